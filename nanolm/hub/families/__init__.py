"""The families of published models that compute exactly what some of ours compute.

    gpt2         pre-norm decoder, learned positions
    llama        RMSNorm, SwiGLU, rotary positions, grouped queries, no biases
    qwen3        the same with normed queries and keys
    bert         post-norm encoder, learned positions, segments
    roberta      the same with one segment and one head
    distilbert   the same without segments
    albert       BERT with one block for all layers and narrow embeddings
    modernbert   pre-norm encoder, rotary positions, GeGLU, windows
    t5           encoder and decoder, RMSNorm, buckets of distances, no biases
    xlnet        two streams, distances and segments that each layer weighs for itself

Where a model of ours is computed by several, the first is taken.
"""

from __future__ import annotations

from nanolm.hub.families.albert import ALBERT
from nanolm.hub.families.base import Family
from nanolm.hub.families.bert import BERT, DISTILBERT, ROBERTA
from nanolm.hub.families.gpt2 import GPT2
from nanolm.hub.families.llama import LLAMA, QWEN3
from nanolm.hub.families.modernbert import MODERNBERT
from nanolm.hub.families.t5 import T5
from nanolm.hub.families.xlnet import XLNET

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (GPT2, LLAMA, QWEN3, ROBERTA, DISTILBERT, BERT, ALBERT, MODERNBERT, T5, XLNET)
}
