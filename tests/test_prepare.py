"""`prepare` as a whole: same bytes however it runs, safe to kill, honest about what it dropped."""

import dataclasses
import errno
import json
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

from nanolm import files
from nanolm.data.prepare import report
from nanolm.data.prepare.pipeline import PrepareConfig, prepare
from nanolm.data.prepare.progress import Lines, Silent
from nanolm.data.prepare.workspace import WORK, Workspace
from nanolm.data.shards.directory import open_split, open_tokenizer, verify
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError

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


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_what_nanolm_wrote_is_never_input(tmp_path, place):
    """The same command three times, and once from a half-done folder: the same bytes."""
    words = tmp_path / "words"
    words.mkdir()
    for number in range(60):
        (words / f"{number}.txt").write_text(
            f"document {number} of some words and more words\n" * 9
        )
    (words / "notes.doc").write_text("no text")
    run = words / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("a: 1\n")
    (run / "README.md").write_text("what a run says of itself")
    out = (words if place == "inside" else tmp_path) / "out"
    settings = config(words, out, vocab_size=324)
    first = prepare(settings, Silent())
    assert first.manifest.cleaning["passed over/.doc"] == 1
    assert first.manifest.cleaning["passed over/folder that nanolm wrote"] == 1
    assert report.figures(first)["passed over"] == {".doc": 1, "folder that nanolm wrote": 1}
    assert sum(totals["documents"] for totals in first.manifest.totals.values()) == 60
    assert prepare(settings, Silent()).reused
    whole = contents(out)
    (out / "manifest.json").unlink()
    (out / WORK).mkdir()
    (out / WORK / "lock").write_text("")
    prepare(settings, Silent())
    assert contents(out) == whole
    other = prepare(config(words, tmp_path / "other", vocab_size=324), Silent())
    assert other.manifest.data_hash == first.manifest.data_hash


def test_documents_keep_their_order_and_the_first_of_equals_stays(tmp_path):
    texts = [f"document {n % 70} of many words" for n in range(100)]
    (tmp_path / "x.txt").write_text("\n".join(texts))
    out = tmp_path / "data"
    options = {"txt_documents": "line", "vocab_size": 326, "val_fraction": 0.0, "workers": 1}
    prepare(PrepareConfig(out=str(out), sources=[str(tmp_path / "x.txt")], **options), Silent())
    manifest, (shard,) = open_split(out, "train")
    tokenizer = open_tokenizer(out, manifest)
    assert [tokenizer.decode(shard.document(n)) for n in range(len(shard))] == texts[:70]


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


def test_kills_and_workers_change_no_byte(corpus, reference, tmp_path):
    """Two workers, killed with SIGKILL in several phases; workers go with their parent."""
    settings = config(corpus, tmp_path / "data", workers=2)
    killed = []
    for phase in ("reading", "encoding", "writing shards"):
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
    assert len(killed) == 3
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


def test_an_interrupted_directory_is_never_mixed(tmp_path):
    (tmp_path / "x.txt").write_text("some words " * 50)
    options = {"sources": [str(tmp_path / "x.txt")], "vocab_size": 5000, "workers": 1}
    options["val_fraction"] = 0.0
    settings = PrepareConfig(out=str(tmp_path / "data"), **options)
    (tmp_path / "x.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="undecodable bytes"):
        prepare(dataclasses.replace(settings, undecodable="refuse"), Silent())
    (tmp_path / "x.txt").write_text("some words " * 50)  # nothing was finished: free to change
    with pytest.raises(UserError, match="vocab_size 5000 is larger than this corpus supports"):
        prepare(settings, Silent())
    with pytest.raises(UserError, match="prepared with seed 0, not 1"):
        prepare(dataclasses.replace(settings, seed=1), Silent())
    (tmp_path / "x.txt").write_text("other words " * 50)
    with pytest.raises(UserError, match="input files changed since"):
        prepare(settings, Silent())
    with (
        Workspace(str(tmp_path / "data")),
        pytest.raises(UserError, match="another process is preparing"),
    ):
        prepare(settings, Silent())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="was not written by `nanolm prepare`"):
        prepare(dataclasses.replace(settings, out=str(tmp_path / "mine")), Silent())


