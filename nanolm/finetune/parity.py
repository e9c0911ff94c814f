"""Every family with every head of a task, both ways, with random weights: does transformers compute
what we compute? Heads of pretraining: `inference/parity.py`.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, cast

from nanolm import build
from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.config.schema import Config
from nanolm.data.tokenizer import Tokenizer
from nanolm.finetune.published import described_folder, families_of, scaled
from nanolm.hub.configs import Published
from nanolm.hub.families import FAMILIES
from nanolm.hub.heads import with_task
from nanolm.hub.keys import Tensors
from nanolm.hub.proof import prove
from nanolm.hub.published import Imported, as_config, assembled, model_keys, row_length
from nanolm.hub.task_heads import KINDS, NAMES, TASK_HEADS
from nanolm.inference.parity import (
    ALBERT,
    BERT,
    DISTILBERT,
    GPT2,
    LLAMA,
    MODERNBERT,
    ROBERTA,
    VOCABULARY,
    NoTokenizer,
    randomise,
)
from nanolm.learner import Learner
from nanolm.saved import Saved

SHAPES: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "distilbert": DISTILBERT,
    "albert": ALBERT,
    "modernbert": MODERNBERT,
    "gpt2": GPT2,
    "llama": LLAMA | {"num_key_value_heads": 2},
    "qwen3": LLAMA | {"num_key_value_heads": 2, "head_dim": 16},
}
TASKS = {kind: task for task, kind in KINDS.items()}
SEVERAL: dict[str, Any] = {"problem_type": "multi_label_classification"}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "sequence classification": ("SequenceClassification", {"num_labels": 3}),
    "several labels": ("SequenceClassification", {"num_labels": 3} | SEVERAL),
    "regression": ("SequenceClassification", {"num_labels": 1}),
    "token classification": ("TokenClassification", {"num_labels": 5}),
    "question answering": ("QuestionAnswering", {}),
    "multiple choice": ("MultipleChoice", {}),
}
"""name -> (what transformers calls it, its keys of config.json)."""
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    f"{family}, {head}": (family, f"{NAMES[family]}For{kind}", shape | keys)
    for family, shape in SHAPES.items()
    for head, (kind, keys) in HEADS.items()
    if TASKS[kind] in TASK_HEADS[family]
} | {
    "modernbert, of the mean": (
        "modernbert",
        "ModernBertForSequenceClassification",
        MODERNBERT | {"num_labels": 3, "classifier_pooling": "mean"},
    ),
    "gpt2, without padding": (
        "gpt2",
        "GPT2ForSequenceClassification",
        GPT2 | {"num_labels": 3, "pad_token_id": None},
    ),
}
"""name -> (family, class in transformers, its config)."""


def difference(case: str, direction: str) -> float:
    """The largest one between transformers and us, in one case and direction."""
    import transformers  # noqa: PLC0415  (slow to import, and not always installed)

    name, theirs, keys = CASES[case]
    values = {"vocab_size": VOCABULARY, "model_type": name, "architectures": [theirs], **keys}
    values = {"pad_token_id": 1} | values
    published = Published(f"the config.json of {case}", values, name)
    plain = FAMILIES[name]
    ours = model_keys(plain, published)
    family = with_task(plain, published, (), row_length(ours))
    tokenizer = cast(Tokenizer, NoTokenizer(pad=1 if family.pad is None else family.pad))
    if direction == "in":
        model = getattr(transformers, theirs)(
            getattr(transformers, family.classes.config)(**values)
        )
        randomise(model)
        stored = model.state_dict()
        return prove(assembled(family, published, ours, stored, tokenizer, case)).largest
    config = as_config(family, ours, frozenset(), tokenizer)
    learner = build.build_learner(config, build.build_objective(config, tokenizer))
    randomise(learner)
    return prove(written(config, tokenizer, learner.eval())).largest


def written(config: Config, tokenizer: Tokenizer, learner: Learner) -> Imported:
    """A fine-tuned model beside what `nanolm export --format transformers` writes of it."""
    saved = Saved(pathlib.Path("this model"), config, tokenizer, learner)
    families = families_of(saved)
    tensors: Tensors = scaled(config.objective.name, config.objective, learner_tensors(learner))
    named, files, _ = described_folder(saved, tensors, families)
    facts = json.loads(files["config.json"])
    family = families[facts["model_type"]]
    published = Published("config.json", facts, family.name)
    return Imported(family, config, tokenizer, learner, named, published, ())
