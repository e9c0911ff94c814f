"""Two nodes as network namespaces: real multi-node torchrun over a link that is cut.

Needs root and iproute2 (`apt-get install iproute2`); skips with a reason where they are missing.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from tests.test_resume import assert_same_bits, fit
from tests.tiny_run import in_ranks, tiny_config

ROOT = pathlib.Path(__file__).parent.parent
NODES = {"nanolm-a": "10.199.0.1", "nanolm-b": "10.199.0.2"}
LAST = "checkpoints/step-00000080"
CHANGES = {"train__steps": 80, "distributed__hang_timeout": 12.0}

WORKER = """
import sys, time
sys.path.insert(0, {root!r})
from nanolm import cli
from nanolm.config import DistributedConfig
from nanolm.distributed import close, launch
from tests.tiny_run import build_trainer, tiny_config

def run(argv):
    world = launch(DistributedConfig(timeout=60), "cpu")
    config = tiny_config({run!r}, resume="auto", **{changes!r})
    build_trainer(config, world, hook=lambda record: time.sleep({pause})).fit()
    close(world)

cli.run = run
cli.main([])
"""


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def link():
    """Two namespaces joined by a veth pair; the name of the first one's end."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and iproute2")
    made = subprocess.run(["ip", "netns", "add", "nanolm-a"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"this machine makes no network namespaces: {made.stderr.strip()}")
    try:
        ip("netns", "add", "nanolm-b")
        pair = ("link", "add", "veth-a", "netns", "nanolm-a", "type", "veth")
        ip(*pair, "peer", "name", "veth-b", "netns", "nanolm-b")
        for (node, address), end in zip(NODES.items(), ("veth-a", "veth-b"), strict=True):
            ip("-n", node, "address", "add", f"{address}/24", "dev", end)
            for device in ("lo", end):
                ip("-n", node, "link", "set", device, "up")
        yield "veth-a"
    finally:
        for node in NODES:
            subprocess.run(["ip", "netns", "del", node], check=False, capture_output=True)


def start(tmp_path, run, pause=0.05):
    """torchrun on both nodes, one rank each, with host names of their own."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), run=str(run), changes=CHANGES, pause=pause))
    jobs = []
    for number, (node, address) in enumerate(NODES.items()):
        launcher = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"),
            *(f"--node_rank={number}", "--master_addr=10.199.0.1", "--master_port=29511"),
            *(f"--local_addr={address}", "--shutdown-timeout=2"),
            str(script),
        ]
        inside = f"hostname {node}; exec " + " ".join(launcher)
        jobs.append(
            subprocess.Popen(
                ["ip", "netns", "exec", node, "unshare", "--uts", "sh", "-c", inside],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"GLOO_SOCKET_IFNAME": f"veth-{node[-1]}", "OMP_NUM_THREADS": "1"},
            )
        )
    return jobs


def wait_for_step(run, step, jobs):
    path = run / "metrics.jsonl"
    while not path.is_file() or len(path.read_text().splitlines()) < step:
        for job in jobs:
            assert job.poll() is None, job.stdout.read()
        time.sleep(0.1)


def finish(jobs, timeout=180):
    outputs = [job.communicate(timeout=timeout)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(outputs)


@pytest.fixture
def whole(tmp_path):
    """The undisturbed run, in this namespace."""
    in_ranks(2, fit, tiny_config(tmp_path / "whole", **CHANGES))
    return tmp_path / "whole"


@pytest.mark.slow
def test_a_link_that_is_cut_for_five_seconds_changes_nothing(link, tmp_path, whole):
    run = tmp_path / "run"
    jobs = start(tmp_path, run)
    wait_for_step(run, 20, jobs)
    ip("-n", "nanolm-a", "link", "set", link, "down")
    time.sleep(5)
    ip("-n", "nanolm-a", "link", "set", link, "up")
    finish(jobs)
    assert_same_bits(whole, run, LAST)


@pytest.mark.slow
def test_a_link_that_is_cut_for_good_names_the_node_and_the_run_goes_on_later(
    link, tmp_path, whole
):
    run = tmp_path / "run"
    jobs = start(tmp_path, run)
    wait_for_step(run, 20, jobs)
    ip("-n", "nanolm-a", "link", "set", link, "down")
    cut = time.monotonic()
    outputs = [job.communicate(timeout=90)[0] for job in jobs]
    assert time.monotonic() - cut < 60  # the collectives' own time-out would have been later
    assert all(job.returncode for job in jobs)
    assert "on node nanolm-b" in outputs[0] and "last heartbeat" in outputs[0], outputs[0]
    assert "on node nanolm-b is cut off" in outputs[1], outputs[1]
    ip("-n", "nanolm-a", "link", "set", link, "up")
    finish(start(tmp_path, run))
    assert_same_bits(whole, run, LAST)
