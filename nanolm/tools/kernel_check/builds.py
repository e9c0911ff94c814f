"""What the compile matrix compiles: every op in the shapes and modes whose machine code differs.

A build calls an op, forward and backward, on CPU tensors; `compile.collecting` sees to it that the
launches compile for another GPU and do not run. Attention has variants: masks, biases, soft-cap and
dropout are compile-time branches of its kernels, each with registers of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanolm.ops.bias import AlibiBias, BucketBias, DenseBias
from nanolm.ops.masks import Mask

N_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Build:
    """One thing to compile: an op in one shape, and for attention in one variant."""

    op: str
    dtype: str
    width: int
    causal: bool = False
    variant: str = ""

    @property
    def name(self) -> str:
        """How its rows are called."""
        words = [self.op, str(self.width), self.dtype]
        return "/".join(words + ["causal"] * self.causal + [self.variant] * bool(self.variant))

    def exists_on(self, arch: str) -> bool:
        """Whether the architecture has it: TF32 is NVIDIA's."""
        return self.variant != "tf32x3" or arch.startswith("sm_")

    def leaf(self, *shape: int) -> Tensor:
        """An input that wants a gradient."""
        return torch.zeros(shape, dtype=getattr(torch, self.dtype), requires_grad=True)


BUILDS = (
    Build("attention", "bfloat16", 64, True),
    Build("attention", "bfloat16", 64),
    Build("attention", "float16", 64, True),
    Build("attention", "float32", 64, True),
    Build("attention", "bfloat16", 96, True),
    Build("attention", "bfloat16", 128, True),
    Build("attention", "bfloat16", 128),
    Build("attention", "float16", 128, True),
    Build("attention", "bfloat16", 256, True),
    Build("attention", "bfloat16", 64, variant="documents"),
    Build("attention", "bfloat16", 128, True, variant="documents"),
    Build("attention", "bfloat16", 64, variant="dropout"),
    Build("attention", "bfloat16", 128, True, variant="dropout"),
    Build("attention", "bfloat16", 64, variant="bucket"),
    Build("attention", "bfloat16", 128, True, variant="bucket"),
    Build("attention", "bfloat16", 128, True, variant="dense"),
    Build("attention", "bfloat16", 128, True, variant="softcap"),
    Build("attention", "bfloat16", 128, True, variant="alibi"),
    Build("attention", "float32", 64, True, variant="tf32x3"),
    Build("attention_decode", "bfloat16", 64, True),
    Build("attention_decode", "bfloat16", 128, True),
    Build("norm", "bfloat16", 1024),
    Build("rotary", "bfloat16", 64),
    Build("glu", "bfloat16", 4096),
    Build("linear_cross_entropy", "bfloat16", 50304),
    Build("symmetric_product", "bfloat16", 1024),
    Build("symmetric_product", "float32", 1024, variant="tf32x3"),
)
SAMPLE = (BUILDS[0], Build("norm", "bfloat16", 1024))


def variant_options(build: Build) -> dict[str, Any]:
    """Arguments of attention that a variant adds; biases are in float32, as in training."""
    n_heads = 2
    wide: dict[str, Any] = {"dtype": torch.float32, "requires_grad": True}
    choices: dict[str, Callable[[], dict[str, Any]]] = {
        "": dict,
        "documents": lambda: {
            "mask": Mask(causal=build.causal, documents=torch.zeros(1, N_TOKENS, dtype=torch.int64))
        },
        "dropout": lambda: {"dropout": 0.1},
        "bucket": lambda: {
            "bias": BucketBias(torch.zeros(32, n_heads, **wide), not build.causal, 128)
        },
        "dense": lambda: {"bias": DenseBias(torch.zeros(1, n_heads, N_TOKENS, N_TOKENS, **wide))},
        "alibi": lambda: {"bias": AlibiBias(torch.ones(n_heads))},
        "softcap": lambda: {"softcap": 30.0},
        "tf32x3": lambda: {"precision": "tf32x3"},
    }
    return choices[build.variant]()


def attention(build: Build) -> None:
    """Forward and backward, with the bias's gradient where it has one."""
    from nanolm.kernels.attention.operator import attention as run  # noqa: PLC0415

    options = {"mask": Mask(causal=build.causal)} | variant_options(build)
    q, k, v = (build.leaf(1, N_TOKENS, 2, build.width) for _ in range(3))
    wanted = [q, k, v]
    out, _ = run(q, k, v, options.pop("mask"), scale=0.1, **options)
    bias = vars(options["bias"]).values() if "bias" in options else ()
    wanted += [x for x in bias if isinstance(x, Tensor) and x.requires_grad]
    torch.autograd.grad(out, wanted, out)


def attention_decode(build: Build) -> None:
    """One query of two heads a group against a cache."""
    from nanolm.kernels.attention.decode import attention_decode as run  # noqa: PLC0415

    q, k, v = (build.leaf(1, n, h, build.width) for n, h in ((1, 4), (N_TOKENS, 2), (N_TOKENS, 2)))
    run(q, k, v, Mask(causal=build.causal), scale=0.1)


def norm(build: Build) -> None:
    """RMSNorm after a residual sum."""
    from nanolm.kernels.norm import norm as run  # noqa: PLC0415

    x, weight, residual = (build.leaf(*shape, build.width) for shape in ((64,), (), (64,)))
    out, _ = run(x, weight, None, kind="rmsnorm", eps=1e-5, residual=residual)
    torch.autograd.grad(out, (x, weight), out)


def rotary(build: Build) -> None:
    """All of a head rotated."""
    from nanolm.kernels.rotary import rotary as run  # noqa: PLC0415

    angle = torch.zeros(1, 64, build.width // 2)
    run(build.leaf(1, 64, 12, build.width), angle, angle)


def glu(build: Build) -> None:
    """SwiGLU."""
    from nanolm.kernels.glu import glu as run  # noqa: PLC0415

    gate_up = build.leaf(64, 2 * build.width)
    out = run(gate_up, kind="swiglu")
    torch.autograd.grad(out, gate_up, out)


def linear_cross_entropy(build: Build) -> None:
    """Loss and gradients of a small model's large vocabulary."""
    from nanolm.kernels.cross_entropy import linear_cross_entropy as run  # noqa: PLC0415

    targets = torch.zeros(16, dtype=torch.int64)
    run(build.leaf(16, 64), build.leaf(build.width, 64), None, targets)


def symmetric_product(build: Build) -> None:
    """A square matrix."""
    from nanolm.kernels.symmetric_product import symmetric_product as run  # noqa: PLC0415

    run(build.leaf(build.width, build.width), build.variant or "ieee")


CALLS: dict[str, Callable[[Build], None]] = {
    call.__name__: call
    for call in (
        attention,
        attention_decode,
        norm,
        rotary,
        glu,
        linear_cross_entropy,
        symmetric_product,
    )
}


def launch(build: Build) -> None:
    """Calls the build's op (within `compile.collecting`)."""
    CALLS[build.op](build)
