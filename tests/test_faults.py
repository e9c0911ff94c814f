"""Faults in real processes under torchrun's agent: kills, hangs, stops, bad numbers, slow ranks."""

import datetime
import json
import os
import random
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from nanolm.checkpoint import container
from nanolm.distributed.world import World
from nanolm.errors import UserError
from nanolm.training.guards import watchdog
from nanolm.training.guards.watchdog import hanging, verdict
from nanolm.training.phases import Progress, straggler
from tests.elastic import elastic, output
from tests.test_resume import assert_same_bits, fit
from tests.tiny_run import build_trainer, in_ranks, tiny_config

CHANGES = {"train__ema": 0.9, "model__dropout": 0.1}


def fit_and_be_killed(world, config, kills, seed, book):
    """Fits, and in each of the first `kills` attempts one random rank dies, some steps after the
    start and some milliseconds later; in every fifth attempt rank 0 dies as it writes a file."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    rng = random.Random(f"{seed} {attempt}")
    writes = attempt % 5 == 1
    victim, steps = 0 if writes else rng.randrange(world.size), rng.randrange(1, 18)
    delay, left = rng.uniform(0.0, 0.02), [None] * rng.randrange(1, 9)
    trainer = build_trainer(config, world, hook=lambda record: hook(record))
    first = trainer.state.done

    def die():
        writing = bool(list(trainer.snapshot.checkpoints.folder.glob(".tmp-*")))
        entry = {"attempt": attempt, "step": trainer.state.done, "phase": trainer.progress.phase}
        with (book / f"{world.rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry | {"writing": writing}) + "\n")
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(record):
        time.sleep(0.005)
        due = (record["step"], record["kind"]) == (first + steps, "train")
        if due and not writes and victim == world.rank and attempt < kills:
            threading.Timer(delay, die).start()

    def sync(path):
        left.pop()
        if not left:
            die()
        real(path)

    if writes and victim == world.rank and attempt < kills:
        real, container.sync = container.sync, sync
    trainer.fit()


def survive(tmp_path, ranks, kills, **changes):
    """Every attempt but the last was killed while it trained, some while it wrote."""
    steps = 18 * kills
    changes = CHANGES | {"train__steps": steps, "run__checkpoint_every": 4} | changes
    whole, broken, logs, book = (tmp_path / name for name in ("whole", "broken", "logs", "book"))
    book.mkdir()
    in_ranks(ranks, fit, tiny_config(whole, **changes))
    config = tiny_config(broken, resume="auto", **changes)
    assert elastic(logs, ranks, kills, fit_and_be_killed, config, kills, 5, book), output(logs)
    assert_same_bits(whole, broken, f"checkpoints/step-{steps:08d}")
    assert not list(broken.rglob(".tmp*"))
    entries = [json.loads(line) for path in book.iterdir() for line in path.open()]
    assert sorted(entry["attempt"] for entry in entries) == list(range(kills))
    assert all(entry["step"] < steps and entry["phase"] != "start" for entry in entries)
    assert sum(entry["writing"] for entry in entries) >= kills // 5


# Siblings that are not slow: a kill at a known step (test_resume.py), and a job that its agent
# starts again (below).
@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_async", [False, True])
def test_kills_at_random_moments_end_bit_equal(tmp_path, checkpoint_async):
    survive(tmp_path, ranks=2, kills=2, run__checkpoint_async=checkpoint_async)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_fifty_kills_at_random_moments_end_bit_equal(tmp_path, ranks):
    survive(tmp_path, ranks, kills=50, run__checkpoint_async=ranks == 3)


def fit_and_hang(world, config, rank, step, how):
    """In the first attempt one rank blocks, or is stopped, while it waits for data; when it is to
    be `alone`, the others come to that step so late that they have no suspicion yet."""
    trainer = build_trainer(config, world)
    factory = trainer.loader_factory

    def loader(start):
        for number, batches in enumerate(factory(start), start + 1):
            first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
            if first and (world.rank, number) == (rank, step):
                time.sleep(1.0)  # for a heartbeat in this step
                os.kill(os.getpid(), signal.SIGSTOP) if how == "stop" else deadlock()
            if first and number == step and how == "alone":
                time.sleep(2.5)
            yield batches

    trainer.loader_factory = loader
    trainer.fit()


def deadlock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("block", marks=pytest.mark.slow),
        "alone",
        pytest.param("stop", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_is_named_and_the_job_restarts(tmp_path, how):
    changes = {"train__steps": 12, "distributed__hang_timeout": 2.0}
    config = tiny_config(tmp_path / "run", resume="auto", **changes)
    logs = tmp_path / "logs"
    started = time.monotonic()
    assert elastic(logs, 2, 1, fit_and_hang, config, 1, 7, how), output(logs)
    assert time.monotonic() - started < config.distributed.timeout
    told = output(logs)
    if how != "stop":
        assert "hangs in step 7, phase data" in told and "nanolm: rank 1 (pid" in told
        assert "in deadlock" in told
    else:
        assert "nanolm: rank 1 (pid" in told and "is stopped, dead or cut off" in told
        assert "its last heartbeat was in step 7, phase data" in told
    written = sorted(path.name for path in (tmp_path / "run" / "hangs").iterdir())
    ranks = [0] if how == "stop" else [0, 1]
    assert written == [f"step-00000007-rank-{rank:04d}.txt" for rank in ranks]
    in_ranks(2, fit, tiny_config(tmp_path / "whole", train__steps=12))
    assert_same_bits(tmp_path / "whole", tmp_path / "run", "checkpoints/step-00000012")


def test_who_hangs_is_who_does_not_wait():
    beats = {
        0: {"step": 7, "phase": "communication", "pid": 1, "host": "a"},
        1: {"step": 7, "phase": "backward", "pid": 2, "host": "b"},
        2: {"step": 6, "phase": "communication", "pid": 3, "host": "c"},
    }
    assert hanging(beats) == [2]
    beats[2]["step"] = 7
    assert hanging(beats) == [1]
    beats[1]["phase"] = "waiting"
    assert hanging(beats) == [0, 1, 2]
    assert verdict(1, beats, [0], False, 1.0).startswith("rank 0 (pid 1 on node a) is stopped")
    assert verdict(2, beats, [0], False, 1.0) is None
    assert "cut off" in verdict(2, beats, [], True, 1.0)


class SlowStore:
    """A store whose answers take a while, as over a network."""

    def __init__(self, store):
        self.store = store

    def set(self, key, value):
        self.store.set(key, value)

    def check(self, keys):
        with pytest.raises(dist.DistStoreError):
            self.store.wait(["never"], datetime.timedelta(seconds=0.5))
        return self.store.check(keys)


def test_training_does_not_end_before_the_heart(tmp_path, monkeypatch):
    """A heart that came back from C++ while Python shut down ended the process with SIGABRT."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = SlowStore(dist.TCPStore("127.0.0.1", server.port))
    monkeypatch.setattr(watchdog, "connect_store", lambda seconds: store)
    monkeypatch.setattr(World, "broadcast", lambda self, value: value)
    progress = Progress(torch.device("cpu"))
    with watchdog.Watchdog(World(rank=1, size=2), progress, 48.0, tmp_path) as dog:
        time.sleep(0.2)
        assert all(thread.is_alive() for thread in dog._threads) and len(dog._threads) == 2
    assert not any(thread.is_alive() for thread in dog._threads)


