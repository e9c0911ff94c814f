"""PEFT passes: what is trained and saved, how a base comes back, how adapters are switched."""

import copy
import dataclasses
import json

import pytest
import torch

from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.cli import main
from nanolm.config.load import load_config
from nanolm.errors import UserError
from nanolm.learner import Learner
from nanolm.model.cache import KeyValueCache
from nanolm.model.trunk import Inputs
from nanolm.peft.base import attach, detach, merge, trainable_counts
from nanolm.peft.files import load_adapter, save_adapter
from nanolm.registry import PEFT
from nanolm.saved import open_saved

METHODS = [name for name in PEFT.names() if name != "none"]
MERGEABLE = ("lora", "dora", "adalora", "ia3", "bitfit")
GATED = {"feed_forward": "swiglu", "norm": "rmsnorm", "n_kv_heads": 2}
TOKENS = torch.randint(0, 512, (3, 16), generator=torch.Generator().manual_seed(5))


def options_of(name, **changes):
    return load_config([], base={"peft": {"name": name, **changes}}).peft


def hidden(learner):
    with torch.no_grad():
        return learner.eval().trunk(Inputs(tokens_BT=TOKENS))


def shaken(learner):
    """Moves every trained weight, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in learner.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return learner


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [{}, GATED], ids=["gpt2", "llama"])
def test_attach_train_detach(make_learner, name, shape):
    learner = make_learner(shape)
    base, names = hidden(learner), set(learner_tensors(learner))
    before = copy.deepcopy(learner_tensors(learner))
    adapter = attach(learner, options_of(name))
    trained, total = trainable_counts(learner)
    assert 0 < trained < 0.25 * total
    if name not in ("prefix", "prompt"):  # these begin at random
        torch.testing.assert_close(hidden(learner), base, atol=1e-6, rtol=1e-6)
    every = {n for n, _ in learner.named_parameters()}
    assert names <= every, "the base's weights keep their names"
    # Every trained weight gets a gradient: DDP has no unused parameters.
    learner.train()
    term = learner({"tokens": TOKENS, "targets": TOKENS})["clm"]
    (term.sum / term.count).backward()
    for n, p in learner.named_parameters():
        assert (p.grad is not None) == p.requires_grad, n
    learner.zero_grad()
    assert (hidden(shaken(learner)) - base).abs().max() > 1e-3
    assert set(learner_tensors(learner)) == set(adapter.names) != names
    detach(learner)
    after = learner_tensors(learner)
    assert set(after) == names and all(torch.equal(after[n], before[n]) for n in names)
    assert torch.equal(hidden(learner), base)
    assert trainable_counts(learner) == (total_of(learner), total_of(learner))


def total_of(learner):
    return sum(p.numel() for p in learner.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_merging_changes_no_hidden_state(make_learner, name):
    learner = make_learner(GATED | {"n_layers": 1})
    targets = ["q", "v", "out", "gate", "down"]
    low_rank = {"targets": targets} if name in ("lora", "dora", "adalora") else {}
    attach(learner, options_of(name, **low_rank))
    expected = hidden(shaken(learner))
    if name not in MERGEABLE:
        with pytest.raises(UserError, match=rf"peft={name} .*cannot be merged"):
            merge(learner)
        return
    merge(learner)
    assert learner.adapter is None
    assert not any("lora" in n or "ia3" in n for n, _ in learner.named_parameters())
    torch.testing.assert_close(hidden(learner), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["prefix", "prompt", "lora"])
def test_tokens_one_by_one_behind_a_cache_see_the_same(make_learner, name):
    learner = make_learner(GATED | {"window": [6, None]})
    attach(learner, options_of(name))
    expected = hidden(shaken(learner))
    cache = KeyValueCache(2, len(TOKENS), TOKENS.shape[1], 2, 8)
    parts = [TOKENS[:, :5], *TOKENS[:, 5:].split(1, dim=1)]
    with torch.no_grad():
        found = [learner.trunk(Inputs(tokens_BT=part, cache=cache)) for part in parts]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_adapters_are_switched_and_refuse_another_base(make_learner, tmp_path):
    learner, found = make_learner(), {}
    base = hidden(learner)
    for name in METHODS:
        attach(learner, options_of(name), base="runs/base")
        found[name] = hidden(shaken(learner))
        folder = save_adapter(tmp_path / name, learner)
        assert (folder / "model.safetensors").stat().st_size < 60_000
        detach(learner)
    for name in reversed(METHODS):
        load_adapter(tmp_path / name, learner)
        assert torch.equal(hidden(learner), found[name])
    detach(learner)
    assert torch.equal(hidden(learner), base)
    other = make_learner()
    with torch.no_grad():
        other.trunk.embedding.weight[0, 0] += 1
    kept = hidden(other)
    with pytest.raises(UserError, match=r"was trained on runs/base .* another model's"):
        load_adapter(tmp_path / "lora", other)
    assert other.adapter is None and torch.equal(hidden(other), kept)


def test_trained_heads_are_saved_and_come_back(make_learner, tmp_path):
    learner = make_learner({"trunk": "encoder"}, {"name": "mlm"})
    before = copy.deepcopy(learner_tensors(learner))
    adapter = attach(learner, options_of("lora"), heads=["lm"])
    heads = {n for n in adapter.names if n.startswith("heads.")}
    assert heads and "trunk.embedding.weight" not in adapter.names
    shaken(learner)
    bias = learner.heads["lm"].bias.detach().clone()
    save_adapter(tmp_path / "a", learner)
    detach(learner)
    assert all(torch.equal(t, before[n]) for n, t in learner_tensors(learner).items())
    load_adapter(tmp_path / "a", learner)
    assert torch.equal(learner.heads["lm"].bias, bias)


def test_refusals(make_learner):
    learner = make_learner()
    with pytest.raises(UserError, match=r"peft\.targets has gate, which this model lacks"):
        attach(learner, options_of("lora", targets=["gate"]))
    with pytest.raises(UserError, match=r"peft\.rank=0"):
        options_of("lora", rank=0)
    detach(learner)
    attach(learner, options_of("lora"))
    with pytest.raises(UserError, match="attached"):
        attach(learner, options_of("lora"))


TINY_RUN = [
    "--model.d_model", "32", "--model.n_layers", "2", "--model.n_heads", "4",
    "--data.row_length", "32", "--model.max_length", "48", "--train.global_batch", "4",
    "--run.device", "cpu", "--run.threads", "1", "--run.wandb.mode", "disabled",
    "--eval.batches", "2", "--run.log_every", "2",
]  # fmt: skip


def train(corpus, run, *words):
    main(["train", "--data.path", str(corpus), "--run.dir", str(run), *TINY_RUN, *words])


def test_a_run_saves_the_adapter_alone_resumes_exactly_and_is_merged(corpus, tmp_path, capsys):
    base, run = tmp_path / "base", tmp_path / "lora"
    train(corpus, base, "--train.steps", "3")
    adapted = ["--init_from", str(base), "--peft.name", "lora", "--optim.lr", "0.01"]
    train(corpus, run, "--train.steps", "6", *adapted)
    assert "peft=lora trains 2,048 of" in "".join(capsys.readouterr())
    summary = json.loads((run / "summary.json").read_text())
    assert summary["trainable_params"] == 2 * 2 * (8 * 32 + 32 * 8)
    checkpoint = run / "checkpoints" / "step-00000006"
    assert (checkpoint / "model.safetensors").stat().st_size < 20_000
    # Three steps, a stop, three more: the same weights.
    once, twice, even = tmp_path / "once", tmp_path / "twice", ["--schedule.name", "constant"]
    train(corpus, twice, "--train.steps", "3", *even, *adapted)
    train(corpus, twice, "--train.steps", "6", "--resume", "auto", *even, *adapted)
    train(corpus, once, "--train.steps", "6", *even, *adapted)
    left, right = open_saved(twice).learner, open_saved(once).learner
    for name, tensor in learner_tensors(left).items():
        assert torch.equal(tensor, learner_tensors(right)[name]), name
    main(["merge", str(run), "--out", str(tmp_path / "merged"), "--json", str(tmp_path / "f.json")])
    assert json.loads((tmp_path / "f.json").read_text())["largest_difference"] < 1e-5
    merged, opened = open_saved(tmp_path / "merged"), open_saved(run)
    assert merged.config.peft.name == "none" and merged.learner.adapter is None
    torch.testing.assert_close(hidden(merged.learner), hidden(opened.learner), atol=1e-5, rtol=1e-5)
    assert isinstance(merged.learner, Learner) and dataclasses.is_dataclass(merged.config)
    # Another base under the same name is refused, and so is none.
    train(corpus, tmp_path / "other", "--train.steps", "3", "--run.seed", "5")
    base.rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"its base .* is not there"):
        open_saved(run)
    (tmp_path / "other").rename(base)
    with pytest.raises(UserError, match="another model's"):
        open_saved(run)
    with pytest.raises(SystemExit):
        train(corpus, tmp_path / "none", "--peft.name", "lora")
    assert "say which: --init_from" in capsys.readouterr().err
