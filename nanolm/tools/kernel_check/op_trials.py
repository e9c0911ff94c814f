"""Trials of the ops other than attention: one problem of a given shape and dtype each.

Shapes: B batch, T tokens, H heads, K head width, R rotated pairs, N tokens, D width, V vocabulary,
F feed-forward width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from nanolm.ops.contract import (
    CrossEntropySpec,
    GluSpec,
    LinearSpec,
    NormSpec,
    RotarySpec,
    Spec,
    SymmetricProductSpec,
)
from nanolm.tools.kernel_check.trial import Trial
from nanolm.tools.kernel_check.variants import remade, spread


def normal(*shape: int, dtype: torch.dtype, seed: int, device: str) -> Tensor:
    """Normal numbers that are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def eighths(*shape: int, dtype: torch.dtype, seed: int, device: str) -> Tensor:
    """-1/4, -1/8, … 1/4: of 16 products of such numbers times 8 every dtype holds the sum."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-2, 3, shape, generator=generator) / 8).to(device, dtype)


@dataclasses.dataclass(frozen=True)
class Mix:
    """Dtypes that differ within one call, as autocast and FSDP make them.

    `x` is that of activations, `weight` of parameters, `residual` of the residual stream, and
    `autocast` of the region.
    """

    x: torch.dtype
    weight: torch.dtype
    residual: torch.dtype
    autocast: torch.dtype | None = None

    def __str__(self) -> str:
        """In words."""
        words = f"x {self.x}, parameters {self.weight}, residual {self.residual}"
        return words.replace("torch.", "") + (" under autocast" if self.autocast else "")


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in."""
    return torch.promote_types(dtype, FP32)