def fit_with_bad_gradient(world, config, rank, steps, value=float("nan")):
    """One rank's own gradient of one weight is multiplied in the given steps."""
    notes, log = [], []
    trainer = build_trainer(config, world, notes=notes, log=log)

    def hook(gradient):
        bad = world.rank == rank and trainer.state.done + 1 in steps
        return gradient * value if bad else gradient

    trainer.engine.learner.trunk.blocks[1][1].weight.register_hook(hook)
    trainer.fit()
    weights = {n: p.tolist() for n, p in trainer.engine.learner.named_parameters()}
    return notes, weights


@pytest.mark.parametrize("policy", ["stop", "rewind"])
def test_nan_in_one_ranks_gradient(tmp_path, policy):
    config = tiny_config(tmp_path / "a", train__steps=14, train__nonfinite=policy)
    answers = in_ranks(2, fit_with_bad_gradient, config, 1, [8])
    (record,) = map(json.loads, (tmp_path / "a" / "nonfinite.jsonl").read_text().splitlines())
    assert record["tensor"] == "gradient of trunk.blocks.1.1.weight" and record["rank"] == 1
    assert record["rows"] == list(range(7 * 7 + 3, 7 * 8)) and record["step"] == 8
    if policy == "stop":
        assert all("UserError: step 8" in answer for answer in answers)
        return
    assert answers[0][1] == answers[1][1]
    notes = [note for note in answers[0][0] if "is slow" not in note]  # of a loaded machine
    assert len(notes) == 1 and "gradient of trunk.blocks.1.1.weight (rank 1)" in notes[0]
    # Going back and passing over the same step is the same as never having taken it.
    config = tiny_config(tmp_path / "b", train__steps=14, train__nonfinite="skip")
    assert in_ranks(2, fit_with_bad_gradient, config, 1, [8])[0][1] == answers[0][1]


