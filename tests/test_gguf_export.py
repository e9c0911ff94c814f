"""GGUF files go out: read again by the format's own package, and by us."""

import dataclasses
import functools
import json

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from nanolm import cli
from nanolm.checkpoint.container import read_tensors
from nanolm.data.prepare.tokenizer_training import train_tokenizer
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError
from nanolm.hub.gguf import keys
from nanolm.hub.gguf.reading import GgufFile
from nanolm.hub.gguf.vocabulary import read_vocabulary
from nanolm.hub.gguf.writing import vocabulary_values
from nanolm.hub.samples import PHRASES, sample_texts
from nanolm.inference.export_gguf import gguf_file
from nanolm.saved import open_saved
from tests.gguf_files import (
    arrays,
    byte_level_vocabulary,
    sentencepiece_model,
    sentencepiece_vocabulary,
    small_gguf,
)
from tests.published import LINES, edit_config, write_published

SENTENCES = [*LINES, *[text for text in PHRASES if text.strip()] * 20]


def silent(_):
    pass


@functools.cache
def vocabularies():
    byte_level = byte_level_vocabulary()
    padded = {
        "tokenizer.ggml.tokens": [*byte_level["tokenizer.ggml.tokens"], "[PAD300]"],
        "tokenizer.ggml.token_type": [*byte_level["tokenizer.ggml.token_type"], 5],
    }
    return {
        "llama": byte_level | padded,
        "qwen3": byte_level | {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_bos_token": True},
        "llama, sentencepiece": sentencepiece_vocabulary(sentencepiece_model(SENTENCES)),
        "llama, no prefix": sentencepiece_vocabulary(
            sentencepiece_model(SENTENCES, add_dummy_prefix=False), prefix=False
        ),
    }


@pytest.mark.parametrize("case", vocabularies())
def test_out_and_in_again_is_the_same_in_every_bit(case, tmp_path, capsys):
    arch, vocabulary = case.split(",")[0], vocabularies()[case]
    theirs = small_gguf(tmp_path / "a.gguf", arch, vocabulary=vocabulary)
    cli.run(["import", str(tmp_path / "a.gguf"), str(tmp_path / "b")])
    figures = tmp_path / "figures.json"
    out = tmp_path / "new" / "c.gguf"
    cli.run(["export", str(tmp_path / "b"), f"--out={out}", "--format=gguf", f"--json={figures}"])
    told = json.loads(figures.read_text())
    assert told["texts_with_other_ids"] == 0 and told["difference_of_logits"] < 1e-5
    assert [path.name for path in out.parent.iterdir()] == ["c.gguf"]
    cli.run(["import", str(out), str(tmp_path / "d")])
    first, second = (read_tensors(tmp_path / name, "model") for name in "bd")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    old, new = (open_saved(tmp_path / name) for name in "bd")
    assert old.tokenizer.model_bytes == new.tokenizer.model_bytes
    assert dataclasses.asdict(old.config) == dataclasses.asdict(new.config)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(out).tensors}
    wanted = arrays(theirs, arch)
    assert stored.keys() == wanted.keys()
    assert all(np.array_equal(stored[name], array) for name, array in wanted.items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    small_gguf(folder / "a.gguf", tied=True)
    cli.run(["import", str(folder / "a.gguf"), str(folder / "b")])
    return open_saved(folder / "b")


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_quantised_files_hold_what_the_kind_makes_of_the_numbers(kind, saved, tmp_path):
    told = []
    figures = gguf_file(saved, tmp_path / "a.gguf", kind, told.append)
    assert 0 < figures["difference_of_logits"] < 0.5 and figures["largest_difference"] < 1e-4
    whole = gguf_file(saved, tmp_path / "b.gguf", "F32", silent)
    assert figures["bytes"] < 0.7 * whole["bytes"]
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    exact = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    assert read.keys() == exact.keys() and "output.weight" not in read
    for name, tensor in read.items():
        norm = name.split(".")[-2].endswith("norm")
        assert tensor.tensor_type == (Kind.F32 if norm else Kind[kind])
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        step = 0 if norm else np.abs(exact[name]).max() / (100 if kind == "Q8_0" else 1000)
        assert np.abs(found - exact[name]).max() <= step


def test_our_bpe_goes_out_without_a_prefix_and_with_its_bytes():
    ours = Tokenizer(train_tokenizer(SENTENCES, vocab_size=500, kind="bpe"), "x.model")
    values = vocabulary_values(ours, 512)
    assert values["tokenizer.ggml.add_space_prefix"] is False
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert {len(values[f"tokenizer.ggml.{key}"]) for key in ("tokens", "scores")} == {512}
    assert values["tokenizer.ggml.token_type"].count(6) == 256
    again = read_vocabulary(GgufFile("x.gguf", values, {}, {}))
    assert again.roles() == ours.roles() and again.vocab_size == ours.vocab_size
    texts = [text for text in sample_texts() if not set(text) & set("\u2581\uf4a1\uf4a2")]
    assert len(texts) > 300
    for text, mine, theirs in zip(texts, ours.encode_batch(texts), again.encode_batch(texts)):
        assert mine.tolist() == theirs.tolist(), text


def test_what_llama_cpp_would_do_otherwise_is_refused(saved, tmp_path):
    unigram = Tokenizer(train_tokenizer(SENTENCES, vocab_size=450, kind="unigram"), "x.model")
    other = dataclasses.replace(saved, tokenizer=unigram)
    with pytest.raises(UserError, match="no byte fallback"):
        gguf_file(other, tmp_path / "new" / "a.gguf", "F32", silent)
    write_published(tmp_path / "words", "bert")
    words = Tokenizer((tmp_path / "words" / "tokenizer.json").read_bytes(), "x.json")
    with pytest.raises(UserError, match="a WordPiece"):
        vocabulary_values(words, 300)
    whole = json.loads(saved.tokenizer.model_bytes)
    whole["pre_tokenizer"] = {"type": "Whitespace"}
    with pytest.raises(UserError, match="no name for"):
        vocabulary_values(Tokenizer(json.dumps(whole).encode(), "x.json"), 300)
    assert list(tmp_path.glob("*.gguf")) == []


def test_other_models_and_options_are_refused_and_nothing_is_written(saved, tmp_path, capsys):
    write_published(tmp_path / "a", "gpt2")
    cli.run(["import", str(tmp_path / "a"), str(tmp_path / "b")])
    words = ["export", str(tmp_path / "b"), f"--out={tmp_path / 'c'}"]
    with pytest.raises(UserError, match="llama is nearest"):
        cli.run([*words, "--format=gguf"])
    with pytest.raises(UserError, match="add --format gguf"):
        cli.run([*words, "--weights=Q8_0"])
    write_published(tmp_path / "narrow", "llama")
    cli.run(["import", str(tmp_path / "narrow"), str(tmp_path / "d")])
    words = ["export", str(tmp_path / "d"), f"--out={tmp_path / 'c'}", "--format=gguf"]
    with pytest.raises(UserError, match="rows of 48 numbers"):
        cli.run([*words, "--weights=Q8_0"])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        cli.main(
            ["export", str(tmp_path / "d"), f"--out={tmp_path / 'file' / 'c'}", "--format=gguf"]
        )
    assert "something else has that name, so name another place" in capsys.readouterr().err
    scaled = {"rope_type": "linear", "factor": 2.0}
    edit_config(tmp_path / "narrow", rope_parameters=scaled)
    cli.run(["import", str(tmp_path / "narrow"), str(tmp_path / "e")])
    with pytest.raises(UserError, match=r"positions\.scaling is linear"):
        cli.run(["export", str(tmp_path / "e"), f"--out={tmp_path / 'c'}", "--format=gguf"])
    assert not list(tmp_path.glob("*c*"))


def test_a_wrong_order_is_caught_by_the_proof(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "neighbours", lambda rows, heads: rows)
    with pytest.raises(UserError, match="logits that differ"):
        gguf_file(saved, tmp_path / "a.gguf", "F32", silent)
    assert list(tmp_path.iterdir()) == []