@remade
def norm_trial(
    kind: Any, n_rows: int, width: int, *, bias: bool, residual: bool, dtype: torch.dtype,
    device: str, size: float = 1.0, mean: float = 0.0, eps: float = 1e-5, mix: Mix | None = None,
) -> Trial:  # fmt: skip
    """A norm with or without bias and residual, of rows of a size and a mean."""
    mix = mix or Mix(dtype, dtype, dtype)
    names = ["x", "weight"] + ["bias"] * bias + ["residual"] * residual
    dtypes = {"x": mix.x, "residual": mix.residual}
    leaves = {}
    for seed, name in enumerate(names):
        shape = (n_rows, width) if name in ("x", "residual") else (width,)
        leaf = normal(*shape, dtype=dtypes.get(name, mix.weight), seed=seed, device=device)
        leaves[name] = leaf * size + mean if name in dtypes else leaf

    def run(kernel: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        out, total = kernel.run(
            given["x"], given["weight"], given.get("bias"), kind=kind, eps=eps,
            residual=given.get("residual"),
        )  # fmt: skip
        return {"out": out, "total": total}

    spec = NormSpec(
        kind=kind, width=width, bias=bias, residual=residual, dtype=dtype, device=device
    )
    total = torch.promote_types(mix.x, mix.residual) if residual else mix.x
    words = " bias" * bias + " residual" * residual
    words += f" of size {size:g}" * (size < 1) + " of hundreds" * (size > 1)
    words += f" around {mean:g}" * (mean != 0) + f" eps {eps:g}" * (eps != 1e-5)
    kinds = f"{dtype}" if mix == Mix(dtype, dtype, dtype) else str(mix)
    return Trial(
        f"{kind} {n_rows}x{width}{words} {kinds}", spec, leaves, run, autocast=mix.autocast,
        computes=wide_of(dtype), dtypes={"out": total, "total": total},
    )  # fmt: skip


@remade
def rotary_trial(
    n_heads: int, width: int, n_pairs: int, *, per_row: bool, n_tokens: int = 7,
    dtype: torch.dtype, device: str, autocast: torch.dtype | None = None, cancels: bool = False,
) -> Trial:  # fmt: skip
    """Rotation of a strided view, with one set of angles or one for each row, these strided too.

    `cancels`: ones, turned by nearly an eighth of a circle, and of the result the first halves:
    cos - sin is as exact as the angles are, also where the result has 16 bits."""
    n_rows = 2
    x = normal(n_rows, n_tokens, 2 * n_heads, width, dtype=dtype, seed=0, device=device)
    angle = normal(
        n_rows if per_row else 1, n_tokens, n_pairs, dtype=torch.float32, seed=1, device=device
    )
    if cancels:
        x, angle = torch.ones_like(x), math.pi / 4 + angle / 200
    cos, sin = (spread(x) if per_row else x for x in (angle.cos(), angle.sin()))

    def run(kernel: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        out = kernel.run(given["x"], cos, sin)
        return {"out": out[..., :n_pairs] if cancels else out}

    spec = RotarySpec(head_dim=width, dtype=dtype, device=device)
    name = f"{n_tokens} tokens, " * (n_tokens != 7)
    name += f"{n_heads} heads of {width}, {n_pairs} pairs{' per row' * per_row} {dtype}"
    return Trial(
        name + " that cancel" * cancels, spec, {"x": x[:, :, ::2]}, run, computes=wide_of(dtype),
        dtypes={"out": dtype}, autocast=autocast, constants={"cos": cos, "sin": sin},
    )  # fmt: skip


@remade
def glu_trial(
    kind: Any, n_rows: int, width: int, *, dtype: torch.dtype, device: str,
    autocast: torch.dtype | None = None, large: bool = False,
) -> Trial:  # fmt: skip
    """A gated activation. `large`: gates of hundreds, and every third number behind them is 0."""
    gate_up = normal(n_rows, 2 * width, dtype=dtype, seed=0, device=device) * 2
    if large:
        gate_up[..., :width] *= 100
        gate_up[..., width::3] = 0

    def run(kernel: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"out": kernel.run(given["gate_up"], kind=kind)}

    spec = GluSpec(kind=kind, width=width, dtype=dtype, device=device)
    return Trial(
        f"{kind} {n_rows}x{width}{' of hundreds' * large} {dtype}", spec, {"gate_up": gate_up}, run,
        autocast=autocast, dtypes={"out": dtype},
    )  # fmt: skip


@remade
def cross_entropy_trial(
    n_tokens: int, vocab_size: int, *, bias: bool, softcap: float | None, label_smoothing: float,
    z_loss: float, width: int = 16, dtype: torch.dtype, device: str, mix: Mix | None = None,
    exact: bool = False, ignored: bool = False, large: bool = False,
) -> Trial:  # fmt: skip
    """The projected loss of logits with a deviation of 1.2, some targets ignored; beside a bias
    the targets are strided.

    `exact`: 16 bits hold all logits as they are, eighths below 32, so that the loss has to be as
    exact as float32 and shows whatever is rounded behind the product (but for the plain loss, which
    torch's own function takes in 16 bits). `ignored`: all targets are.
    `large`: logits of hundreds, exact ones; their exponents are as exact as they are large.
    """
    mix = mix or Mix(dtype, dtype, dtype)
    draw = eighths if exact else normal
    weight = draw(vocab_size, width, dtype=mix.weight, seed=1, device=device)
    leaves = {
        "hidden": draw(n_tokens, width, dtype=mix.x, seed=0, device=device),
        "weight": weight * (2.0 if exact else 1.2 * width**-0.5),
    }
    if exact:
        leaves["hidden"] *= 256.0 if large else 4.0  # quarters times halves
    if bias:
        leaves["bias"] = draw(vocab_size, dtype=mix.weight, seed=2, device=device)
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(vocab_size, (n_tokens,), generator=generator)
    targets[torch.arange(n_tokens) % 4 == 1] = -100
    targets[:] = -100 if ignored else targets
    targets = spread(targets.to(device)) if bias else targets.to(device)

    def run(kernel: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        result = kernel.run(
            given["hidden"], given["weight"], given.get("bias"), targets, softcap=softcap,
            label_smoothing=label_smoothing, z_loss=z_loss,
        )  # fmt: skip
        fields = ("loss", "nll", "lse", "correct")
        return {field: getattr(result, field) for field in fields}

    plain = dtype != FP32 and softcap is None and label_smoothing == z_loss == 0
    spec = CrossEntropySpec(
        width=width, vocab_size=vocab_size, bias=bias, softcap=softcap, dtype=dtype, device=device,
        z_loss=z_loss > 0, label_smoothing=label_smoothing > 0,
    )  # fmt: skip
    words = f"{' bias' * bias} softcap={softcap} smoothing={label_smoothing} z={z_loss} {dtype}"
    kinds = "" if mix == Mix(dtype, dtype, dtype) else f" {mix}"
    return Trial(
        f"{n_tokens}x{vocab_size}{words}{kinds}{' exact' * exact}{' ignored' * ignored}"
        f"{' of hundreds' * large}", spec,
        leaves, run, autocast=mix.autocast, computes=FP32 if exact and not plain else None,
        detached=frozenset({"nll", "lse", "correct"}),
        dtypes={} if dtype == FP64 else dict.fromkeys(("loss", "nll", "lse", "correct"), FP32),
        constants={"targets": targets}, terms=softmax_terms if large else None,
        rounding=2e-5 * large,
    )  # fmt: skip


def softmax_terms(leaves: dict[str, Tensor]) -> dict[str, float]:
    """What is added up to the gradients of a loss: weights, and hidden states, times shares."""
    hidden, weight = (float(leaves[name].abs().max()) for name in ("hidden", "weight"))
    return {"dhidden": weight, "dweight": hidden, "dbias": 1.0}


@remade
def symmetric_trial(
    n_rows: int, n_columns: int, *, dtype: torch.dtype, device: str,
    autocast: torch.dtype | None = None,
) -> Trial:  # fmt: skip
    """x x^T of a transposed view."""
    x = normal(2, n_columns, n_rows, dtype=dtype, seed=0, device=device).mT

    def run(kernel: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"out": kernel.run(given["x"])}

    spec: Spec = SymmetricProductSpec(
        rows=n_rows, columns=n_columns, dtype=autocast or dtype, device=device
    )
    return Trial(
        f"{n_rows}x{n_columns} {dtype}", spec, {"x": x}, run, autocast=autocast,
        dtypes={"out": autocast or dtype},
    )  # fmt: skip


@remade
def linear_trial(
    n_rows: int, n_in: int, n_out: int, *, bias: bool, dtype: torch.dtype, device: str,
    mix: Mix | None = None,
) -> Trial:  # fmt: skip
    """A linear layer on [2, N, I]."""
    mix = mix or Mix(dtype, dtype, dtype)
    leaves = {
        "x": normal(2, n_rows, n_in, dtype=mix.x, seed=0, device=device),
        "weight": normal(n_out, n_in, dtype=mix.weight, seed=1, device=device) * n_in**-0.5,
    }
    if bias:
        leaves["bias"] = normal(n_out, dtype=mix.weight, seed=2, device=device)

    def run(kernel: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"out": kernel.run(given["x"], given["weight"], given.get("bias"))}

    kinds = f"{dtype}" if mix == Mix(dtype, dtype, dtype) else str(mix)
    return Trial(
        f"{n_in} to {n_out}, {n_rows} rows{' bias' * bias} {kinds}",
        LinearSpec(dtype=dtype, device=device), leaves, run, autocast=mix.autocast,
        dtypes={"out": dtype},
    )  # fmt: skip
