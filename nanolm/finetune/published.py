"""A fine-tuned model as transformers' class for its task, such as BertForSequenceClassification.

A family of `hub/families/` with another head (`hub/heads.py`). A regression's mean and deviation go
into its last layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.data.sentencepiece_json import Frame, end_around
from nanolm.errors import UserError, require
from nanolm.finetune.tasks.base import Task
from nanolm.hub.families import Family
from nanolm.hub.heads import answers as head_answers
from nanolm.hub.heads import pooling_facts, task_families, their_answers
from nanolm.hub.keys import Tensors
from nanolm.hub.proof import LIMIT, can_pad, can_prove, same_rows
from nanolm.hub.task_heads import KINDS, LAST, TASK_HEADS
from nanolm.hub.tokenizer_files import compared, tokenizer_files
from nanolm.inference.export_transformers import families_that_fit, transformers_folder
from nanolm.learner import Learner
from nanolm.saved import Saved

Note = Callable[[str], None]


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
    files |= tokenizer_files(saved.tokenizer, saved.config.model, frame=frame_in_files(saved))
    figures = {"largest_difference": difference, "greedy_tokens": None}
    return named, files, figures | {"texts_with_other_ids": compared(saved.tokenizer, files, note)}


def families_of(saved: Saved) -> dict[str, Family]:
    """The families that have the head of a fine-tuned model, which all compute its trunk; raises
    UserError when none has."""
    task = saved.config.objective.name
    require(
        task in KINDS,
        f"{saved.folder} was fine-tuned (objective.name={task}), and transformers has that head "
        f"for none of the families that nanolm exports; export it with --format nanolm",
    )
    options, families = saved.config.objective, task_families(task)
    fitting = families_that_fit(saved.config.model, saved.tokenizer.roles(), families)
    pooling = pooling_in(saved.learner, task)
    problems = {name: TASK_HEADS[name][task].why_not(options, pooling) for name in fitting}
    found = {name: families[name] for name in fitting if problems[name] is None}
    if not found:
        raise UserError(f"{saved.folder} {problems[fitting[0]]}, or export it with --format nanolm")
    return found


def pooling_in(learner: Learner, task: str) -> str | None:
    """How a task's head reads a sequence; None of a head that reads every token."""
    return getattr(learner.heads[task], "pooling", None)


def frame_in_files(saved: Saved) -> Frame | None:
    """What the tokenizer's files are to put around a text beside what they put there themselves:
    what a decoder was fine-tuned with, unless that is what they do."""
    options: Any = saved.config.objective
    own = options.frame == "trunk" and saved.config.model.trunk == "decoder"
    return end_around if own else None


def described_folder(
    saved: Saved, tensors: Tensors, families: Mapping[str, Family]
) -> tuple[Tensors, dict[str, bytes], str]:
    """(published tensors, config.json, transformers' class) of a fine-tuned model's tensors."""
    named, files = transformers_folder(saved.config, saved.tokenizer, tensors, families)
    facts = json.loads(files["config.json"])
    model_class = families[facts["model_type"]].classes.plain
    facts |= {"architectures": [model_class]} | told_of_answers(saved, facts)
    files["config.json"] = json.dumps(facts, indent=2, ensure_ascii=False).encode() + b"\n"
    return named, files, model_class


def told_of_answers(saved: Saved, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of a task's answers and how they are read."""
    options, family = saved.config.objective, facts["model_type"]
    found = described(options.name, options)
    found |= pooling_facts(family, options.name, pooling_in(saved.learner, options.name))
    if TASK_HEADS[family][options.name].poolings == LAST:
        task = cast(Task, saved.learner.objective)
        ends = task.framing.sides(saved.tokenizer, 1)[-1]
        if ends[-1:] == [facts["pad_token_id"]]:
            # transformers decides by the last token that is no padding: it would leave out the end
            found["pad_token_id"] = None
    return found


def scaled(task: str, options: Any, tensors: Tensors) -> Tensors:
    """The tensors, a regression's last layer in the scores' own units; one without a bias holds no
    mean (`TaskHead.why_not`)."""
    if task != "regress":
        return tensors
    mean, std = torch.tensor(options.mean), torch.tensor(options.std)
    weight, bias = "heads.regress.out.weight", "heads.regress.out.bias"
    found = {**tensors, weight: tensors[weight] * std[:, None]}
    return found | ({bias: tensors[bias] * std + mean} if bias in tensors else {})


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
    pad = theirs.config.pad_token_id
    tokens_BT, inputs, words = same_rows(saved.config.model, pad, padded=can_pad(pad))
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
