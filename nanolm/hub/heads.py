"""Heads of tasks under published names: sequence and token classification, question answering,
multiple choice; in both directions.

A family of `families/` with another head. Only heads that compute the same are known: those of
BERT, RoBERTa and ALBERT decide with tanh on the first token, DistilBERT's with ReLU.
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
from nanolm.hub.keys import Rule, Table, pair
from nanolm.model.heads import Layout

KINDS = {
    "classify": "SequenceClassification",
    "regress": "SequenceClassification",
    "choose": "MultipleChoice",
    "tag": "TokenClassification",
    "read": "QuestionAnswering",
}
"""What transformers calls our tasks."""
NAMES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "albert": "Albert"}
POOLERS = {
    "bert": "bert.pooler.dense",
    "roberta": "roberta.pooler.dense",
    "albert": "albert.pooler",
}
"""Published keys of the layer between the first token and the decision, which files may hold
although their head does not read it."""
DECIDING = {
    "bert": dict.fromkeys(("classify", "regress", "choose"), (POOLERS["bert"], "classifier")),
    "roberta": {
        "classify": ("classifier.dense", "classifier.out_proj"),
        "regress": ("classifier.dense", "classifier.out_proj"),
        "choose": (POOLERS["roberta"], "classifier"),
    },
    "distilbert": dict.fromkeys(
        ("classify", "regress", "choose"), ("pre_classifier", "classifier")
    ),
    "albert": dict.fromkeys(("classify", "regress", "choose"), (POOLERS["albert"], "classifier")),
}
"""Published keys of the two layers of heads on the first token."""
PLAIN = {"tag": "classifier", "read": "qa_outputs"}
"""Published keys of heads of one layer, in all families."""
ACTIVATIONS = {"distilbert": "relu"}
"""What stands between the two layers; tanh where nothing else is said."""
PROBLEMS = {
    "regression": "regress",
    "single_label_classification": "classify",
    "multi_label_classification": "classify",
}
"""Our tasks by config.json's problem_type."""
NEVER = r"(?!)"


def activation_of(family: str) -> str:
    """What a family's heads on the first token have between their two layers."""
    return ACTIVATIONS.get(family, "tanh")


def task_families(task: str, activation: str = "tanh") -> dict[str, Family]:
    """The families that have a head for a task, with that head in place of their own; of heads on
    the first token those with this activation."""
    found = {}
    for name in (name for name in FAMILIES if name in NAMES):
        if task in PLAIN:
            rules = pair(PLAIN[task], f"heads.{task}.out")
        elif activation == activation_of(name):
            inner, outer = DECIDING[name][task]
            rules = (*pair(inner, f"heads.{task}.dense"), *pair(outer, f"heads.{task}.out"))
        else:
            continue
        found[name] = with_head(FAMILIES[name], f"{NAMES[name]}For{KINDS[task]}", rules)
    return found


def with_head(family: Family, model_class: str, rules: tuple[Rule, ...]) -> Family:
    """A family whose models have these heads alone."""
    trunk = tuple(rule for rule in family.table.whole if not rule.ours.startswith("heads."))
    table = Table(whole=(*trunk, *rules), layers=family.table.layers)
    classes = dataclasses.replace(family.classes, plain=model_class, pooled=None)
    changes: dict[str, Any] = {"table": table, "classes": classes, "has_head": None, "heads": {}}
    pooler = POOLERS.get(family.name)
    read = any(name.startswith(f"{pooler}.") for rule in rules for name in rule.theirs)
    unread = NEVER if pooler is None or read else rf"{re.escape(pooler)}\.(weight|bias)"
    return dataclasses.replace(family, duplicates={}, unread=unread, **changes)


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
            f'task; add the class there: "architectures": ["BertForSequenceClassification"]',
        )
        return family
    task = task_of(kind, published)
    found = task_families(task, activation_of(family.name))
    if family.name not in found:
        raise UserError(
            f"{published.path} is of a {architecture}, and nanolm imports heads of tasks for "
            f"{', '.join(NAMES)}; choose a checkpoint of one of them"
        )
    options = options_of(task, family.name, published)
    if task == "read":  # windows of a short row must not share more than they hold
        options["stride"] = min(32, row_length // 8)
    return dataclasses.replace(found[family.name], objective=lambda names: dict(options))


def is_of_task(key: str) -> bool:
    """Whether a key is one of a task's head."""
    return key.startswith(("classifier.", "pre_classifier.", "qa_outputs."))


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


def options_of(task: str, family: str, published: Published) -> dict[str, Any]:
    """The task's options that a config.json describes."""
    options: dict[str, Any] = {"name": task}
    if task not in PLAIN:
        options |= {"pooling": "cls", "activation": activation_of(family)}
    if task in ("classify", "tag"):
        options["labels"] = labels_of(published)
    if task == "classify":
        options["multi_label"] = published.get("problem_type", "").startswith("multi_label")
    if task == "regress":
        scores = labels_of(published)
        options |= {"scores": scores, "mean": [0.0] * len(scores), "std": [1.0] * len(scores)}
    return options


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
    if task == "choose":  # the rows are the choices of one question
        tokens_BT, words = tokens_BT[None], {key: value[None] for key, value in words.items()}
    found = theirs(tokens_BT, **words)
    if task == "read":
        return torch.stack([found.start_logits, found.end_logits], -1)[keep_BT]
    if task == "tag":
        return found.logits[keep_BT]
    return found.logits.reshape(len(keep_BT), -1)
