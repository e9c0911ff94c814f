"""Slow pipes and Ctrl-C, in processes of their own: nothing is lost, and no end looks like success.

(Training is in test_train_command.py, SIGKILL of `prepare` in test_prepare.py.)
"""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from nanolm.data.prepare.pipeline import PrepareConfig, prepare
from nanolm.data.prepare.progress import Silent
from tests.finetuned import checkpoint, finetune, questions, table
from tests.prepared import train
from tests.test_prepare import contents

ROOT = pathlib.Path(__file__).parent.parent


def begin(*words: object, **options) -> subprocess.Popen:
    """A command in a process group of its own, its streams unbuffered pipes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "nanolm", *map(str, words)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        bufsize=0,
        # A shell that starts the tests behind `&` has Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def interrupt(process: subprocess.Popen) -> str:
    """Ctrl-C as a terminal sends it, to the whole group; gives what was told at the end."""
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate(timeout=600)[1].decode()
    assert process.returncode == 130 and "Traceback" not in told, told
    return told


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    for split in ("train", "val"):
        table(folder / "data", split, questions(12))
    words = ("--objective.name=classify", "--train.steps=1")
    finetune(checkpoint("mlm"), folder / "data", folder / "run", *words)
    return folder / "run"


@pytest.mark.slow
def test_each_line_of_a_slow_pipe_is_answered_before_the_next_one_comes(classifier):
    process = begin("predict", classifier, "--batch=1", stdin=subprocess.PIPE)
    found = []
    for line in (b"open a file\n", b"\n", b"raise an err", b"or\n"):
        process.stdin.write(line)
        if line.endswith(b"\n"):
            found.append(json.loads(process.stdout.readline()))
    rest, told = process.communicate(timeout=600)
    assert process.returncode == 0 and rest == b"", told
    assert ["label" in answer for answer in found] == [True, False, True]


@pytest.mark.slow
def test_ctrl_c_while_predicting_leaves_the_output_as_it_was(classifier, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("before\n")
    words = ("predict", classifier, "--batch=1", f"--out={out}")
    process = begin(*words, stdin=subprocess.PIPE)
    process.stdin.write(b"open a file\n")
    while len(list(tmp_path.iterdir())) == 1:
        assert process.poll() is None, process.stderr.read()
    assert interrupt(process) == "nanolm: interrupted\n"
    assert out.read_text() == "before\n" and list(tmp_path.iterdir()) == [out]


# Of Ctrl-C in a process that has begun, that in `prepare` stands in `make test`.
@pytest.mark.slow
def test_ctrl_c_while_writing_keeps_what_was_shown(tmp_path):
    long = ("--model.max_length=20000", "--train.steps=1", "--schedule.warmup=0")
    train(tmp_path / "run", *long, "--model.positions.name=rotary")
    process = begin("generate", tmp_path / "run", "--prompt=def", "--max_tokens=19000")
    shown = b""
    while len(shown) < 8:
        piece = process.stdout.read(8)
        assert piece, process.stderr.read()
        shown += piece
    assert interrupt(process) == "nanolm: interrupted\n"
    assert shown.startswith(b"def")


SETTINGS = {"vocab_size": 400, "shard_tokens": 200_000, "sample_bytes": 100_000}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(the sources, what a preparation that was never broken off makes of them)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    lines = "".join(f"{i} {i * i} words of line {i % 97}\n" for i in range(15000))
    sources = [str(folder / "a.txt"), str(folder / "b.txt")]
    for source in sources:
        pathlib.Path(source).write_text(source[-5] + lines)
    settings = PrepareConfig(out=str(folder / "whole"), sources=sources, workers=1, **SETTINGS)
    prepare(settings, Silent())
    return sources, contents(folder / "whole")


@pytest.mark.parametrize(
    ("phase", "workers"),
    [
        ("reading", 1),
        pytest.param("sampling", 2, marks=pytest.mark.slow),
        pytest.param("reading", 2, marks=pytest.mark.slow),
        pytest.param("sampling", 1, marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_in_prepare_loses_nothing(undisturbed, workers, phase, tmp_path):
    """What goes on afterwards has the bytes of a preparation that was never broken off."""
    sources, whole = undisturbed
    out = tmp_path / "out"
    words = [f"--{key}={value}" for key, value in SETTINGS.items()]
    words = ["prepare", *sources, f"--out={out}", f"--workers={workers}", *words]
    process = begin(*words)
    while not (told := process.stderr.readline()).startswith(f"{phase}: ".encode()):
        assert told, process.communicate()
    assert interrupt(process).endswith("nanolm: interrupted\n")
    assert not (out / "manifest.json").exists()
    process = begin(*words)
    told = process.communicate(timeout=600)[1]
    assert process.returncode == 0, told
    assert contents(out) == whole
