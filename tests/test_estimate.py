"""`nanolm estimate`: its figures against a model that is built, run and saved; world 1,024."""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys

import pytest
import torch

from nanolm import cli
from nanolm.build import build_learner, build_objective, resolve
from nanolm.config.load import load_config
from nanolm.errors import UserError
from nanolm.tools.estimate import (
    Sizes,
    activation_bytes,
    estimate,
    find_device,
    largest,
    lean,
    scaled,
)
from tests.conftest import tiny_tokenizer

BASE = {"d_model": 96, "n_layers": 4, "n_heads": 4, "max_length": 128, "vocab_size": 512}
LLAMA = {
    "feed_forward": "swiglu",
    "norm": "rmsnorm",
    "positions": {"name": "rotary"},
    "n_kv_heads": 2,
    "bias": False,
}


def build(model, **train):
    base = {"model": {**BASE, **model}, "data": {"row_length": 128}, "train": train}
    config = resolve(load_config([], base=base), tiny_tokenizer())
    return config, build_learner(config, build_objective(config, tiny_tokenizer()))


def kept_bytes(learner, batch):
    """Bytes of all storages that autograd keeps for the backward pass, parameters excepted."""
    own = {t.untyped_storage().data_ptr() for t in [*learner.parameters(), *learner.buffers()]}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = learner.train()(batch)
    del terms
    return sum(sizes.values())


@pytest.mark.parametrize("model", [{}, LLAMA, {**LLAMA, "d_ff": 192}, {"n_layers": 1}])
def test_activations_are_those_that_autograd_keeps(model):
    config, learner = build(model)
    tokens = torch.arange(8 * 128).view(8, 128) % 512
    head = 4 * 512 * 96 + 4 * tokens.numel() * 96  # gradient of the table and of the hidden states
    expected = activation_bytes(config.model, "fp32", "none", tokens.numel()) + head
    assert kept_bytes(learner, {"tokens": tokens, "targets": tokens}) == pytest.approx(
        expected, rel=0.15
    )


def test_parameters_memory_and_checkpoint_are_those_of_a_run(tmp_path):
    from tests.prepared import SMALL, prepared_corpus, train

    train(tmp_path / "run", "--train.steps=1", "--schedule.warmup=0", "--train.ema=0.9")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    files = list((tmp_path / "run" / "checkpoints").glob("step-*/*.safetensors"))
    config = load_config([*SMALL, f"--data.path={prepared_corpus()}", "--train.ema=0.9"])
    config = resolve(config, tiny_tokenizer())
    learner = build_learner(config, build_objective(config, tiny_tokenizer()), meta=True)
    sizes = Sizes.of(learner)
    needs = estimate(config, sizes, 1, "h100")
    assert needs.parameters == summary["params"]
    assert needs.checkpoint == pytest.approx(sum(f.stat().st_size for f in files), rel=0.1)
    sharded = dataclasses.replace(config.distributed, strategy="fsdp")
    parts = estimate(dataclasses.replace(config, distributed=sharded), sizes, 8, "h100").memory
    assert parts["weights"] == needs.memory["weights"] / 8 and parts["gathered weights"] > 0


def test_the_command_prints_the_parts(tmp_path):
    path = "configs/pretrain/gpt2_124m.yaml"
    report = tmp_path / "report.json"
    with contextlib.redirect_stdout(io.StringIO()) as text:
        cli.run(["estimate", path, "--gpus=8", "--device=h100", f"--json={report}"])
    figures = json.loads(report.read_text())
    assert 120e6 < figures["parameters"] < 130e6 and figures["fits"]
    assert "memory: activations" in text.getvalue() and "days for" in text.getvalue()
    sizes = [limit["parameters"] / 1e9 for limit in figures["largest"]]
    assert 2 < sizes[0] < 6 and sizes[0] < sizes[1] <= sizes[2] < sizes[3] < sizes[4]
    assert "Largest model of this shape per 80 GiB" in text.getvalue()
    assert find_device("rtx-4090") == "RTX 4090" and find_device("v100-pcie") == "V100-PCIE"
    with pytest.raises(UserError, match="device=abacus is not known"):
        find_device("abacus")


def test_the_largest_model_fits_and_the_next_does_not():
    config, _ = build(LLAMA)
    assert scaled(config.model, 5).n_layers == 10 and scaled(config.model, 5).d_model == 240

    def sizes_of(model):
        changed = dataclasses.replace(config, model=model)
        objective = build_objective(changed, tiny_tokenizer())
        return Sizes.of(build_learner(changed, objective, meta=True))

    assert sizes_of(config.model) == sizes_of(scaled(config.model, 2)).deeper(4)
    for limit in largest(config, sizes_of, [("ddp", 1), ("fsdp", 8)], "rtx4090"):
        for groups, fits in ((limit.model.kv_heads, True), (limit.model.kv_heads + 1, False)):
            model = scaled(config.model, groups)
            sizes = sizes_of(dataclasses.replace(model, n_layers=2)).deeper(model.n_layers)
            tried = lean(config, model, limit.strategy, limit.gpus)
            assert estimate(tried, sizes, limit.gpus, "rtx4090").fits == fits


FAKE = """
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from nanolm.config.load import load_config
from nanolm.tools.stand_in import StandInTokenizer
from nanolm.build import build_learner, build_objective, initialiser, resolve
from nanolm.distributed.world import World
from nanolm.training.engine import Engine
from nanolm.distributed.sharding import local
dist.init_process_group("fake", store=FakeStore(), rank=517, world_size=1024)
for strategy, share in (("fsdp", 1024), ("hsdp", 8)):
    tokenizer = StandInTokenizer(8192)
    config = resolve(load_config(["--model.d_model=1024", "--model.n_layers=2", "--model.n_heads=8",
        f"--distributed.strategy={strategy}", "--distributed.shard_size=8"]), tokenizer)
    learner = build_learner(config, build_objective(config, tokenizer), meta=True)
    total = sum(p.numel() for p in learner.parameters())
    world = World(rank=517, size=1024, control=dist.group.WORLD)
    engine = Engine(learner, world, config, initialise=initialiser(config))
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    engine.module({"tokens": tokens, "targets": tokens})["clm"].sum.backward()
    mine = sum(local(p).numel() for p in learner.parameters())
    grads = sum(local(p.grad).numel() for p in learner.parameters() if p.grad is not None)
    print(strategy, mine == grads, round(mine * share / total, 3))
"""


@pytest.mark.slow
def test_shards_at_world_1024(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", FAKE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    fsdp, hsdp = (line.split() for line in done.stdout.splitlines())
    assert fsdp[:2] == ["fsdp", "True"] and hsdp[:2] == ["hsdp", "True"]
    # A rank holds whole rows: 1,024 ranks divide sizes that are multiples of 1,024 evenly.
    assert float(fsdp[2]) == float(hsdp[2]) == 1.0


def test_deeper_sizes_are_those_of_the_deeper_model_in_every_stack(make_learner):
    for trunk, objective in (("decoder", "clm"), ("encoder_decoder", "span")):
        keys = {"trunk": trunk, "norm": "rmsnorm", "bias": False, "positions": {"name": "t5"}}
        found = [
            Sizes.of(make_learner({**keys, "n_layers": n}, {"name": objective})) for n in (2, 5, 1)
        ]
        assert found[0].deeper(5) == found[1] and found[0].deeper(1) == found[2]
