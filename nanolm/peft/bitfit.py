"""BitFit: only the biases are trained (Ben Zaken et al. 2022)."""

from __future__ import annotations

import dataclasses

from nanolm.errors import require
from nanolm.learner import Adapter, Learner
from nanolm.peft.base import PeftOptions
from nanolm.registry import PEFT


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFitOptions(PeftOptions):
    """The trunk's own biases."""

    name: str = "bitfit"


@PEFT.register("bitfit", options=BitFitOptions)
def bitfit(options: BitFitOptions, learner: Learner, adapter: Adapter) -> None:
    """Trains every bias of the trunk, those of the norms included."""
    biases = [p for name, p in learner.trunk.named_parameters() if name.endswith("bias")]
    require(
        len(biases) > 0,
        "peft=bitfit trains biases, and this model has none (model.bias and model.norm_bias are "
        "false, or its norm is RMSNorm); choose another method",
    )
    adapter.train(biases)
