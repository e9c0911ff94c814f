"""How many floating-point operations a training step needs, by formula: the numerator of MFU.

Per token and block, forward, counting a multiply-add as 2 (Kaplan et al. 2020, section 2.1):

    projections   2 x their parameters
    attention     4 x (keys seen) x H x K          (q k^T and weights v)

and 2 D V per token that reaches the vocabulary. An encoder-decoder is reckoned per token of the
source: its decoder reads `predicted_share` tokens to one of the source, and each block of it also
projects the source's keys and values and its own queries, and sees the whole source. Of two streams
the content's are the tokens of a row, and `predicted_share` query places come to each; `memory`
tokens before the row cost a forward pass, which no backward pass follows.

The backward pass costs twice the forward.
Embeddings, norms, softmax and activations count 0; so does recomputation under activation
checkpointing: this is *model* FLOPs utilisation (Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

from nanolm.config.model import ModelConfig

Product = tuple[int, int, int]
"""Rows, inner width and columns of a matrix product."""


def keys_seen(model: ModelConfig, row_length: int, layer: int) -> float:
    """Mean number of keys that a query of a full row sees in this block."""
    behind = keys_behind(model, row_length, layer)
    return behind if model.trunk == "decoder" else 2 * behind - 1


def keys_behind(model: ModelConfig, row_length: float, layer: int) -> float:
    """Mean number of keys that a query sees in this block when it is causal."""
    window = model.window[layer % len(model.window)] or row_length
    window = min(window, row_length)
    # Query t sees min(t + 1, window) keys behind it (itself included): the sum over t, divided.
    return window - window * (window - 1) / (2 * row_length)


def forward_flops_per_token(
    model: ModelConfig, row_length: int, *, predicted_share: float = 1.0, memory: int = 0
) -> float:
    """Forward FLOPs per token of a row; `predicted_share` of the tokens reach the vocabulary. All
    that an encoder-decoder's decoder reads does, so there it is the targets to a source token too,
    and of two streams the places to a token.
    """
    blocks = BLOCKS.get(model.trunk, one_stack)(model, row_length, predicted_share, memory)
    width = model.embedded_width
    vocabulary = 2.0 * predicted_share * width * (model.vocab_size or 0)
    if model.embedding_width is not None:  # into the blocks, and out again before the vocabulary
        vocabulary += 2.0 * (1.0 + predicted_share) * width * model.d_model
    return blocks + vocabulary


def one_stack(model: ModelConfig, row_length: int, share: float = 1.0, memory: int = 0) -> float:
    """Forward FLOPs of an encoder's or a decoder's blocks per token."""
    head = model.head_width
    attention_weights = model.d_model * head * (2 * model.n_heads + 2 * model.kv_heads)
    ff_weights = model.d_model * model.ff_width * (3 if model.gated else 2)
    total = 2.0 * model.n_layers * (attention_weights + ff_weights)
    for layer in range(model.n_layers):
        total += 4.0 * keys_seen(model, row_length, layer) * model.n_heads * head
    return total


def two_stacks(model: ModelConfig, row_length: int, share: float, memory: int) -> float:
    """Forward FLOPs of an encoder-decoder's blocks per token of the source."""
    return one_stack(model, row_length) + decoder_flops(model, row_length, share)


def two_streams(model: ModelConfig, row_length: int, share: float, memory: int) -> float:
    """Forward FLOPs of a two-stream trunk's blocks per token of a row, without its memory's pass.

    Queries are content and places; each is also compared with all distances that may occur, and
    with the two vectors of segments.
    """
    head, keys = model.head_width, row_length + memory
    queries_and_out = model.d_model * head * 2 * model.n_heads
    ff_weights = model.d_model * model.ff_width * (3 if model.gated else 2)
    compared = 4.0 * keys + 2.0 * (keys + row_length - 1) + (4.0 if model.n_segments else 0.0)
    per_query = 2.0 * (queries_and_out + ff_weights) + compared * model.n_heads * head
    per_key = 2.0 * model.d_model * head * 2 * model.kv_heads
    return model.n_layers * ((1.0 + share) * per_query + keys / row_length * per_key)


BLOCKS = {"encoder_decoder": two_stacks, "two_stream": two_streams}
"""What the blocks of a trunk cost per token of a row, where they are not one stack of one stream;
a plug-in's are reckoned as one."""


def largest_products(model: ModelConfig, tokens: int) -> list[Product]:
    """(rows, inner, columns) of the products that a step of so many tokens spends most time in: the
    feed-forward's two, the gradient of its weights, and some rows of the vocabulary's."""
    tokens, width, inner = min(tokens, 4096), model.d_model, model.ff_width
    found = [(tokens, width, inner), (tokens, inner, width), (width, tokens, inner)]
    if model.vocab_size:
        found.append((min(tokens, 512), width, model.vocab_size))
    return found


def decoder_flops(model: ModelConfig, source_length: int, targets_share: float) -> float:
    """Forward FLOPs of a decoder's blocks per token of the source that it reads."""
    head, n_targets = model.head_width, targets_share * source_length
    attention_weights = model.d_model * head * (2 * model.n_heads + 2 * model.kv_heads)
    queries_and_out = model.d_model * head * 2 * model.n_heads
    ff_weights = model.d_model * model.ff_width * (3 if model.gated else 2)
    per_target = 2.0 * model.n_layers * (attention_weights + queries_and_out + ff_weights)
    for layer in range(model.n_layers):
        seen = keys_behind(model, n_targets, layer) + source_length
        per_target += 4.0 * seen * model.n_heads * head
    per_source = 2.0 * model.n_layers * model.d_model * head * 2 * model.kv_heads
    return targets_share * per_target + per_source


def train_flops_per_token(
    model: ModelConfig,
    row_length: int,
    *,
    predicted_share: float = 1.0,
    memory: int = 0,
    recurrence: int = 1,
) -> float:
    """Forward and backward FLOPs per token, and the forward pass over a memory; a row may be so
    many segments that are read one after another."""
    forward = forward_flops_per_token(
        model, row_length // recurrence, predicted_share=predicted_share, memory=memory
    )
    return 3.0 * forward + memory_flops(model, memory) / row_length


def memory_flops(model: ModelConfig, memory: int) -> float:
    """Forward FLOPs of all blocks but the last, which nobody asks, over the tokens of a memory."""
    if not memory:
        return 0.0
    return memory * two_streams(model, memory, 0.0, 0) * (model.n_layers - 1) / model.n_layers
