"""How many floating-point operations a training step needs, by formula: the numerator of MFU.

Per token and block, forward, counting a multiply-add as 2 (Kaplan et al. 2020, section 2.1):

    projections   2 x their parameters
    attention     4 x (keys seen) x H x K          (q k^T and weights v)

and 2 D V per token that reaches the vocabulary. The backward pass costs twice the forward.
Embeddings, norms, softmax and activations count 0; so does recomputation under activation
checkpointing: this is *model* FLOPs utilisation (Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

from nanolm.config.model import ModelConfig


def keys_seen(model: ModelConfig, row_length: int, layer: int) -> float:
    """Mean number of keys that a query of a full row sees in this block."""
    window = model.window[layer % len(model.window)] or row_length
    window = min(window, row_length)
    # Query t sees min(t + 1, window) keys behind it (itself included): the sum over t, divided.
    behind = window - window * (window - 1) / (2 * row_length)
    return behind if model.trunk == "decoder" else 2 * behind - 1


def forward_flops_per_token(
    model: ModelConfig, row_length: int, *, predicted_share: float = 1.0
) -> float:
    """Forward FLOPs per token of a row; `predicted_share` of the tokens reach the vocabulary."""
    head = model.head_width
    attention_weights = model.d_model * head * (2 * model.n_heads + 2 * model.kv_heads)
    ff_weights = model.d_model * model.ff_width * (3 if model.gated else 2)
    total = 2.0 * model.n_layers * (attention_weights + ff_weights)
    for layer in range(model.n_layers):
        total += 4.0 * keys_seen(model, row_length, layer) * model.n_heads * head
    return total + 2.0 * predicted_share * model.d_model * (model.vocab_size or 0)


def train_flops_per_token(
    model: ModelConfig, row_length: int, *, predicted_share: float = 1.0
) -> float:
    """Forward and backward FLOPs per token."""
    return 3.0 * forward_flops_per_token(model, row_length, predicted_share=predicted_share)
