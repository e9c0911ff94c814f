"""The loader: the same bytes for any workers, ranks and restarts, and no process left behind."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from token_shards import random_documents, write_prepared

from nanolm.data.rows import IGNORED, fill_blocks
from nanolm.data.stream import RowStream
from nanolm.errors import UserError
from nanolm.training.loader import Loader, eval_batches

LENGTH = 12


class Causal:
    """A causal objective by the fast path."""

    def batch(self, rows):
        return fill_blocks(rows, LENGTH)

    def counts(self, batch):
        return {"clm": int((batch["targets"] != IGNORED).sum())}


class Noisy:
    """An objective that uses everything: the generator, drawn rows, uneven counts."""

    def example(self, row, rng, draw):
        tokens = row.tokens[:LENGTH].astype(np.int32)
        hidden = rng.random(len(tokens)) < 0.3
        return {"tokens": tokens, "hidden": hidden, "other": draw(int(rng.integers(9))).tokens[:2]}

    def collate(self, examples):
        width = max(len(example["tokens"]) for example in examples)
        tokens = np.full((len(examples), width), -1, dtype=np.int32)
        for line, example in zip(tokens, examples, strict=True):
            line[: len(example["tokens"])] = example["tokens"]
        return {
            "tokens": tokens,
            "hidden": np.concatenate([example["hidden"] for example in examples]),
            "other": np.stack([example["other"] for example in examples]),
        }

    def counts(self, batch):
        return {"mlm": int(batch["hidden"].sum()), "pair": len(batch["tokens"])}


class Failing(Causal):
    """Raises for every batch that holds a certain token."""

    def __init__(self, error):
        self.error = error

    def batch(self, rows):
        if (rows.tokens == 500).any():
            raise self.error
        return super().batch(rows)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    rng = np.random.default_rng(0)
    paths = [folder / "a", folder / "b"]
    for path, shards in zip(paths, ((400, 300), (350,)), strict=True):
        documents = [random_documents(rng, tokens, 15) for tokens in shards]
        write_prepared(path, {"train": documents, "val": documents})
    return [(str(paths[0]), 2.0), (str(paths[1]), 1.0)]


def open_stream(corpora, split="train"):
    return RowStream(corpora, split, stride=LENGTH, span=LENGTH + 1, seed=3, partial=split == "val")


def take(loader, steps):
    """The batches of some steps, one list a step; the loader's processes end."""
    batches = [step for _, step in zip(range(steps), loader, strict=False)]
    loader.close()
    return batches


def in_bytes(batches):
    return [
        {
            name: (tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes())
            for name, tensor in batch.tensors.items()
        }
        | batch.counts
        | {"ids": batch.row_ids.tolist()}
        for batch in batches
    ]


@pytest.mark.parametrize("objective", [Causal(), Noisy()])
def test_batches_are_the_same_bytes_for_any_workers_and_start(corpora, objective):
    def steps(first, count, workers):
        loader = Loader(
            open_stream(corpora),
            objective,
            global_batch=7,
            micro_batch=3,
            workers=workers,
            start_step=first,
        )
        found = [in_bytes(batches) for batches in take(loader, count)]
        assert loader.step == first + count
        return found

    expected = steps(0, 30, 0)
    assert [len(step) for step in expected] == [3] * 30
    assert steps(0, 30, 1) == expected
    assert steps(0, 30, 2) == expected
    assert steps(17, 13, 0) == steps(17, 13, 2) == expected[17:]


@pytest.mark.parametrize("world,micro", [(2, 16), (3, 2), (5, 1), (16, 4)])
def test_ranks_together_read_the_global_batch_in_order(corpora, world, micro):
    whole = Loader(open_stream(corpora), Noisy(), global_batch=11, micro_batch=11)
    expected = [batches[0] for batches in take(whole, 4)]
    ranks = [
        take(
            Loader(
                open_stream(corpora),
                Noisy(),
                global_batch=11,
                micro_batch=micro,
                rank=rank,
                world=world,
            ),
            4,
        )
        for rank in range(world)
    ]
    for step, batch in enumerate(expected):
        mine = [part for rank in ranks for part in rank[step]]
        for name, tensor in batch.tensors.items():
            assert torch.equal(torch.cat([part.tensors[name] for part in mine]), tensor)
        assert np.array_equal(np.concatenate([part.row_ids for part in mine]), batch.row_ids)
        for term, count in batch.counts.items():
            assert sum(part.counts[term] for part in mine) == count
    if world > 11:
        empty = Loader(
            open_stream(corpora),
            Noisy(),
            global_batch=11,
            micro_batch=1,
            rank=0,
            world=world,
            workers=2,
        )
        assert take(empty, 3) == [[], [], []] and empty.step == 3


def test_integers_become_int64_and_the_rest_stays(corpora):
    batch = take(Loader(open_stream(corpora), Noisy(), global_batch=4, micro_batch=4), 1)[0][0]
    kinds = {name: tensor.dtype for name, tensor in batch.tensors.items()}
    assert kinds == {"tokens": torch.int64, "hidden": torch.bool, "other": torch.int64}


