"""Early stopping: a run ends when its validation figure has not improved for a while.

(Prechelt 1998, "Early stopping – but when?": stop after s evaluations in a row without a new best.)

The count belongs to the run, so it stands in every checkpoint. A checkpoint is written before the
evaluation of its step; a resumed run repeats that evaluation, and so counts it once.
"""

from __future__ import annotations

import math
from typing import cast

from nanolm.errors import require


class Patience:
    """Counts evaluations without a new best; `limit` of them in a row end the run.

    Without a limit it never ends. All ranks see the same figures, so they agree.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.lowest: float | None = None
        self.stale = 0

    def see(self, selection_score: float) -> None:
        """Takes in one evaluation's selection score: the smaller, the better; NaN is never best."""
        if selection_score < (math.inf if self.lowest is None else self.lowest):
            self.lowest, self.stale = selection_score, 0
        else:
            self.stale += 1

    @property
    def over(self) -> bool:
        """Whether the run is to end."""
        return self.limit is not None and self.stale >= self.limit

    def state(self) -> dict[str, float | int | None]:
        """What a checkpoint keeps of it."""
        return {"lowest": self.lowest, "stale": self.stale}

    def restore(self, saved: dict[str, float | int | None] | None) -> None:
        """Goes on from a checkpoint's state; None, from before there was one, changes nothing.

        Raises UserError when the state is damaged.
        """
        if saved is None:
            return
        lowest, stale = saved.get("lowest"), cast(int, saved.get("stale"))
        require(
            isinstance(lowest, float | int | None) and isinstance(stale, int) and stale >= 0,
            f"trainer.json has no usable 'patience': {saved}; use another checkpoint",
        )
        self.lowest, self.stale = lowest, stale
