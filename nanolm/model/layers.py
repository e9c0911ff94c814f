"""The Transformer's layers: Linear, Norm, MultiHeadAttention, FeedForward.

    Attention(x)    softmax(q k^T / sqrt(K)) v per head, then a projection
    FeedForward(x)  W2 act(W1 x)

In a batch's journey: Block.forward (blocks.py) -> MultiHeadAttention.forward -> the attention
kernel that `ops.choose` picked when the model was built -> FeedForward.forward.

Shapes: B batch, T tokens (queries), S source tokens (keys), D model width, H query heads, G
key/value heads, K head width, F feed-forward width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanolm.config.model import ModelConfig
from nanolm.model.cache import KeyValueCache
from nanolm.model.positions import Positions
from nanolm.model.rederive import keeping_input
from nanolm.ops.bias import Bias
from nanolm.ops.contract import AttentionSpec, GluSpec, Kernels, LinearSpec, NormSpec
from nanolm.ops.masks import Mask


class Linear(nn.Linear):
    """x W^T + b, by the kernel chosen at build."""

    def __init__(self, n_in: int, n_out: int, kernels: Kernels, *, bias: bool) -> None:
        super().__init__(n_in, n_out, bias=bias)
        # An op only because a CPU without bfloat16 instructions is slow at torch's bfloat16 product
        # (ops/cpu_bf16.py). It may not leave the core: a Linear that asked for its kernel only on
        # such a CPU would be a branch on the device here, and one that was swapped from outside
        # would have to be found again in every layer, head and adapter.
        self.kernel = kernels.choose("linear", LinearSpec)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n_in] -> [..., n_out]."""
        return self.kernel.run(x, self.weight, self.bias)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, by the kernel chosen at build."""

    def __init__(self, model: ModelConfig, kernels: Kernels, width: int | None = None) -> None:
        super().__init__()
        width = width or model.d_model
        has_bias = model.norm == "layernorm" and model.norm_bias
        self.kind, self.eps = model.norm, model.norm_eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if has_bias else None
        self.kernel = kernels.choose("norm", NormSpec, kind=self.kind, width=width, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        """norm(x), in x's shape."""
        return self.kernel.run(x, self.weight, self.bias, kind=self.kind, eps=self.eps)[0]

    def after_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual): what a kernel can fuse."""
        return self.kernel.run(
            x, self.weight, self.bias, kind=self.kind, eps=self.eps, residual=residual
        )


class HeadNorm(nn.Module):
    """RMSNorm of every query or key head, against logits that grow.

    Dehghani et al. 2023, section 2, normalise queries and keys too, with LayerNorm.
    """

    def __init__(self, model: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        width = model.head_width
        self.weight, self.eps = nn.Parameter(torch.ones(width)), model.norm_eps
        self.kernel = kernels.choose("norm", NormSpec, kind="rmsnorm", width=width)

    def forward(self, x_BTHK: Tensor) -> Tensor:
        """Each head's vector divided by its root mean square, in the input's shape and dtype."""
        y_BTHK = self.kernel.run(x_BTHK, self.weight, None, kind="rmsnorm", eps=self.eps)[0]
        return y_BTHK.to(x_BTHK.dtype)


class MultiHeadAttention(nn.Module):
    """softmax(q k^T / sqrt(K)) v per head, concatenated and projected; self or cross.

    One weight holds the rows of queries, keys and values, in this order. With `source` the queries
    come from x and the keys and values from source (cross-attention: no causality, no rotation); a
    cache keeps a source's keys and values, which are the same for every token that is written.
    """

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        kernels: Kernels,
        *,
        causal: bool,
        bias_kind: str | None,
        masks: frozenset[str],
        cross: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.causal = layer, causal
        self.window = None if cross else model.window[layer % len(model.window)]
        self.n_heads, self.n_kv_heads = model.n_heads, model.kv_heads
        self.head_dim = model.head_width
        # One product instead of three: x is read once, and a wide matrix keeps a processor busier
        # than three narrow ones.
        n_rows = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        self.qkv = Linear(model.d_model, n_rows, kernels, bias=model.bias)
        self.out = Linear(self.n_heads * self.head_dim, model.d_model, kernels, bias=model.bias)
        self.q_norm = HeadNorm(model, kernels) if model.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(model, kernels) if model.qk_norm else nn.Identity()
        choose = functools.partial(
            kernels.choose,
            "attention",
            AttentionSpec,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            causal=causal,
            window=self.window,
            masks=masks,
            bias=bias_kind,
            softcap=model.attention_softcap,
            dropout=model.attention_dropout,
            cross=cross,
        )
        # q . k is a sum of K products. Where the entries have variance 1 the sum has variance K,
        # and softmax of scores that far apart is nearly one-hot, with hardly any gradient; divided
        # by sqrt(K) the scores have variance 1 for every K (Vaswani et al. 2017, section 3.2.1).
        # T5 does not divide scores by sqrt(K): its queries start smaller by that factor, which is
        # the same function at first, and under Adafactor, whose steps are relative to a weight's
        # size, the same training (Raffel et al. 2020, in their code). Its published weights hold
        # the factor, so a scale of 1 reads and writes them as they are.
        scale = model.attention_scale or self.head_dim**-0.5
        constants = {"scale": scale, "softcap": model.attention_softcap}
        self.attend = functools.partial(choose().run, **constants)
        # A model built to generate also has a kernel for one query against a cache.
        decode = choose(phase="decode").run if kernels.phase == "prefill" else None
        self.attend_to_cache = functools.partial(decode, **constants) if decode else self.attend
        self.dropout = model.attention_dropout

    def forward(
        self,
        x_BTD: Tensor,
        mask: Mask,
        positions: Positions,
        prepared: Any,
        bias: Bias | None,
        cache: KeyValueCache | None = None,
        source_BSD: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if source_BSD is None:
            q_BTHK, k_BSGK, v_BSGK = self.project(x_BTD)
            # Normed before the rotation, which keeps lengths: what the norm fixed stays fixed, and
            # its gains do not depend on the position.
            q_BTHK, k_BSGK = self.q_norm(q_BTHK), self.k_norm(k_BSGK)
            q_BTHK, k_BSGK = positions.rotate(q_BTHK, k_BSGK, prepared, self.layer)
            if cache is not None:
                # Cached after the rotation: a key's position never changes, so it is rotated once
                # and not again for every token that is written.
                k_BSGK, v_BSGK = cache.extend(self.layer, k_BSGK, v_BSGK)
        else:
            q_BTHK = self.q_norm(self.project_queries(x_BTD))
            if cache is None:
                k_BSGK, v_BSGK = self.project_source(source_BSD)
            else:
                project = functools.partial(self.project_source, source_BSD)
                k_BSGK, v_BSGK = cache.of_source(self.layer, project)
        return self.read(q_BTHK, k_BSGK, v_BSGK, mask, bias)

    def read(
        self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Mask, bias: Bias | None
    ) -> Tensor:
        """[B, T, D]: what the queries find, projected."""
        # The batch brings what it alone knows (lengths, documents); whether it is causal and how
        # far a window reaches belongs to the layer.
        mask = mask.at(causal=self.causal, window=self.window)
        dropout = self.dropout if self.training else 0.0
        # A single query leaves most of a GPU idle in the kernel for many, which gives each program
        # a tile of queries; the decoding kernel divides the keys instead.
        attend = self.attend_to_cache if q_BTHK.shape[1] == 1 else self.attend
        out_BTHK = attend(q_BTHK, k_BSGK, v_BSGK, mask, bias=bias, dropout=dropout)
        return self.out(out_BTHK.flatten(2))

    def project(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """Queries [B, T, H, K], keys and values [B, T, G, K]."""
        n_query, n_kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return tuple(map(self.by_head, self.qkv(x_BTD).split([n_query, n_kv, n_kv], dim=-1)))

    def project_queries(self, x_BTD: Tensor) -> Tensor:
        """Queries [B, T, H, K], alone."""
        n_query = self.n_heads * self.head_dim
        # Queries come from x, keys and values from the source: the same weight is used by rows.
        bias = None if self.qkv.bias is None else self.qkv.bias[:n_query]
        return self.by_head(self.qkv.kernel.run(x_BTD, self.qkv.weight[:n_query], bias))

    def project_source(self, source_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, G, K] of a source, the keys normed."""
        n_query = self.n_heads * self.head_dim
        bias = None if self.qkv.bias is None else self.qkv.bias[n_query:]
        both = self.qkv.kernel.run(source_BSD, self.qkv.weight[n_query:], bias)
        k_BSGK, v_BSGK = map(self.by_head, both.chunk(2, dim=-1))
        return self.k_norm(k_BSGK), v_BSGK

    def by_head(self, x: Tensor) -> Tensor:
        """[..., heads x K] -> [..., heads, K]."""
        return x.unflatten(-1, (-1, self.head_dim))


