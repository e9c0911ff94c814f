"""Optimizers: which parameters get which update, and Muon written out.

A builder takes the learner and its options and returns a list of torch optimizers that together
hold every parameter once. Each parameter group also carries

    peak_lr   its learning rate at schedule factor 1 (the trainer sets lr = peak_lr * factor(step))
    names     its parameters' names, in order: checkpoints key optimizer state by name

Weight decay acts on matrices (two dimensions or more, embeddings included) and never on biases and
norm gains (Radford et al. 2018, section 4.1).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanolm.config.ranges import Count, Decay, Size
from nanolm.distributed.sharding import divided
from nanolm.errors import UserError
from nanolm.ops.contract import Kernels, SymmetricProductSpec
from nanolm.ops.cpu_bf16 import multiplies_bf16
from nanolm.registry import OPTIMIZERS, Options

Named = tuple[str, nn.Parameter]
Product = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimOptions(Options):
    """What every optimizer has."""

    lr: Size = 3e-4
    """Peak learning rate."""
    weight_decay: Size = 0.1
    """Decoupled weight decay on matrices."""

    def __post_init__(self) -> None:
        if self.lr < 0 or self.weight_decay < 0:
            raise UserError(
                f"optim.lr={self.lr} and optim.weight_decay={self.weight_decay} must be >= 0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWOptions(OptimOptions):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    name: str = "adamw"
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of the gradient's first and second moment."""
    eps: Size = 1e-8
    """Added to the root of the second moment."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MuonOptions(OptimOptions):
    """Muon for the blocks' matrices, AdamW for everything else."""

    name: str = "muon"
    lr: Size = 0.02
    """Peak learning rate of Muon."""
    momentum: Size = 0.95
    """Momentum of Muon, Nesterov style."""
    newton_schulz_steps: Count = 5
    """Iterations of the orthogonalisation."""
    adamw_lr: Size = 3e-4
    """Peak learning rate of the embeddings, heads and vectors."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's moment decays."""
    eps: Size = 1e-8
    """AdamW's epsilon."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SgdOptions(OptimOptions):
    """Stochastic gradient descent with momentum."""

    name: str = "sgd"
    momentum: Size = 0.9
    """Momentum."""
    nesterov: bool = False
    """Look-ahead momentum."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RmspropOptions(OptimOptions):
    """RMSprop (Tieleman & Hinton 2012)."""

    name: str = "rmsprop"
    alpha: Size = 0.99
    """Decay of the squared gradient."""
    eps: Size = 1e-8
    """Added to the root."""
    momentum: Size = 0.0
    """Momentum."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdafactorOptions(OptimOptions):
    """Adafactor (Shazeer & Stern 2018): second moments as row and column means."""

    name: str = "adafactor"
    lr: Size = 1e-2
    """Peak learning rate, relative to each parameter's own scale."""


def build_optimizers(learner: nn.Module, options: Options) -> list[torch.optim.Optimizer]:
    """The optimizers of the registered name; together they hold every trainable parameter once."""
    return OPTIMIZERS.get(options.name).build(learner, options)


def decay_groups(named: Iterable[Named], lr: float, weight_decay: float) -> list[dict]:
    """Two parameter groups of one peak learning rate: matrices with decay, vectors without."""
    named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    # Decay pulls towards zero. A gain's neutral value is 1 and a bias is an offset: for neither is
    # a smaller one a simpler model.
    matrices = [(name, parameter) for name, parameter in named if parameter.ndim >= 2]
    vectors = [(name, parameter) for name, parameter in named if parameter.ndim < 2]
    return [
        _group(part, lr, decay)
        for part, decay in ((matrices, weight_decay), (vectors, 0.0))
        if part
    ]


def _group(named: list[Named], lr: float, weight_decay: float) -> dict:
    return {
        "params": [parameter for _, parameter in named],
        "names": [name for name, _ in named],
        "lr": lr,
        "peak_lr": lr,
        "weight_decay": weight_decay,
    }


@OPTIMIZERS.register("adamw", options=AdamWOptions)
def adamw(learner: nn.Module, options: AdamWOptions) -> list[torch.optim.Optimizer]:
    """torch's fused AdamW: one kernel over all parameters."""
    groups = decay_groups(learner.named_parameters(), options.lr, options.weight_decay)
    first, second = options.betas
    return [torch.optim.AdamW(groups, betas=(first, second), eps=options.eps, fused=True)]


@OPTIMIZERS.register("muon", options=MuonOptions)
def muon(learner: nn.Module, options: MuonOptions) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of `trunk.blocks`, AdamW on embeddings, heads, gains and biases."""
    named = list(learner.named_parameters())
    inside = {id(parameter) for parameter in cast(Any, learner).trunk.blocks.parameters()}
    matrices = [
        (name, parameter)
        for name, parameter in named
        if id(parameter) in inside and parameter.ndim == 2 and parameter.requires_grad
    ]
    taken = {name for name, _ in matrices}
    rest = [(name, parameter) for name, parameter in named if name not in taken]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        group = _group(matrices, options.lr, options.weight_decay)
        # A plug-in's trunk may not keep its chooser: then `auto` on the matrices' device.
        device = matrices[0][1].device.type
        kernels = getattr(learner.trunk, "kernels", None) or Kernels(device=device)
        dtype = iteration_dtype(device)
        products = {
            (rows, columns): kernels.choose(
                "symmetric_product", SymmetricProductSpec, dtype=dtype, rows=rows, columns=columns
            ).run
            for rows, columns in dict.fromkeys(size_of(parameter) for _, parameter in matrices)
        }
        steps = options.newton_schulz_steps
        optimizers.append(Muon([group], options.momentum, steps, products=products, dtype=dtype))
    groups = decay_groups(rest, options.adamw_lr, options.weight_decay)
    if groups:
        first, second = options.betas
        betas = (first, second)
        optimizers.append(torch.optim.AdamW(groups, betas=betas, eps=options.eps, fused=True))
    return optimizers


@OPTIMIZERS.register("sgd", options=SgdOptions)
def sgd(learner: nn.Module, options: SgdOptions) -> list[torch.optim.Optimizer]:
    """torch's SGD (its weight decay is the L2 penalty, not decoupled)."""
    groups = decay_groups(learner.named_parameters(), options.lr, options.weight_decay)
    return [torch.optim.SGD(groups, momentum=options.momentum, nesterov=options.nesterov)]


