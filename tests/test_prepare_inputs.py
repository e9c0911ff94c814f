"""What `nanolm prepare` takes and refuses: its own output, corpora without documents, vocabularies
that do not fit."""

import dataclasses
import re

import pytest

from nanolm.data.prepare import report
from nanolm.data.prepare.pipeline import PrepareConfig, prepare
from nanolm.data.prepare.progress import Silent
from nanolm.data.prepare.workspace import WORK, Workspace
from nanolm.data.shards.directory import open_split, open_tokenizer, verify
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError
from tests.test_prepare import config, contents


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
        with pytest.raises(UserError, match=r"at most (\d+)|at least (\d+)") as caught:
            prepare(settings, Silent())
        (size,) = re.findall(r"at most (\d+)|at least (\d+)", str(caught.value))
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
