"""What is explained: for each task, one number that the model says about a text.

    classify, prompt   the logit of a label (the predicted one unless another is asked for)
    regress            a score, in its own units
    tag                the logit of a word's tag
    read               start score plus end score of the best span
    a pretrained model (`guess.py`): the log probability of a token

A `Question` is fixed once, from the prediction on the text itself, and then asked again for every
changed input: on the way of integrated gradients the prediction may be another one.

Shapes: B rows, T tokens, S sequences, D model width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from nanolm.data.tables.numbers import whole_number
from nanolm.errors import UserError, require
from nanolm.finetune.tasks.classify import Classify
from nanolm.finetune.tasks.read import Read
from nanolm.finetune.tasks.regress import Regress
from nanolm.finetune.tasks.tag import Tag

Batch = dict[str, Tensor]


class Question(NamedTuple):
    """What the number is called, and how it is read off hidden states: one per sequence, [S]."""

    name: str
    score: Callable[[Tensor, nn.ModuleDict, Batch], Tensor]


@functools.singledispatch
def question_of(
    task: Any, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: Batch, target: str | None
) -> Question:
    """The question about a batch of one sequence.

    `target` names what to explain (a label, a score's column, a word's number from 1); None means
    what the model predicts. Raises UserError for a task without such a number, or an unknown name.
    """
    raise UserError(
        f"objective={task.options.name} gives no single number for a text whose causes could be "
        f"found; classify, prompt, regress, tag and read do"
    )


@question_of.register
def _(
    task: Classify, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: Batch, target: str | None
) -> Question:
    require(
        target is None or target in task.number,
        f"--target {target} is none of the labels {', '.join(task.labels)}",
    )
    if target is None:
        place = int(task.class_logits(hidden_BTD, heads, batch)[0].argmax())
    else:
        place = task.number[target]
    return Question(
        f"logit of label {task.labels[place]}",
        lambda hidden, heads, batch: task.class_logits(hidden, heads, batch)[:, place],
    )


@question_of.register
def _(
    task: Regress, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: Batch, target: str | None
) -> Question:
    require(
        target is None or target in task.gold,
        f"--target {target} is none of the scores {', '.join(task.gold)}",
    )
    place = 0 if target is None else task.gold.index(target)
    mean, std = (cast(list[float], v)[place] for v in (task.options.mean, task.options.std))
    return Question(
        task.gold[place],
        lambda hidden, heads, batch: (
            heads["regress"](hidden, task.layout(batch))[:, place] * std + mean
        ),
    )


@question_of.register
def _(
    task: Tag, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: Batch, target: str | None
) -> Question:
    tags = task.logits(hidden_BTD, heads, batch)["tag"].argmax(dim=-1).tolist()
    n_words = len(tags)
    if target is None:  # the first word that is anything at all
        word = next((w for w, tag in enumerate(tags) if task.labels[tag] != "O"), 0)
    else:
        number = whole_number(target)
        if number is None or not 1 <= number <= n_words:
            raise UserError(f"--target {target} is no word's number; here are words 1 to {n_words}")
        word = number - 1
    tag = tags[word]
    return Question(
        f"logit of tag {task.labels[tag]} at word {word + 1}",
        # Word after word, sequence after sequence: all sequences are the same text.
        lambda hidden, heads, batch: task.logits(hidden, heads, batch)["tag"][word::n_words, tag],
    )


@question_of.register
def _(
    task: Read, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: Batch, target: str | None
) -> Question:
    require(target is None, "objective=read explains the span that it finds; leave --target out")
    _, first, last, _ = task.answers(hidden_BTD.detach(), heads, batch)[0]

    def score(hidden_BTD: Tensor, heads: nn.ModuleDict, batch: Batch) -> Tensor:
        start_SL, end_SL = task.scores(hidden_BTD, heads, batch)
        return start_SL[:, first] + end_SL[:, last]

    return Question(f"score of the span of tokens {first + 1} to {last + 1}", score)
