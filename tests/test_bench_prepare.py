"""The benchmark of preparation runs on real text and reports what it says it does."""

import json
import pathlib

import pytest

from nanolm import cli
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError
from nanolm.tools.bench import corpus
from nanolm.tools.bench.prepare import encoder_alone, sum_of_encoders
from tests.conftest import tiny_tokenizer
from tests.published import write_tokenizer


def test_rates_and_memory_of_a_small_corpus(tmp_path, capsys):
    text = pathlib.Path(json.__file__).read_text(encoding="utf-8")
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"{number}\n{text}", encoding="utf-8")
    out = tmp_path / "figures.json"
    command = ["bench", "prepare", f"{tmp_path}/*.txt", "--vocab_size=512", "--workers=1"]
    cli.run([*command, "--repeats=1", '--tokenizer_types=["bpe"]', f"--json={out}"])
    (row,) = json.loads(out.read_text())
    assert row["bytes"] == 4 * (len(text.encode()) + 2)
    assert row["kind"] == "bpe" and row["workers"] == 1
    for key in ("alone_one", "alone_all", "encoding", "everything", "encoding_over_alone"):
        assert row[key] > 0
    assert row["peak_bytes"] > 10_000_000
    assert "prepare with 1 workers" in capsys.readouterr().out


@pytest.mark.slow
def test_a_tokenizer_of_others_is_measured_beside_its_own_library(tmp_path):
    text = pathlib.Path(json.__file__).read_text(encoding="utf-8")
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(f"{number}\n{text}", encoding="utf-8")
    write_tokenizer(tmp_path, "gpt2")
    given, out = tmp_path / "tokenizer.json", tmp_path / "figures.json"
    command = ["bench", "prepare", f"{tmp_path}/*.txt", f"--tokenizer={given}", "--workers=1"]
    cli.run([*command, "--repeats=1", f"--json={out}"])
    (row,) = json.loads(out.read_text())
    assert row["kind"] == str(given) and row["bytes"] == 2 * (len(text.encode()) + 2)
    assert row["alone_one"] > 0 and row["encoding_over_alone"] > 0
    given.unlink()
    with pytest.raises(UserError, match=r"^prepare failed: [^\['].*tokenizer.json"):
        cli.run([*command, "--repeats=1"])


@pytest.mark.slow
def test_an_encoder_that_fails_ends_the_measurement(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be encoded with alone"):
        sum_of_encoders(str(tmp_path / "tokenizer.json"), ["a"], 2)


def test_encoders_alone_give_the_ids_of_a_prepared_folder(tmp_path):
    write_tokenizer(tmp_path, "gpt2")
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer().model_bytes)
    for name in ("tokenizer.json", "tokenizer.model"):
        ours = Tokenizer.load(tmp_path / name)
        found = encoder_alone(str(tmp_path / name))(["the quick brown fox"])
        ids = getattr(found[0], "ids", found[0])
        assert ids == ours.encode("the quick brown fox").tolist()


def test_a_corpus_is_grown_from_the_sources_sentences(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "FILE_BYTES", 20_000)
    source = tmp_path / "small.jsonl"
    text = "".join(f"Sentence {n} is short. " for n in range(500))
    source.write_text(json.dumps({"body": text}) + "\n", encoding="utf-8")
    folder = tmp_path / "corpus"
    corpus.grow([str(source)], "body", 50_000, folder)
    files = sorted(folder.iterdir())
    texts = [json.loads(line)["body"] for path in files for line in path.open()]
    assert len(files) == 3
    assert 50_000 <= sum(map(len, texts)) < 51_000
    assert len(set(texts)) == len(texts)
    assert all(word in {"Sentence", "is", "short."} or word.isdigit() for word in texts[0].split())
    again = tmp_path / "again"
    corpus.grow([str(source)], "body", 50_000, again)
    assert [path.read_bytes() for path in sorted(again.iterdir())] == [
        path.read_bytes() for path in files
    ]
