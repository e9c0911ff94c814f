"""`prepare` as a whole: same bytes however it runs, safe to kill, honest about what it dropped."""

import dataclasses
import errno
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from nanolm import files
from nanolm.data.prepare import report
from nanolm.data.prepare.pipeline import PrepareConfig, prepare
from nanolm.data.prepare.progress import Lines, Silent
from nanolm.data.prepare.workspace import WORK
from nanolm.data.shards.directory import open_split, open_tokenizer, verify
from nanolm.errors import UserError
from nanolm.tables import show

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    """Some 4 MB in several formats, with repeats, dirt and Chinese: a few units of work."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(400)]
    poems = ["秦川雄帝宅，函谷壯皇居。", "綺殿千尋起，離宮百雉餘。", "連甍遙接漢，飛觀迥凌虛。"]

    def sentence(words: int) -> str:
        return " ".join(rng.choices(vocabulary, k=words)) + "."

    with open(folder / "records.jsonl", "w") as file:
        for number in range(6000):
            text = sentence(60) if number % 7 else rng.choice(poems) + sentence(8)
            file.write(json.dumps({"text": text}) + "\n")
            if number % 50 == 0:
                file.write(json.dumps({"text": text}) + "\n")
    (folder / "lines.txt").write_bytes(
        b"".join(sentence(150).encode() + b"\n" for _ in range(1500)) + b"bad \xff bytes\n"
    )
    for number in range(20):
        (folder / f"m{number:02d}.py").write_text(f"def f{number}(x):\n\treturn x  # ▁\n" * 9)
    return folder


def config(corpus: pathlib.Path, out: pathlib.Path, **changes) -> PrepareConfig:
    options = {
        "sources": [str(corpus)],
        "vocab_size": 600,
        "val_fraction": 0.05,
        "test_fraction": 0.01,
        "shard_tokens": 200_000,
        "sample_bytes": 150_000,
        "workers": 1,
    }
    return PrepareConfig(out=str(out), **{**options, **changes})


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("prepared") / "reference"
    prepare(config(corpus, out), Silent())
    return out


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_result_is_whole_and_holds_every_document_once(corpus, reference):
    manifest = verify(reference)
    assert not (reference / WORK).exists()
    assert manifest.cleaning["dropped/duplicate"] >= 120
    assert manifest.cleaning["dropped/undecodable"] == 1
    tokenizer = open_tokenizer(reference, manifest)
    found: list[str] = []
    for split in ("train", "val", "test"):
        _, shards = open_split(reference, split)
        for shard in shards:
            texts = [tokenizer.decode(shard.document(index)) for index in range(len(shard))]
            assert sum(len(text.encode()) for text in texts) == shard.metadata["bytes"]
            found += texts
    assert len(manifest.splits["train"]) > 2
    lines = (corpus / "lines.txt").read_bytes().split(b"\n")
    records = (corpus / "records.jsonl").read_text().splitlines()
    wanted = [json.loads(line)["text"] for line in records]
    wanted += [line.decode() for line in lines if line and b"\xff" not in line]
    wanted += [path.read_text() for path in corpus.glob("*.py")]
    assert sorted(found) == sorted(set(wanted))
    dropped = sum(n for key, n in manifest.cleaning.items() if key.startswith("dropped/"))
    assert len(found) + dropped == len(wanted) + 1


def run_prepare(settings: PrepareConfig, **options) -> subprocess.Popen:
    """Prepare in a process of its own; each phase's name goes to stdout as it begins."""
    code = (
        "import json, sys\n"
        "from nanolm.data.prepare.pipeline import PrepareConfig, prepare\n"
        "from nanolm.data.prepare.progress import Silent\n"
        "class Told(Silent):\n"
        "    def begin(self, phase, total, unit): print(phase, flush=True)\n"
        "    def advance(self, amount): print('step', flush=True)\n"
        "if __name__ == '__main__':\n"
        "    prepare(PrepareConfig(**json.loads(sys.argv[1])), Told())\n"
    )
    script = pathlib.Path(settings.out).parent / "run_prepare.py"
    script.write_text(code)
    return subprocess.Popen(
        [sys.executable, str(script), json.dumps(dataclasses.asdict(settings))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


ALL_PHASES = ("reading", "encoding", "writing shards")


@pytest.mark.parametrize(
    "phases", [("encoding",), pytest.param(ALL_PHASES, marks=pytest.mark.slow)], ids=len
)
def test_kills_and_workers_change_no_byte(corpus, reference, tmp_path, phases):
    """Two workers, killed with SIGKILL in these phases; workers go with their parent."""
    settings = config(corpus, tmp_path / "data", workers=2)
    killed = []
    for phase in phases:
        process = run_prepare(settings)
        steps = 0
        for line in process.stdout:
            if line.strip() == phase:
                killed.append(phase)
            steps += phase in killed and line.strip() == "step"
            if steps == 2:
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "data" / "manifest.json").exists()
        with pytest.raises(UserError, match="not a prepared directory"):
            open_split(tmp_path / "data", "train")
    assert tuple(killed) == phases
    deadline = time.monotonic() + 20
    while orphans(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not orphans(tmp_path)
    untouched = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "data").glob("**/unit-*.text")
    }
    assert untouched
    process = run_prepare(settings)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert contents(tmp_path / "data") == contents(reference)


