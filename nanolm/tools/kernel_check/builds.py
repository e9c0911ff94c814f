"""What the compile matrix compiles: every op in the shapes and modes whose machine code differs.

A build calls an op, forward and backward, on CPU tensors; `compile.collecting` sees to it that the
launches compile for another GPU and do not run. Attention has variants: masks, biases, soft-cap,
dropout and shared key heads are compile-time branches of its kernels, each with registers of its
own, and together they need more than each alone. So what models are made of stands here whole.
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
    """One thing to compile: an op in one shape, and in one variant: features joined by "+"."""

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

    @property
    def features(self) -> tuple[str, ...]:
        """The variant's words."""
        return tuple(self.variant.split("+")) if self.variant else ()

    def exists_on(self, arch: str) -> bool:
        """Whether the architecture has it: TF32 is NVIDIA's."""
        return self.variant != "tf32x3" or arch.startswith("sm_")

    def leaf(self, *shape: int) -> Tensor:
        """An input that wants a gradient."""
        return torch.zeros(shape, dtype=getattr(torch, self.dtype), requires_grad=True)


BF16 = "bfloat16"
BUILDS = (
    Build("attention", BF16, 64, True),
    Build("attention", BF16, 64),
    Build("attention", "float16", 64, True),
    Build("attention", "float32", 64, True),
    Build("attention", BF16, 96, True),
    Build("attention", BF16, 128, True),
    Build("attention", BF16, 128),
    Build("attention", "float16", 128, True),
    Build("attention", BF16, 256, True),
    Build("attention", BF16, 64, variant="documents"),
    Build("attention", BF16, 128, True, variant="documents"),
    Build("attention", BF16, 64, variant="dropout"),
    Build("attention", BF16, 128, True, variant="dropout"),
    Build("attention", BF16, 64, variant="bucket"),
    Build("attention", BF16, 128, True, variant="bucket"),
    Build("attention", BF16, 128, True, variant="dense"),
    Build("attention", BF16, 128, True, variant="softcap"),
    Build("attention", BF16, 128, True, variant="alibi"),
    Build("attention", "float32", 64, True, variant="tf32x3"),
    # BERT and RoBERTa: padding and dropout. T5: its table beside both, and its decoder. XLNet.
    Build("attention", BF16, 64, variant="lengths"),
    Build("attention", BF16, 64, variant="lengths+dropout"),
    Build("attention", BF16, 64, variant="lengths+bucket+dropout"),
    Build("attention", BF16, 64, True, variant="bucket+dropout"),
    Build("attention", BF16, 64, variant="order+dense"),
    # ModernBERT's local layers, of packed rows. A prefix that sees itself.
    Build("attention", BF16, 64, variant="documents+window"),
    Build("attention", BF16, 64, True, variant="prefix"),
    Build("attention", BF16, 128, True, variant="prefix+lengths"),
    # Llama, Mistral and Qwen: eight query heads on two, alone, packed, and with a window.
    Build("attention", BF16, 64, True, variant="grouped"),
    Build("attention", BF16, 128, True, variant="grouped"),
    Build("attention", BF16, 64, True, variant="grouped+documents"),
    Build("attention", BF16, 128, True, variant="grouped+documents"),
    Build("attention", BF16, 128, True, variant="grouped+window"),
    # Gemma: heads of 256, with a window and a soft-cap. What takes most registers at each width.
    Build("attention", BF16, 256, True, variant="grouped"),
    Build("attention", BF16, 256, True, variant="grouped+window+softcap"),
    Build("attention", BF16, 256, True, variant="bucket"),
    Build("attention", BF16, 256, True, variant="dense"),
    Build("attention", BF16, 64, True, variant="grouped+window+bucket+dropout"),
    Build("attention", BF16, 128, True, variant="grouped+window+bucket+dropout"),
    Build("attention", BF16, 256, True, variant="grouped+window+bucket+dropout"),
    Build("attention_decode", BF16, 64, True),
    Build("attention_decode", BF16, 128, True),
    Build("norm", BF16, 1024),
    Build("norm", BF16, 768, variant="layernorm"),
    Build("norm", BF16, 4096, variant="wide_stream"),
    Build("norm", BF16, 12288),
    Build("norm", BF16, 16384),
    Build("norm", BF16, 12288, variant="layernorm+wide_stream"),
    Build("norm", BF16, 16384, variant="layernorm+wide_stream"),
    Build("rotary", BF16, 64),
    Build("glu", BF16, 4096),
    Build("linear_cross_entropy", BF16, 50304),
    Build("symmetric_product", BF16, 1024),
    Build("symmetric_product", "float32", 1024, variant="tf32x3"),
)
SAMPLE = (Build("attention", BF16, 64, True), Build("norm", BF16, 1024))


