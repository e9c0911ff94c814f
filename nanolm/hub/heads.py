"""Heads of tasks under published names: sequence and token classification, question answering,
multiple choice; in both directions.

A family of `families/` with another head, one of `task_heads.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nanolm.errors import UserError, require
from nanolm.hub.configs import Published
from nanolm.hub.families import FAMILIES, Family
from nanolm.hub.keys import Rule, Table
from nanolm.hub.task_heads import KINDS, NAMES, PLAIN, POOLED, POOLERS, TASK_HEADS, TaskHead, having
from nanolm.model.heads import Layout

PROBLEMS = {
    "regression": "regress",
    "single_label_classification": "classify",
    "multi_label_classification": "classify",
}
"""Our tasks by config.json's problem_type."""
NEVER = r"(?!)"
POOLING_KEY = "classifier_pooling"
"""What ModernBERT's config.json calls it."""


def task_families(task: str) -> dict[str, Family]:
    """The families that have a head of a task, with that head in place of their own."""
    return {name: with_head(FAMILIES[name], task) for name in having(task)}


def with_head(family: Family, task: str) -> Family:
    """A family whose models have the head of this task alone."""
    head = TASK_HEADS[family.name][task]
    prefix = family.prefix if head.prefix is None else head.prefix

    def renamed(rule: Rule) -> Rule:
        theirs = (name.removeprefix(family.prefix) for name in rule.theirs)
        return dataclasses.replace(rule, theirs=tuple(prefix + name for name in theirs))

    trunk = [rule for rule in family.table.whole if not rule.ours.startswith("heads.")]
    layers = family.table.layers
    if prefix != family.prefix:
        trunk, layers = [renamed(rule) for rule in trunk], tuple(map(renamed, layers))
    pooler = POOLERS.get(family.name)
    read = any(key.startswith(f"{pooler}.") for rule in head.rules(task) for key in rule.theirs)
    return dataclasses.replace(
        family,
        table=Table(whole=(*trunk, *head.rules(task)), layers=layers),
        classes=dataclasses.replace(
            family.classes, plain=f"{NAMES[family.name]}For{KINDS[task]}", pooled=None
        ),
        prefix=prefix,
        embedding=prefix + family.embedding.removeprefix(family.prefix),
        has_head=None,
        heads={},
        duplicates={},
        unread=NEVER if pooler is None or read else rf"{re.escape(pooler)}\.(weight|bias)",
    )


