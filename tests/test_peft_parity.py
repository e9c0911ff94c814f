"""Each PEFT method beside `peft` on the same GPT-2 or Llama: the same start, 20 steps, one loss.

Both models see the same batches and take the same AdamW steps; what is compared is the loss after
each of them, to 1e-3 (they agree to about 1e-5).
"""

import peft
import pytest
import torch
import transformers_weights
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nanolm.arguments import load_config
from nanolm.peft.base import attach

B, T, V, D, STEPS = 4, 12, 512, 32, 20
LAYERS, HEADS = 2, 4


def batches(positions_from=0):
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        # Few symbols and a pattern, so that the loss moves.
        row = torch.randint(0, 16, (B, 4), generator=generator).repeat(1, 4)[:, : T + 1]
        yield row


def noisy(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5 + 0.08 * torch.randn(
            parameter.shape, generator=generator
        )
    return model


def gpt2():
    config = GPT2Config(
        n_layer=LAYERS, n_head=HEADS, n_embd=D, n_positions=64, vocab_size=V,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip
    ours = {"n_layers": LAYERS, "d_model": D, "max_length": 64, "feed_forward": "gelu_tanh"}
    theirs = noisy(GPT2LMHeadModel(config))
    return theirs, ours, transformers_weights.gpt2(theirs)


def llama():
    config = LlamaConfig(
        num_hidden_layers=LAYERS, hidden_size=D, num_attention_heads=HEADS, num_key_value_heads=2,
        intermediate_size=48, vocab_size=V, max_position_embeddings=64, rms_norm_eps=1e-6,
        tie_word_embeddings=False, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    ours = {
        "n_layers": LAYERS, "d_model": D, "n_kv_heads": 2, "d_ff": 48, "feed_forward": "swiglu",
        "norm": "rmsnorm", "norm_eps": 1e-6, "bias": False, "tied": False,
        "positions": {"name": "rotary", "base": [10000.0]},
    }  # fmt: skip
    theirs = noisy(LlamaForCausalLM(config))
    return theirs, ours, transformers_weights.llama(theirs)


def low_rank_names(fused):
    """(ours, theirs) of each low-rank pair: where the target lies in either model."""
    for layer in range(LAYERS):
        ours = f"trunk.stack.blocks.{layer}"
        if fused:
            yield f"{ours}.attention.qkv.lora.qkv", f"transformer.h.{layer}.attn.c_attn"
        else:
            yield f"{ours}.attention.qkv.lora.q", f"model.layers.{layer}.self_attn.q_proj"
            yield f"{ours}.attention.qkv.lora.v", f"model.layers.{layer}.self_attn.v_proj"
            yield f"{ours}.feed_forward.gate_up.lora.up", f"model.layers.{layer}.mlp.up_proj"
            yield f"{ours}.feed_forward.down.lora.down", f"model.layers.{layer}.mlp.down_proj"


def copy_low_rank(theirs, fused, magnitude=False):
    source = dict(theirs.base_model.model.named_parameters())
    copied = {}
    for ours, other in low_rank_names(fused):
        copied[f"{ours}.a"] = source[f"{other}.lora_A.default.weight"]
        copied[f"{ours}.b"] = source[f"{other}.lora_B.default.weight"]
        if magnitude:
            name = f"{other}.lora_magnitude_vector.default.weight"
            copied[ours.replace(".lora.", ".magnitude.")] = source[name]
    return copied


def compare(make_learner, build, theirs_config, options, start, *, step=None, ours_loss=None):
    """Trains both for 20 steps from one start; asserts that the losses agree."""
    base, shape, weights = build()
    learner = make_learner(shape)
    learner.load_state_dict(weights)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, theirs_config)
    config = load_config([], base={"peft": options})
    attach(learner, config.peft)
    copied = start(theirs)
    named = dict(learner.named_parameters())
    trained = {name for name, p in named.items() if p.requires_grad}
    assert trained == set(copied)
    with torch.no_grad():
        for name, value in copied.items():
            named[name].copy_(value)
    assert sum(named[n].numel() for n in trained) == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad
    )
    learner.train(), theirs.train()
    settings = {"lr": 2e-2, "weight_decay": 0.0}
    mine = torch.optim.AdamW([named[n] for n in trained], **settings)
    other = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **settings)
    losses = []
    for number, rows in enumerate(batches()):
        tokens, targets = rows[:, :-1], rows[:, 1:]
        expected = theirs(input_ids=rows, labels=rows).loss
        if ours_loss is None:
            term = learner({"tokens": tokens, "targets": targets})["clm"]
            found = term.sum / term.count
        else:
            found = ours_loss(learner, tokens, targets)
        expected.backward()
        extra = step(learner, theirs, number, before=True) if step else 0.0
        found.backward()
        mine.step(), other.step()
        if step:
            step(learner, theirs, number, before=False)
        losses.append((float(found.detach()) + extra, float(expected.detach())))
        mine.zero_grad(), other.zero_grad()
    assert losses[0][1] - losses[-1][1] > 0.05, "nothing was learnt"
    for found, expected in losses:
        assert found == pytest.approx(expected, abs=1e-3)
    return learner, theirs


@pytest.mark.parametrize("dora", [False, True])
def test_lora_on_the_fused_weight_of_gpt2(make_learner, dora):
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=dora
    )
    options = {"name": "dora" if dora else "lora", "rank": 4, "alpha": 8, "targets": ["qkv"]}
    compare(make_learner, gpt2, config, options, lambda theirs: copy_low_rank(theirs, True, dora))


@pytest.mark.parametrize("dora", [False, True])
def test_lora_on_parts_of_llama(make_learner, dora):
    modules = ["q_proj", "v_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, use_dora=dora)
    options = {"name": "dora" if dora else "lora", "rank": 4, "alpha": 8}
    options["targets"] = ["q", "v", "up", "down"]
    compare(make_learner, llama, config, options, lambda theirs: copy_low_rank(theirs, False, dora))
