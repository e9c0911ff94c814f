"""Trials of the ops other than attention, over shapes with primes and ends of blocks.

Shapes: B batch, T tokens, H heads, K head width, R rotated pairs, N tokens, D width, V vocabulary,
F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanolm.ops.contract import (
    CrossEntropySpec,
    GluSpec,
    NormSpec,
    RotarySpec,
    Spec,
    SymmetricProductSpec,
)
from nanolm.tools.kernel_check.trial import Trial

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, dtype: torch.dtype, seed: int, device: str) -> Tensor:
    """Normal numbers that are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def norm_trial(
    kind: str, n_rows: int, width: int, *, bias: bool, residual: bool, dtype: torch.dtype,
    device: str,
) -> Trial:  # fmt: skip
    """A norm with or without bias and residual."""
    names = ["x", "weight"] + ["bias"] * bias + ["residual"] * residual
    leaves = {}
    for seed, name in enumerate(names):
        shape = (n_rows, width) if name in ("x", "residual") else (width,)
        leaves[name] = normal(*shape, dtype=dtype, seed=seed, device=device)

    def run(kernel: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        out, total = kernel.run(
            given["x"], given["weight"], given.get("bias"), kind=kind, eps=1e-5,
            residual=given.get("residual"),
        )  # fmt: skip
        return {"out": out, "total": total}

    spec = NormSpec(
        kind=kind, width=width, bias=bias, residual=residual, dtype=dtype, device=device
    )
    words = " bias" * bias + " residual" * residual
    return Trial(f"{kind} {n_rows}x{width}{words} {dtype}", spec, leaves, run)


def rotary_trial(
    n_heads: int, width: int, n_pairs: int, *, per_row: bool, n_tokens: int = 7,
    dtype: torch.dtype, device: str,
) -> Trial:  # fmt: skip
    """Rotation of a strided view, with one set of angles or one for each row."""
    n_rows = 2
    x = normal(n_rows, n_tokens, 2 * n_heads, width, dtype=dtype, seed=0, device=device)
    angle = normal(
        n_rows if per_row else 1, n_tokens, n_pairs, dtype=torch.float32, seed=1, device=device
    )

    def run(kernel: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"out": kernel.run(given["x"], angle.cos(), angle.sin())}

    spec = RotarySpec(head_dim=width, dtype=dtype, device=device)
    name = f"{n_heads} heads of {width}, {n_pairs} pairs{' per row' * per_row} {dtype}"
    return Trial(name, spec, {"x": x[:, :, ::2]}, run)


def glu_trial(kind: str, n_rows: int, width: int, *, dtype: torch.dtype, device: str) -> Trial:
    """A gated activation."""
    gate_up = normal(n_rows, 2 * width, dtype=dtype, seed=0, device=device) * 2

    def run(kernel: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"out": kernel.run(given["gate_up"], kind=kind)}

    spec = GluSpec(kind=kind, width=width, dtype=dtype, device=device)
    return Trial(f"{kind} {n_rows}x{width} {dtype}", spec, {"gate_up": gate_up}, run)


def cross_entropy_trial(
    n_tokens: int, vocab_size: int, *, bias: bool, softcap: float | None, label_smoothing: float,
    z_loss: float, width: int = 16, dtype: torch.dtype, device: str,
) -> Trial:  # fmt: skip
    """The projected loss of logits with a deviation of 1.2, some targets ignored."""
    weight = normal(vocab_size, width, dtype=dtype, seed=1, device=device)
    leaves = {
        "hidden": normal(n_tokens, width, dtype=dtype, seed=0, device=device),
        "weight": weight * (1.2 * width**-0.5),
    }
    if bias:
        leaves["bias"] = normal(vocab_size, dtype=dtype, seed=2, device=device)
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(vocab_size, (n_tokens,), generator=generator)
    targets[torch.arange(n_tokens) % 4 == 1] = -100
    targets = targets.to(device)

    def run(kernel: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        result = kernel.run(
            given["hidden"], given["weight"], given.get("bias"), targets, softcap=softcap,
            label_smoothing=label_smoothing, z_loss=z_loss,
        )  # fmt: skip
        return {"loss": result.loss, "nll": result.nll, "lse": result.lse}

    spec = CrossEntropySpec(
        width=width, vocab_size=vocab_size, bias=bias, softcap=softcap, dtype=dtype, device=device,
        z_loss=z_loss > 0, label_smoothing=label_smoothing > 0,
    )  # fmt: skip
    words = f"{' bias' * bias} softcap={softcap} smoothing={label_smoothing} z={z_loss} {dtype}"
    name = f"{n_tokens}x{vocab_size}{words}"
    return Trial(name, spec, leaves, run, detached=frozenset({"nll", "lse"}))


def symmetric_trial(n_rows: int, n_columns: int, *, dtype: torch.dtype, device: str) -> Trial:
    """x x^T of a transposed view."""
    x = normal(2, n_columns, n_rows, dtype=dtype, seed=0, device=device).mT

    def run(kernel: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"out": kernel.run(given["x"])}

    spec: Spec = SymmetricProductSpec(dtype=dtype, device=device)
    return Trial(f"{n_rows}x{n_columns} {dtype}", spec, {"x": x}, run)


def op_trials(op: str, device: str = "cpu") -> list[Trial]:
    """The trials of one op."""
    trials = []
    for index, dtype in enumerate(DTYPES):
        common = {"dtype": dtype, "device": device}
        if op == "norm":
            for kind in ("layernorm", "rmsnorm"):
                # A LayerNorm of one number is 0 whatever it is: two tell something.
                least = 2 if kind == "layernorm" else 1
                for n_rows, width in ((37, 24), (1, least), (5, 129), (3, 1000)):
                    trials.append(
                        norm_trial(
                            kind, n_rows, width, bias=kind == "layernorm" and width != 24,
                            residual=(width + index) % 2 == 0, **common,
                        )
                    )  # fmt: skip
        elif op == "rotary":
            trials.append(rotary_trial(3, 16, 8, per_row=index == 0, **common))
            trials.append(rotary_trial(1, 20, 5, per_row=True, **common))
        elif op == "glu":
            trials += [
                glu_trial(kind, *shape, **common)
                for kind in ("swiglu", "geglu")
                for shape in ((3, 127), (1, 1), (2, 1029))
            ]
        elif op == "linear_cross_entropy":
            for n_tokens, vocab_size, bias, softcap, smoothing, z in (
                (13, 127, False, None, 0.0, 0.0),
                (5, 129, True, None, 0.1, 0.0),
                (7, 31, False, 5.0, 0.0, 1e-2),
                (1, 5000, True, 3.0, 0.1, 1e-2),
            ):
                trials.append(
                    cross_entropy_trial(
                        n_tokens, vocab_size, bias=bias, softcap=softcap,
                        label_smoothing=smoothing, z_loss=z, **common,
                    )
                )  # fmt: skip
        elif op == "symmetric_product":
            trials += [symmetric_trial(*shape, **common) for shape in ((37, 19), (1, 1), (64, 65))]
    return trials
