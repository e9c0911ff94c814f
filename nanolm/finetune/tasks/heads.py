"""Heads of tasks: what reads whole sequences, words or spans out of hidden states.

    sequence    pooled -> W2 act(W1 h): classes, scores      classify, regress, choose, rank
                or W h, or W norm(act(W1 h)): `PooledLogits`
    words       hidden of a word's first piece -> tags       tag
    span        hidden -> start and end scores               read
    embedding   pooled -> unit vector                        embed

Pooling follows the trunk: an encoder's mean (or <cls>), a decoder's last token, which alone has
seen everything, and that of two streams, which is its <cls>. Sequences lie packed or padded in the
rectangle; `Layout` says where, so a head never asks which.

Shapes: B rows, T tokens of a row, S sequences, M tokens of all sequences, D model width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanolm.config.model import ModelConfig
from nanolm.errors import require
from nanolm.finetune.tasks.frames import frame_of
from nanolm.model.heads import Layout, Transform
from nanolm.model.trunk import Trunk
from nanolm.ops.contract import Kernels
from nanolm.registry import HEADS

Pooling = Literal["auto", "cls", "mean", "last"]
Activation = Literal["tanh", "relu"]
PooledHead = Literal["layer", "linear", "transform"]
WordHead = Literal["linear", "transform"]
POOLED_HEADS: dict[PooledHead, str] = {
    "layer": "sequence",
    "linear": "sequence_linear",
    "transform": "sequence_transform",
}
"""The registered kind of each head on pooled states."""


def pooling_of(pooling: Pooling, trunk: str) -> Pooling:
    """What `auto` means for a trunk; raises UserError for cls where it does not come first."""
    if pooling == "auto":
        return frame_of(trunk).pooling
    require(
        not (pooling == "cls" and trunk == "two_stream"),
        "objective.pooling=cls reads the first token, and that of model.trunk=two_stream is none: "
        "its <cls> stands last; use last or mean",
    )
    require(
        not (pooling == "cls" and trunk == "decoder"),
        "objective.pooling=cls cannot go with a decoder: its first token has seen nothing; use "
        "last or mean",
    )
    return pooling


def group_sizes(owner_M: Tensor, n_groups: int) -> Tensor:
    """int64 [n_groups]: how many of M things each group owns. `torch.bincount` counts the same, but
    makes the host wait for the device. Whole numbers add up to the same in any order."""
    return owner_M.new_zeros(n_groups).index_add(0, owner_M, torch.ones_like(owner_M))


def group_sums(values_M: Tensor, owner_M: Tensor, n_groups: int) -> Tensor:
    """[n_groups, …]: the sum of every group's values, which lie group by group (`owner_M` ascends).

    Each sum is taken in one piece and in order, so it is the same every time; `index_add` adds
    atomically on CUDA, in another order in every run.
    """
    sizes = group_sizes(owner_M, n_groups)
    # Unsafe: it does not make the host wait to see whether the sizes add up.
    return torch.segment_reduce(values_M, "sum", lengths=sizes, axis=0, unsafe=True)


def pool(hidden_BTD: Tensor, layout: Layout, pooling: Pooling) -> Tensor:
    """One vector per sequence, [S, D]: its first hidden state, its last, or their mean."""
    hidden_ND = hidden_BTD.flatten(0, 1)
    if pooling != "mean":
        return hidden_ND[layout.first_S if pooling == "cls" else layout.last_S]
    tokens_MD = hidden_ND[layout.index_M].float()
    total_SD = group_sums(tokens_MD, layout.owner_M, len(layout.first_S))
    lengths_S = group_sizes(layout.owner_M, len(layout.first_S))
    return total_SD / lengths_S[:, None].clamp(min=1)


class PooledLogits(nn.Module):
    """Base of heads that decide about a whole sequence: W dropout(features(pool(h)))."""

    pooling: Pooling
    dropout: nn.Dropout
    out: nn.Linear

    def features(self, pooled_SD: Tensor) -> Tensor:
        """What the decision reads of one vector per sequence, [S, D]."""
        raise NotImplementedError

    def forward(self, hidden_BTD: Tensor, layout: Layout) -> Tensor:
        """[B, T, D] -> [S, C], float32."""
        return self.decide(pool(hidden_BTD, layout, self.pooling).to(hidden_BTD.dtype))

    def decide(self, pooled_SD: Tensor) -> Tensor:
        """One vector per sequence -> [S, C], float32."""
        return self.out(self.dropout(self.features(pooled_SD))).float()


@HEADS.register("sequence")
class SequenceLogits(PooledLogits):
    """W2 dropout(act(W1 pool(h))): BERT's head (Devlin et al. 2019, in their code; section 4.1 has
    W2 alone) on any pooling, with tanh, or with the ReLU of DistilBERT's (Sanh et al. 2019, in
    theirs)."""

    ACTIVATIONS: ClassVar[dict[str, Callable[[Tensor], Tensor]]] = {
        "tanh": torch.tanh,
        "relu": F.relu,
    }

    def __init__(
        self,
        model: ModelConfig,
        kernels: Kernels,
        trunk: Trunk,
        *,
        n_classes: int,
        pooling: Pooling,
        dropout: float = 0.0,
        activation: Activation = "tanh",
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.activation = self.ACTIVATIONS[activation]
        self.dense = nn.Linear(model.d_model, model.d_model)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(model.d_model, n_classes)

    def features(self, pooled_SD: Tensor) -> Tensor:
        """act(W1 h)."""
        return self.activation(self.dense(pooled_SD))


@HEADS.register("sequence_linear")
class LinearLogits(PooledLogits):
    """W dropout(pool(h)) without a bias, as transformers' decoders decide (GPT-2, Llama, Qwen3)."""

    def __init__(
        self,
        model: ModelConfig,
        kernels: Kernels,
        trunk: Trunk,
        *,
        n_classes: int,
        pooling: Pooling,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(model.d_model, n_classes, bias=False)

    def features(self, pooled_SD: Tensor) -> Tensor:
        """The pooled state as it is."""
        return pooled_SD


@HEADS.register("sequence_transform")
class TransformedLogits(PooledLogits):
    """W2 dropout(norm(act(W1 pool(h)))), as ModernBERT decides (Warner et al. 2024, in their
    code)."""

    def __init__(
        self,
        model: ModelConfig,
        kernels: Kernels,
        trunk: Trunk,
        *,
        n_classes: int,
        pooling: Pooling,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.transform = transform_of(model, kernels)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(model.d_model, n_classes)

    def features(self, pooled_SD: Tensor) -> Tensor:
        """norm(act(W1 h))."""
        return self.transform(pooled_SD)


def transform_of(model: ModelConfig, kernels: Kernels) -> Transform:
    """What stands before BERT's vocabulary; raises UserError where embeddings are narrow, since it
    brings states to their width."""
    require(
        model.embedding_width is None,
        f"objective.head=transform is as wide as the embeddings, and this base has "
        f"model.embedding_width={model.embedding_width}; use another objective.head",
    )
    return Transform(model, kernels)


@HEADS.register("words")
class WordLogits(nn.Module):
    """W dropout(h) at the chosen tokens (Devlin et al. 2019, section 5.3: a word's first piece)."""

    def __init__(
        self,
        model: ModelConfig,
        kernels: Kernels,
        trunk: Trunk,
        *,
        n_classes: int,
        dropout: float = 0.0,
        transform: bool = False,
    ) -> None:
        super().__init__()
        self.transform = transform_of(model, kernels) if transform else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(model.d_model, n_classes)

    def forward(self, hidden_BTD: Tensor, index_W: Tensor) -> Tensor:
        """Hidden states at the flat places index_W -> [W, C], float32."""
        hidden_WD = self.transform(hidden_BTD.flatten(0, 1)[index_W])
        return self.out(self.dropout(hidden_WD)).float()


@HEADS.register("span")
class SpanLogits(nn.Module):
    """Start and end scores of every token (Devlin et al. 2019, section 4.2)."""

    def __init__(
        self, model: ModelConfig, kernels: Kernels, trunk: Trunk, *, transform: bool = False
    ) -> None:
        super().__init__()
        self.transform = transform_of(model, kernels) if transform else nn.Identity()
        self.out = nn.Linear(model.d_model, 2)

    def forward(self, hidden_BTD: Tensor, index_M: Tensor) -> Tensor:
        """[M, 2] for the tokens at the flat places index_M, float32."""
        return self.out(self.transform(hidden_BTD.flatten(0, 1)[index_M])).float()


@HEADS.register("embedding")
class Embedding(nn.Module):
    """A unit vector per sequence (Reimers & Gurevych 2019), projected when it has a width."""

    def __init__(
        self,
        model: ModelConfig,
        kernels: Kernels,
        trunk: Trunk,
        *,
        pooling: Pooling,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.project = nn.Linear(model.d_model, width) if width else nn.Identity()

    def forward(self, hidden_BTD: Tensor, layout: Layout) -> Tensor:
        """[B, T, D] -> [S, width or D], of length 1, float32."""
        pooled_SD = pool(hidden_BTD, layout, self.pooling).to(hidden_BTD.dtype)
        return F.normalize(self.project(pooled_SD).float(), dim=-1)
