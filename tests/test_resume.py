"""Resume is exact: 40 steps = 15 + kill -9 + 25, bit for bit, with 1, 2 and 3 ranks."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from nanolm.errors import UserError
from nanolm.training.throughput import TIMING
from tests.tiny_run import build_trainer, in_ranks, in_turn, tiny_config

LAST = "checkpoints/step-00000040"


def fit(world, config, kill_after=None):
    def hook(record):
        if record["step"] == kill_after and record["kind"] == "train":
            os.kill(os.getpid(), signal.SIGKILL)

    log = []
    trainer = build_trainer(config, world, hook=hook, log=log)
    trainer.fit()
    return log


def tensors(run, last=LAST):
    return {path.stem: load_file(path) for path in sorted((run / last).glob("*.safetensors"))}


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def assert_same_bits(left, right, last=LAST):
    assert metrics(left) == metrics(right)
    before, after = tensors(left, last), tensors(right, last)
    assert before.keys() == after.keys() and len(before) >= 2
    for part, expected in before.items():
        found = after[part]
        assert expected.keys() == found.keys() and expected
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), f"{part} {name}"


CHANGES = {"train__ema": 0.9, "model__dropout": 0.1}


# With one rank, a kill between a checkpoint and its evaluation is the cheaper sibling.
@pytest.mark.parametrize("ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_a_killed_run_ends_bit_equal_to_an_undisturbed_one(tmp_path, ranks):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    stages = (fit, tiny_config(whole, **CHANGES)), (fit, tiny_config(broken, **CHANGES), 18)
    in_ranks(ranks, in_turn, *stages, kill=True)
    (broken / "checkpoints" / ".tmp-step-00000020-1").mkdir()
    in_ranks(ranks, fit, tiny_config(broken, resume="auto", **CHANGES))
    assert_same_bits(whole, broken)
    assert not list((broken / "checkpoints").glob(".tmp*"))


def test_a_kill_between_checkpoint_and_evaluation_loses_no_line(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    killed = tiny_config(broken, **CHANGES)
    stages = (fit, tiny_config(whole, **CHANGES)), (fit_until_evaluation, killed)
    in_ranks(1, in_turn, *stages, kill=True)
    in_ranks(1, fit, tiny_config(broken, resume="auto", **CHANGES))
    assert_same_bits(whole, broken)


def fit_until_evaluation(world, config):
    trainer = build_trainer(config, world)
    trainer.evaluate = lambda saved: os.kill(os.getpid(), signal.SIGKILL)
    trainer.fit()


def test_another_number_of_ranks_continues_the_same_batches(tmp_path):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    steady = {"train__ema": 0.9}  # no dropout: its randomness is keyed by the rank
    in_ranks(1, fit, tiny_config(whole, **steady))
    in_ranks(3, fit, tiny_config(moved, **steady), 18, kill=True)
    logs = in_ranks(2, fit, tiny_config(moved, resume="auto", **steady))
    for step, *shares in zip(range(15, 40), *logs):
        assert [row for _, rows in shares for row in rows] == list(range(7 * step, 7 * step + 7))
    for part, expected in tensors(whole).items():
        for name, tensor in expected.items():
            torch.testing.assert_close(tensors(moved)[part][name], tensor, rtol=1e-4, atol=1e-5)
    for left, right in zip(metrics(whole), metrics(moved), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)


def test_a_folder_that_holds_a_run_is_refused_and_other_configs_too(tmp_path):
    config = tiny_config(tmp_path, train__steps=5)
    in_ranks(1, fit, config)
    (refused,) = in_ranks(1, fit, config)
    assert "already holds a run" in refused and "--resume auto" in refused
    other = tiny_config(tmp_path, resume="auto", train__global_batch=8, run__log_every=3)
    (refused,) = in_ranks(1, fit, other)
    assert "train.global_batch (7 there, 8 here)" in refused and "log_every" not in refused
    (log,) = in_ranks(1, fit, tiny_config(tmp_path, resume="auto", train__steps=8))
    assert [step for step, _ in log] == [5, 6, 7]


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(tmp_path):
    in_ranks(1, fit, tiny_config(tmp_path, train__steps=15))
    path = tmp_path / "checkpoints" / "step-00000015" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    config = tiny_config(tmp_path, resume="auto", train__steps=15)
    notes, log = in_ranks(1, resume_with_notes, config)[0]
    assert f"{path} is damaged" in notes[0] and "went back to" in notes[0]
    assert [step for step, _ in log] == [10, 11, 12, 13, 14]
    missing = tiny_config(tmp_path, resume=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no such folder"):
        from nanolm.distributed.world import World

        build_trainer(missing, World())


def resume_with_notes(world, config):
    notes, log = [], []
    build_trainer(config, world, notes=notes, log=log).fit()
    return notes, log
