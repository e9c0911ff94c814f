"""One call of attention, as PyTorch's operators and the kernels take it.

An operator may take nothing but tensors and scalars, so `flatten` turns a Mask and a Bias into the
flat arguments that SCHEMA lists; `Call` turns these into the kernels' named tuples. All operators
of attention (attention/operator.py, decode.py) take the same arguments in the same order.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from nanolm.kernels.attention import scores
from nanolm.kernels.launch import (
    Launch,
    accumulator,
    attention_launch,
    columns_of,
    device_guard,
    wide_dtype,
)
from nanolm.kernels.tiles import View
from nanolm.ops.bias import AlibiBias, Bias, BucketBias
from nanolm.ops.masks import Mask, Ranges
from nanolm.ops.matching import with_ranges

LOG2E = 1 / math.log(2)
PRECISIONS = ("ieee", "tf32x3")
SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? buckets, Tensor? key_lengths, "
    "Tensor? documents, Tensor? key_documents, Tensor? prefix_lengths, Tensor? order, "
    "Tensor? key_order, Tensor? key_ranges, Tensor? query_ranges, Tensor? seed, str bias_kind, "
    "bool causal, bool strict, SymInt? window, float scale, float? softcap, float dropout, "
    "str precision"
)
"""Of every operator of attention: q, k, v, the fields of Tensors, the fields of Options."""


class Tensors(NamedTuple):
    """The operators' optional tensors, in order; masks as in nanolm.ops.masks, rows contiguous.

    bias          slopes [H], or table [buckets, H], or values [B or 1, H or 1, T, S]
    buckets       int32 [T + S - 1]: the bucket of each distance, 1 - T first
    key_ranges    int32 [B, 2, T] of nanolm.ops.masks.Ranges, None without documents and order …
    query_ranges  … and [B, 2, S], also None where no gradient was wanted
    seed          int64 [1], for dropout
    """

    bias: Tensor | None
    buckets: Tensor | None
    key_lengths: Tensor | None
    documents: Tensor | None
    key_documents: Tensor | None
    prefix_lengths: Tensor | None
    order: Tensor | None
    key_order: Tensor | None
    key_ranges: Tensor | None
    query_ranges: Tensor | None
    seed: Tensor | None


class Options(NamedTuple):
    """The operators' scalars, in their order.

    precision  of float32 products: "ieee", or "tf32x3", three TF32 products on the tensor cores
               that together keep about 21 of 23 bits; 16-bit products are exact either way
    """

    bias_kind: str
    causal: bool
    strict: bool
    window: int | None
    scale: float
    softcap: float | None
    dropout: float
    precision: str


class Call:
    """One call's arguments, converted once and passed to several kernels.

    Raises ValueError when q, k and v (after autocast, where it is on) differ in dtype.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(
                f"queries are {q.dtype}, keys {k.dtype}, values {v.dtype}: they must have one dtype"
            )
        self.tensors = tensors = Tensors(*rest[: len(Tensors._fields)])
        self.options = options = Options(*rest[len(Tensors._fields) :])
        self.n_rows, self.n_queries, self.n_heads, self.width = q.shape
        self.n_keys, self.n_groups = k.shape[1:3]
        self.q = q
        self.inputs = (view(q), view(k), view(v))
        self.columns = columns_of(self.width)
        self.shape = scores.Shape(self.n_queries, self.n_keys, self.n_heads)
        self.masks = scores.Masks(options.window, *tensors[2:-1])
        n_distances = self.n_queries + self.n_keys - 1
        self.bias = kernel_bias(options.bias_kind, tensors, n_distances)
        softcap = options.softcap or 1.0
        self.scores = scores.Scores(options.scale * LOG2E, softcap * LOG2E, options.scale / softcap)
        self.dropout = scores.Dropout(None, None, None)
        if tensors.seed is not None:
            # A decision has 16 bits. None reaches the threshold of p = 1, which keeps nothing.
            p = options.dropout
            scale = 1 / (1 - p) if p < 1 else 0.0
            self.dropout = scores.Dropout(tensors.seed, round(p * 2**16), scale)
        self.constants = {
            "GROUP": self.n_heads // self.n_groups,
            "WIDTH": self.width,
            "COLUMNS": self.columns,
            "CAUSAL": options.causal,
            "STRICT": options.strict,
            "BIAS": options.bias_kind,
            "SOFTCAP": options.softcap is not None,
            # Triton's default for float32, TF32, keeps 10 of 23 bits.
            "PRECISION": options.precision if q.dtype == torch.float32 else "ieee",
            "ACCUMULATE": accumulator(q.dtype),
        }

    @property
    def problem(self) -> tuple:
        """What every kernel takes after its tensors."""
        return self.shape, self.masks, self.bias, self.scores, self.dropout

    @property
    def words(self) -> frozenset[str]:
        """What of the call takes registers, in the words of the launch tables."""
        options, (window, *others) = self.options, self.masks
        present = {
            "grouped": self.n_heads > self.n_groups,
            "window": window is not None,
            "numbers": any(other is not None for other in others),
            "ranges": self.masks.key_ranges is not None,
            options.bias_kind: options.bias_kind != "none",
            "softcap": options.softcap is not None,
            "dropout": self.tensors.seed is not None,
        }
        return frozenset(word for word, there in present.items() if there)

    def tile(self, kind: str) -> Launch:
        """Tile sizes, warps and stages of one kernel."""
        return attention_launch(kind, self.q.device, self.columns, self.q.dtype, self.words)

    def start(self, kernel: Any, n_programs: int, *arguments: Any, **constants: Any) -> None:
        """Launches a kernel, unless there is nothing for it to do."""
        if n_programs > 0:
            with device_guard(self.q):
                kernel[(n_programs,)](*arguments, **self.constants, **constants)


