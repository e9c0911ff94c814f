"""Nodes without a common disk: each keeps what its ranks hold; a run goes on from what all have."""

import dataclasses
import json
import shutil
import socket

import pytest

from nanolm.checkpoint.lazy_tensors import missing_parts
from nanolm.checkpoint.nodes import what_lacks
from tests.test_resume import assert_same_bits, fit, metrics, resume_with_notes
from tests.test_sharding import fit_until
from tests.tiny_run import in_ranks, in_turn, tiny_config

CHANGES = {"train__ema": 0.9, "train__steps": 20, "eval__every": 0}
LAST = "checkpoints/step-00000020"


def on_own_disk(world, config, function, *arguments):
    """Calls the function as if every rank were on a node of its own, with its own run.dir."""
    socket.gethostname = lambda: f"node{world.rank}"
    run = dataclasses.replace(config.run, dir=f"{config.run.dir}/node{world.rank}", shared=False)
    config = dataclasses.replace(config, run=run)
    return function(dataclasses.replace(world, local_rank=0, local_size=1), config, *arguments)


# The next test reads the parts of all nodes too, and another strategy from them.
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_run_goes_on_from_what_all_nodes_have(tmp_path, strategy):
    changes = CHANGES | {"distributed__strategy": strategy}
    whole, config = tiny_config(tmp_path / "whole", **changes), tiny_config(tmp_path, **changes)
    in_ranks(2, in_turn, (fit, whole), (on_own_disk, config, fit, 18), kill=True)
    for rank in range(2):  # a node has its own ranks' part and no other
        folder = tmp_path / f"node{rank}" / "checkpoints" / "step-00000015"
        parts = [path.name for path in folder.glob("model*")]
        own = f"model-{rank:05d}-of-00002" if strategy == "fsdp" else "model"
        assert parts == [f"{own}.safetensors"]
    shutil.rmtree(tmp_path / "node1" / "checkpoints" / "step-00000015")
    config = tiny_config(tmp_path, resume="auto", **changes)
    notes, log = in_ranks(2, on_own_disk, config, resume_with_notes)[0]
    assert "step-00000015: node node1: no checkpoint at" in notes[0]
    assert log[0][0] == 10
    if strategy == "ddp":
        for rank in range(2):
            lines = tmp_path / "whole" / "metrics.jsonl"
            shutil.copy(lines, tmp_path / "node1" / "metrics.jsonl")
            assert_same_bits(tmp_path / "whole", tmp_path / f"node{rank}", LAST)
        return
    for rank in range(2):  # the same bits in the same files, on two disks
        shutil.copytree(
            tmp_path / f"node{rank}" / LAST, tmp_path / "all" / LAST, dirs_exist_ok=True
        )
    shutil.copy(tmp_path / "node0" / "metrics.jsonl", tmp_path / "all" / "metrics.jsonl")
    assert_same_bits(tmp_path / "whole", tmp_path / "all", LAST)


def test_another_strategy_reads_parts_of_all_nodes_and_a_lost_disk_is_told(tmp_path):
    changes = CHANGES | {"run__checkpoint_async": True}
    config = tiny_config(tmp_path, distributed__strategy="fsdp", **changes)
    in_ranks(2, on_own_disk, config, fit_until, 10)
    config = tiny_config(tmp_path, resume="auto", **changes)
    in_ranks(2, on_own_disk, config, fit)
    in_ranks(1, fit, tiny_config(tmp_path / "one", **changes))
    for mine, theirs in zip(metrics(tmp_path / "node0"), metrics(tmp_path / "one"), strict=True):
        assert mine["step"] == theirs["step"]
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    shutil.rmtree(tmp_path / "node1")
    for answer in in_ranks(2, on_own_disk, config, fit):
        assert "no checkpoint that all nodes have whole; checkpoint step-00000020" in answer
        assert "node node1: no checkpoint at" in answer and "no such folder" in answer


def fit_with_bad_loss(world, config):
    """One rank's gradient is bad in step 8: both go back to step 5, each on its own disk."""
    from tests.test_faults import fit_with_bad_gradient

    return fit_with_bad_gradient(world, config, 1, [8])


def test_a_rewind_on_own_disks(tmp_path):
    changes = {"train__steps": 12, "train__nonfinite": "rewind"}
    config = tiny_config(tmp_path, distributed__strategy="ddp", **changes)
    answers = in_ranks(2, on_own_disk, config, fit_with_bad_loss)
    notes = answers[0][0]  # a loaded machine may add that a rank is slow
    assert any("back to" in note for note in notes) and answers[0][1] == answers[1][1]
    assert json.loads((tmp_path / "node0" / "nonfinite.jsonl").read_text())["step"] == 8


def test_what_lacks_names_the_node_or_the_file():
    files = ["model-00000-of-00003.safetensors", "model-00002-of-00003.safetensors", "index.json"]
    assert missing_parts(files) == ["model-00001-of-00003.safetensors"]
    nodes = [{"node": "a", "files": files[:1]}, {"node": "b", "files": files[1:]}]
    assert what_lacks(nodes) == f"{missing_parts(files)[0]} is on none of the nodes a, b"
    assert what_lacks([*nodes, {"node": "c", "files": missing_parts(files)}]) is None
    nodes[1] = {"node": "b", "problem": "it is damaged"}
    assert what_lacks(nodes) == "node b: it is damaged"