class FeedForward(nn.Module):
    """W2 act(W1 x) (Vaswani et al. 2017, section 3.3), act = GELU, ReLU or ReLU^2 (So et al.
    2021)."""

    ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": F.gelu,
        "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda x: F.relu(x).square(),
    }

    def __init__(self, model: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.up = Linear(model.d_model, model.ff_width, kernels, bias=model.bias)
        self.activation = self.ACTIVATIONS[model.feed_forward]
        self.keeps_input = True  # of the activation, not its output, for the backward pass
        self.down = Linear(model.ff_width, model.d_model, kernels, bias=model.bias)
        rate = model.feed_forward_dropout
        self.dropout = nn.Dropout(rate) if rate else nn.Identity()

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        # The activation's output is as wide as anything that a block keeps, and cheap to compute
        # again from its input, which is kept anyhow. It may not leave the core for a CPU plug-in:
        # the switch is one of memory, for every device, and what to keep is decided in the forward
        # pass, where nothing outside of it can look.
        if self.keeps_input:
            return keeping_input(self.write, self.activation, self.up(x_BTD))
        return self.write(self.activation(self.up(x_BTD)))

    def write(self, inner_BTF: Tensor) -> Tensor:
        """[B, T, F] -> [B, T, D]: what the activation has left, dropped at times, projected."""
        return self.down(self.dropout(inner_BTF))


def geglu_tanh(gate_up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up, [..., 2F] -> [..., F]: T5 v1.1's, which differs from exact GELU by up
    to 5e-4 a gate. No kernel fuses it."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


class GatedFeedForward(nn.Module):
    """W2 (act(Wg x) * Wu x): SwiGLU and GeGLU (Shazeer 2020). Wg stands above Wu in one weight."""

    UNFUSED = {"geglu_tanh": geglu_tanh}

    def __init__(self, model: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        # Both halves in one weight: one product reads x once, and a kernel can fuse act(gate) * up
        # from its output.
        self.gate_up = Linear(model.d_model, 2 * model.ff_width, kernels, bias=model.bias)
        self.down = Linear(model.ff_width, model.d_model, kernels, bias=model.bias)
        self.glu = self.UNFUSED.get(model.feed_forward) or self.fused(model, kernels)
        rate = model.feed_forward_dropout
        self.dropout = nn.Dropout(rate) if rate else nn.Identity()

    def fused(self, model: ModelConfig, kernels: Kernels) -> Any:
        """The kernel of this kind."""
        kernel = kernels.choose("glu", GluSpec, kind=model.feed_forward, width=model.ff_width)
        return functools.partial(kernel.run, kind=model.feed_forward)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.down(self.dropout(self.glu(self.gate_up(x_BTD))))
