"""Every family with every head of a task, both ways, with random weights: does transformers compute
what we compute? Heads of pretraining: `inference/parity.py`.
"""

from __future__ import annotations

import json
from typing import Any, cast

from nanolm import build
from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.config.schema import Config
from nanolm.data.tokenizer import Tokenizer
from nanolm.finetune.published import described, families_with, scaled
from nanolm.hub.configs import Published
from nanolm.hub.families import FAMILIES, Family
from nanolm.hub.heads import NAMES, with_task
from nanolm.hub.keys import Tensors
from nanolm.hub.proof import prove
from nanolm.hub.published import Imported, as_config, assembled, model_keys, row_length
from nanolm.inference.export_transformers import transformers_folder
from nanolm.inference.parity import (
    ALBERT,
    BERT,
    DISTILBERT,
    ROBERTA,
    VOCABULARY,
    NoTokenizer,
    randomise,
)
from nanolm.learner import Learner

SHAPES: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "distilbert": DISTILBERT,
    "albert": ALBERT,
}
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
}
"""name -> (family, class in transformers, its config)."""


def difference(case: str, direction: str) -> float:
    """The largest one between transformers and us, in one case and direction."""
    import transformers  # noqa: PLC0415  (slow to import, and not always installed)

    name, theirs, keys = CASES[case]
    values = keys | {"vocab_size": VOCABULARY, "model_type": name, "architectures": [theirs]}
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
    task = config.objective.name
    families: dict[str, Family] = families_with(task, config.objective)
    tensors: Tensors = scaled(task, config.objective, learner_tensors(learner))
    named, files = transformers_folder(config, tokenizer, tensors, families)
    facts = json.loads(files["config.json"]) | described(task, config.objective)
    family = families[facts["model_type"]]
    published = Published("config.json", facts, family.name)
    return Imported(family, config, tokenizer, learner, named, published, ())
