"""Checks of every op at the sizes that training has.

`nanolm kernels doctor` asks with 29 queries and heads of 16, which on a GPU are one masked tile.
Here the loop over whole tiles runs too: LENGTH is three of the largest tiles and five rows, and
some lengths are those of GPT-2 and BERT.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nanolm.ops.masks import Mask
from nanolm.ops.reference import ReferenceAttention, upcast
from nanolm.tools.kernel_check.attention_cases import Case
from nanolm.tools.kernel_check.attention_trials import spec_of, trial_of
from nanolm.tools.kernel_check.op_trials import (
    cross_entropy_trial,
    glu_trial,
    norm_trial,
    rotary_trial,
    symmetric_trial,
)
from nanolm.tools.kernel_check.trial import Trial
from tests.kernel_tools.philox import keep_mask

LENGTH = 3 * 128 + 5
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
DROPOUT, SEED = 0.1, 12345678901
KEYED = frozenset({"triton", "triton_tf32x3"})
"""Kernels of attention whose dropout is keyed."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One trial of an op, made when its turn comes.

    `reference` replaces the op's definition; `kernels` names the only kernels that it is for.
    """

    op: str
    name: str
    make: Callable[[], Trial]
    reference: Any = None
    kernels: frozenset[str] | None = None


def checks(device: str, divide: int = 1) -> Iterator[Check]:
    """All checks on a device, every size divided by a number (for a CPU)."""
    for name, case in attention_cases(divide).items():
        yield Check("attention", name, functools.partial(trial_of, case, device))
    for dtype in DTYPES:
        yield dropout_check(dtype, device, divide)
    for dtype in DTYPES:
        yield from other_checks(dtype, device, divide)


def attention_cases(divide: int = 1) -> dict[str, Case]:
    """Attention by what is special about it; bfloat16 unless the name says otherwise."""

    def case(n_queries: int = LENGTH, n_keys: int | None = None, **features: Any) -> Case:
        plain: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 4, "width": 64, "dtype": BF16}
        sizes = [max(n // divide, 1) for n in (n_queries, n_keys or n_queries)]
        window = features.pop("window", None)
        if window is not None:
            features["window"] = max(window // divide, 2)
        return Case(n_queries=sizes[0], n_keys=sizes[1], **plain | features)

    shapes = {
        "4,096 tokens": case(4096, causal=True, n_rows=1, n_heads=2, n_kv_heads=2),
        "an odd length": case(1001, causal=True),
        "256 tokens": case(256, causal=True),
        "three query heads a key head": case(777, causal=True, n_heads=9, n_kv_heads=3),
        "one key head": case(causal=True, n_heads=8, n_kv_heads=1),
        "queries over a cache": case(130, 1030, causal=True),
        "cross attention": case(70, 900, lengths=True),
        "fewer keys than queries": case(LENGTH, 200, causal=True),
        "every other feature of longer rows": case(causal=True, layout="sliced"),
        "heads first": case(causal=True, layout="heads_first"),
    }
    masks = {
        "documents": case(documents=True),
        "causal documents": case(1024, causal=True, documents=True),
        "a window both ways, documents": case(1024, window=65, documents=True),
        "a causal window": case(1024, causal=True, window=200),
        "padding": case(777, lengths=True),
        "a prefix": case(777, causal=True, prefix=True),
        "an order": case(order="loose"),
        "a strict order": case(order="strict"),
    }
    scores = {
        "ALiBi": case(causal=True, bias="alibi"),
        "T5's bias": case(causal=True, bias="bucket"),
        "T5's bias both ways": case(512, bias="bucket"),
        "a bias for all": case(bias="dense_all"),
        "a bias for each head": case(bias="dense_by_head"),
        "a bias for each row": case(bias="dense_by_row"),
        "a bias for each row and head": case(bias="dense"),
        "a soft-cap": case(causal=True, softcap=30.0),
        "a soft-cap, heads of 128": case(causal=True, softcap=30.0, width=128),
        "T5's bias, a soft-cap, padding": case(softcap=2.0, bias="bucket", lengths=True),
        "everything": case(
            causal=True, window=130, lengths=True, documents=True, prefix=True, order="loose",
            bias="dense_by_head", softcap=3.0, n_kv_heads=2, layout="sliced",
        ),
    }  # fmt: skip
    return (
        {f"GPT-2 in {DTYPES[dtype]}": case(1024, causal=True, dtype=dtype) for dtype in DTYPES}
        | {f"BERT in {DTYPES[dtype]}": case(512, dtype=dtype) for dtype in DTYPES}
        | {f"heads of {n}": case(causal=True, width=n) for n in (16, 20, 32, 80, 96, 128, 256)}
        | {f"heads of {n}, bidirectional": case(width=n) for n in (128, 256)}
        | {f"heads of {n} in fp16": case(causal=True, width=n, dtype=FP16) for n in (128, 256)}
        | {f"heads of {n} in fp32": case(causal=True, width=n, dtype=FP32) for n in (128, 256)}
        | shapes
        | masks
        | scores
        | {
            f"{name} in {DTYPES[dtype]}": dataclasses.replace(scores[name], dtype=dtype)
            for name in ("T5's bias", "everything")
            for dtype in (FP16, FP32)
        }
        | decode_cases(divide)
    )


def decode_cases(divide: int) -> dict[str, Case]:
    """One query or a few against a cache of up to 4,097 keys."""

    def case(n_keys: int, **features: Any) -> Case:
        plain: dict[str, Any] = {"n_heads": 12, "n_kv_heads": 3, "width": 64, "dtype": BF16}
        plain |= {"n_queries": 1, "causal": True, "phase": "decode"}
        return Case(n_keys=max(n_keys // divide, 2), **plain | features)

    return {
        "decoding, 4,097 keys": case(4097),
        "decoding in fp32": case(4097, dtype=FP32),
        "decoding in fp16, heads of 128": case(1024, width=128, dtype=FP16),
        "decoding, heads of 256": case(600, width=256, n_heads=4, n_kv_heads=1),
        "decoding three tokens": case(1500, n_queries=3),
        "decoding in a window, padding": case(2048, window=300, lengths=True),
        "decoding with ALiBi": case(1000, bias="alibi"),
        "decoding with T5's bias": case(1000, bias="bucket"),
        "decoding with a soft-cap": case(1000, softcap=30.0),
    }


class KeyedReference(ReferenceAttention):
    """The definition with the Triton kernels' dropout: a function of (seed, b, h, t, s) alone."""

    def run(  # type: ignore[override]  # the seed is needed, and no bias is known
        self,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        v_BSGK: Tensor,
        mask: Mask,
        *,
        scale: float,
        dropout: float,
        seed: Tensor,
    ) -> Tensor:
        """Attention [B, T, H, K], its weights kept or not as `philox.keep_mask` says."""
        weights, _ = self.weights(q_BTHK, k_BSGK, mask, bias=None, scale=scale, softcap=None)
        b, h, t, s = weights.shape
        keep = torch.from_numpy(keep_mask(int(seed), dropout, (b, h, t, s)))
        weights_BHTS = torch.where(keep.to(weights.device), weights / (1 - dropout), 0.0)
        return (weights_BHTS @ upcast(v_BSGK).transpose(1, 2)).transpose(1, 2).to(q_BTHK.dtype)