@OPTIMIZERS.register("rmsprop", options=RmspropOptions)
def rmsprop(learner: nn.Module, options: RmspropOptions) -> list[torch.optim.Optimizer]:
    """torch's RMSprop (its weight decay is the L2 penalty, not decoupled)."""
    groups = decay_groups(learner.named_parameters(), options.lr, options.weight_decay)
    return [
        torch.optim.RMSprop(groups, alpha=options.alpha, eps=options.eps, momentum=options.momentum)
    ]


@OPTIMIZERS.register("adafactor", options=AdafactorOptions)
def adafactor(learner: nn.Module, options: AdafactorOptions) -> list[torch.optim.Optimizer]:
    """torch's Adafactor."""
    groups = decay_groups(learner.named_parameters(), options.lr, options.weight_decay)
    return [torch.optim.Adafactor(groups)]


def iteration_dtype(device: str) -> torch.dtype:
    """What Muon's iteration computes in: bfloat16, and float32 on a CPU without bfloat16 products,
    where it is three times as fast and no less exact."""
    return torch.float32 if device == "cpu" and not multiplies_bf16() else torch.bfloat16


def size_of(matrix_MN: Tensor) -> tuple[int, int]:
    """(rows, columns) as Muon multiplies it, the shorter side first; of a sharded one the whole."""
    n_rows, n_columns = matrix_MN.shape
    return min(n_rows, n_columns), max(n_rows, n_columns)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts).

    m <- mu m + (1 - mu) g                        momentum
    u  = orthogonalise((1 - mu) g + mu m)         Nesterov look-ahead, then U V^T of its SVD
    w <- (1 - lr * weight_decay) w - lr sqrt(max(1, rows / columns)) u

    `products` has for every size of matrix (`size_of`) what computes its X X^T, a third to a half
    of the iteration's work: a kernel of the op symmetric_product. The iteration runs in `dtype`.
    """

    def __init__(
        self,
        groups: list[dict],
        momentum: float = 0.95,
        steps: int = 5,
        *,
        products: Mapping[tuple[int, int], Product],
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(groups, {"momentum": momentum, "steps": steps, "weight_decay": 0.0})
        self.products, self.dtype = products, dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum, mu = state["momentum"], group["momentum"]
                # An average, where SGD keeps a sum: orthogonalising forgets the size anyhow, and an
                # average cannot overflow.
                momentum.lerp_(weight.grad, 1 - mu)
                update = self.orthogonal_part(weight.grad.lerp(momentum, mu), group["steps"])
                # An orthogonal update of [M, N] changes an output by at most lr times its input,
                # for all shapes alike; tall matrices get sqrt(M / N) more, so that each output
                # coordinate moves by as much (Jordan et al. 2024).
                scale = math.sqrt(max(1.0, weight.shape[0] / weight.shape[1]))
                # Decoupled: the decay acts on the weight and is not orthogonalised with the
                # gradient.
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * scale)

    def orthogonal_part(self, matrix_MN: Tensor, steps: int) -> Tensor:
        """The matrix orthogonalised, in its own type; of a sharded one, this rank's rows of it.

        Every rank gathers the whole matrix and orthogonalises it, one matrix at a time: the update
        of some rows needs all rows.
        """
        whole_MN = matrix_MN.full_tensor() if isinstance(matrix_MN, DTensor) else matrix_MN
        product = self.products[size_of(whole_MN)]
        found_MN = orthogonalise(whole_MN, steps, product, self.dtype).to(matrix_MN.dtype)
        return divided(found_MN, matrix_MN) if isinstance(matrix_MN, DTensor) else found_MN


def orthogonalise(
    matrix_MN: Tensor, steps: int, product: Product, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Nearest semi-orthogonal matrix, roughly: the singular values of the input become about 1.

    Newton-Schulz iteration X <- a X + (b A + c A^2) X with A = X X^T, in `dtype`, with the
    coefficients of Jordan et al. (2024), which push small singular values up as fast as possible.
    In exact arithmetic, five steps take every singular value above 0.0015 of the Frobenius norm
    into [0.68, 1.21]. Smaller ones are multiplied by at most a^5 = 485 and stay below: 0.001 ends
    at 0.47, 0.0001 at 0.05, and 0 stays 0.
    """
    # A polynomial of X keeps its singular vectors and changes its singular values alone: products
    # of matrices, where an SVD would be slow on a GPU.
    a, b, c = 3.4445, -4.7750, 2.0315
    # X X^T of the shorter side: a smaller Gram matrix, and the same singular values.
    tall = matrix_MN.shape[0] > matrix_MN.shape[1]
    x_MN = (matrix_MN.mT if tall else matrix_MN).to(dtype)
    x_MN = x_MN / x_MN.norm().clamp(min=1e-7)
    for _ in range(steps):
        a_MM = product(x_MN)
        polynomial_MM = torch.addmm(a_MM, a_MM, a_MM, beta=b, alpha=c)
        x_MN = torch.addmm(x_MN, polynomial_MM, x_MN, beta=a)
    return x_MN.mT if tall else x_MN
