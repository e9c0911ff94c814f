"""Two nodes as network namespaces: real multi-node torchrun over a link that is cut, slow or lossy.

Needs root and iproute2 (`apt-get install iproute2`); skips with a reason where they are missing.
Delay and loss come from the kernel's netem where it has that, otherwise from `tun_relay.py`.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from tests.elastic import HAS_PATIENCE
from tests.test_resume import assert_same_bits, fit
from tests.tiny_run import in_ranks, tiny_config

ROOT = pathlib.Path(__file__).parent.parent
NODES = {"nanolm-a": "10.199.0.1", "nanolm-b": "10.199.0.2"}
LAST = "checkpoints/step-00000080"
CHANGES = {"train__steps": 80, "distributed__hang_timeout": 12.0}
SHORT = {"train__steps": 8, "distributed__hang_timeout": 12.0}
DELAY, LOSS = 0.2, 0.05  # seconds and share of packets, of what the first node sends

WORKER = """
import sys, time
sys.path.insert(0, {root!r})
from nanolm import cli
from nanolm.config.schema import DistributedConfig
from nanolm.distributed.world import close, launch
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


def end_of(node):
    """The device of a node that is its end of the link."""
    return f"link-{node[-1]}"


@pytest.fixture
def nodes():
    """Two namespaces that nothing joins yet."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and iproute2")
    made = subprocess.run(["ip", "netns", "add", "nanolm-a"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"this machine makes no network namespaces: {made.stderr.strip()}")
    try:
        ip("netns", "add", "nanolm-b")
        yield
    finally:
        for node in NODES:
            subprocess.run(["ip", "netns", "del", node], check=False, capture_output=True)


def join_by_veth():
    ends = [end_of(node) for node in NODES]
    pair = ("link", "add", ends[0], "netns", "nanolm-a", "type", "veth")
    ip(*pair, "peer", "name", ends[1], "netns", "nanolm-b")


def bring_up():
    for node, address in NODES.items():
        ip("-n", node, "address", "add", f"{address}/24", "dev", end_of(node))
        for device in ("lo", end_of(node)):
            ip("-n", node, "link", "set", device, "up")


@pytest.fixture
def link(nodes):
    """A sound link between the nodes; the name of the first one's end."""
    join_by_veth()
    bring_up()
    return end_of("nanolm-a")


def add_netem():
    """Whether this kernel delays and drops what the first node sends."""
    words = ("root", "netem", "delay", f"{DELAY}s", "loss", f"{LOSS:%}")
    command = ["tc", "-n", "nanolm-a", "qdisc", "add", "dev", end_of("nanolm-a"), *words]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def bad_link(nodes):
    """A link that holds back and loses what the first node sends; the name of that end."""
    join_by_veth()
    if shutil.which("tc") and add_netem():
        bring_up()
        yield end_of("nanolm-a")
        return
    if not pathlib.Path("/dev/net/tun").exists():
        pytest.skip("this kernel has neither netem nor TUN devices")
    ip("-n", "nanolm-a", "link", "del", end_of("nanolm-a"))
    for node in NODES:
        ip("-n", node, "tuntap", "add", "dev", end_of(node), "mode", "tun")
    bring_up()
    places = [f"{node}/{end_of(node)}" for node in NODES]
    command = [sys.executable, "-m", "tests.tun_relay", str(DELAY), str(LOSS), *places]
    relay = subprocess.Popen(command, cwd=ROOT)
    yield end_of("nanolm-a")
    assert relay.poll() is None, "the relay died"
    relay.terminate()
    relay.wait()


def start(tmp_path, run, pause=0.05, changes=CHANGES):
    """torchrun on both nodes, one rank each, with host names of their own."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), run=str(run), changes=changes, pause=pause))
    jobs = []
    for number, (node, address) in enumerate(NODES.items()):
        launcher = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"),
            *(f"--node_rank={number}", "--master_addr=10.199.0.1", "--master_port=29511"),
            *(f"--local_addr={address}", *(["--shutdown-timeout=2"] if HAS_PATIENCE else [])),
            str(script),
        ]
        inside = f"hostname {node}; exec " + " ".join(launcher)
        jobs.append(
            subprocess.Popen(
                ["ip", "netns", "exec", node, "unshare", "--uts", "sh", "-c", inside],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"GLOO_SOCKET_IFNAME": end_of(node), "OMP_NUM_THREADS": "1"},
            )
        )
    return jobs


def wait_for_step(run, step, jobs):
    path = run / "metrics.jsonl"
    while not path.is_file() or len(path.read_text().splitlines()) < step:
        for job in jobs:
            assert job.poll() is None, job.stdout.read()
        time.sleep(0.1)


def finish(jobs, timeout=600):
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


def assert_told(jobs, seconds):
    """Both jobs end within the time and say which node is gone."""
    cut = time.monotonic()
    outputs = [job.communicate(timeout=600)[0] for job in jobs]
    assert time.monotonic() - cut < seconds  # the collectives' own time-out would have been later
    assert all(job.returncode for job in jobs)
    assert "on node nanolm-b" in outputs[0] and "last heartbeat" in outputs[0], outputs[0]
    assert "on node nanolm-b is cut off" in outputs[1], outputs[1]


@pytest.mark.slow
def test_a_link_that_is_cut_for_good_names_the_node_and_the_run_goes_on_later(
    link, tmp_path, whole
):
    run = tmp_path / "run"
    jobs = start(tmp_path, run)
    wait_for_step(run, 20, jobs)
    ip("-n", "nanolm-a", "link", "set", link, "down")
    assert_told(jobs, 60)
    ip("-n", "nanolm-a", "link", "set", link, "up")
    finish(start(tmp_path, run))
    assert_same_bits(whole, run, LAST)


@pytest.mark.slow
def test_a_slow_link_that_loses_packets_is_borne_and_its_end_is_told(bad_link, tmp_path):
    """Training goes on over it; when it is cut as well, the node is named; the run goes on later,
    over the same bad link, and ends bit-equal."""
    in_ranks(2, fit, tiny_config(tmp_path / "whole", **SHORT))
    run = tmp_path / "run"
    jobs = start(tmp_path, run, changes=SHORT)
    wait_for_step(run, 6, jobs)
    ip("-n", "nanolm-a", "link", "set", bad_link, "down")
    assert_told(jobs, 60)
    ip("-n", "nanolm-a", "link", "set", bad_link, "up")
    finish(start(tmp_path, run, changes=SHORT))
    assert_same_bits(tmp_path / "whole", run, "checkpoints/step-00000008")
