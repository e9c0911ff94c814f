"""Answers that are written, not read off: the generation side of the task `write`.

The prompt of each record is framed exactly as in training; writing stops at the end of document.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

from nanolm.data.tables.files import Table
from nanolm.finetune.tasks.base import task_in
from nanolm.finetune.tasks.write import Write, WriteOptions
from nanolm.inference.beam_search import BeamSearch, write_best
from nanolm.inference.generate import Generator, write
from nanolm.inference.generate_from_source import GENERATORS
from nanolm.inference.sampling import Sampling
from nanolm.saved import Saved

Search = Callable[[Generator, list[str]], list[str]]
"""What continues prompts: generator, prompts -> texts."""


def search_of(options: WriteOptions) -> Search:
    """How the task's answers are searched for: token by token, or by beams."""
    most = options.max_new_tokens
    if options.beams == 1:
        return functools.partial(write, max_tokens=most, sampling=Sampling(temperature=0.0))
    search = BeamSearch(options.beams, most, options.length_penalty)
    return functools.partial(write_best, search=search)


def writing_task(saved: Saved) -> Write:
    """The task of a run whose task `generates`."""
    return cast(Write, task_in(saved.learner))


def write_answers(
    saved: Saved, table: Table, batch: int, *, with_gold: bool = False
) -> list[dict[str, Any]]:
    """{"text": …} for each record: the most probable answer that the task's search finds; with
    gold, in the place of the answer that the record has."""
    task = writing_task(saved)
    generator = GENERATORS[saved.config.model.trunk](
        saved, frame=lambda prompt: task.prompt_tokens(prompt).tolist()
    )
    search = search_of(task.options)
    found: list[dict[str, Any]] = []
    for start in range(0, len(table), batch):
        prompts = [
            task.prompt(record, with_gold=with_gold)
            for record in table.records[start : start + batch]
        ]
        found += [{"text": text} for text in search(generator, prompts)]
    return found
