"""Fuzzing: mutated configs, checkpoints, indexes and records are accepted rightly or refused in one
sentence: no traceback, nothing unpickled."""

import contextlib
import json
import pickle
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm import strict_yaml
from nanolm.arguments import load_config
from nanolm.checkpoint import Checkpoints, load_weights, locate, read_trainer
from nanolm.container import read_json, read_tensors
from nanolm.distributed import World
from nanolm.errors import UserError
from nanolm.nonfinite import read_passed
from nanolm.runfolder import cut_metrics
from nanolm.state import learner_tensors
from tests.tiny_run import build_learner

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True, database=None)
CONFIG = """
model: {d_model: 32, n_layers: 2, positions: {name: rotary}}
data: {path: x, row_length: 32}
optim: {name: adamw, lr: 0.001, betas: [0.9, 0.95]}
train: {steps: 10, nonfinite: rewind, spike: 10.0}
distributed: {strategy: fsdp, timeout: 60}
"""

INSERTIONS = [b"{", b"[", b"null", b"-1e999", b"9" * 400, b"\xff\xfe", b"&a [*a]"]


def mutated(data: bytes, seed: int) -> bytes:
    """The bytes with one to four random flips, cuts, repeats or insertions."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        data = rng.choice(
            [
                lambda at=at, d=data: d[:at] + bytes([rng.randrange(256)]) + d[at + 1 :],
                lambda at=at, d=data: d[:at],
                lambda at=at, d=data: d[:at] + d[max(at - 20, 0) :],
                lambda at=at, d=data: d[:at] + rng.choice(INSERTIONS) + d[at:],
            ]
        )()
    return data


@given(st.integers(0, 10**9))
@SETTINGS
def test_mutated_configs(tmp_path_factory, seed):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(mutated(CONFIG.encode(), seed))
    with contextlib.suppress(UserError):
        config = load_config([f"--config={path}"])
        assert config == load_config([], base=strict_yaml.read_mapping(path))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    checkpoints = Checkpoints(tmp_path_factory.mktemp("fuzz"), World())
    trainer = {"step": 3, "skips": 0, "losses": [], "best": 1.0, "seconds": 1.0}
    trainer |= {"scaler": {}, "environment": {}, "facts": {}}
    checkpoints.save(3, {"model": learner_tensors(build_learner())}, trainer, {})
    return checkpoints


@given(st.integers(0, 10**9), st.sampled_from(["index.json", "trainer.json", "model.safetensors"]))
@SETTINGS
def test_mutated_checkpoints(checkpoint, seed, name):
    """With checksums a mutation is found; without them (a stranger's index) it is still read
    rightly or refused."""
    path = checkpoint.path(3) / name
    before = path.read_bytes()
    after = mutated(before, seed)
    path.write_bytes(after)
    try:
        if name != "index.json" and after != before:
            with pytest.raises(UserError):
                locate(checkpoint.run)
        for read in (
            lambda: locate(checkpoint.run),
            lambda: read_trainer(path.parent),
            lambda: read_tensors(path.parent, "model"),
            lambda: load_weights(path.parent, build_learner()),
        ):
            with contextlib.suppress(UserError):
                read()
    finally:
        path.write_bytes(before)


RECORD = b'{"step": 1, "kind": "train", "loss": 2.0}\n{"step": 2, "kind": "val", "loss": 1.0}\n'


@given(st.integers(0, 10**9))
@SETTINGS
def test_mutated_records(tmp_path_factory, seed):
    folder = tmp_path_factory.getbasetemp() / "records"
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_bytes(mutated(RECORD, seed))
    (folder / "nonfinite.jsonl").write_bytes(mutated(b'{"step": 9, "passed": [8, 9]}\n', seed))
    for read in (
        lambda: cut_metrics(folder / "metrics.jsonl", 2),
        lambda: read_passed(folder),
        lambda: read_json(folder, "nonfinite.jsonl"),
    ):
        with contextlib.suppress(UserError):
            read()


class Bomb:
    def __reduce__(self):
        return (print, ("executed!",))


def test_a_pickle_in_place_of_anything_executes_nothing(checkpoint, capsys):
    for name in ("model.safetensors", "trainer.json"):
        path = checkpoint.path(3) / name
        before = path.read_bytes()
        path.write_bytes(pickle.dumps(Bomb()))
        try:
            with pytest.raises(UserError):
                read_trainer(path.parent)
                read_tensors(path.parent, "model")
        finally:
            path.write_bytes(before)
    path = checkpoint.path(3) / "pytorch_model.bin"
    torch.save({"w": Bomb()}, path)  # lies there and is not touched
    read_tensors(path.parent, "model")
    assert "executed" not in capsys.readouterr().out
    assert json.loads((path.parent / "index.json").read_text())["format"] == 1
