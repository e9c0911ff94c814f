"""Where metrics go: the terminal, metrics.jsonl, TensorBoard, Weights & Biases.

A sink has `write(record)`, one flat dictionary per step or evaluation, and `close()`. Only rank 0
has sinks. metrics.jsonl is the run's own truth; the others repeat it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TextIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nanolm.checkpoint.run_folder import cut_metrics
from nanolm.config.load import as_mapping
from nanolm.config.schema import Config, WandbConfig
from nanolm.distributed.world import World
from nanolm.errors import UserError
from nanolm.terminal import say, wrapped

Record = Mapping[str, Any]


class Sink(Protocol):
    """Something that takes metric records."""

    def write(self, record: Record) -> None:
        """Takes one record: step, kind, and figures."""

    def close(self) -> None:
        """No more records follow."""


class JsonLines:
    """metrics.jsonl: one JSON object a line, on the disk before the next step starts."""

    def __init__(self, path: pathlib.Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Appends the record; non-finite figures become null, which JSON can say.

        Raises UserError when the disk is full.
        """
        try:
            self._file.write(json.dumps({k: _plain(v) for k, v in record.items()}) + "\n")
            self._file.flush()
        except OSError as error:
            name = self._file.name
            raise UserError(f"{name} not written: {error.strerror}; free some space") from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _plain(value: Any) -> Any:
    finite = not isinstance(value, float) or abs(value) < float("inf")
    return value if finite else None


class Console:
    """A progress bar with lines above it on a terminal; plain lines anywhere else."""

    def __init__(self, steps: int, done: int = 0, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.bar: Progress | None = None
        if self.stream.isatty():
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, refresh_per_second=2)
            self.task = self.bar.add_task("training", total=steps, completed=done)
            self.bar.start()

    def write(self, record: Record) -> None:
        """One line; the bar moves on."""
        self.note(line_of(record))
        if self.bar is not None:
            self.bar.update(self.task, completed=record["step"])

    def note(self, text: str) -> None:
        """Any other line, such as a warning or a saved checkpoint."""
        if self.bar is not None:
            lines = wrapped(text, self.bar.console.width)
            self.bar.console.print(*lines, sep="\n", highlight=False, markup=False)
        else:
            say(text, stream=self.stream)

    def close(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.stop()


_FORMATS: dict[str, Callable[[Any], str]] = {
    "loss": "loss {:.6f}".format,
    "accuracy": "accuracy {:.4f}".format,
    "macro_f1": "macro-F1 {:.4f}".format,
    "f1": "F1 {:.4f}".format,
    "exact_match": "exact {:.4f}".format,
    "pearson": "pearson {:.4f}".format,
    "mrr": "MRR {:.4f}".format,
    "perplexity": "perplexity {:.3f}".format,
    "bits_per_byte": "bits/byte {:.4f}".format,
    "unigram_bits_per_byte": "(unigram {:.4f})".format,
    "lr": "lr {:.3e}".format,
    "grad_norm": "grad {:.4f}".format,
    "tokens_per_second": "{:,.0f} tok/s".format,
    "tflops": "{:,.2f} TFLOP/s".format,
    "mfu": "mfu {:.1%}".format,
    "memory": lambda value: f"{value / 2**20:,.0f} MiB",
    "data_wait": "wait {:.1%}".format,
}


def line_of(record: Record) -> str:
    """A record as one line for people."""
    shown = [f"{record['kind']:>5} step {record['step']}"]
    for key, form in _FORMATS.items():
        if record.get(key) is not None:
            shown.append(form(record[key]))
    return "  ".join(shown)


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: pathlib.Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (an extra)
        except ImportError as error:
            raise UserError(
                "run.tensorboard is on but tensorboard is not installed: pip install tensorboard"
            ) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, record: Record) -> None:
        """One scalar per figure, as kind/figure."""
        for key, value in record.items():
            if isinstance(value, int | float) and key != "step":
                self._writer.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()


