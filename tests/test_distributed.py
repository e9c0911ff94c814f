"""Ranks: collectives of host numbers, time-outs that name the late, no pickle on the wire."""

import inspect
import pathlib
import re
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.run import get_args_parser
from torch.nn.parallel import DistributedDataParallel

from nanolm.config.schema import DistributedConfig
from nanolm.distributed.launch_store import connect_store, exchange
from nanolm.distributed.world import (
    SYNC_BUFFERS,
    World,
    launch,
    peer_lost,
    require_gpus_apart,
    undivided,
)
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
    with pytest.raises(UserError, match=r"^--device cuda: torch sees no CUDA device"):
        launch(DistributedConfig(), "cuda")
    assert launch(DistributedConfig(), "auto").device.type == "cpu"


def test_the_switch_of_ddp_is_one_that_this_torch_has():
    assert SYNC_BUFFERS in inspect.signature(DistributedDataParallel.__init__).parameters


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n): torch sees so many; the device that was made current is appended to the list."""
    current: list[int] = []

    def see(count: int) -> list[int]:
        monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        monkeypatch.setattr("torch.cuda.set_device", current.append)
        return current

    return see


@pytest.mark.parametrize(
    ("local_rank", "visible", "device"),
    [(0, 1, 0), (3, 1, 0), (0, 4, 0), (3, 4, 3), (1, 2, 1)],
)
def test_a_rank_takes_its_gpu_or_the_only_one_it_sees(
    monkeypatch, gpus, local_rank, visible, device
):
    current = gpus(visible)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert launch(DistributedConfig(), "auto").device == torch.device("cuda", device)
    assert current == [device]


def test_more_ranks_than_gpus_is_one_sentence(monkeypatch, gpus):
    gpus(2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"local rank 2 has no GPU of its own.*nproc_per_node"):
        launch(DistributedConfig(), "auto")


def test_ranks_that_share_a_gpu_are_named():
    require_gpus_apart(["a GPU-1", "a GPU-2", "b GPU-1"])
    with pytest.raises(UserError, match=r"ranks 1 and 3 .*a GPU-2.*distributed\.backend to gloo"):
        require_gpus_apart(["a GPU-1", "a GPU-2", "b GPU-1", "a GPU-2"])


def one_word(world):
    return exchange(connect_store(60), world.rank, world.size, f"GPU of {world.rank}")


def test_words_are_exchanged_before_there_is_a_group():
    assert in_ranks(3, one_word) == [[f"GPU of {rank}" for rank in range(3)]] * 3


def test_nccl_on_cpus_is_refused_and_its_remedy_works():
    with pytest.raises(UserError, match=r"set distributed\.backend to auto"):
        launch(DistributedConfig(backend="nccl"), "cpu")
    launch(DistributedConfig(backend="auto"), "cpu")


def backends(world):
    return [dist.get_backend(), world.control is dist.group.WORLD]


def test_the_cpu_is_reached_by_gloo():
    assert in_ranks(2, backends) == [["gloo", True]] * 2


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
def test_one_rank_is_told_that_nothing_is_divided(strategy):
    (sentence,) = undivided(DistributedConfig(strategy=strategy), World())
    assert f"distributed.strategy={strategy}" in sentence and "nproc_per_node" in sentence
    (sentence,) = undivided(DistributedConfig(strategy=strategy, cpu_offload=True), World())
    assert "cpu_offload" in sentence
    assert undivided(DistributedConfig(strategy=strategy), World(0, 2)) == []
    assert undivided(DistributedConfig(), World()) == []


def test_torchrun_knows_every_option_of_the_commands_in_the_documentation():
    root = pathlib.Path(__file__).parent.parent
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    asked = set()
    for page in ("README.md", "docs/LAUNCH.md"):
        text = (root / page).read_text(encoding="utf-8")
        for line_break in ("\\\n", ",\n"):  # of a shell, of a list
            text = text.replace(line_break, " ")
        for command in re.findall(r"torchrun,? (--[^\n]*?)(?:train\.py|-m )", text):
            asked |= set(re.findall(r"--[a-z][a-z_-]*", command))
    assert {"--nnodes", "--max-restarts", "--signals-to-handle"} <= asked
    assert asked <= known
