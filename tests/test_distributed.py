"""Ranks: collectives of host numbers, time-outs that name the late, no pickle on the wire."""

import time

import pytest

from nanolm.config import DistributedConfig
from nanolm.distributed import World, launch, peer_lost
from nanolm.errors import UserError
from tests.tiny_run import in_ranks


def collectives(world):
    return [
        world.all_sum([world.rank, 0.5, 2**50 + world.rank]),
        world.gather({"rank": world.rank, "text": "ü" * world.rank}),
        world.broadcast(f"from {world.rank}"),
        world.is_main,
    ]


def test_every_rank_gets_the_same_answers():
    answers = in_ranks(3, collectives)
    for rank, (total, gathered, word, is_main) in enumerate(answers):
        assert total == [3, 1.5, 3 * 2**50 + 3]
        assert gathered == [{"rank": r, "text": "ü" * r} for r in range(3)]
        assert word == "from 0" and is_main == (rank == 0)
    assert collectives(World()) == [[0, 0.5, 2**50], [{"rank": 0, "text": ""}], "from 0", True]


def late(world):
    if world.rank == 1:
        time.sleep(3)
        return "late"
    try:
        world.barrier(timeout=1)
    except RuntimeError as error:
        return [peer_lost(error), str(error)]


def test_a_barrier_names_the_rank_that_did_not_come():
    lost, message = in_ranks(2, late)[0]
    assert lost and "rank" in message.lower() and "1" in message


def test_cuda_without_a_gpu_is_one_sentence(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"run\.device is cuda"):
        launch(DistributedConfig(), "cuda")
    assert launch(DistributedConfig(), "auto").device.type == "cpu"
