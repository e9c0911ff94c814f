"""What every weight is before the first step.

    matrices    Normal(0, init_std); those that write into a pre-norm residual stream divided by
                sqrt(2 n_layers), so that their sum does not grow with depth
    biases 0, gains of norms 1

Stands before a batch's journey: `build_learner` (build.py) calls it once.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from nanolm.model_config import ModelConfig


def init_weights(module: nn.Module, model: ModelConfig) -> None:
    """Normal(0, init_std) for matrices, zero for biases; the projections that write into a pre-norm
    residual stream divided by sqrt(2 n_layers) (Radford et al. 2019, section 2.3)."""
    for name, parameter in module.named_parameters():
        init_parameter(name, parameter, model)


def init_parameter(name: str, parameter: Tensor, model: ModelConfig) -> None:
    """Fills one parameter; gains of norms, all that is neither bias nor matrix, become one."""
    if name.endswith("bias"):
        nn.init.zeros_(parameter)
    elif parameter.ndim >= 2:
        writes = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
        shrink = math.sqrt(2 * model.n_layers) if model.norm_position == "pre" else 1.0
        nn.init.normal_(parameter, std=model.init_std / (shrink if writes else 1.0))
    else:
        nn.init.ones_(parameter)
