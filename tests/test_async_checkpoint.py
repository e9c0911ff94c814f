"""Checkpoints that are written while training goes on: the same bits, errors and promises."""

import errno
import json
import threading
import time

import pytest

from nanolm.checkpoint import container
from nanolm.checkpoint.background import Background
from nanolm.checkpoint.checkpoints import locate
from tests.test_preemption import fit_with_signal
from tests.test_resume import assert_same_bits, fit
from tests.tiny_run import build_trainer, in_ranks, in_turn, tiny_config

CHANGES = {"train__ema": 0.9, "train__steps": 20, "run__checkpoint_every": 5}
LAST = "checkpoints/step-00000020"


def fit_on_a_slow_disk(world, config, seconds=0.1):
    """Fits; (step, name of the newest checkpoint) at each metrics line."""
    real, seen = container.sync, []
    latest = None

    def slow(path):
        time.sleep(seconds)
        real(path)

    def hook(record):
        if record["kind"] == "train" and latest.is_file():
            seen.append((record["step"], latest.read_text().strip()))

    container.sync = slow
    trainer = build_trainer(config, world, hook=hook)
    latest = trainer.snapshot.checkpoints.folder / "latest"
    trainer.fit()
    assert threading.active_count() == 1 or not trainer.snapshot.background._thread
    return seen


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, strategy):
    changes = CHANGES | {"distributed__strategy": strategy, "eval__every": 0}
    whole = tiny_config(tmp_path / "whole", **changes)
    config = tiny_config(tmp_path / "run", run__checkpoint_async=True, **changes)
    (_, seen), _ = in_ranks(2, in_turn, (fit, whole), (fit_on_a_slow_disk, config))
    assert (9, "step-00000005") in seen or 9 not in dict(seen)
    assert dict(seen).get(11) in (None, "step-00000005")  # the second one was still on its way
    assert_same_bits(tmp_path / "whole", tmp_path / "run", LAST)
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000020\n"
    assert not list((tmp_path / "run").rglob(".tmp*"))


def fit_on_a_full_disk(world, config, rank):
    """The disk of one rank is full from its second checkpoint on."""
    real, calls = container.save_file, []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) > 3 and world.rank == rank:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata)

    container.save_file = full
    build_trainer(config, world).fit()


@pytest.mark.parametrize("steps", [20, 10])
def test_a_full_disk_is_told_by_all_and_leaves_the_last_checkpoint_intact(tmp_path, steps):
    """In the middle of a run, and with the last checkpoint."""
    changes = CHANGES | {"distributed__strategy": "fsdp", "train__steps": steps}
    config = tiny_config(tmp_path, run__checkpoint_async=True, **changes)
    for answer in in_ranks(2, fit_on_a_full_disk, config, 1):
        assert answer.startswith("UserError: checkpoint ") and "the disk is full" in answer
        assert "step-00000010 not written" in answer
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000005"] or names == ["best", "latest", "step-00000005"]
    assert locate(tmp_path).name == "step-00000005"
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] <= 15  # not to the end of the run


def preempted_on_a_slow_disk(world, config):
    real = container.sync
    container.sync = lambda path: (time.sleep(0.05), real(path))
    return fit_with_signal(world, config, 1, 17, 15)


def test_preemption_waits_for_the_checkpoint(tmp_path):
    whole = tiny_config(tmp_path / "whole", **CHANGES)
    config = tiny_config(tmp_path / "run", run__checkpoint_async=True, **CHANGES)
    for _, done in in_ranks(2, in_turn, (fit, whole), (preempted_on_a_slow_disk, config)):
        assert done[:2] == (17, True)
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "latest").read_text() == "step-00000017\n"
    assert (folder / "preempted").is_file()
    in_ranks(2, fit, tiny_config(tmp_path / "run", resume="auto", **CHANGES))
    assert_same_bits(tmp_path / "whole", tmp_path / "run", LAST)


def test_one_at_a_time_and_an_error_is_told_once():
    background, order = Background(), []
    background.start(lambda: (time.sleep(0.1), order.append(1)))
    background.start(lambda: order.append(1 / 0))
    with pytest.raises(ZeroDivisionError):
        background.wait()
    background.wait()
    assert order == [1] and background.error is None