def test_a_vocabulary_that_does_not_fit_is_mended_in_place(tmp_path):
    """The remedy of the refusal, followed."""
    (tmp_path / "x.txt").write_text("some words and others " * 50)
    options = {"sources": [str(tmp_path / "x.txt")], "workers": 1, "val_fraction": 0.0}
    for out, vocab_size in (("large", 5000), ("small", 298)):
        settings = PrepareConfig(out=str(tmp_path / out), vocab_size=vocab_size, **options)
        with pytest.raises(UserError, match=r"at most (\d+)|the (\d+) characters") as caught:
            prepare(settings, Silent())
        (size,) = re.findall(r"at most (\d+)|the (\d+) characters", str(caught.value))
        mended = dataclasses.replace(settings, vocab_size=int("".join(size)))
        prepare(mended, Silent())
        assert verify(tmp_path / out).vocab_size == int("".join(size))


def test_corpora_without_documents_are_refused(tmp_path):
    no_model = {"tokenizer": str(tmp_path / "no.model"), "vocab_size": PrepareConfig.vocab_size}
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2" * 100)
    (tmp_path / "blank.txt").write_text(" \n\n ")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "one.txt").write_text("one document only " * 20)
    for name, options, sentence in (
        ("empty", {}, "no document is left of .*the files are empty"),
        ("binary", {}, "no document is left of .*1 binary file"),
        ("blank", {}, "no document is left of .*1 empty"),
        ("latin", {}, "no document is left of .*1 undecodable"),
        ("latin", {"undecodable": "refuse"}, r"latin\.txt: undecodable bytes after b'Gr'"),
        ("one", {}, "no document of .* is left to train on after val_fraction"),
        ("one", {"val_fraction": 1.0}, "val_fraction and test_fraction must be"),
        ("one", no_model, "cannot read the tokenizer"),
    ):
        settings = PrepareConfig(
            out=str(tmp_path / f"out-{name}-{len(options)}-{sentence[:5]}"),
            sources=[str(tmp_path / f"{name}.txt")],
            **{"vocab_size": 320, "workers": 1, **options},
        )
        with pytest.raises(UserError, match=sentence):
            prepare(settings, Silent())


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
    console = Console(width=100)
    console.print(report.render(summary))
    console.print(report.render_inspection(inspection))
    shown = capsys.readouterr().out
    for text in ("bytes/token", "dropped: duplicate", "train document 0"):
        assert text in shown
    assert 0 < inspection.unigram_bits_per_byte < 8
    counts = np.array([totals["documents"] for totals in inspection.manifest.totals.values()])
    assert counts.min() > 0


def test_extra_tokens_are_a_choice_that_older_folders_did_not_have(tmp_path):
    usual = PrepareConfig(out="x", sources=["y"]).fingerprint()
    assert "extra_tokens" not in usual
    assert PrepareConfig(out="x", sources=["y"], extra_tokens=57).fingerprint() != usual
    for keys, words in (
        ({"extra_tokens": -1}, "must be at least 0"),
        ({"extra_tokens": 57, "tokenizer": "other.model"}, "extra_tokens says how to train"),
    ):
        with pytest.raises(UserError, match=words):
            PrepareConfig(out="x", sources=["y"], **keys).check()
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Line {n} of a text about {n * n} things." for n in range(900)))
    out = tmp_path / "out"
    prepare(
        PrepareConfig(
            out=str(out),
            sources=[str(text)],
            txt_documents="paragraph",
            extra_tokens=57,
            vocab_size=360,
            workers=1,
        )
    )
    assert len(Tokenizer.load(out).extra_ids) == 57
