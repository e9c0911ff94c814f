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


def zeros(*shape: int) -> Tensor:
    """Numbers of documents and places, and lengths."""
    return torch.zeros(shape, dtype=torch.int64)


def learned(kind: Callable[..., Any], *shape: int, **more: Any) -> dict[str, Any]:
    """A learned bias; it is in float32, as in training."""
    return {"bias": kind(torch.zeros(shape, dtype=torch.float32, requires_grad=True), **more)}


MASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "documents": lambda: {"documents": zeros(1, N_TOKENS)},
    "lengths": lambda: {"key_lengths": zeros(1)},
    "order": lambda: {"order": zeros(1, N_TOKENS), "strict": True},
    "prefix": lambda: {"prefix_lengths": zeros(1)},
    "window": lambda: {"window": 65},
}
"""Words of a variant of attention: what each adds to the mask …"""
OPTIONS: dict[str, Callable[[bool, int], dict[str, Any]]] = {
    "dropout": lambda causal, n_heads: {"dropout": 0.1},
    "bucket": lambda causal, n_heads: learned(
        BucketBias, 32, n_heads, bidirectional=not causal, max_distance=128
    ),
    "dense": lambda causal, n_heads: learned(DenseBias, 1, n_heads, N_TOKENS, N_TOKENS),
    "alibi": lambda causal, n_heads: {"bias": AlibiBias(torch.ones(n_heads))},
    "softcap": lambda causal, n_heads: {"softcap": 30.0},
    "tf32x3": lambda causal, n_heads: {"precision": "tf32x3"},
}
"""… and to the other arguments, for a causal layer or not, and so many heads."""
WORDS = {
    "attention": {*MASKS, *OPTIONS, "grouped"},
    "norm": {"layernorm", "wide_stream"},
    "symmetric_product": {"tf32x3"},
}
"""All words that a variant of an op may have."""


@dataclasses.dataclass(frozen=True)
class Build:
    """One thing to compile: an op in one shape, and in one variant: words joined by "+".

    Raises ValueError for a word that the op does not know, since it would compile the plain op
    under a name that promises more.
    """

    op: str
    dtype: str
    width: int
    causal: bool = False
    variant: str = ""

    def __post_init__(self) -> None:
        known = WORDS.get(self.op, set())
        unknown = [word for word in self.features if word not in known]
        if unknown:
            raise ValueError(
                f"build {self.name}: {self.op} has no variant {', '.join(map(repr, unknown))}; "
                f"it has {', '.join(sorted(known)) or 'none'}"
            )

    @property
    def features(self) -> tuple[str, ...]:
        """The variant's words."""
        return tuple(self.variant.split("+")) if self.variant else ()

    @property
    def name(self) -> str:
        """How its rows are called."""
        words = [self.op, str(self.width), self.dtype]
        return "/".join(words + ["causal"] * self.causal + [self.variant] * bool(self.variant))

    def exists_on(self, arch: str) -> bool:
        """Whether the architecture has it: TF32 is NVIDIA's."""
        return "tf32x3" not in self.features or arch.startswith("sm_")

    def leaf(self, *shape: int) -> Tensor:
        """An input that wants a gradient."""
        return torch.zeros(shape, dtype=getattr(torch, self.dtype), requires_grad=True)


BF16 = "bfloat16"
PLAIN = (
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
    Build("attention_decode", BF16, 64, True),
    Build("attention_decode", BF16, 128, True),
    Build("norm", BF16, 1024),
    Build("rotary", BF16, 64),
    Build("glu", BF16, 4096),
    Build("linear_cross_entropy", BF16, 50304),
    Build("symmetric_product", BF16, 1024),
    Build("symmetric_product", "float32", 1024, variant="tf32x3"),
)
"""Each op, and each variant of attention alone."""
MODELS = (
    # BERT and RoBERTa: padding and dropout. T5: its table beside both, and its decoder. XLNet.
    Build("attention", BF16, 64, variant="lengths"),
    Build("attention", BF16, 64, variant="lengths+dropout"),
    Build("attention", BF16, 64, variant="lengths+bucket+dropout"),
    Build("attention", BF16, 64, True, variant="bucket+dropout"),
    Build("attention", BF16, 64, variant="order+dense"),
    Build("attention", BF16, 64, variant="order+dense+dropout"),
    # ModernBERT's local layers, of packed and of padded rows. A prefix that sees itself.
    Build("attention", BF16, 64, variant="documents+window"),
    Build("attention", BF16, 64, variant="lengths+window"),
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
    # After a stream in float32, and rows that a multiprocessor hardly holds.
    Build("norm", BF16, 768, variant="layernorm"),
    Build("norm", BF16, 4096, variant="wide_stream"),
    Build("norm", BF16, 12288),
    Build("norm", BF16, 16384),
    Build("norm", BF16, 12288, variant="layernorm+wide_stream"),
    Build("norm", BF16, 16384, variant="layernorm+wide_stream"),
)
"""What models are made of: variants together, and the widest norms."""
BUILDS = PLAIN + MODELS
SAMPLE = (Build("attention", BF16, 64, True), Build("norm", BF16, 1024))


def attention(build: Build) -> None:
    """Forward and backward, with the bias's gradient where it has one."""
    from nanolm.kernels.attention.operator import attention as run  # noqa: PLC0415

    n_heads, n_groups = (8, 2) if "grouped" in build.features else (2, 2)
    masks: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for word in build.features:
        if word in MASKS:
            masks |= MASKS[word]()
        elif word in OPTIONS:
            options |= OPTIONS[word](build.causal, n_heads)
    q, k, v = (build.leaf(1, N_TOKENS, n, build.width) for n in (n_heads, n_groups, n_groups))
    out, _ = run(q, k, v, Mask(causal=build.causal, **masks), scale=0.1, **options)
    parts = vars(options["bias"]).values() if "bias" in options else ()
    wanted = [q, k, v, *(x for x in parts if isinstance(x, Tensor) and x.requires_grad)]
    torch.autograd.grad(out, wanted, out)


def attention_decode(build: Build) -> None:
    """One query of two heads a group against a cache."""
    from nanolm.kernels.attention.decode import attention_decode as run  # noqa: PLC0415

    q, k, v = (build.leaf(1, n, h, build.width) for n, h in ((1, 4), (N_TOKENS, 2), (N_TOKENS, 2)))
    run(q, k, v, Mask(causal=build.causal), scale=0.1)


def norm(build: Build) -> None:
    """RMSNorm or LayerNorm after a residual sum, whose stream autocast keeps in float32."""
    from nanolm.kernels.norm import norm as run  # noqa: PLC0415

    x, weight, residual = (build.leaf(*shape, build.width) for shape in ((64,), (), (64,)))
    if "wide_stream" in build.features:
        residual = residual.detach().float().requires_grad_()
    layernorm = "layernorm" in build.features
    bias = build.leaf(build.width) if layernorm else None
    kind = "layernorm" if layernorm else "rmsnorm"
    out, total = run(x, weight, bias, kind=kind, eps=1e-5, residual=residual)
    wanted = [x, weight, residual, *([bias] if bias is not None else [])]
    torch.autograd.grad((out, total), wanted, (out, total))


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