def orphans(folder: pathlib.Path) -> list[str]:
    """Command lines of live processes that were started from a script in this folder."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes()
            command = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in command or str(folder).encode() in environment:
            found.append(command.decode(errors="replace"))
    return found


def test_finished_units_and_shards_are_not_done_again(corpus, reference, tmp_path, monkeypatch):
    from nanolm.data.prepare import pipeline as module

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    settings = config(corpus, tmp_path / "data")
    with monkeypatch.context() as patched:
        patched.setattr(module, "data_hash", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings, Silent())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*-0*")}
    assert sum(path.suffix == ".arrow" for path in before) > 3
    kept = {}

    def look(*arguments: object) -> str:
        kept.update({path: path.stat().st_mtime_ns for path in before})
        return original(*arguments)

    original = module.data_hash
    monkeypatch.setattr(module, "data_hash", look)
    prepare(settings, Silent())
    assert {path: t for path, t in kept.items() if "duplicates" not in path.name} == {
        path: t for path, t in before.items() if "duplicates" not in path.name
    }
    assert contents(tmp_path / "data") == contents(reference)


def test_a_finished_directory_is_left_alone_and_never_mixed(corpus, reference):
    before = contents(reference)
    assert prepare(config(corpus, reference), Silent()).reused
    with pytest.raises(UserError, match="prepared with vocab_size 600, not 700"):
        prepare(config(corpus, reference, vocab_size=700), Silent())
    extra = corpus / "new.txt"
    extra.write_text("new")
    try:
        with pytest.raises(UserError, match="the input changed since"):
            prepare(config(corpus, reference), Silent())
    finally:
        extra.unlink()
    assert contents(reference) == before


def test_an_existing_tokenizer_is_used_as_it_is(corpus, reference, tmp_path):
    training = {"vocab_size": 8192, "sample_bytes": None}
    settings = config(corpus, tmp_path / "data", tokenizer=str(reference), **training)
    manifest = prepare(settings, Silent()).manifest
    assert manifest.tokenizer_hash == verify(reference).tokenizer_hash
    assert manifest.data_hash == verify(reference).data_hash
    for key, value in (
        ("vocab_size", 999),
        ("sample_bytes", 5),
        ("tokenizer_type", "bpe"),
        ("character_coverage", 1.0),
    ):
        wrong = dataclasses.replace(settings, **{key: value})
        with pytest.raises(UserError, match=f"^{key} says how to train .* leave out one"):
            prepare(wrong, Silent())


def test_a_full_disk_is_told_and_the_work_goes_on_afterwards(
    corpus, reference, tmp_path, monkeypatch
):
    """The disk fills up after more and more writes; each run keeps what was finished."""
    settings = config(corpus, tmp_path / "data")
    written = 0
    real_write = files.AtomicFile.write
    limit = 0

    def write(self: files.AtomicFile, block: bytes) -> int:
        nonlocal written
        written += 1
        if written > limit:
            with self._disk_errors():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(self, block)

    monkeypatch.setattr(files.AtomicFile, "write", write)
    failures = 0
    for limit in (0, 5, 30, 60, 100, 100, 10_000):  # noqa: B007 (read by `write`)
        written = 0
        try:
            prepare(settings, Silent())
        except UserError as error:
            failures += 1
            assert "No space left on device" in str(error) and str(tmp_path / "data") in str(error)
            assert not list((tmp_path / "data").rglob(f"{files.TEMPORARY}*"))
            assert not (tmp_path / "data" / "manifest.json").exists()
        else:
            break
    assert failures >= 3
    assert contents(tmp_path / "data") == contents(reference)


def test_a_real_limit_on_file_sizes_is_told(corpus, tmp_path):
    """The kernel refuses the write, in a worker process, through pyarrow."""
    settings = config(corpus, tmp_path / "data", workers=2)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    process = run_prepare(settings, preexec_fn=limit)
    _, errors = process.communicate()
    assert process.returncode != 0
    last = errors.strip().splitlines()[-1]
    assert "UserError: cannot write" in last and "File too large" in last
    assert not list((tmp_path / "data").rglob(f"{files.TEMPORARY}*"))


def test_reports_and_progress_lines(corpus, reference, tmp_path, capsys):
    (tmp_path / "x.txt").write_text("\n".join(f"some words {n}" for n in range(90)))
    settings = PrepareConfig(
        out=str(tmp_path / "data"),
        sources=[str(tmp_path / "x.txt")],
        txt_documents="line",
        vocab_size=320,
        workers=1,
    )
    with open(tmp_path / "log", "w") as stream:
        summary = prepare(settings, Lines(stream))
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == list(summary.seconds)
    figures = report.figures(summary)
    assert figures["splits"]["train"]["documents"] + figures["splits"]["val"]["documents"] == 90
    assert json.loads(json.dumps(figures)) == figures
    inspection = report.inspect(str(reference))
    assert json.dumps(report.inspection_figures(inspection))
    show(*report.render(summary), *report.render_inspection(inspection))
    shown = capsys.readouterr().out
    for text in ("bytes/token", "dropped: duplicate", "train document 0"):
        assert text in shown
    assert 0 < inspection.unigram_bits_per_byte < 8
    counts = np.array([totals["documents"] for totals in inspection.manifest.totals.values()])
    assert counts.min() > 0
