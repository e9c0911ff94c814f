"""Each PEFT method beside `peft` on the same GPT-2 or Llama: the same start, 20 steps, one loss.

Both models see the same batches and take the same AdamW steps; what is compared is the loss after
each of them, to 1e-3 (they agree to about 1e-5).
"""

import dataclasses

import peft
import pytest
import torch
import transformers_weights
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nanolm.config.load import load_config
from nanolm.peft.base import attach

B, T, V, D, STEPS = 4, 12, 512, 32, 20
LAYERS, HEADS = 2, 4


def batches():
    """One batch, over and over: few symbols and a pattern, so that the loss falls steadily."""
    row = torch.randint(0, 16, (B, 4), generator=torch.Generator().manual_seed(3))
    return [row.repeat(1, 4)[:, : T + 1]] * STEPS


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


def compare(
    make_learner, build, theirs_config, options, start, *, after=None, positions=None, lr=2e-2
):
    """Trains both for 20 steps from one start; asserts that the losses agree.

    `after(learner, theirs, number)` runs behind each step; what it returns of the step before was
    added to their loss. `positions` are those of the tokens, where they do not begin at 0.
    """
    base, shape, weights = build()
    learner = make_learner(shape)
    learner.load_state_dict(weights)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, theirs_config)
    config = load_config([], base={"peft": options})
    adapter = attach(learner, config.peft)
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
    settings = {"lr": lr, "weight_decay": 0.0}
    mine = torch.optim.AdamW([named[n] for n in trained], **settings)
    other = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **settings)
    adapter.watch([mine], STEPS + 1)
    if positions is not None:
        inputs = learner.objective.inputs
        learner.objective.inputs = lambda batch: dataclasses.replace(
            inputs(batch), positions_BT=positions
        )
    losses, extra = [], after(learner, theirs, -1) if after else 0.0
    for number, rows in enumerate(batches()):
        # The first token is predicted by nothing, nor should it be by a prompt before it.
        labels = torch.where(torch.arange(T + 1) > 0, rows, -100)
        expected = theirs(input_ids=rows, labels=labels).loss
        term = learner({"tokens": rows[:, :-1], "targets": rows[:, 1:]})["clm"]
        found = term.sum / term.count
        expected.backward(), found.backward()
        mine.step(), other.step()
        losses.append((float(found.detach()) + extra, float(expected.detach())))
        if after:
            extra = after(learner, theirs, number)
        mine.zero_grad(), other.zero_grad()
    assert losses[0][1] - losses[-1][1] > 0.05, "hardly anything was learnt"
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


def test_adalora_with_its_budget(make_learner):
    config = peft.AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=8, target_modules=["q_proj", "v_proj"], tinit=3, tfinal=4,
        deltaT=2, total_step=STEPS + 1, orth_reg_weight=0.3, task_type="CAUSAL_LM",
    )  # fmt: skip
    options = {
        "name": "adalora", "rank": 6, "target_rank": 3, "alpha": 8, "warm_steps": 3,
        "final_steps": 4, "every": 2, "orthogonality": 0.3,
    }  # fmt: skip

    def start(theirs):
        source, copied = dict(theirs.base_model.model.named_parameters()), {}
        for layer in range(LAYERS):
            for part in "qv":
                ours = f"trunk.stack.blocks.{layer}.attention.qkv.lora.{part}"
                other = f"model.layers.{layer}.self_attn.{part}_proj"
                for name in "abe":
                    copied[f"{ours}.{name}"] = source[f"{other}.lora_{name.upper()}.default"]
        return copied

    def after(learner, theirs, number):
        if number >= 0:
            theirs.base_model.update_and_allocate(number + 1)
        budget = learner.trunk.budget
        with torch.no_grad():
            disorder = sum(t.disorder() for t in budget.triplets) / (2 * len(budget.triplets))
        if number >= 3:
            ours = [(t.e != 0).flatten().tolist() for t in budget.triplets]
            kept = [p for n, p in theirs.named_parameters() if ".lora_E." in n]
            assert ours == [(p != 0).flatten().tolist() for p in kept]
        return 0.3 * float(disorder)

    learner, _ = compare(make_learner, llama, config, options, start, after=after)
    kept = sum(int((t.e != 0).sum()) for t in learner.trunk.budget.triplets)
    assert kept == 3 * 2 * LAYERS


def test_ia3(make_learner):
    config = peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )

    def start(theirs):
        source, copied = dict(theirs.base_model.model.named_parameters()), {}
        for layer in range(LAYERS):
            ours, other = f"trunk.stack.blocks.{layer}", f"model.layers.{layer}"
            for mine, name in (
                ("attention.qkv.ia3.k", "self_attn.k_proj"),
                ("attention.qkv.ia3.v", "self_attn.v_proj"),
                ("feed_forward.down.ia3", "mlp.down_proj"),
            ):
                copied[f"{ours}.{mine}"] = source[f"{other}.{name}.ia3_l.default"].flatten()
        return copied

    compare(make_learner, llama, config, {"name": "ia3"}, start, lr=0.1)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_prefix_tuning(make_learner, build):
    P = 5
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, token_dim=D, num_layers=LAYERS,
        num_attention_heads=HEADS if build is gpt2 else 2,
    )  # fmt: skip

    def start(theirs):
        weight = theirs.prompt_encoder.default.embedding.weight
        heads = HEADS if build is gpt2 else 2
        pairs = weight.view(P, 2 * LAYERS, heads, -1)
        names = [
            f"trunk.stack.blocks.{i}.attention.prefix.{k}_PGK" for i in range(LAYERS) for k in "kv"
        ]
        return {name: pairs[:, i] for i, name in enumerate(names)}

    # There the text stands behind the prefix, at positions P, P + 1, …
    positions = torch.arange(P, P + T)[None]
    options = {"name": "prefix", "length": P}
    compare(make_learner, build, config, options, start, positions=positions, lr=0.1)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_prompt_tuning(make_learner, build):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)

    def start(theirs):
        return {"trunk.prompt.vectors_PD": theirs.prompt_encoder.default.embedding.weight}

    compare(make_learner, build, config, {"name": "prompt", "length": 5}, start, lr=0.2)
