"""Positions and segments as relations of a query to a key (Dai et al. 2019; Yang et al. 2019).

    score(t, s) = [(q_t + u) k_s + (q_t + w) W_r R(p_t - p_s) + (q_t + v) e(t, s)] / sqrt(K)

R is a sinusoid of the distance, sines in the first half and cosines in the second. e(t, s) is one
learned vector where the two stand in the same segment, and another where they do not, so a model
never learns what a segment is, only where it ends. Every block has its own W_r, u, w, v and e; the
vectors u, w and v (r_w, r_r and r_s in XLNet's code) stand where a query's bias would, and there is
no other: attention's projections have none.

The last two terms depend on the query, so no kernel knows them as intent: they are computed as one
bias [B, H, T, S] and added to the scores. Memory grows with the square of the row, also under a
kernel that fuses the rest.

Shapes: B batch, T queries, S keys, D model width, H heads, K head width, E distances.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nanolm.config.model import ModelConfig
from nanolm.errors import require
from nanolm.model.cache import KeyValueCache
from nanolm.model.layers import Linear, MultiHeadAttention
from nanolm.model.positions import Positions, inverse_frequencies
from nanolm.ops.bias import Bias, DenseBias
from nanolm.ops.contract import Kernels
from nanolm.ops.masks import Mask
from nanolm.registry import POSITIONS, Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """Where the queries, or the keys, of a row stand: int64, [B or 1, T]."""

    positions: Tensor
    segments: Tensor


class Relations(NamedTuple):
    """What every block needs of where queries and keys stand."""

    sinusoids_ED: Tensor
    """Of every distance that may occur."""
    distance_BTS: Tensor
    """int64 [B or 1, T, S]: which of them is the pair's."""
    differ_BTS: Tensor
    """bool [B or 1, T, S]: whether the pair stands in different segments."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelativeOptions(Options):
    """Sinusoids of the distance, read by each block with weights of its own (Dai et al. 2019)."""

    name: str = "relative"
    base: float = 10000.0
    """Ratio between the longest and the shortest wavelength."""


@POSITIONS.register("relative", options=RelativeOptions)
class Relative(Positions):
    """Distances as sinusoids; blocks with `RelativeAttention` compare queries with them."""

    bias_kind = "dense"

    def __init__(self, options: RelativeOptions, model: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        require(
            model.trunk == "two_stream",
            f"model.positions=relative is read by the blocks of model.trunk=two_stream, but "
            f"model.trunk={model.trunk}; change one of them",
        )
        require(model.d_model % 2 == 0, "model.positions=relative needs an even model.d_model")
        self.d_model, self.base = model.d_model, options.base
        self.dropout = nn.Dropout(model.dropout) if model.dropout else nn.Identity()

    def between(self, queries: Tokens, keys: Tokens, *, behind: int, ahead: int) -> Relations:
        """Relations of every query to every key; no key stands more than `behind` tokens before a
        query or `ahead` tokens after it, unless a mask hides the pair."""
        frequency_i = inverse_frequencies(self.d_model, self.base, queries.positions.device)
        distance_E = torch.arange(-ahead, behind + 1, device=queries.positions.device)
        angle_Ei = distance_E[:, None].float() * frequency_i
        sinusoids_ED = self.dropout(torch.cat([angle_Ei.sin(), angle_Ei.cos()], dim=-1))
        distance_BTS = queries.positions[:, :, None] - keys.positions[:, None, :]
        differ_BTS = queries.segments[:, :, None] != keys.segments[:, None, :]
        return Relations(sinusoids_ED, distance_BTS.clamp(-ahead, behind) + ahead, differ_BTS)


class RelativeAttention(MultiHeadAttention):
    """Attention whose scores also weigh distances and segments; keys and values come from x itself,
    or from what is given as source."""

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        kernels: Kernels,
        *,
        causal: bool,
        bias_kind: str | None,
        masks: frozenset[str],
    ) -> None:
        # Queries have u, w and v for a bias, and one of keys would add the same to all scores.
        bare = dataclasses.replace(model, bias=False)
        super().__init__(
            bare, layer, kernels, causal=causal, bias_kind=bias_kind, masks=masks, cross=True
        )
        shape = (self.n_heads, self.head_dim)
        self.scale = model.attention_scale or self.head_dim**-0.5
        self.tells_segments = model.n_segments > 0
        self.distance = Linear(model.d_model, self.n_heads * self.head_dim, kernels, bias=False)
        # u, w and v. Vectors of heads, no matrix: three dimensions tell optimizers so.
        self.vectors = nn.Parameter(torch.empty(3 if self.tells_segments else 2, *shape))
        if self.tells_segments:
            self.segments = nn.Parameter(torch.empty(2, *shape))  # the same one, another one

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
        """[B, T, D] -> [B, T, D]; `prepared` are the Relations."""
        if source_BSD is None:
            q_BTHK, k_BSGK, v_BSGK = self.project(x_BTD)
            k_BSGK = self.k_norm(k_BSGK)
        else:
            q_BTHK = self.project_queries(x_BTD)
            k_BSGK, v_BSGK = self.project_source(source_BSD)
        q_BTHK = self.q_norm(q_BTHK)
        relations = DenseBias(self.relate(q_BTHK, prepared))
        return self.read(with_bias(q_BTHK, self.vectors[0]), k_BSGK, v_BSGK, mask, relations)

    def relate(self, q_BTHK: Tensor, relations: Relations) -> Tensor:
        """[B, H, T, S]: what distances and segments add to the scores."""
        r_EHK = self.by_head(self.distance(relations.sinusoids_ED.to(q_BTHK.dtype)))
        query_BTHK = with_bias(q_BTHK, self.vectors[1])
        far_BHTE = torch.einsum("bthk,ehk->bhte", query_BTHK, r_EHK)
        batch, heads = far_BHTE.shape[:2]
        distance_BHTS = relations.distance_BTS[:, None].expand(batch, heads, -1, -1)
        scores_BHTS = far_BHTE.gather(-1, distance_BHTS)
        if self.tells_segments:
            query_BTHK = with_bias(q_BTHK, self.vectors[2])
            segments_2HK = self.segments.to(q_BTHK.dtype)
            same_BHT, other_BHT = torch.einsum("bthk,chk->cbht", query_BTHK, segments_2HK)
            differ_B1TS = relations.differ_BTS[:, None]
            scores_BHTS = scores_BHTS + torch.where(
                differ_B1TS, other_BHT[..., None], same_BHT[..., None]
            )
        return scores_BHTS * self.scale


def with_bias(q_BTHK: Tensor, bias_HK: Tensor) -> Tensor:
    """q + bias, in q's dtype."""
    return q_BTHK + bias_HK.to(q_BTHK.dtype)