def zeros(*shape: int) -> Tensor:
    """Numbers of documents and places, and lengths."""
    return torch.zeros(shape, dtype=torch.int64)


def mask_of(build: Build) -> Mask:
    """The mask of a build of attention."""
    fields: dict[str, dict[str, Any]] = {
        "documents": {"documents": zeros(1, N_TOKENS)},
        "lengths": {"key_lengths": zeros(1)},
        "order": {"order": zeros(1, N_TOKENS), "strict": True},
        "prefix": {"prefix_lengths": zeros(1)},
        "window": {"window": 65},
    }
    chosen: dict[str, Any] = {}
    for feature in build.features:
        chosen |= fields.get(feature, {})
    return Mask(causal=build.causal, **chosen)


def options_of(build: Build, n_heads: int) -> dict[str, Any]:
    """The other arguments of attention; biases are in float32, as in training."""
    wide: dict[str, Any] = {"dtype": torch.float32, "requires_grad": True}
    choices: dict[str, Callable[[], dict[str, Any]]] = {
        "dropout": lambda: {"dropout": 0.1},
        "bucket": lambda: {
            "bias": BucketBias(torch.zeros(32, n_heads, **wide), not build.causal, 128)
        },
        "dense": lambda: {"bias": DenseBias(torch.zeros(1, n_heads, N_TOKENS, N_TOKENS, **wide))},
        "alibi": lambda: {"bias": AlibiBias(torch.ones(n_heads))},
        "softcap": lambda: {"softcap": 30.0},
        "tf32x3": lambda: {"precision": "tf32x3"},
    }
    options: dict[str, Any] = {}
    for feature in build.features:
        options |= choices.get(feature, dict)()
    return options


def attention(build: Build) -> None:
    """Forward and backward, with the bias's gradient where it has one."""
    from nanolm.kernels.attention.operator import attention as run  # noqa: PLC0415

    n_heads, n_groups = (8, 2) if "grouped" in build.features else (2, 2)
    options = options_of(build, n_heads)
    q, k, v = (build.leaf(1, N_TOKENS, n, build.width) for n in (n_heads, n_groups, n_groups))
    wanted = [q, k, v]
    out, _ = run(q, k, v, mask_of(build), scale=0.1, **options)
    bias = vars(options["bias"]).values() if "bias" in options else ()
    wanted += [x for x in bias if isinstance(x, Tensor) and x.requires_grad]
    torch.autograd.grad(out, wanted, out)


def attention_decode(build: Build) -> None:
    """One query of two heads a group against a cache."""
    from nanolm.kernels.attention.decode import attention_decode as run  # noqa: PLC0415

    q, k, v = (build.leaf(1, n, h, build.width) for n, h in ((1, 4), (N_TOKENS, 2), (N_TOKENS, 2)))
    run(q, k, v, Mask(causal=build.causal), scale=0.1)


def norm(build: Build) -> None:
    """RMSNorm or LayerNorm after a residual sum, whose stream autocast keeps in float32."""
    from nanolm.kernels.norm import norm as run  # noqa: PLC0415

    layernorm = "layernorm" in build.features
    x, weight, residual = (build.leaf(*shape, build.width) for shape in ((64,), (), (64,)))
    if "wide_stream" in build.features:
        residual = residual.detach().float().requires_grad_()
    bias = build.leaf(build.width) if layernorm else None
    kind = "layernorm" if layernorm else "rmsnorm"
    out, total = run(x, weight, bias, kind=kind, eps=1e-5, residual=residual)
    torch.autograd.grad((out, total), (x, weight), (out, total))


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
