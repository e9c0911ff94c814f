"""What many tests share: a tiny tokenizer, and learners built the way that a run builds them."""

import functools
import gc
import pathlib
import signal
import sysconfig
from unittest import mock

import pytest
import torch

from nanolm.build import build_learner, build_objective, resolve
from nanolm.config.load import load_config
from nanolm.data.prepare.tokenizer_training import sentences, train_tokenizer
from nanolm.data.tokenizer import Tokenizer
from nanolm.learner import Learner
from nanolm.training import throughput

# A shell starts what it puts into the background with Ctrl-C ignored, and what a test starts and
# interrupts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Imports and tests that are collected stay: looking through them again and again for garbage takes
# a quarter of the time that collecting them takes.
gc.disable()


def pytest_collection_finish():
    """From here on garbage is looked for among what the tests make."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def a_glance_at_the_peak():
    """Some 300 runs of the tests would each measure the CPU's peak for a fifth of a second."""
    with mock.patch.object(throughput, "SECONDS", 0.005):
        yield


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    """512 unigram pieces trained on a few modules of the standard library."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse.py", "textwrap.py", "statistics.py")
    text = "".join((library / name).read_text(encoding="utf-8") for name in names)
    return Tokenizer(train_tokenizer(sentences(text[:150_000]), vocab_size=512, kind="unigram"))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, tokenizer) -> pathlib.Path:
    """A prepared directory of a dozen modules of the standard library (about 150,000 tokens)."""
    from nanolm.data.prepare.pipeline import PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("corpus")
    model = folder / "tiny.model"
    model.write_bytes(tokenizer.model_bytes)
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    sources = sorted(str(path) for path in library.glob("[cs]*.py"))[:24]
    out = str(folder / "prepared")
    prepare(
        PrepareConfig(out=out, sources=sources, tokenizer=str(model), val_fraction=0.2, workers=1)
    )
    return pathlib.Path(out)


TINY = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_length": 64, "vocab_size": 512}


@pytest.fixture(scope="session")
def make_learner(tokenizer):
    """make_learner(model keys, objective keys, row_length=…, dtype=…) -> Learner in eval mode."""

    def make(
        model: dict | None = None,
        objective: dict | None = None,
        *,
        row_length: int = 16,
        document_mask: bool = False,
        kernels: dict | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> Learner:
        config = load_config(
            [],
            base={
                "model": {**TINY, **(model or {})},
                "objective": objective or {"name": "clm"},
                "data": {"row_length": row_length, "document_mask": document_mask},
                "kernels": kernels or {},
            },
        )
        config = resolve(config, tokenizer)
        return build_learner(config, build_objective(config, tokenizer), device).to(dtype).eval()

    return make