def dropout_check(dtype: torch.dtype, device: str, divide: int) -> Check:
    """Causal attention with keyed dropout."""
    length = max(LENGTH // divide, 1)
    sizes: dict[str, Any] = {"n_queries": length, "n_keys": length, "n_heads": 2, "n_kv_heads": 2}
    case = Case(causal=True, width=64, dtype=dtype, **sizes)

    def make() -> Trial:
        plain = trial_of(case, device)
        seed, mask = torch.tensor([SEED], device=device), Mask(causal=True)

        def run(kernel: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
            q, k, v = given["q"], given["k"], given["v"]
            options = {"scale": case.width**-0.5, "dropout": DROPOUT, "seed": seed}
            return {"out": kernel.run(q, k, v, mask, **options)}

        spec = dataclasses.replace(spec_of(case, device), dropout=DROPOUT)
        return dataclasses.replace(plain, spec=spec, run=run)

    return Check("attention", f"dropout in {DTYPES[dtype]}", make, KeyedReference(), KEYED)


def other_checks(dtype: torch.dtype, device: str, divide: int) -> Iterator[Check]:
    """The other ops in one dtype."""
    common: dict[str, Any] = {"dtype": dtype, "device": device}

    def size(number: int) -> int:
        return max(number // divide, 3)

    def check(op: str, make: Callable[..., Trial], *words: Any, **options: Any) -> Check:
        shown = [*map(str, words), *(f"{k}={v}" for k, v in options.items() if v)]
        name = f"{' '.join(shown)} in {DTYPES[dtype]}"
        return Check(op, name, lambda: make(*words, **options, **common))

    for kind in ("layernorm", "rmsnorm"):
        for rows, width in ((40_000, 768), (257, 1000), (8192, 4096), (600, 16_384)):
            for residual in (False, True):
                given = {"bias": kind == "layernorm", "residual": residual}
                yield check("norm", norm_trial, kind, size(rows), size(width), **given)
    plain: dict[str, Any] = {"bias": False, "softcap": None, "label_smoothing": 0.0, "z_loss": 0.0}
    busy: dict[str, Any] = {"bias": True, "softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4}
    for tokens, vocabulary, options in ((3000, 50_257, plain), (1500, 50_304, busy)):
        yield check(
            "linear_cross_entropy", cross_entropy_trial, size(tokens), size(vocabulary),
            width=size(768), **options,
        )  # fmt: skip
    for kind in ("swiglu", "geglu"):
        for rows, width in ((8192, 3072), (777, 1411)):
            yield check("glu", glu_trial, kind, size(rows), size(width))
    for heads, width, pairs, per_row in (
        (12, 64, 32, False),
        (8, 128, 64, True),
        (4, 80, 20, True),
    ):
        yield check(
            "rotary", rotary_trial, heads, width, pairs, per_row=per_row, n_tokens=size(1025)
        )
    for rows, columns in ((768, 3072), (3072, 768), (1000, 1000)):
        yield check("symmetric_product", symmetric_trial, size(rows), size(columns))
