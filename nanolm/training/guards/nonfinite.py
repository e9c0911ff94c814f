"""A loss or gradient that is not finite, or a loss that spikes: who saw it, and what to do.

All ranks see the same reduced loss and gradient norm, so they agree without asking. The step's rows
go to `nonfinite.jsonl`. Three policies:

    stop      the run ends with a sentence that names the step, the tensor and the rank
    skip      the step moves no weight
    rewind    weights, optimizers and averages go back to the last good checkpoint, and on the way
              forward again the step's rows, or those of the `rewind_steps` up to it, are passed
              over (as PaLM did by hand: Chowdhery et al. 2022, section 5.1)

Which steps are passed over stands in nonfinite.jsonl, so a restart passes over them too.
"""

from __future__ import annotations

import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from nanolm.config.schema import TrainConfig
from nanolm.distributed.world import World
from nanolm.errors import UserError
from nanolm.files import RESUME, append_line
from nanolm.training.batch import MicroBatch
from nanolm.training.engine import Engine
from nanolm.training.guards.diagnosis import KINDS, find_tensor
from nanolm.training.run_state import RECENT, RunState

NAME = "nonfinite.jsonl"


class NonFinitePolicy:
    """Which steps may move weights, and what becomes of a run when one may not."""

    def __init__(
        self, train: TrainConfig, world: World, run: pathlib.Path, state: RunState
    ) -> None:
        self.train, self.world, self.run, self.state = train, world, run, state
        mine = world.call_on_all_ranks(lambda: sorted(read_passed(run)) if world.is_main else [])
        self.passed = set(mine[0])
        self._worst = 0

    def accepts(self, loss: float, norm: float) -> bool:
        """Whether a step of this loss and gradient norm may move the weights."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        return finite and not self.spikes(loss)

    def spikes(self, loss: float) -> bool:
        """Whether the loss is beyond train.spike times the recent median."""
        losses = self.state.losses
        if self.train.spike is None or len(losses) < RECENT // 4:  # too few to know what is usual
            return False
        return loss > self.train.spike * statistics.median(losses)

    def good(self, step: int, loss: float) -> None:
        """Notes a step that moved the weights."""
        self.state.losses.append(loss)
        if step > self._worst:
            self.state.skips = 0

    def answer_bad_step(
        self,
        engine: Engine,
        micro_batches: Sequence[MicroBatch],
        step: int,
        seed: int,
        loss: float,
        counts: Mapping[str, float],
    ) -> str:
        """Writes down a bad step; returns the sentence to log when the run may go on; collective.

        Raises UserError, on all ranks, when it may not.
        """
        rewinds = self.train.nonfinite == "rewind"
        first = max(step - self.train.rewind_steps + 1, 1)
        passed = list(range(first, step + 1)) if rewinds else []
        found = self._find(engine, micro_batches, seed, counts)
        record = {"step": step, "policy": self.train.nonfinite, **found, "passed": passed}
        if self.world.is_main:
            append_line(self.run / NAME, json.dumps(record | {"loss": repr(loss)}), RESUME)
        sentence = self._sentence(record, loss)
        self.passed |= set(passed)
        self.state.skips += 1
        self._worst = max(self._worst, step)
        if self.train.nonfinite == "stop":
            raise UserError(f"{sentence}; lower optim.lr, or set train.nonfinite to skip or rewind")
        if self.state.skips > self.train.max_skips:
            limit = self.train.max_skips
            raise UserError(f"{sentence}; train.max_skips={limit} steps in a row were skipped")
        if rewinds:
            return f"{sentence}; passes over the rows of {len(passed)} steps"
        return f"{sentence}; skipped ({self.state.skips} in a row)"

    def _find(
        self,
        engine: Engine,
        micro_batches: Sequence[MicroBatch],
        seed: int,
        counts: Mapping[str, float],
    ) -> dict[str, Any]:
        rows = [int(row) for batch in micro_batches for row in batch.row_ids]
        tensor = find_tensor(engine, micro_batches, seed, counts)
        ranks = self.world.gather({"tensor": tensor, "rows": rows})
        kinds = [KINDS.index(rank["tensor"].split(" ")[0]) for rank in ranks]
        guilty = min(range(len(ranks)), key=kinds.__getitem__)
        # A bad weight is everybody's, and so is a spike: only outputs and gradients accuse rows.
        accused = [
            rank
            for rank, kind in zip(ranks, kinds, strict=True)
            if KINDS[kind] in ("output", "gradient")
        ]
        return {
            "rank": guilty,
            "tensor": ranks[guilty]["tensor"],
            "rows": [row for rank in accused or ranks for row in rank["rows"]],
        }

    def _sentence(self, record: Mapping[str, Any], loss: float) -> str:
        rows, path = record["rows"], self.run / NAME
        listed = f"its {len(rows)} rows, {rows[0]} first, are listed in {path}"
        if self.spikes(loss):
            median = statistics.median(self.state.losses)
            return (
                f"step {record['step']}: loss {loss:.4g} is {loss / median:.0f} times the median "
                f"of the last {len(self.state.losses)}; {listed}"
            )
        return (
            f"step {record['step']}: loss or gradient is not finite; first non-finite tensor: "
            f"{record['tensor']} (rank {record['rank']}); {listed}"
        )


def read_passed(run: pathlib.Path) -> set[int]:
    """Steps whose rows earlier rewinds of this run decided to pass over."""
    path = run / NAME
    if not path.is_file():
        return set()
    passed: set[int] = set()
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            passed |= {int(step) for step in record.get("passed", [])}
        except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            told = f"{path} has a line that nanolm did not write: {line[:60]!r}"
            raise UserError(told) from error
    return passed
