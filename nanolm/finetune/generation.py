"""Answers that are written, not read off: the generation side of the task `write`.

The prompt of each record is framed exactly as in training; writing stops at the end of document.
"""

from __future__ import annotations

from typing import Any, cast

from nanolm.data.tables.files import Table
from nanolm.finetune.tasks.base import task_in
from nanolm.finetune.tasks.write import Write
from nanolm.inference.generate import Generator, write
from nanolm.inference.sampling import Sampling
from nanolm.saved import Saved


class PromptGenerator(Generator):
    """A generator whose prompts are records, framed by the task."""

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of an already rendered prompt."""
        return writing_task(self.saved).prompt_tokens(text).tolist()


def writing_task(saved: Saved) -> Write:
    """The task of a run whose task `generates`."""
    return cast(Write, task_in(saved.learner))


def write_answers(
    saved: Saved, table: Table, batch: int, *, with_gold: bool = False
) -> list[dict[str, Any]]:
    """{"text": …} for each record: the most probable continuation, token by token; with gold, in
    the place of the answer that the record has."""
    task = writing_task(saved)
    generator = PromptGenerator(saved)
    found: list[dict[str, Any]] = []
    for start in range(0, len(table), batch):
        prompts = [
            task.prompt(record, with_gold=with_gold)
            for record in table.records[start : start + batch]
        ]
        texts = write(
            generator,
            prompts,
            max_tokens=task.options.max_new_tokens,
            sampling=Sampling(temperature=0.0),
        )
        found += [{"text": text} for text in texts]
    return found