def with_task(family: Family, published: Published, keys: Iterable[str], row_length: int) -> Family:
    """The family with the head of the task that config.json names under `architectures`; the family
    as it is where that is no task's. `keys` are those of the file's tensors; a task reads rows of
    `row_length` tokens.

    Raises UserError for a head that the family has not here, and for one that nothing names.
    """
    named = published.get("architectures", [])
    listed = isinstance(named, list) and len(named) > 0 and isinstance(named[0], str)
    architecture = named[0] if listed else ""
    kind = architecture.partition("For")[2]
    if kind not in KINDS.values():
        require(
            listed or not any(is_of_task(key) for key in keys),
            f"{published.path} names no class under architectures, and the file holds a head of a "
            f'task; add the class there: "architectures": '
            f'["{NAMES.get(family.name, "Bert")}ForSequenceClassification"]',
        )
        return family
    task = task_of(kind, published)
    if family.name not in having(task):
        raise UserError(
            f"{published.path} is of a {architecture}, and nanolm imports heads of "
            f"{KINDS[task]} for {', '.join(having(task))}; choose a checkpoint of one of them"
        )
    options = options_of(task, family, published)
    if task == "read":  # windows of a short row must not share more than they hold
        options["stride"] = min(32, row_length // 8)
    found = with_head(family, task)
    return dataclasses.replace(found, objective=lambda names: dict(options))


def is_of_task(key: str) -> bool:
    """Whether a key is one of a task's head."""
    return key.startswith(("classifier.", "pre_classifier.", "qa_outputs.", "score."))


def task_of(kind: str, published: Published) -> str:
    """Our task of a kind; a sequence's is classification or, as transformers decides, regression
    where there is one label and nothing else is said."""
    if kind != KINDS["classify"]:
        return next(task for task, name in KINDS.items() if name == kind)
    problem = published.get("problem_type", None)
    if problem is None:
        return "regress" if len(labels_of(published)) == 1 else "classify"
    require(
        isinstance(problem, str) and problem in PROBLEMS,
        f"{published.path} gives problem_type as {problem!r}; it must be {' or '.join(PROBLEMS)}",
    )
    return PROBLEMS[problem]


def options_of(task: str, family: Family, published: Published) -> dict[str, Any]:
    """The task's options that a config.json describes."""
    head = TASK_HEADS[family.name][task]
    options: dict[str, Any] = {"name": task, "head": head.head}
    if task in POOLED:
        options |= {"pooling": pooling_of(head, published), "activation": head.activation}
    if family.fits["trunk"] == "decoder":
        options["frame"] = "tokenizer"
    if task in ("classify", "tag"):
        options["labels"] = labels_of(published)
    if task == "classify":
        options["multi_label"] = published.get("problem_type", "").startswith("multi_label")
    if task == "regress":
        scores = labels_of(published)
        options |= {"scores": scores, "mean": [0.0] * len(scores), "std": [1.0] * len(scores)}
    return options


def pooling_of(head: TaskHead, published: Published) -> str:
    """How a published head reads a sequence; raises UserError for another way than it can."""
    if len(head.poolings) == 1:
        return head.poolings[0]
    pooling = published.get(POOLING_KEY, head.poolings[0])
    require(
        pooling in head.poolings,
        f"{published.path} gives {POOLING_KEY} as {pooling!r}; it must be "
        f"{' or '.join(head.poolings)}",
    )
    return pooling


def pooling_facts(family: str, task: str, pooling: str | None) -> dict[str, Any]:
    """What config.json says of how a sequence is read: nothing, where there is one way."""
    several = len(TASK_HEADS[family][task].poolings) > 1
    return {POOLING_KEY: pooling} if several else {}


def labels_of(published: Published) -> list[str]:
    """The labels by their number; where only how many is said, or nothing, the names that
    transformers gives them.

    Raises UserError for numbers with gaps, and for labels that are no texts or occur twice.
    """
    named = published.get("id2label", None)
    if named is None:
        count = published.size("num_labels") if "num_labels" in published.values else 2
        return [f"LABEL_{number}" for number in range(count)]
    keys = [str(number) for number in range(len(named))] if isinstance(named, dict) else []
    found = [named[key] for key in keys if key in named] if isinstance(named, dict) else []
    good = len(found) == len(keys) > 0 and all(isinstance(each, str) and each for each in found)
    require(
        good and len(set(found)) == len(found),
        f"{published.path} gives id2label as {named!r}; it must give each number from 0 on a "
        f"label of its own",
    )
    return found


def head_of(config: Any) -> str | None:
    """The task whose head a published class has too; None of a pretraining objective."""
    return config.objective.name if config.objective.name in KINDS else None


def answers(options: Any, heads: nn.ModuleDict, hidden_BTD: Tensor, keep_BT: Tensor) -> Tensor:
    """What a task's head says of every row, or of every token that counts, in a regression's own
    units; `keep_BT` says which tokens count."""
    head = heads[options.name]
    index_M = keep_BT.flatten().nonzero()[:, 0]
    if options.name in PLAIN:
        return head(hidden_BTD, index_M)
    rows, length = keep_BT.shape
    first_S = torch.arange(rows) * length
    layout = Layout(index_M, index_M // length, first_S, first_S + keep_BT.sum(1) - 1)
    logits_SC = head(hidden_BTD, layout)
    if options.name != "regress":
        return logits_SC
    return logits_SC * torch.tensor(options.std) + torch.tensor(options.mean)


def their_answers(theirs: Any, task: str, tokens_BT: Tensor, words: dict[str, Tensor]) -> Tensor:
    """The same of transformers' model of the task."""
    keep_BT = words["attention_mask"].bool()
    if task in POOLED and theirs.config.pad_token_id is None and len(keep_BT) > 1:
        # without padding a decoder of transformers decides about one row at a time
        rows = [
            their_answers(theirs, task, tokens_BT[[row]], {k: v[[row]] for k, v in words.items()})
            for row in range(len(keep_BT))
        ]
        return torch.cat(rows)
    if task == "choose":  # the rows are the choices of one question
        tokens_BT, words = tokens_BT[None], {key: value[None] for key, value in words.items()}
    found = theirs(tokens_BT, **words)
    if task == "read":
        return torch.stack([found.start_logits, found.end_logits], -1)[keep_BT]
    if task == "tag":
        return found.logits[keep_BT]
    return found.logits.reshape(len(keep_BT), -1)
