"""Checkpoints are complete or absent, verified, pruned, and load only where they fit."""

import errno
import json
import pathlib
import resource
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from nanolm.checkpoint import container
from nanolm.checkpoint.checkpoints import Checkpoints, load_trunk, load_weights, locate
from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.distributed.world import World
from nanolm.errors import UserError
from tests.tiny_run import build_learner, build_trainer, tiny_config


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, World(), keep_last=2)
    learner = build_learner()
    tensors = {"model": learner_tensors(learner)}
    checkpoints.save(7, tensors, {"step": 7}, {"config.yaml": b"a: 1\n"})
    return checkpoints, learner


def test_tied_weights_are_stored_once_under_names_without_wrappers(saved):
    checkpoints, learner = saved
    names = set(container.read_tensors(checkpoints.path(7), "model"))
    assert names == {name for name, _ in learner.named_parameters()}
    assert "heads.lm.weight" not in names and "trunk.embedding.weight" in names


def damage(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[:-1])
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize("file", ["model.safetensors", "trainer.json", "config.yaml"])
def test_every_damage_is_told_by_file(saved, file, how):
    checkpoints, _ = saved
    container.verify(checkpoints.path(7))
    damage(checkpoints.path(7) / file, how)
    words = {"missing": "is missing", "truncated": "truncated", "flipped": "is damaged"}
    with pytest.raises(UserError, match=f"{file} .*{words[how]}"):
        locate(checkpoints.path(7))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 9, "files": {}}', '{"files": 3}']
)
def test_a_damaged_index_is_one_sentence(saved, text):
    checkpoints, _ = saved
    (checkpoints.path(7) / "index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        locate(checkpoints.path(7))


def test_an_index_cannot_point_outside_its_folder(saved):
    checkpoints, _ = saved
    index = checkpoints.path(7) / "index.json"
    index.write_text(json.dumps({"format": 1, "files": {"../x": {"bytes": 1, "sha256": ""}}}))
    with pytest.raises(UserError, match="outside its folder"):
        locate(checkpoints.path(7))


def test_another_model_shape_names_the_first_key_and_both_shapes(saved):
    checkpoints, learner = saved
    learner.trunk.blocks[1][1] = nn.Linear(8, 30)
    with pytest.raises(UserError, match=r"trunk.blocks.1.1.weight is 32 x 8 there and 30 x 8 here"):
        load_weights(checkpoints.path(7), learner)
    learner.trunk.blocks.pop(1)
    with pytest.raises(UserError, match=r"has a tensor trunk.blocks.1"):
        load_weights(checkpoints.path(7), learner)


def test_load_trunk_takes_the_trunk_and_matching_heads(saved):
    checkpoints, learner = saved
    other = build_learner()
    nn.init.zeros_(other.trunk.embedding.weight)
    other.heads["row"] = nn.Linear(8, 5)
    assert load_trunk(checkpoints.run, other) == ["row"]
    assert torch.equal(other.trunk.embedding.weight, learner.trunk.embedding.weight)


def test_newest_best_and_pruning(saved):
    checkpoints, learner = saved
    tensors = {"model": learner_tensors(learner)}
    checkpoints.mark_best(7)
    for step in (8, 9, 10):
        checkpoints.save(step, tensors, {"step": step}, {})
    assert checkpoints.steps() == [7, 9, 10]
    assert checkpoints.newest()[0] == checkpoints.path(10)
    damage(checkpoints.path(10) / "model.safetensors", "flipped")
    found, problems = checkpoints.newest()
    assert found == checkpoints.path(9) and "damaged" in problems[0]
    checkpoints.save(10, tensors, {"step": 10}, {})  # written again, over the damaged one
    assert checkpoints.newest() == (checkpoints.path(10), [])


def test_a_full_disk_is_told_and_leaves_the_last_checkpoint_intact(tmp_path, monkeypatch):
    trainer = build_trainer(tiny_config(tmp_path, train__steps=10), World())
    real, calls = container.save_file, []

    def full(tensors, path, metadata):
        calls.append(path)
        real(tensors, path, metadata)
        if len(calls) > 2:  # the second checkpoint's first file
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(container, "save_file", full)
    with pytest.raises(UserError, match="step-00000010 not written: the disk is full"):
        trainer.fit()
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000005"]
    assert locate(tmp_path) == folder / "step-00000005"


def test_a_file_that_the_system_cuts_short_is_told(tmp_path):
    """A real limit of the operating system, in a process of its own."""
    code = """
import pathlib, sys, torch
from nanolm.checkpoint.checkpoints import Checkpoints
from nanolm.distributed.world import World
from nanolm.errors import UserError
try:
    Checkpoints(pathlib.Path(sys.argv[1]), World()).save(
        1, {"model": {"w": torch.zeros(1 << 18)}}, {"step": 1}, {})
except UserError as error:
    print(error)
"""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    command = [sys.executable, "-c", code, str(tmp_path)]
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, cwd=root)
    assert "step-00000001 not written" in done.stdout, done.stderr
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_nothing_in_the_package_can_unpickle():
    root = pathlib.Path(__file__).parent.parent
    words = ("import pickle", "torch.load(", "torch.save(", "gather_object(", "broadcast_object")
    # A published .bin file is read in one place, with weights_only=True and when the user says so:
    # tests/test_imports.py holds that.
    published = root / "nanolm" / "hub" / "folder.py"
    for path in {*root.glob("nanolm/**/*.py"), *root.glob("data/**/*.py")} - {published}:
        text = path.read_text(encoding="utf-8")
        for word in words:
            assert word not in text, f"{path} uses {word}"