def view(x_BTHK: Tensor) -> View:
    """A tensor as the kernels see it, copied only if a tile's offsets would need 64 bits."""
    steps = zip(x_BTHK.shape[1:], x_BTHK.stride()[1:], strict=True)
    if any(length > 1 and stride * 256 >= 2**31 for length, stride in steps):
        x_BTHK = x_BTHK.contiguous()
    return View(x_BTHK, *x_BTHK.stride())


def kernel_bias(bias_kind: str, tensors: Tensors, n_distances: int) -> scores.Bias:
    """The bias as the kernels read it; a T5 table is spread out by distance first."""
    bias = tensors.bias
    if bias_kind == "none" or bias is None:
        return scores.Bias(None, None, None, None, None)
    if bias_kind == "dense":
        strides = [0 if n == 1 else d for n, d in zip(bias.shape, bias.stride(), strict=True)]
        return scores.Bias(bias, *strides)
    if bias_kind == "bucket":
        buckets = cast(Tensor, tensors.buckets)
        bias = bias[buckets[:n_distances].long()].t()
    return scores.Bias(bias.contiguous(), None, None, None, None)


def product_flops(q_shape: Any, k_shape: Any) -> int:
    """Two products of [T, K] by [K, S] a head; masks do not lessen it, as in PyTorch's formulas."""
    n_rows, n_queries, n_heads, width = q_shape
    return 4 * n_rows * n_heads * n_queries * k_shape[1] * width


def empty_outputs(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, K], lse [B, H, T]) of the right shape, not computed."""
    n_rows, n_queries, n_heads, _width = q.shape
    lse = q.new_empty((n_rows, n_heads, n_queries), dtype=wide_dtype(q.dtype))
    return q.new_empty(q.shape), lse


def check(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, precision: str) -> None:
    """Raises ValueError for shapes that do not fit together and for an unknown precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} of float32 products: choose from {PRECISIONS}")
    if k_BSGK.shape != v_BSGK.shape:
        raise ValueError(f"keys {tuple(k_BSGK.shape)} and values {tuple(v_BSGK.shape)} differ")
    if (q_BTHK.shape[0], q_BTHK.shape[3]) != (k_BSGK.shape[0], k_BSGK.shape[3]):
        raise ValueError(f"queries {tuple(q_BTHK.shape)} do not fit keys {tuple(k_BSGK.shape)}")
    if q_BTHK.shape[2] % k_BSGK.shape[2] != 0:
        raise ValueError(f"{k_BSGK.shape[2]} key heads do not divide {q_BTHK.shape[2]} query heads")


def flatten(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    mask: Mask,
    bias: Bias | None,
    *,
    scale: float,
    softcap: float | None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    precision: str = "ieee",
) -> tuple:
    """All arguments of the operators, as SCHEMA lists them.

    Raises ValueError for shapes that do not fit together.
    """
    check(q_BTHK, k_BSGK, v_BSGK, precision)
    n_rows, n_queries = q_BTHK.shape[:2]
    n_keys = k_BSGK.shape[1]

    def rows(x: Tensor | None, *shape: int) -> Tensor | None:
        return None if x is None else x.expand(n_rows, *shape).contiguous()

    values, buckets, kind = flat_bias(bias, n_queries, n_keys, q_BTHK.device)
    # A model finds them once a batch (Stack.forward); whoever gives a bare mask pays at each call.
    ranges = with_ranges(mask).ranges or Ranges(None, None)
    key_documents = mask.documents if mask.key_documents is None else mask.key_documents
    key_order = mask.order if mask.key_order is None else mask.key_order
    tensors = Tensors(
        values,
        buckets,
        rows(mask.key_lengths),
        rows(mask.documents, n_queries),
        rows(key_documents, n_keys) if mask.documents is not None else None,
        rows(mask.prefix_lengths) if mask.causal else None,
        rows(mask.order, n_queries),
        rows(key_order, n_keys) if mask.order is not None else None,
        rows(ranges.keys, 2, n_queries),
        rows(ranges.queries, 2, n_keys),
        seed,
    )
    options = Options(
        kind, mask.causal, mask.strict, mask.window, scale, softcap, dropout, precision
    )
    return q_BTHK, k_BSGK, v_BSGK, *tensors, *options


def flat_bias(
    bias: Bias | None, n_queries: int, n_keys: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None, str]:
    """(values, buckets, kind) of a bias, as Tensors describes them."""
    if bias is None:
        return None, None, "none"
    if isinstance(bias, AlibiBias):
        if bias.slopes_H.requires_grad:
            raise ValueError(
                "the Triton kernel takes ALiBi slopes as constants, not as parameters; a position "
                "encoding whose slopes learn says so: bias_kind = 'learned_alibi'"
            )
        return bias.slopes_H, None, "alibi"
    if isinstance(bias, BucketBias):
        distance = torch.arange(1 - n_queries, n_keys, device=device)
        return bias.table_NH, bias.buckets(distance).int(), "bucket"
    values = bias.values  # those that hide are seen to in the kernel, without a copy
    values = values.reshape([1] * (4 - values.ndim) + list(values.shape))
    return values.expand(-1, -1, n_queries, n_keys), None, "dense"
