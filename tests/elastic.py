"""torchrun's own elastic agent around worker functions of the tests.

The same agent, rendezvous and restarts as the command `torchrun --standalone --max-restarts=N`; its
workers come from a fork server that has imported torch already, so a restart takes no seconds.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import signal
import sys
from collections.abc import Iterator
from unittest import mock

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from nanolm import cli
from nanolm.config.schema import DistributedConfig
from nanolm.distributed.world import close, launch
from tests.tiny_run import PRELOADED

HAS_PATIENCE = "shutdown_timeout" in {field.name for field in dataclasses.fields(LaunchConfig)}
"""Whether torchrun can be told how long to wait for workers that shall go (torch 2.13); before, it
waits 30 s."""


def elastic(logs: pathlib.Path, ranks: int, restarts: int, function, *arguments) -> bool:
    """Runs function(world, *arguments) in `ranks` workers; whether they ended well at last."""
    return _launch(logs, ranks, restarts, _worker, function, *arguments)


def command_on_ranks(logs: pathlib.Path, ranks: int, *words: str) -> None:
    """`torchrun --nproc_per_node=RANKS -m nanolm WORDS`, which must end well."""
    assert _launch(logs, ranks, 0, _command, words), output(logs)


def _launch(logs: pathlib.Path, ranks: int, restarts: int, entry, *arguments) -> bool:
    multiprocessing.set_forkserver_preload(PRELOADED)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"test-{os.getpid()}",
        max_restarts=restarts,
        monitor_interval=0.05,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
        **({"shutdown_timeout": 0.3} if HAS_PATIENCE else {}),
    )
    try:
        with (
            mock.patch.object(dynamic_rendezvous, "get_method_name", _name_of_caller),
            _own_handlers(),
        ):
            elastic_launch(config, entry)(*arguments)
    except ChildFailedError:
        return False
    return True


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Afterwards signals do what they did before: torch's agent takes them for itself and, in a
    process that outlives it, would raise its SignalException at any later one."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _name_of_caller(depth: int = 2) -> str:
    """What torch's event log calls the method that does something: torch looks it up with the
    source text of all frames, a quarter of a second a call where so many modules are imported."""
    return sys._getframe(depth).f_code.co_name


def _command(words):
    torch.set_num_threads(1)
    cli.main(list(words))


def _worker(function, *arguments):
    """A worker as the command line runs it: a user's mistake is one sentence and status 2."""

    def run(argv):
        torch.set_num_threads(1)
        world = launch(DistributedConfig(timeout=60), "cpu")
        function(world, *arguments)
        close(world)

    cli.run = run
    cli.main([])


def output(logs: pathlib.Path) -> str:
    """All that the workers of all attempts said."""
    paths = sorted(logs.rglob("std*.log"))
    return "\n".join(path.read_text() for path in paths if path.is_file())
