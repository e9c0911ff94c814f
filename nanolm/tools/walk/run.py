"""From a run's folder to the walk of one of its steps."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile

from nanolm.checkpoint.checkpoints import Checkpoints
from nanolm.config.schema import Config
from nanolm.data.tokenizer import Tokenizer
from nanolm.distributed.world import World
from nanolm.tools.replay import replay, trainer_before
from nanolm.tools.walk.questions import asked, reader_of
from nanolm.tools.walk.recording import Recording, record
from nanolm.tools.walk.stop import Stop
from nanolm.tools.walk.stops import stops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """A step that was walked: what is told, and what the step was."""

    step: int
    notes: list[str]
    stops: list[Stop]
    recording: Recording


def next_step(folder: pathlib.Path, config: Config) -> int:
    """The first step after the newest checkpoint that has one: the fewest are replayed."""
    saved = [step for step in Checkpoints(folder, World()).steps() if step < config.train.steps]
    return max(saved, default=0) + 1


def walk(
    folder: pathlib.Path,
    config: Config,
    world: World,
    *,
    step: int | None = None,
    position: int | None = None,
    layer: int = 0,
    head: int = 0,
) -> Walk:
    """Replays the run up to the step and takes it, watched; nothing is written to the run.

    Raises UserError for what the run does not have: the step, the position, the layer, the head.
    """
    reader = reader_of(config.objective.name, folder)
    step = next_step(folder, config) if step is None else step
    # As written, and by this process alone: hooks see neither compiled blocks nor other processes.
    train = dataclasses.replace(config.train, compile=False)
    data = dataclasses.replace(config.data, workers=0)
    config = dataclasses.replace(config, train=train, data=data)
    with tempfile.TemporaryDirectory() as scratch:
        trainer, notes = trainer_before(step, config, folder, world, pathlib.Path(scratch))
        micro_batches = replay(trainer, step)
        question = asked(reader, micro_batches[0], position)
        found = record(trainer, micro_batches, question, layer, head)
    tokenizer = Tokenizer.load(next(folder.glob("checkpoints/step-*")))  # all hold the same
    told = stops(trainer, tokenizer, reader, micro_batches, question, found, layer=layer, head=head)
    return Walk(step=step, notes=notes, stops=told, recording=found)