class Wandb:
    """Weights & Biases, which may never hold up or end a run.

    Everything it does happens on a daemon thread of its own, fed by a list; a failure is told once,
    through `note`, and then it is left alone. Files stay inside the run's folder.
    """

    TIMEOUT = 20.0

    def __init__(
        self,
        folder: pathlib.Path,
        options: WandbConfig,
        config: Mapping[str, Any],
        note: Callable[[str], None],
    ) -> None:
        self._note, self._broken = note, False
        self._pending: list[dict[str, Any]] = []
        self._wake = threading.Condition()
        self._closing = False
        arguments = (folder, options, dict(config))
        self._thread = threading.Thread(target=self._work, args=arguments, daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Hands the record to the thread and returns at once."""
        with self._wake:
            if not self._broken:
                self._pending.append(dict(record))
                self._wake.notify()

    def close(self) -> None:
        """Waits a bounded time for what is still on its way."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(self.TIMEOUT)
        if self._thread.is_alive():
            self._note(f"W&B did not finish within {self.TIMEOUT:.0f} s; its files stay on disk")

    def _work(self, folder: pathlib.Path, options: WandbConfig, config: dict[str, Any]) -> None:
        # Whatever goes wrong in a logging service is reported, and is no reason to stop training.
        try:
            run = self._open(folder, options, config)
            while (record := self._take()) is not None:
                kind, step = record.pop("kind"), record.pop("step")
                run.log({f"{kind}/{key}": value for key, value in record.items()}, step=step)
            run.finish()
        except Exception as error:  # noqa: BLE001
            with self._wake:
                self._broken = True
                self._pending.clear()
            self._note(f"W&B is off for the rest of this run: {type(error).__name__}: {error}")

    def _open(self, folder: pathlib.Path, options: WandbConfig, config: dict[str, Any]) -> Any:
        import wandb  # noqa: PLC0415 (takes a second, and off the training thread)

        mode: Any = options.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or (_logged_in(wandb) and "online") or "offline"
        identity = folder / "wandb" / "run_id"
        identity.parent.mkdir(parents=True, exist_ok=True)
        run_id = identity.read_text() if identity.is_file() else secrets.token_hex(4)
        identity.write_text(run_id)
        settings = wandb.Settings(
            init_timeout=self.TIMEOUT, login_timeout=5, silent=True, console="off"
        )
        run = wandb.init(
            project=options.project,
            id=run_id,
            name=folder.name,
            dir=str(folder),
            mode=mode,
            resume="allow",
            config=config,
            settings=settings,
        )
        starts = len(list(folder.glob("wandb/offline-run-*")))
        if mode == "offline" and starts > 1:
            self._note(
                f"W&B keeps {starts} starts of this run offline; `wandb sync "
                f"{shlex.quote(str(folder))}/wandb/offline-run-*`, all in one command, uploads "
                f"them in order as one"
            )
        return run

    def _take(self) -> dict[str, Any] | None:
        with self._wake:
            self._wake.wait_for(lambda: self._pending or self._closing)
            return self._pending.pop(0) if self._pending else None


def _logged_in(wandb: Any) -> bool:
    return bool(wandb.login(prompt=False, timeout=5))


@contextlib.contextmanager
def open_sinks(
    config: Config, world: World, done: int
) -> Iterator[tuple[list[Sink], Callable[[str], None]]]:
    """The sinks of rank 0, after `done` steps, and its way to tell the user something; they are
    closed at the end. Other ranks have none and are silent."""
    if not world.is_main:
        yield [], lambda text: None
        return
    run = pathlib.Path(config.run.dir)
    cut_metrics(run / "metrics.jsonl", done)
    console = Console(config.train.steps, done)
    sinks: list[Sink] = [console]
    try:
        sinks.append(JsonLines(run / "metrics.jsonl"))
        if config.run.tensorboard:
            sinks.append(TensorBoard(run))
        if config.run.wandb.mode != "disabled":
            sinks.append(Wandb(run, config.run.wandb, as_mapping(config), console.note))
        yield sinks, console.note
    finally:
        for sink in sinks:
            sink.close()
