"""What every weight is before the first step.

    matrices    Normal(0, init_std); those that write into a pre-norm residual stream divided by
                sqrt(2 n_layers), so that their sum does not grow with depth
    biases 0, gains of norms 1
    t5          embeddings Normal(0, 1), a matrix Normal(0, 1 / inputs) (`model.weight_init`)
    mimetic     queries and keys of a head start as the same projection (`model.attention_init`)

Stands before a batch's journey: `build_learner` (build.py) calls it once.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from nanolm.config.model import ModelConfig


def init_weights(module: nn.Module, model: ModelConfig) -> None:
    """Normal(0, init_std) for matrices, zero for biases; the projections that write into a pre-norm
    residual stream divided by sqrt(2 n_layers) (Radford et al. 2019, section 2.3)."""
    for name, parameter in module.named_parameters():
        init_parameter(name, parameter, model)


def init_parameter(name: str, parameter: Tensor, model: ModelConfig) -> None:
    """Fills one parameter, named as in the learner; gains of norms, all that is neither bias nor
    matrix, become one."""
    if name.endswith("bias"):
        nn.init.zeros_(parameter)
    elif parameter.ndim >= 2:
        WEIGHT_INITS[model.weight_init](name, parameter, model)
    else:
        nn.init.ones_(parameter)


def init_normal(name: str, parameter: Tensor, model: ModelConfig) -> None:
    """Normal(0, init_std), smaller where a block writes into a pre-norm residual stream."""
    writes = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
    # A pre-norm stream is a sum of 2 n layers' outputs. If these are independent its variance is
    # the sum of theirs, so each is made sqrt(2 n) times smaller and the sum starts at the same size
    # for every depth. Post-norm brings the stream back to size 1 itself.
    shrink = math.sqrt(2 * model.n_layers) if model.norm_position == "pre" else 1.0
    nn.init.normal_(parameter, std=model.init_std / (shrink if writes else 1.0))
    if name.endswith(".attention.qkv.weight"):
        ATTENTION_INITS[model.attention_init](parameter, model)


def init_t5(name: str, parameter: Tensor, model: ModelConfig) -> None:
    """What T5 starts from (Raffel et al. 2020, in their code): a product of a normed token starts
    with variance 1, and so do embeddings and logits. An untied head starts like any matrix; with
    the 1 that `transformers` gives it, logits would start sqrt(D) times as large."""
    # A sum of D products of variance 1/D each has variance 1.
    std = parameter.shape[-1] ** -0.5
    if name.endswith("embedding.weight"):
        std = 1.0
    elif name.endswith("positions.table.weight"):  # [buckets, heads]: no product has these inputs
        std = model.d_model**-0.5
    nn.init.normal_(parameter, std=std)
    if name.endswith("attention.qkv.weight"):
        # T5 does not divide scores by sqrt(K): its queries start smaller by that factor instead.
        parameter.data[: model.n_heads * model.head_width] *= model.head_width**-0.5


WEIGHT_INITS = {"normal": init_normal, "t5": init_t5}


def keep_normal(qkv: Tensor, model: ModelConfig) -> None:
    """Queries and keys as independent as all other matrices."""


def mimetic(qkv: Tensor, model: ModelConfig) -> None:
    """Every key head becomes random orthogonal rows P, and so does each query head that reads it:
    a score starts as x^T P^T P y, high where x and y are alike, as trained attention is seen to be
    (Trockman & Kolter 2023, who start values and output the same way, as about minus the identity;
    here they stay normal). So a model can compare from its first step, where it would else have
    to discover it. qkv: [(n_heads + 2 n_kv_heads) K, D], K the width of a head."""
    K, readers = model.head_width, model.n_heads // model.kv_heads
    queries, keys = qkv.data.split([model.n_heads * K, 2 * model.kv_heads * K])
    for head, key in enumerate(keys[: model.kv_heads * K].split(K)):
        # A normed token has |x|^2 = D, its projection K, and scores are divided by sqrt(K).
        nn.init.orthogonal_(key, gain=math.sqrt(LIKE_SCORE / math.sqrt(K)))
        for query in queries.split(K)[head * readers : (head + 1) * readers]:
            query.copy_(key)


LIKE_SCORE = 4.0
"""Attention score of a token with its like under `mimetic`: e^4 = 55 times an unlike one's."""
ATTENTION_INITS = {"normal": keep_normal, "mimetic": mimetic}
