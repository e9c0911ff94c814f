"""A process that does errands for this one, and whose end is told instead of shared.

A kernel of an outsider may do what ends a process: write over memory that is not its own, divide by
zero in C, take all memory, call os._exit. Its checks are therefore done by an `Elsewhere`. When
that process ends before an errand is done, `ask` raises ProcessEndedError with how it ended, and
the next errand starts another. `Here` does errands in this process: for kernels that are trusted,
and for a debugger.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from nanolm.config.load import import_plugins
from nanolm.errors import UserError
from nanolm.tools.kernel_check.interpreter import prepare_interpreter

PATIENCE = 900.0
"""Seconds after which an errand is taken for one that never ends. The longest check of a right
kernel took some 20 seconds in the interpreter; compiling for a GPU takes minutes at most."""
GLANCE = 0.5
"""Seconds between two looks at whether the process is still there."""


class ProcessEndedError(Exception):
    """The process ended before its errand was done; the words say how."""


class Errand(Protocol):
    """What a process can be sent, and do."""

    def run(self) -> Any:
        """What is sent back."""


class Worker(Protocol):
    """Who does errands, one after the other."""

    def ask(self, errand: Errand) -> Any:
        """What the errand gives; raises ProcessEndedError."""

    def close(self) -> None:
        """Ends what was started for it."""


class Here:
    """Does errands in this process, which ends with them if they end it."""

    def ask(self, errand: Errand) -> Any:
        """What the errand gives."""
        return errand.run()

    def close(self) -> None:
        """Nothing was started."""


class Elsewhere:
    """Does errands in a process of its own, which is started for the first one, and again for the
    next one after it ended.

    It imports the plug-ins and reaches for the device, which may admit one process only.
    `environment` is set in it beside what it inherits; `threads` is how many torch takes there,
    None for as many as here.
    """

    def __init__(
        self,
        device: str,
        plugins: Sequence[str] = (),
        *,
        environment: Mapping[str, str] | None = None,
        threads: int | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self.device, self.plugins, self.threads = device, tuple(plugins), threads
        self.environment, self.patience = dict(environment or {}), patience
        self.process: Any = None
        self.connection: Connection | None = None

    def ask(self, errand: Errand) -> Any:
        """What the errand gives.

        Raises UserError when the plug-ins cannot be imported, ProcessEndedError when the process
        ends, or does not answer within its time.
        """
        if self.connection is None:
            self.start()
        assert self.connection is not None
        with contextlib.suppress(BrokenPipeError):  # the answer below says how it ended
            self.connection.send(errand)
        return self.answer()

    def start(self) -> None:
        """Starts the process, and waits until it is ready."""
        context = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, self.device, self.plugins, self.threads)
        )
        with variables(self.environment):
            self.process.start()
        theirs.close()
        try:
            self.answer()
        except ProcessEndedError as error:
            names = ", ".join(self.plugins)
            what = f"plugins: {names}: the process that imports it" if names else "a process"
            raise UserError(f"{what} {error}") from None

    def answer(self) -> Any:
        """The next thing that the process says."""
        assert self.connection is not None
        stop = time.monotonic() + self.patience
        try:
            while not self.connection.poll(GLANCE):
                if self.process.exitcode is not None and not self.connection.poll():
                    raise EOFError
                if time.monotonic() > stop:
                    self.close()
                    raise ProcessEndedError(
                        f"was stopped, as it had not ended after {self.patience:.0f} seconds"
                    )
            kind, value = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(GLANCE)
            how = how_it_ended(self.process.exitcode)
            self.close()
            raise ProcessEndedError(how) from None
        if kind == "lost":  # the device answers it no longer: the next errand needs another process
            self.close()
        elif kind == "refused":
            self.close()
            raise UserError(value)
        elif kind == "raised":
            self.close()
            raise ProcessEndedError(value)
        return value

    def close(self) -> None:
        """Ends the process; whatever it is doing is of no use any more."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
        if self.connection is not None:
            self.connection.close()
        self.process = self.connection = None


@contextlib.contextmanager
def variables(changes: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a process that is started within it."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def how_it_ended(status: int | None) -> str:
    """Words for an exit status as multiprocessing gives it: a signal is negative."""
    if status is None:
        return "closed its connection"
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was ended by {name}{WHAT_SIGNALS_MEAN.get(name, '')}"


WHAT_SIGNALS_MEAN = {
    "SIGABRT": " (C's abort: memory that is not its own was written over, or an assertion failed)",
    "SIGBUS": " (an address that does not exist)",
    "SIGFPE": " (a division by zero in machine code)",
    "SIGILL": " (an instruction that this processor lacks)",
    "SIGKILL": " (which the system sends where memory runs out)",
    "SIGSEGV": " (it touched memory that is not its own)",
}


def serve(connection: Connection, device: str, plugins: Sequence[str], threads: int | None) -> None:
    """The process: does errand after errand, until nobody is there to ask for one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        prepare_interpreter()
        torch.zeros(1, device=device)
        import_plugins(list(plugins))
    except UserError as error:
        connection.send(("refused", str(error)))
        return
    connection.send(("ready", None))
    while True:
        try:
            errand = connection.recv()
        except EOFError:
            return
        try:
            done = ("done", errand.run())
        except UserError as error:
            done = ("refused", str(error))
        except BaseException as error:  # noqa: BLE001  (a kernel may raise anything: it is reported)
            traceback.print_exc()
            done = ("raised", f"ended with {type(error).__name__}: {error}")
        if done[0] == "done" and device != "cpu" and not answers(device):
            done = ("lost", done[1])
        connection.send(done)


def answers(device: str) -> bool:
    """Whether the device still works for this process: after an address that is not its own it
    answers every call with the same error."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True
