"""Heads: what reads the hidden states. A head is named by the objective that needs it.

    token_logits   hidden -> vocabulary logits or their loss     CLM, MLM
    pooled         first token -> logits                         NSP, SOP, classification

Shapes: B batch, T tokens, N gathered tokens, D model width, V vocabulary, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanolm.config.model import ModelConfig
from nanolm.errors import require
from nanolm.model.layers import FeedForward, Linear, Norm
from nanolm.model.trunk import Trunk
from nanolm.ops.contract import CrossEntropySpec, Kernels
from nanolm.ops.reference import CrossEntropyOutput
from nanolm.registry import HEADS


class HeadRequest(NamedTuple):
    """A head that an objective needs: the registered kind and its keyword options."""

    kind: str
    options: dict


class Layout(NamedTuple):
    """Where the sequences of a batch lie, in the flattened B x T."""

    index_M: Tensor
    """Flat place of every token, sequence by sequence."""
    owner_M: Tensor
    """The sequence that each of them belongs to."""
    first_S: Tensor
    """Flat place of each sequence's first token."""
    last_S: Tensor
    """Flat place of each sequence's last token."""


class Transform(nn.Module):
    """norm(act(W h)): what BERT puts before the vocabulary (Devlin et al. 2019, in its code); as
    wide as the embeddings (Lan et al. 2020, in theirs)."""

    def __init__(self, model: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        width = model.embedded_width
        self.dense = Linear(model.d_model, width, kernels, bias=model.bias)
        self.activation = FeedForward.ACTIVATIONS[model.head_activation]
        self.norm = Norm(model, kernels, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., E], E the embeddings' width."""
        return self.norm(self.activation(self.dense(hidden)))


@HEADS.register("token_logits")
class TokenLogits(nn.Module):
    """softcap(W h + b) with W tied to the token embedding or not (Press & Wolf 2017); h is divided
    by sqrt(D) first if model.logit_scale says so."""

    def __init__(
        self,
        model: ModelConfig,
        kernels: Kernels,
        trunk: Trunk,
        *,
        transform: bool = False,
        bias: bool = False,
        z_loss: bool = False,
        label_smoothing: bool = False,
    ) -> None:
        super().__init__()
        require(
            transform or model.embedding_width is None,
            f"model.embedding_width={model.embedding_width} needs the head's transform, which "
            f"brings hidden states to that width; set objective.transform to true",
        )
        self.transform = Transform(model, kernels) if transform else nn.Identity()
        shape = trunk.embedding.weight.shape
        # The same tensor, not a copy: it gets both gradients and stands once in a checkpoint.
        self.weight = trunk.embedding.weight if model.tied else nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None
        # T5 v1.0 starts its tied embedding with variance 1: without the scale its logits would have
        # variance D.
        self.scale = model.d_model**-0.5 if model.logit_scale else None
        self.softcap = model.logit_softcap
        self.kernel = kernels.choose(
            "linear_cross_entropy",
            CrossEntropySpec,
            width=shape[1],
            vocab_size=shape[0],
            bias=bias,
            softcap=model.logit_softcap,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., V]: for generation and inspection; training uses `cross_entropy`."""
        logits = F.linear(self.features(hidden), self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def features(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., E]: hidden states as the vocabulary's rows are compared with them."""
        hidden = self.transform(hidden)
        return hidden if self.scale is None else hidden * self.scale

    def cross_entropy(
        self, hidden_ND: Tensor, targets_N: Tensor, *, label_smoothing: float, z_loss: float
    ) -> CrossEntropyOutput:
        """Loss summed over the targets that are not -100, without ever holding [N, V]."""
        # [N, V] is the largest tensor of a small model's step (16 x 1024 tokens and 50,257 words in
        # float32: 3.3 GB), so the projection and its loss are one op, which never holds it whole.
        return self.kernel.run(
            self.features(hidden_ND),
            self.weight,
            self.bias,
            targets_N,
            softcap=self.softcap,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )


@HEADS.register("pooled")
class Pooled(nn.Module):
    """W2 tanh(W1 h_first): a decision about the whole sequence, as BERT pools it (Devlin et al.
    2019, in their code)."""

    def __init__(
        self, model: ModelConfig, kernels: Kernels, trunk: Trunk, *, n_classes: int
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(model.d_model, model.d_model)
        self.out = nn.Linear(model.d_model, n_classes)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, C]."""
        # The first token is <cls>, which stands for no word: what the blocks gather there is free
        # to be about the row.
        return self.out(torch.tanh(self.dense(hidden_BTD[:, 0])))
