"""A fine-tuned model as transformers' class for its task, such as BertForSequenceClassification.

A family of `hub/families/` with another head (`hub/heads.py`). A regression's mean and deviation go
into its last layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.errors import require
from nanolm.hub.families import Family
from nanolm.hub.heads import KINDS, task_families, their_answers
from nanolm.hub.heads import answers as head_answers
from nanolm.hub.keys import Tensors
from nanolm.hub.proof import LIMIT, can_prove, same_rows
from nanolm.hub.tokenizer_files import compared, tokenizer_files
from nanolm.inference.export_transformers import transformers_folder
from nanolm.saved import Saved

Note = Callable[[str], None]


def families_with(task: str, options: Any) -> dict[str, Family]:
    """The families that have the head which these options describe; none for another task."""
    activation = getattr(options, "activation", "tanh")
    return task_families(task, activation) if task in KINDS else {}


def task_folder(
    saved: Saved, note: Note = print
) -> tuple[Tensors, dict[str, bytes], dict[str, Any]]:
    """(tensors, files, figures of the proof) of a fine-tuned model.

    Raises UserError when transformers has no such head, or computes something else.
    """
    task, families = saved.config.objective.name, families_of(saved)
    tensors = scaled(task, saved.config.objective, learner_tensors(saved.learner))
    named, files, model_class = described_folder(saved, tensors, families)
    facts = json.loads(files["config.json"])
    theirs = their_model(model_class, facts)
    if theirs is not None:
        theirs.load_state_dict(named, strict=True)
    difference = proved(saved, theirs, note)
    files |= tokenizer_files(saved.tokenizer, saved.config.model)
    figures = {"largest_difference": difference, "greedy_tokens": None}
    return named, files, figures | {"texts_with_other_ids": compared(saved.tokenizer, files, note)}


def families_of(saved: Saved) -> dict[str, Family]:
    """The families that have the head of a fine-tuned model; raises UserError when none has."""
    task = saved.config.objective.name
    families = families_with(task, saved.config.objective)
    require(
        bool(families),
        f"{saved.folder} was fine-tuned (objective.name={task}), and transformers has that head "
        f"for none of the families that nanolm exports; export it with --format nanolm",
    )
    pooling = getattr(saved.learner.heads[task], "pooling", "cls")
    require(
        pooling == "cls",
        f"{saved.folder} decides by its tokens' {pooling} (objective.pooling), and transformers by "
        f"the first token; fine-tune with --objective.pooling cls, or export it with --format "
        f"nanolm",
    )
    return families


def described_folder(
    saved: Saved, tensors: Tensors, families: Mapping[str, Family]
) -> tuple[Tensors, dict[str, bytes], str]:
    """(published tensors, config.json, transformers' class) of a fine-tuned model's tensors."""
    named, files = transformers_folder(saved.config, saved.tokenizer, tensors, families)
    facts = json.loads(files["config.json"])
    model_class = families[facts["model_type"]].classes.plain
    options = saved.config.objective
    facts |= {"architectures": [model_class], **described(options.name, options)}
    files["config.json"] = json.dumps(facts, indent=2, ensure_ascii=False).encode() + b"\n"
    return named, files, model_class


def scaled(task: str, options: Any, tensors: Tensors) -> Tensors:
    """The tensors, a regression's last layer in the scores' own units."""
    if task != "regress":
        return tensors
    mean, std = torch.tensor(options.mean), torch.tensor(options.std)
    weight, bias = tensors["heads.regress.out.weight"], tensors["heads.regress.out.bias"]
    return {
        **tensors,
        "heads.regress.out.weight": weight * std[:, None],
        "heads.regress.out.bias": bias * std + mean,
    }


def described(task: str, options: Any) -> dict[str, Any]:
    """What config.json says of the answers."""
    if task == "choose" or task == "read":
        return {}
    labels = options.scores if task == "regress" else options.labels
    facts: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    if task == "regress":
        facts["problem_type"] = "regression"
    if task == "classify":
        several = "multi" if options.multi_label else "single"
        facts["problem_type"] = f"{several}_label_classification"
    return facts


def their_model(model_class: str, facts: Mapping[str, Any]) -> Any:
    """transformers' model of a config.json with random weights; None without transformers."""
    if not can_prove():
        return None
    import transformers  # noqa: PLC0415  (slow to import, and not always installed)

    built = getattr(transformers, model_class)
    config = built.config_class(**facts)
    config._attn_implementation = "eager"
    return built(config).float().eval()


@torch.no_grad()
def proved(saved: Saved, theirs: Any, note: Note) -> float | None:
    """The largest difference of the answers on random rows from transformers' model, told; None
    without one.

    Raises UserError above LIMIT.
    """
    if theirs is None:
        note("the proof was left out: transformers is not installed")
        return None
    tokens_BT, inputs, words = same_rows(saved.config.model, theirs.config.pad_token_id)
    keep_BT = words["attention_mask"].bool()
    ours = answers(saved, saved.learner.trunk(inputs), keep_BT)
    expected = their_answers(theirs, saved.config.objective.name, tokens_BT, words)
    difference = float((ours - expected).abs().max())
    require(
        difference <= LIMIT,
        f"transformers computes something else of {saved.folder}: the largest difference is "
        f"{difference:.1e}, above {LIMIT:.0e}; nothing is written",
    )
    name = type(theirs).__name__
    note(f"proof: largest difference from {name} {difference:.1e} (float32)")
    return difference


def answers(saved: Saved, hidden_BTD: Tensor, keep_BT: Tensor) -> Tensor:
    """What our head says of every row, or of every token that counts."""
    return head_answers(saved.config.objective, saved.learner.heads, hidden_BTD, keep_BT)
