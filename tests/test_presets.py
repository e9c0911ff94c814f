"""The presets have exactly as many parameters as `transformers` counts for the published models.

Everything is built on the meta device, so no weight is ever allocated.
"""

import pathlib

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
    XLNetModel,
)

from nanolm.build import build_learner, build_objective, resolve
from nanolm.config.load import load_config

PRESETS = pathlib.Path(__file__).parent.parent / "configs" / "pretrain"
SMOL = LlamaConfig(
    num_hidden_layers=30,
    hidden_size=576,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    vocab_size=49152,
    tie_word_embeddings=True,
)
T5_SMALL = T5Config()  # the defaults are the published model's
T5_BASE = T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12)
T5_V1_1_SMALL = T5Config(d_ff=1024, num_layers=8, num_heads=6, feed_forward_proj="gated-gelu")
T5_V1_1_BASE = T5Config(
    d_model=768, d_ff=2048, num_layers=12, num_heads=12, feed_forward_proj="gated-gelu"
)
ALBERT_BASE = AlbertConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072)
XLNET_BASE = XLNetConfig(d_model=768, n_layer=12, n_head=12, d_inner=3072)


class XLNet:
    """No class of `transformers` that chooses one by a task knows XLNet's."""

    from_config = XLNetLMHeadModel


class T5:
    """The published T5s: `transformers` ties every one that it builds, whatever its config says."""

    @staticmethod
    def from_config(config):
        model = T5ForConditionalGeneration(config)
        if config.is_gated_act:  # v1.1, whose head is its own
            model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
        return model


# preset: (the class of transformers that is compared, its config, the published count or None)
PEERS = {
    "gpt2_124m": (AutoModelForCausalLM, GPT2Config(), 124_439_808),
    "bert_base": (AutoModelForPreTraining, BertConfig(), None),
    "albert_base": (AutoModelForPreTraining, ALBERT_BASE, None),
    "llama_135m": (AutoModelForCausalLM, SMOL, 134_515_008),
    "modernbert_base": (AutoModelForMaskedLM, ModernBertConfig(), None),
    "t5_small": (T5, T5_SMALL, 60_506_624),
    "t5_base": (T5, T5_BASE, 222_903_552),
    "t5_v1_1_small": (T5, T5_V1_1_SMALL, 76_961_152),
    "t5_v1_1_base": (T5, T5_V1_1_BASE, 247_577_856),
    "xlnet_base": (XLNet, XLNET_BASE, 116_750_336),
}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(preset, tokenizer):
    config = load_config(["--config", str(PRESETS / f"{preset}.yaml"), "--data.path", "unused"])
    config = resolve(config, tokenizer)
    with torch.device("meta"):
        return build_learner(config, build_objective(config, tokenizer), device="meta")


@pytest.mark.parametrize("preset", PEERS)
def test_parameter_count_is_transformers_own(preset, tokenizer):
    auto, peer_config, published = PEERS[preset]
    learner = on_meta(preset, tokenizer)
    with torch.device("meta"):
        peer = auto.from_config(peer_config)
    assert all(parameter.is_meta for parameter in learner.parameters())
    assert count(learner) == count(peer)
    assert published is None or count(learner) == published


def test_bert_trunk_with_pooler_is_bert_model(tokenizer):
    learner = on_meta("bert_base", tokenizer)
    with torch.device("meta"):
        peer = BertModel(BertConfig())
    ours = count(learner.trunk) + count(learner.heads["pair"].dense)
    assert ours == count(peer) == 109_482_240


def test_albert_trunk_with_pooler_is_albert_model(tokenizer):
    learner = on_meta("albert_base", tokenizer)
    with torch.device("meta"):
        peer = AlbertModel(ALBERT_BASE)
    ours = count(learner.trunk) + count(learner.heads["pair"].dense)
    assert ours == count(peer) == 11_683_584
    assert len(learner.trunk.blocks) == 1 and learner.trunk.stack.n_layers == 12


def test_xlnets_trunk_is_xlnet_model(tokenizer):
    with torch.device("meta"):
        peer = XLNetModel(XLNET_BASE)
    assert count(on_meta("xlnet_base", tokenizer).trunk) == count(peer) == 116_718_336


def test_trunks_of_roberta_and_distilbert_are_the_published_ones(tokenizer):
    roberta = RobertaConfig(max_position_embeddings=514, type_vocab_size=1, vocab_size=50265)
    with torch.device("meta"):
        peers = count(RobertaModel(roberta)), count(DistilBertModel(DistilBertConfig()))
    width = 768
    pooler, unread = width * width + width, 2 * width
    ours = count(on_meta("roberta_base", tokenizer).trunk) + pooler + unread
    assert ours == peers[0] == 124_645_632
    assert count(on_meta("distilbert_base", tokenizer).trunk) == peers[1] == 66_362_880


def test_every_preset_has_a_peer():
    """All but those of our own shapes; of two the trunk is compared, by a test of its own."""
    ours = ("demo_", "small_", "en_", "zh_")
    found = {path.stem for path in PRESETS.glob("*.yaml") if not path.stem.startswith(ours)}
    assert found == {*PEERS, "roberta_base", "distilbert_base"}
