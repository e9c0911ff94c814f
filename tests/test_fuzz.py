"""Fuzzing: mutated configs, manifests, shards, checkpoints and records are accepted rightly or
refused in one sentence: no traceback, no hang, no unbounded memory, nothing unpickled."""

import json
import pickle
import subprocess
import sys

import pytest
import torch

from nanolm.checkpoint.checkpoints import read_trainer
from nanolm.checkpoint.container import read_tensors
from nanolm.errors import UserError
from tests.fuzzing import KINDS, checkpoint

LONG = 2000
"""Examples of each kind: 10,000 in all."""


def fuzz(kind, first, count, kinds, folder):
    """Runs the fuzzer in a process with a limit on memory; the output says what it found."""
    words = [kind, str(first), str(count), str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzzing", *words],
        capture_output=True,
        text=True,
        timeout=60 + count,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"kind": kind, "examples": count * kinds}


def test_mutated_inputs(tmp_path):
    fuzz("all", 0, 100, 5, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_mutated_inputs(kind, tmp_path):
    fuzz(kind, 100, LONG, 1, tmp_path)


class Bomb:
    def __reduce__(self):
        return (print, ("executed!",))


def test_a_pickle_in_place_of_anything_executes_nothing(tmp_path, capsys):
    checkpoints = checkpoint(tmp_path)
    for name, read in (
        ("model.safetensors", lambda folder: read_tensors(folder, "model")),
        ("trainer.json", read_trainer),
    ):
        path = checkpoints.path(3) / name
        before = path.read_bytes()
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(UserError):
            read(path.parent)
        path.write_bytes(before)
    path = checkpoints.path(3) / "pytorch_model.bin"
    torch.save({"w": Bomb()}, path)  # lies there and is not touched
    read_tensors(path.parent, "model")
    assert "executed" not in capsys.readouterr().out
    assert json.loads((path.parent / "index.json").read_text())["format"] == 1
