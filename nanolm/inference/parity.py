"""Every family, both ways, with random weights: does transformers compute what we compute?

    in     a model of transformers, its state read by the family's table
    out    a model of ours, written as `nanolm export --format transformers` writes it

Nothing is downloaded and nothing is written.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import nn

from nanolm import build
from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.data.tokenizer import Tokenizer
from nanolm.hub.configs import Published
from nanolm.hub.families import FAMILIES
from nanolm.hub.proof import prove, untie
from nanolm.hub.published import as_config, assembled, model_keys
from nanolm.inference.export_transformers import as_published, transformers_folder

GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 48}
LLAMA = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 48,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
BERT = LLAMA
ALBERT = BERT | {"embedding_size": 12}
ROBERTA = BERT | {"max_position_embeddings": 50, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
DISTILBERT = {"n_layers": 2, "n_heads": 4, "dim": 32, "hidden_dim": 48}
DISTILBERT |= {"max_position_embeddings": 48}
T5 = {"num_layers": 2, "num_heads": 4, "d_model": 32, "d_kv": 12, "d_ff": 48, "n_positions": 48}
XLNET = {"n_layer": 2, "n_head": 4, "d_model": 32, "d_inner": 48}
MODERNBERT = LLAMA | {"num_hidden_layers": 4, "local_attention": 12, "pad_token_id": 1}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("gpt2", "GPT2LMHeadModel", GPT2),
    "gpt2, untied": ("gpt2", "GPT2LMHeadModel", GPT2 | {"tie_word_embeddings": False}),
    "gpt2, exact gelu": ("gpt2", "GPT2LMHeadModel", GPT2 | {"activation_function": "gelu"}),
    "llama": ("llama", "LlamaForCausalLM", LLAMA),
    "llama, 2 of 4 heads": ("llama", "LlamaForCausalLM", LLAMA | {"num_key_value_heads": 2}),
    "llama, 1 of 4 heads, tied": (
        "llama",
        "LlamaForCausalLM",
        LLAMA | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "llama, wide heads": ("llama", "LlamaForCausalLM", LLAMA | {"head_dim": 16}),
    "llama, scaled as Llama 3.1": (
        "llama",
        "LlamaForCausalLM",
        LLAMA | {"head_dim": 16, "rope_parameters": LLAMA3},
    ),
    "llama, scaled linearly": (
        "llama",
        "LlamaForCausalLM",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e3}},
    ),
    "bert, masked LM and next sentence": ("bert", "BertForPreTraining", BERT),
    "bert, masked LM": ("bert", "BertForMaskedLM", BERT),
    "bert, masked LM, untied": (
        "bert",
        "BertForMaskedLM",
        BERT | {"tie_word_embeddings": False},
    ),
    "bert, next sentence": ("bert", "BertForNextSentencePrediction", BERT),
    "bert, trunk": ("bert", "BertModel", BERT),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", LLAMA | {"head_dim": 16, "num_key_value_heads": 4}),
    "qwen3, 2 of 4 heads, tied": (
        "qwen3",
        "Qwen3ForCausalLM",
        LLAMA | {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    ),
    "roberta, masked LM": ("roberta", "RobertaForMaskedLM", ROBERTA),
    "roberta, trunk": ("roberta", "RobertaModel", ROBERTA),
    "distilbert, masked LM": ("distilbert", "DistilBertForMaskedLM", DISTILBERT),
    "distilbert, trunk": ("distilbert", "DistilBertModel", DISTILBERT),
    "bert, masked LM, tanh gelu": ("bert", "BertForMaskedLM", BERT | {"hidden_act": "gelu_new"}),
    "albert, masked LM and sentence order": ("albert", "AlbertForPreTraining", ALBERT),
    "albert, masked LM": ("albert", "AlbertForMaskedLM", ALBERT),
    "albert, masked LM, exact gelu": (
        "albert",
        "AlbertForMaskedLM",
        ALBERT | {"hidden_act": "gelu"},
    ),
    "albert, masked LM, untied": (
        "albert",
        "AlbertForMaskedLM",
        ALBERT | {"tie_word_embeddings": False},
    ),
    "albert, trunk": ("albert", "AlbertModel", ALBERT),
    "modernbert, masked LM": ("modernbert", "ModernBertForMaskedLM", MODERNBERT),
    "modernbert, trunk": ("modernbert", "ModernBertModel", MODERNBERT),
    "t5, v1.0": ("t5", "T5ForConditionalGeneration", T5),
    "t5, v1.1": (
        "t5",
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "xlnet": ("xlnet", "XLNetLMHeadModel", XLNET),
    "xlnet, untied, relu": (
        "xlnet",
        "XLNetLMHeadModel",
        XLNET | {"tie_word_embeddings": False, "ff_activation": "relu"},
    ),
    "xlnet, trunk": ("xlnet", "XLNetModel", XLNET),
}
"""name -> (family, class in transformers, its config)."""
POOLERS = ("bert.pooler.dense.weight", "albert.pooler.weight")
DIRECTIONS = ("in", "out")
VOCABULARY = 256


@dataclasses.dataclass(frozen=True)
class NoTokenizer:
    """What a model asks of its tokenizer when it is built: the size, and what the objectives of T5
    and XLNet and a reader of answers need of it."""

    pad: int
    vocab_size: int = VOCABULARY
    eos: int = 2
    sep: int = 3
    cls: int = 4
    can_place: bool = True
    separators: int = 1
    extra_ids: tuple[int, ...] = tuple(range(VOCABULARY - 32, VOCABULARY))

    def roles(self) -> dict[str, int]:
        """Padding, by which some families count."""
        return {"pad": self.pad}

    def role(self, name: str) -> int:
        """What stands around a text."""
        return int(getattr(self, name))

    def around(self, n_texts: int) -> list[list[int]]:
        """An end before a text and none behind it, as published decoders read it."""
        return [[self.eos], [], []][: n_texts + 1]


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights large enough that a wrong formula shows, gains and biases included."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        ones = parameter == 1
        parameter.copy_(0.1 * noise + 0.8 * ones)


def difference(case: str, direction: str) -> float:
    """The largest one between transformers and us, in one case and direction."""
    import transformers  # noqa: PLC0415  (slow to import, and not always installed)

    name, theirs, keys = CASES[case]
    family = FAMILIES[name]
    tokenizer = cast(Tokenizer, NoTokenizer(pad=1 if family.pad is None else family.pad))
    values = keys | {"vocab_size": VOCABULARY, "model_type": name}
    model_class = getattr(transformers, theirs)
    published = Published(f"the config.json of {case}", values, name)
    if direction == "in":
        model = model_class(getattr(transformers, family.classes.config)(**values))
        if values.get("tie_word_embeddings") is False:
            untie(model)
        randomise(model)
        stored = model.state_dict()
        for other, own in family.duplicates.items():  # two parameters that real files hold equal
            stored |= {other: stored[own]} if other in stored else {}
        ours = model_keys(family, published)
        imported = assembled(family, published, ours, stored, tokenizer, case)
        return prove(imported).largest
    pooled = family.classes.pooled is not None and theirs != family.classes.plain
    names = frozenset(POOLERS if pooled else ())
    config = as_config(family, model_keys(family, published), names, tokenizer)
    learner = build.build_learner(config, build.build_objective(config, tokenizer))
    randomise(learner)
    tensors, files = transformers_folder(config, tokenizer, learner_tensors(learner))
    return prove(as_published(config, tokenizer, learner.eval(), tensors, files)).largest
