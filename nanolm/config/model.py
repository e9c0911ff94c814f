"""The Transformer's shape as a config: what every block, position encoding and head is built from.

A part of the schema in `schema.py`, as `model:`; a saved model carries it as its description.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

from nanolm.config.ranges import Amount, Count, Decay, Size
from nanolm.errors import require, require_at_least
from nanolm.registry import Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained: the Transformer's shape."""

    trunk: str = "decoder"
    """Which trunk: decoder (causal), encoder (bidirectional), encoder_decoder (a decoder that reads
    what an encoder made of a source), or two_stream (an encoder that predicts in any order)."""
    d_model: Count = 384
    """Width of the residual stream."""
    n_layers: Count = 6
    """Number of blocks; an encoder_decoder has as many in each of its two stacks."""
    n_heads: Count = 6
    """Query heads per attention."""
    n_kv_heads: Count | None = None
    """Key/value heads: n_heads gives MHA, 1 MQA, between them GQA; null means n_heads."""
    head_dim: Count | None = None
    """Width of one head; null means d_model / n_heads."""
    d_ff: Count | None = None
    """Hidden width of the feed-forward; null means 4 d_model (8/3 d_model, rounded up to a
    multiple of 64, when it is gated)."""
    feed_forward: Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu", "geglu", "geglu_tanh"] = (
        "gelu"
    )
    """Feed-forward kind: GELU (exact or tanh), ReLU, ReLU squared, or the gated SwiGLU and GeGLU
    (exact or tanh)."""
    head_activation: Literal["gelu", "gelu_tanh", "relu", "relu2"] = "gelu"
    """Activation of the transform before the vocabulary (objective.transform); other heads have
    none."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation of the residual stream."""
    norm_position: Literal["pre", "post"] = "pre"
    """Norm before each sub-layer (GPT-2) or after each residual sum (BERT)."""
    norm_eps: Size = 1e-5
    """Epsilon inside the norm's square root."""
    norm_bias: bool = True
    """Whether a LayerNorm has a bias."""
    embedding_norm: bool = False
    """Norm right after the embeddings (BERT, ModernBERT); with pre-norm the first attention then
    needs no norm of its own and has none."""
    positions: Options = dataclasses.field(default_factory=lambda: Options(name="learned"))
    """Position encoding and its options."""
    max_length: Count = 1024
    """Longest sequence that the model is built for, in tokens."""
    bias: bool = True
    """Whether the linear layers of the blocks have biases."""
    attention_scale: float | None = None
    """What attention scores are multiplied by; null means 1 / sqrt(width of a head). T5 has 1."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head before the product."""
    window: list[Count | None] = dataclasses.field(default_factory=lambda: [None])
    """Sliding window by layer, repeated as a pattern: a query sees keys less than this many tokens
    away; null is global. [128, 128, null] makes every third layer global."""
    n_segments: Amount = 0
    """Number of segment (token type) embeddings; 0 for none. A two_stream trunk has no embedding of
    them: its blocks tell the same segment from another one."""
    embedding_scale: bool = False
    """Multiply token embeddings by sqrt(d_model), as in Vaswani et al. (2017)."""
    logit_scale: bool = False
    """Divide hidden states by sqrt(d_model) before the vocabulary, as T5 does where its head is
    tied to embeddings of standard deviation 1."""
    dropout: Decay = 0.0
    """Dropout after embeddings and each sub-layer."""
    feed_forward_dropout: Decay = 0.0
    """Dropout between the activation and the last product of each feed-forward."""
    final_dropout: Decay = 0.0
    """Dropout on what a stack returns, after its final norm."""
    attention_dropout: Decay = 0.0
    """Dropout on attention weights."""
    attention_softcap: float | None = None
    """Soft-cap c on attention scores: c tanh(score / c)."""
    logit_softcap: float | None = None
    """Soft-cap on the vocabulary logits."""
    tied: bool = True
    """Whether the vocabulary head shares the token embedding."""
    embedding_width: Count | None = None
    """Width of the embeddings of an encoder, which are then projected to d_model, as ALBERT's are;
    null: d_model, without a projection."""
    share_layers: bool = False
    """Whether all blocks of an encoder are one block, run n_layers times, as ALBERT's are."""
    vocab_size: Count | None = None
    """Rows of the token embedding; null means the tokenizer's size rounded up to a multiple of
    64."""
    init_std: Size = 0.02
    """Standard deviation of the initial weights."""
    weight_init: Literal["normal", "t5"] = "normal"
    """normal: every matrix has init_std; t5: embeddings have 1, a matrix 1 / sqrt(its inputs), and
    queries are smaller by the 1 / sqrt(width of a head) that their scores are not divided by."""
    attention_init: Literal["normal", "mimetic"] = "normal"
    """normal: queries and keys start as other weights do; mimetic: a head's start as the same
    projection, so that tokens attend to their like."""

    def __post_init__(self) -> None:
        sizes = ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_length")
        require_at_least("model", self, **dict.fromkeys((*sizes, "vocab_size"), 1))
        require_at_least("model", self, n_segments=0, norm_eps=0, init_std=0)
        require(
            self.head_dim is not None or self.d_model % self.n_heads == 0,
            f"model.n_heads={self.n_heads} does not divide model.d_model={self.d_model}; change "
            f"one of them or set model.head_dim",
        )
        require(
            self.n_heads % self.kv_heads == 0,
            f"model.n_kv_heads={self.n_kv_heads} does not divide model.n_heads={self.n_heads}",
        )
        for key in ("dropout", "attention_dropout", "feed_forward_dropout", "final_dropout"):
            value = getattr(self, key)
            require(0 <= value < 1, f"model.{key}={value} must lie in [0, 1)")
        for key in ("attention_softcap", "logit_softcap", "attention_scale"):
            value = getattr(self, key)
            require(value is None or value > 0, f"model.{key}={value} must be positive or null")
        require(
            self.weight_init == "normal" or self.attention_init == "normal",
            f"model.attention_init={self.attention_init} says otherwise than model.weight_init="
            f"{self.weight_init} how attention starts; set one of them to normal",
        )
        self.check_albert()
        require(len(self.window) > 0, "model.window is empty; use [null] for global attention")
        for width in self.window:
            require(width is None or width > 0, f"model.window has {width}; widths are positive")

    def check_albert(self) -> None:
        """Raises UserError where embeddings cannot have a width of their own, or blocks cannot be
        one."""
        require_at_least("model", self, embedding_width=1)
        for key, value in (
            ("embedding_width", self.embedding_width),
            ("share_layers", self.share_layers),
        ):
            require(
                not value or self.trunk == "encoder",
                f"model.{key}={value} is for encoders, and model.trunk is {self.trunk}; leave one "
                f"of them out",
            )
        if not self.share_layers:
            return
        bases = getattr(self.positions, "base", [0.0])
        several = isinstance(bases, list) and len(set(bases)) > 1
        require(
            len(set(self.window)) == 1 and not several,
            "model.share_layers=true makes all blocks one, and model.window or "
            "model.positions.base tells them apart; give one value there",
        )
        require(
            self.norm_position == "post" or not self.embedding_norm,
            "model.share_layers=true makes all blocks one, and after model.embedding_norm the "
            "first pre-norm block differs from the others; set model.norm_position to post",
        )

    @property
    def n_tokens(self) -> int:
        """The size of the vocabulary, where it is known: in a resolved config."""
        return cast(int, self.vocab_size)

    @property
    def embedded_width(self) -> int:
        """Width of the embeddings."""
        return self.embedding_width or self.d_model

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a gate."""
        return self.feed_forward in ("swiglu", "geglu", "geglu_tanh")

    @property
    def ff_width(self) -> int:
        """Hidden width of the feed-forward."""
        if self.d_ff is not None:
            return self.d_ff
        return -(-8 * self.d_model // (3 * 64)) * 64 if self.gated else 4 * self.d_model