def fit_with_spike(world, config, step):
    """The loss and gradient of one step are a hundred times too large."""
    notes = []
    trainer = build_trainer(config, world, notes=notes)

    def spike(module, inputs, output):
        large = trainer.state.done + 1 == step
        return output._replace(sum=output.sum * 100) if large else output

    learner = trainer.engine.learner
    learner.register_forward_hook(
        lambda module, inputs, terms: {k: spike(module, inputs, t) for k, t in terms.items()}
    )
    trainer.fit()
    return notes, trainer.state.done


def test_a_spike_rewinds_over_its_last_rows_and_a_restart_remembers(tmp_path):
    changes = {"train__nonfinite": "rewind", "train__spike": 20.0, "train__rewind_steps": 3}
    config = tiny_config(tmp_path, train__steps=24, **changes)
    (((note,), done),) = in_ranks(1, fit_with_spike, config, 22)
    assert "times the median of the last 21" in note and "step-00000020" in note and done == 24
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    tail = [(r["step"], r["kind"], r.get("skipped")) for r in records[-7:]]
    assert tail[:2] == [(21, "train", None), (22, "rewind", None)]
    assert [t[0] for t in tail if t[2]] == [21, 22]
    again = build_trainer(tiny_config(tmp_path, resume="auto", train__steps=30, **changes), World())
    assert again.policy.passed == {20, 21, 22} and len(again.state.losses) == 22


def test_rewinding_without_a_checkpoint_or_for_ever_stops(tmp_path):
    config = tiny_config(tmp_path / "a", train__nonfinite="rewind")
    (answer,) = in_ranks(1, fit_with_bad_gradient, config, 0, [3])
    assert "nothing to rewind to" in answer
    config = tiny_config(tmp_path / "b", train__nonfinite="rewind", train__max_skips=2)
    (answer,) = in_ranks(1, fit_with_bad_gradient, config, 0, range(8, 99))
    assert "step 10" in answer and "train.max_skips=2" in answer


def fit_with_flipped_bit(world, config, rank, step):
    trainer = build_trainer(config, world)
    take_step = trainer.step

    def step_with_flip(micro_batches):
        if (world.rank, trainer.state.done + 1) == (rank, step):
            weight = trainer.engine.learner.trunk.blocks[0][1].weight
            weight.data.view(torch.int32)[3, 2] ^= 1 << 4
        return take_step(micro_batches)

    trainer.step = step_with_flip
    trainer.fit()


def test_a_flipped_bit_in_one_ranks_weights_is_found(tmp_path):
    config = tiny_config(tmp_path, train__steps=12, distributed__compare_weights_every=4)
    for answer in in_ranks(3, fit_with_flipped_bit, config, 1, 6):
        assert "after step 8 the weights of rank(s) 1 differ" in answer
        assert "trunk.blocks.0.1.weight first" in answer or "first" in answer


def fit_with_slow_rank(world, config, rank):
    notes = []
    trainer = build_trainer(config, world, notes=notes)
    learner = trainer.engine.learner
    learner.register_forward_pre_hook(
        lambda module, inputs: time.sleep(0.1) if world.rank == rank else None
    )
    trainer.fit()
    return notes


def test_a_slow_rank_is_named_with_its_ratio(tmp_path):
    notes = in_ranks(2, fit_with_slow_rank, tiny_config(tmp_path, train__steps=4), 1)
    assert "rank 1 is slow: its steps take" in notes[0][0]
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[2])
    assert line["slowest_rank"] == 1 and line["straggler"] > 1.5
    assert {"data_seconds", "forward_seconds", "backward_seconds"} <= line.keys()
    assert line["communication_seconds"] > 0.1 > line["optimizer_seconds"]  # rank 0 waited
    assert straggler([1.0, 3.0, 1.0]) == (1, 3.0)


def test_a_torn_record_of_bad_steps_is_one_sentence(tmp_path):
    (tmp_path / "nonfinite.jsonl").write_text('{"passed": [3]}\n{"passed": 4}\n')
    with pytest.raises(UserError, match=r"nonfinite\.jsonl has a line"):
        build_trainer(tiny_config(tmp_path), World())


def refuse(world, alone):
    if alone in (None, world.rank):
        raise UserError("data.path is wrong")
    world.barrier()


@pytest.mark.parametrize("alone", [None, 1])
def test_one_rank_speaks_for_all(tmp_path, alone):
    assert not elastic(tmp_path, 2, 0, refuse, alone)
    assert output(tmp_path).count("nanolm: data.path is wrong") == 1
