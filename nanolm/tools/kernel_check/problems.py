"""What `nanolm kernels bench` measures: one problem of a given size for each op.

Shapes: B batch, T tokens, H heads, G key/value heads, K head width, N = B T tokens, D model width,
F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanolm.config.ranges import Count
from nanolm.ops.contract import (
    AttentionSpec,
    CrossEntropySpec,
    GluSpec,
    LinearSpec,
    NormSpec,
    RotarySpec,
    Spec,
    SymmetricProductSpec,
)
from nanolm.ops.masks import Mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the problems; every op takes those that concern it."""

    batch: Count = 4
    """Rows."""
    length: Count = 1024
    """Tokens of a row: queries and keys."""
    heads: Count = 8
    """Query heads."""
    kv_heads: Count = 8
    """Key/value heads."""
    head_dim: Count = 64
    """Width of a head."""
    width: Count = 512
    """Model width: of norms, linear layers and the vocabulary projection."""
    ff_width: Count = 1408
    """Feed-forward width: of linear layers and gates."""
    vocab_size: Count = 16384
    """Vocabulary."""
    causal: bool = True
    """Causal or bidirectional."""
    dtype: str = "float32"
    """float32, bfloat16 or float16; the 16-bit ones under autocast, as in training."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device type."""
    backward: bool = True
    """Forward and backward, or forward only; Muon's products have no backward pass either way."""

    def common(self) -> dict[str, Any]:
        """What every spec says."""
        phase = "train" if self.backward else "prefill"
        return {"dtype": getattr(torch, self.dtype), "device": self.device, "phase": phase}

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers, with a gradient when there is a backward pass."""
        x = torch.randn(shape, device=self.device).mul_(scale).to(getattr(torch, self.dtype))
        return x.requires_grad_(self.backward)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One op on one set of inputs.

    `run(kernel)` gives the outputs, differentiable where `leaves`, the inputs, want gradients;
    `flops` are those of the matrix products that the op means, of all passes, whatever a kernel
    saves or repeats; None without products.
    """

    words: str
    spec: Spec
    leaves: list[Tensor]
    run: Callable[[Any], list[Tensor]]
    flops: float | None

    @property
    def backward(self) -> bool:
        """Whether there is a backward pass."""
        return any(x.requires_grad for x in self.leaves)

    def n_bytes(self, results: list[Tensor]) -> int:
        """Bytes that must move, each once: inputs, outputs, and gradients of both."""
        moved = n_bytes([*self.leaves, *results])
        if not self.backward:
            return moved
        # The backward pass reads inputs and incoming gradients and writes the inputs' gradients.
        return moved + n_bytes([*self.leaves, *results[: -len(self.leaves)]])


def attention(s: Sizes) -> Problem:
    """Half of a causal mask is counted, as it is visible."""
    q, k, v = (s.leaf(s.batch, s.length, h, s.head_dim) for h in (s.heads, s.kv_heads, s.kv_heads))
    spec = AttentionSpec(
        n_heads=s.heads, n_kv_heads=s.kv_heads, head_dim=s.head_dim, causal=s.causal, **s.common()
    )
    mask, scale = Mask(causal=s.causal), s.head_dim**-0.5
    flops = 4.0 * s.batch * s.heads * s.length**2 * s.head_dim
    flops *= (0.5 if s.causal else 1) * (3.5 if s.backward else 1)
    words = f"{s.batch} x {s.length} x {s.heads} x {s.head_dim}{', causal' * s.causal}"

    def run(kernel: Any) -> list[Tensor]:
        return [kernel.run(q, k, v, mask, scale=scale)]

    return Problem(words, spec, [q, k, v], run, flops)


def linear(s: Sizes) -> Problem:
    """D to F, without a bias."""
    x = s.leaf(s.batch * s.length, s.width)
    weight = s.leaf(s.ff_width, s.width, scale=s.width**-0.5)
    flops = 2 * x.shape[0] * weight.numel() * (3 if s.backward else 1)
    words = f"{x.shape[0]} x {s.width} to {s.ff_width}"
    spec = LinearSpec(**s.common())
    return Problem(words, spec, [x, weight], lambda kernel: [kernel.run(x, weight, None)], flops)


def linear_cross_entropy(s: Sizes) -> Problem:
    """The projection and its loss."""
    hidden = s.leaf(s.batch * s.length, s.width)
    weight = s.leaf(s.vocab_size, s.width, scale=s.width**-0.5)
    targets = torch.randint(s.vocab_size, (hidden.shape[0],), device=s.device)
    flops = 2 * hidden.shape[0] * weight.numel() * (3 if s.backward else 1)
    words = f"{hidden.shape[0]} x {s.width} x {s.vocab_size}"
    spec = CrossEntropySpec(width=s.width, vocab_size=s.vocab_size, **s.common())
    return Problem(
        words, spec, [hidden, weight],
        lambda kernel: [kernel.run(hidden, weight, None, targets).loss], flops,
    )  # fmt: skip


def norm(s: Sizes) -> Problem:
    """RMSNorm after a residual sum."""
    x, residual = (s.leaf(s.batch * s.length, s.width) for _ in range(2))
    weight = s.leaf(s.width)
    spec = NormSpec(kind="rmsnorm", width=s.width, residual=True, **s.common())

    def run(kernel: Any) -> list[Tensor]:
        return list(kernel.run(x, weight, None, kind="rmsnorm", eps=1e-5, residual=residual))

    words = f"rmsnorm + residual, {x.shape[0]} x {s.width}"
    return Problem(words, spec, [x, weight, residual], run, None)


def rotary(s: Sizes) -> Problem:
    """All features of every query head."""
    x = s.leaf(s.batch, s.length, s.heads, s.head_dim)
    angle = torch.randn(1, s.length, s.head_dim // 2, device=s.device)
    cos, sin = angle.cos(), angle.sin()
    spec = RotarySpec(head_dim=s.head_dim, **s.common())
    words = f"{s.batch} x {s.length} x {s.heads} x {s.head_dim}"
    return Problem(words, spec, [x], lambda kernel: [kernel.run(x, cos, sin)], None)


def glu(s: Sizes) -> Problem:
    """SwiGLU."""
    gate_up = s.leaf(s.batch * s.length, 2 * s.ff_width)
    spec = GluSpec(kind="swiglu", width=s.ff_width, **s.common())
    words = f"swiglu, {gate_up.shape[0]} x {s.ff_width}"

    def run(kernel: Any) -> list[Tensor]:
        return [kernel.run(gate_up, kind="swiglu")]

    return Problem(words, spec, [gate_up], run, None)


def symmetric_product(s: Sizes) -> Problem:
    """A D x F matrix as Muon meets it, in training and without a gradient; counted as a plain
    product."""
    x = s.leaf(s.width, s.ff_width).requires_grad_(False)
    flops = 2 * s.width**2 * s.ff_width
    common = s.common() | {"phase": "train"}
    spec = SymmetricProductSpec(rows=s.width, columns=s.ff_width, **common)
    return Problem(spec.size, spec, [x], lambda kernel: [kernel.run(x)], flops)


PROBLEMS: dict[str, Callable[[Sizes], Problem]] = {
    problem.__name__: problem
    for problem in (
        attention,
        linear,
        linear_cross_entropy,
        norm,
        rotary,
        glu,
        symmetric_product,
    )
}


def n_bytes(tensors: list[Tensor]) -> int:
    """Bytes of all of them."""
    return sum(math.prod(x.shape) * x.element_size() for x in tensors)