def test_no_two_batches_share_memory(corpora):
    loader = Loader(open_stream(corpora), Causal(), global_batch=4, micro_batch=4)
    batches = [batch for step in take(loader, 5) for batch in step]
    kept = in_bytes(batches)
    for name in ("tokens", "targets", "positions", "documents"):
        batches[0].tensors[name].fill_(7)
    assert in_bytes(batches[1:]) == kept[1:]


def evaluated(stream, world, size, limit):
    """(row id, tokens, hidden) of every row that the ranks evaluate, in order."""
    for rank in range(world):
        for batch in eval_batches(stream, Noisy(), size, rank, world, limit=limit):
            lines = [line[line >= 0] for line in batch.tensors["tokens"]]
            hidden = batch.tensors["hidden"].split([len(line) for line in lines])
            for row_id, line, chosen in zip(batch.row_ids, lines, hidden, strict=True):
                yield int(row_id), line.tolist(), chosen.tolist()


@pytest.mark.parametrize("world,size", [(1, 1), (1, 200), (3, 4), (7, 5)])
@pytest.mark.parametrize("limit", [None, 20])
def test_evaluation_reads_each_row_once_whatever_the_world_and_batch(corpora, world, size, limit):
    stream = open_stream(corpora, "val")
    found = list(evaluated(stream, world, size, limit))
    assert len({row_id for row_id, *_ in found}) == len(found) == (limit or len(stream))
    assert found == list(evaluated(stream, 1, 8, limit))
    if limit is None:
        ranks = [eval_batches(stream, Causal(), size, rank, world) for rank in range(world)]
        total = sum(batch.counts["clm"] for rank in ranks for batch in rank)
        assert total == stream.tokens - 2  # the first token of each corpus is nobody's target


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_reach_the_caller(corpora, workers):
    before = multiprocessing.active_children()

    def run(error):
        take(
            Loader(
                open_stream(corpora), Failing(error), global_batch=4, micro_batch=2, workers=workers
            ),
            60,
        )

    with pytest.raises(UserError) as refusal:
        run(UserError("the shard x is damaged; restore it"))
    assert str(refusal.value) == "the shard x is damaged; restore it"
    with pytest.raises(ZeroDivisionError, match="in row five"):
        run(ZeroDivisionError("in row five"))
    assert multiprocessing.active_children() == before, "no worker outlives the error"


def test_bad_arguments_are_refused(corpora):
    stream = open_stream(corpora)
    with pytest.raises(ValueError, match="rank 3"):
        Loader(stream, Causal(), global_batch=4, micro_batch=2, rank=3, world=3)
    with pytest.raises(ValueError, match="micro-batch"):
        Loader(stream, Causal(), global_batch=4, micro_batch=0)
    with pytest.raises(ValueError, match="pin"):
        Loader(stream, Causal(), global_batch=4, micro_batch=2, pin=True)
    loader = Loader(stream, Causal(), global_batch=4, micro_batch=2)
    iterator = iter(loader)
    next(iterator)
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(iterator)


READS_ON = """
    import sys, time
    sys.path[:0] = {path!r}
    from test_loader import Causal, open_stream
    from nanolm.training.loader import Loader
    import multiprocessing
    loader = Loader(open_stream({corpora!r}), Causal(), global_batch=4, micro_batch=2, workers=2)
    for step, batches in enumerate(loader):
        if step == 2:
            print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        if step > 2 and {leave}:
            break
        time.sleep(0.02)
"""


def alive(pid):
    """Whether the process exists and is no zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_worker_outlives_the_loader(corpora):
    here = pathlib.Path(__file__).parent
    parents, workers = {}, []
    for end in ("leaves", "SIGTERM", "SIGKILL"):
        script = textwrap.dedent(READS_ON).format(
            path=[str(here.parent), str(here)], corpora=corpora, leave=end == "leaves"
        )
        parents[end] = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    for end, parent in parents.items():
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        workers += pids
        if end != "leaves":
            assert all(map(alive, pids))
            parent.send_signal(getattr(signal, end))
    for end, parent in parents.items():
        parent.communicate(timeout=600)
        assert parent.returncode == (0 if end == "leaves" else -getattr(signal, end))
    until = time.monotonic() + 30  # they look for their parent every five seconds
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def test_workers_do_not_hear_signals_to_the_group(corpora):
    before = set(multiprocessing.active_children())
    loader = Loader(open_stream(corpora), Causal(), global_batch=4, micro_batch=2, workers=1)
    iterator = iter(loader)
    next(iterator)
    (worker,) = set(multiprocessing.active_children()) - before
    assert os.getpgid(worker.pid) == worker.pid != os.getpgrp()
    loader.close()
    assert not worker.is_alive()


def test_workers_are_forked_where_the_data_is_local(corpora):
    # Left to Python 3.14, a fork server would start them, and opened shards cannot be pickled.
    before = set(multiprocessing.active_children())
    loader = Loader(open_stream(corpora), Causal(), global_batch=4, micro_batch=4, workers=1)
    iterator = iter(loader)
    next(iterator)
    (worker,) = set(multiprocessing.active_children()) - before
    loader.close()
    assert isinstance(worker, multiprocessing.context.ForkProcess)
