"""The same weights in `transformers` and in nanolm give the same hidden states and logits.

Random weights, float32, evaluation mode, agreement to 1e-5; padding, grouped queries, segments and
sliding windows included.
"""

import pytest
import torch
import transformers_weights
from transformers import (
    BertConfig,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from nanolm.model.trunk import Inputs
from nanolm.ops.masks import Mask

B, T, V = 3, 24, 512
LENGTHS = torch.tensor([24, 17, 5])
PADDED = (torch.arange(T) < LENGTHS[:, None]).long()
EAGER = {"attn_implementation": "eager"}


def randomized(model):
    """Weights large enough that a wrong formula shows, biases and gains included."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data * 0.5 + 0.08 * noise + 0.3 * (parameter.data == 1)
    return model.eval()


def some_tokens():
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(2))


def agree(ours, theirs, keep=None):
    keep = torch.ones(B, T, dtype=torch.bool) if keep is None else keep.bool()
    torch.testing.assert_close(ours[keep], theirs[keep], atol=1e-5, rtol=1e-5)


def test_gpt2_hidden_states_and_logits(make_learner):
    config = GPT2Config(n_layer=3, n_head=4, n_embd=64, n_positions=T, vocab_size=V, **EAGER)
    theirs = randomized(GPT2LMHeadModel(config))
    ours = make_learner(
        {"n_layers": 3, "d_model": 64, "max_length": T, "feed_forward": "gelu_tanh"}
    )
    ours.load_state_dict(transformers_weights.gpt2(theirs))
    with torch.no_grad():
        expected = theirs.transformer(some_tokens()).last_hidden_state
        hidden = ours.trunk(Inputs(tokens_BT=some_tokens()))
        agree(hidden, expected)
        agree(ours.heads["lm"](hidden), theirs(some_tokens()).logits)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_llama_with_grouped_queries(make_learner, kv_heads):
    config = LlamaConfig(
        num_hidden_layers=3,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        intermediate_size=96,
        vocab_size=V,
        max_position_embeddings=T,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        **EAGER,
    )
    theirs = randomized(LlamaForCausalLM(config))
    ours = make_learner(
        {
            "n_layers": 3,
            "d_model": 64,
            "n_kv_heads": kv_heads,
            "d_ff": 96,
            "feed_forward": "swiglu",
            "norm": "rmsnorm",
            "norm_eps": 1e-6,
            "bias": False,
            "tied": False,
            "positions": {"name": "rotary", "base": [5000.0]},
        }
    )
    ours.load_state_dict(transformers_weights.llama(theirs))
    with torch.no_grad():
        expected = theirs.model(some_tokens(), attention_mask=PADDED).last_hidden_state
        inputs = Inputs(tokens_BT=some_tokens(), mask=Mask(key_lengths=LENGTHS))
        hidden = ours.trunk(inputs)
        agree(hidden, expected, PADDED)
        logits = theirs(some_tokens(), attention_mask=PADDED).logits
        agree(ours.heads["lm"](hidden), logits, PADDED)


def test_bert_with_padding_segments_and_both_heads(make_learner):
    config = BertConfig(
        num_hidden_layers=3,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=V,
        max_position_embeddings=T,
        **EAGER,
    )
    theirs = randomized(BertForPreTraining(config))
    ours = make_learner(
        {
            "trunk": "encoder",
            "n_layers": 3,
            "d_model": 64,
            "d_ff": 128,
            "max_length": T,
            "norm_position": "post",
            "norm_eps": 1e-12,
            "embedding_norm": True,
            "n_segments": 2,
        },
        {"name": "mlm_pair"},
    )
    ours.load_state_dict(transformers_weights.bert(theirs))
    segments = (torch.arange(T) >= LENGTHS[:, None] // 2).long()
    inputs = Inputs(tokens_BT=some_tokens(), segments_BT=segments, mask=Mask(key_lengths=LENGTHS))
    with torch.no_grad():
        keys = {"attention_mask": PADDED, "token_type_ids": segments}
        hidden = ours.trunk(inputs)
        agree(hidden, theirs.bert(some_tokens(), **keys).last_hidden_state, PADDED)
        out = theirs(some_tokens(), **keys)
        agree(ours.heads["lm"](hidden), out.prediction_logits, PADDED)
        pair = ours.heads["pair"](hidden)
    torch.testing.assert_close(pair, out.seq_relationship_logits, atol=1e-5, rtol=1e-5)


def test_modernbert_with_alternating_windows_and_bases(make_learner):
    config = ModernBertConfig(
        num_hidden_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=96,
        vocab_size=V,
        max_position_embeddings=T,
        local_attention=8,
        pad_token_id=0,
        bos_token_id=2,
        cls_token_id=4,
        sep_token_id=5,
        eos_token_id=3,
        **EAGER,
    )
    theirs = randomized(ModernBertForMaskedLM(config))
    ours = make_learner(
        {
            "trunk": "encoder",
            "n_layers": 4,
            "d_model": 64,
            "d_ff": 96,
            "feed_forward": "geglu",
            "norm_bias": False,
            "bias": False,
            "embedding_norm": True,
            "window": [None, 5, 5],
            "positions": {"name": "rotary", "base": [160000.0, 10000.0, 10000.0]},
        },
        {"name": "mlm"},
    )
    ours.load_state_dict(transformers_weights.modernbert(theirs))
    with torch.no_grad():
        hidden = ours.trunk(Inputs(tokens_BT=some_tokens(), mask=Mask(key_lengths=LENGTHS)))
        expected = theirs.model(some_tokens(), attention_mask=PADDED).last_hidden_state
        agree(hidden, expected, PADDED)
        logits = theirs(some_tokens(), attention_mask=PADDED).logits
        agree(ours.heads["lm"](hidden), logits, PADDED)
