"""A small prepared corpus and small trained runs, made once for all workers of a test session."""

import functools
import os
import pathlib
import shutil
import sysconfig
import tempfile
from collections.abc import Callable

from filelock import FileLock

from nanolm.config.load import load_config
from nanolm.data.prepare.pipeline import PrepareConfig, prepare
from nanolm.data.prepare.progress import Silent
from nanolm.pretrain import run_train

MODULES = ("argparse.py", "textwrap.py", "statistics.py", "ast.py", "inspect.py", "typing.py")
SMALL = [
    "--model.d_model=32",
    "--model.n_layers=2",
    "--model.n_heads=4",
    "--model.max_length=128",
    "--data.row_length=32",
    "--train.global_batch=8",
    "--run.threads=1",
    "--run.wandb.mode=disabled",
    "--eval.batches=4",
]

STEPS = {"clm": 80, "prefix": 80, "mlm": 150, "mlm_pair": 250, "span": 90, "permutation": 200}
TRUNKS = {
    "mlm": "encoder",
    "mlm_pair": "encoder",
    "span": "encoder_decoder",
    "permutation": "two_stream",
}
EAGER = ("--optim.adamw_lr=2e-2", "--schedule.warmup=4")
QUICKER = {
    "mlm": ("--model.n_layers=1", *EAGER),
    "span": ("--data.row_length=32", *EAGER),
}
"""What lets an objective that every `make test` trains learn as much in a third of the time."""


def once(name: str, make: Callable[[pathlib.Path], object]) -> pathlib.Path:
    """A folder as `make` fills it: the worker that comes first makes it and the others copy it, so
    the tests of each may write to theirs."""
    own = pathlib.Path(tempfile.mkdtemp(prefix="nanolm-made-")) / name
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if session is None:  # one process runs all tests
        make(own)
        return own
    shared = pathlib.Path(tempfile.gettempdir()) / f"nanolm-shared-{session}"
    shared.mkdir(exist_ok=True)
    with FileLock(shared / f"{name}.lock"):
        if (shared / name).exists():
            shutil.copytree(shared / name, own)
        else:
            make(own)
            shutil.copytree(own, shared / f"{name}.part")
            (shared / f"{name}.part").rename(shared / name)
    return own


@functools.cache
def prepared_corpus() -> pathlib.Path:
    """Six modules of the standard library, a vocabulary of 512, train, val and test splits."""
    return once("corpus", prepare_modules) / "prepared"


def prepare_modules(root: pathlib.Path) -> None:
    """The texts in pieces, and in `prepared` their shards."""
    root.mkdir()
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for name in MODULES:  # in pieces, so that every split gets some
        lines = (library / name).read_text(encoding="utf-8").splitlines(keepends=True)
        for start in range(0, len(lines), 100):
            (root / f"{start:05d}_{name}").write_text("".join(lines[start : start + 100]))
    config = PrepareConfig(
        out=str(root / "prepared"),
        sources=[str(root / "*.py")],
        vocab_size=512,
        val_fraction=0.1,
        test_fraction=0.1,
        sentences=True,
        workers=1,
    )
    prepare(config, Silent())


def train(folder: pathlib.Path, *words: str) -> dict:
    """A small run in this process; returns its summary."""
    argv = [*SMALL, f"--data.path={prepared_corpus()}", f"--run.dir={folder}", *words]
    return run_train(load_config(argv))


@functools.cache
def trained_run(objective: str = "clm") -> pathlib.Path:
    """A small trained model: a decoder, or the trunk of TRUNKS."""
    trunk = TRUNKS.get(objective, "decoder")
    words = (
        f"--objective.name={objective}",
        f"--model.trunk={trunk}",
        f"--model.n_segments={2 if objective == 'mlm_pair' else 0}",
        f"--model.positions.name={'relative' if trunk == 'two_stream' else 'rotary'}",
        "--data.row_length=64",
        "--train.global_batch=16",
        f"--train.steps={STEPS[objective]}",
        "--optim.name=muon",
        "--optim.adamw_lr=1e-2",
        "--schedule.warmup=10",
        *(["--objective.mask_rate=0.3"] if trunk == "encoder" else []),
        *QUICKER.get(objective, ()),
    )
    return once(objective, lambda folder: train(folder, *words))
