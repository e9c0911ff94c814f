"""Heads of decoders and of ModernBERT come in, answer as in transformers, and go out again."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from nanolm.data.json_pieces import is_json
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError
from nanolm.finetune.published import task_folder
from nanolm.hub.samples import sample_texts
from nanolm.saved import open_saved
from tests.published import edit_config, write_published
from tests.test_export_tasks import tuned
from tests.test_hub_heads import RECORDS, asked, imported, theirs_of


@pytest.fixture(scope="module", params=["gpt2", "llama", "modernbert"])
def classifier(request, tmp_path_factory):
    """(transformers' model, its tokenizer, the imported run)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = write_published(folder / "a", f"{request.param}-classify")
    if request.param == "modernbert":
        edit_config(folder / "a", classifier_pooling="mean")
        model.config.classifier_pooling = "mean"
    imported(folder / "a", folder / "b")
    return model, AutoTokenizer.from_pretrained(folder / "a"), folder / "b"


def test_predictions_are_those_of_transformers(classifier, tmp_path):
    model, tokenizer, run = classifier
    for record, said in zip(RECORDS, asked(run, RECORDS, tmp_path), strict=True):
        logits = theirs_of(model, tokenizer, record.values()).logits[0]
        found = torch.tensor(list(said["probabilities"].values()))
        torch.testing.assert_close(found, logits.softmax(-1), rtol=1e-4, atol=1e-5)
        assert said["label"] == model.config.id2label[int(logits.argmax())]


def test_texts_are_framed_as_transformers_frames_them(classifier):
    _, theirs, run = classifier
    task = open_saved(run).learner.objective
    task.length = 10_000
    words = {"split_special_tokens": True, "truncation": False}
    texts = [text for text in sample_texts(60) if text.strip()]
    for first, second in zip(texts, reversed(texts), strict=True):
        pair, _ = task.frame(task.encode(first), task.encode(second))
        alone, _ = task.frame(task.encode(first))
        assert pair.tokens.tolist() == theirs(first, second, **words).input_ids
        assert alone.tokens.tolist() == theirs(first, **words).input_ids
    full, cut = task.frame(*map(task.encode, ("the quick brown fox " * 20, "lazy " * 20)))
    task.length = 12
    pair, more = task.frame(*map(task.encode, ("the quick brown fox " * 20, "lazy " * 20)))
    assert (len(pair.tokens), cut, more) == (12, 0, len(full.tokens) - 12)


def test_decoders_say_a_words_tag_at_its_last_piece(tmp_path):
    model = write_published(tmp_path / "a", "llama-tag")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    imported(tmp_path / "a", tmp_path / "b")
    words = ["the", "quickest", "lazydog", "x"]
    (said,) = asked(tmp_path / "b", [{"tokens": words}], tmp_path)
    pieces = [tokenizer(text, add_special_tokens=False).input_ids for text in spaced(words)]
    ids = [0, *(number for part in pieces for number in part)]
    ends = [sum(map(len, pieces[: n + 1])) for n in range(len(pieces))]  # one piece lies before
    with torch.no_grad():
        best = model(torch.tensor([ids])).logits[0].argmax(-1)
    assert said["tags"] == [model.config.id2label[int(best[end])] for end in ends]


def spaced(words):
    return [words[0], *(f" {word}" for word in words[1:])]


def test_a_decoder_trained_here_frames_its_texts_there_too(tmp_path):
    """An end stands before and behind; where padding is that end, transformers may not skip it."""
    saved = tuned("llama", "classify", tmp_path / "run")
    _, files, _ = task_folder(saved, lambda line: None)
    write(files, tmp_path / "out")
    eos, sep = (saved.tokenizer.role(role) for role in ("eos", "sep"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    first, second = (saved.tokenizer.encode(text).tolist() for text in ("quick brown", "fox"))
    assert theirs("quick brown").input_ids == [eos, *first, eos]
    assert theirs("quick brown", "fox").input_ids == [eos, *first, sep, *second, eos]
    assert Tokenizer.load(tmp_path / "out" / "tokenizer.json").around(2) == [[eos], [sep], [eos]]
    assert json.loads(files["config.json"])["pad_token_id"] == saved.tokenizer.pad
    saved.tokenizer._roles["pad"] = eos
    _, files, figures = task_folder(saved, lambda line: None)
    assert json.loads(files["config.json"])["pad_token_id"] is None
    assert figures["largest_difference"] < 1e-5


def test_a_tokenizer_of_others_gets_the_frame_that_was_trained_with(tmp_path):
    """And keeps the step that says where its pieces stand."""
    write_published(tmp_path / "a", "gpt2-classify")
    imported(tmp_path / "a", tmp_path / "b")
    saved = open_saved(tmp_path / "b")
    assert is_json(saved.tokenizer.model_bytes) and saved.tokenizer.around(1) == [[], []]
    for frame, around in (("tokenizer", [[], []]), ("trunk", [[0], [0]])):
        object.__setattr__(saved.config.objective, "frame", frame)
        _, files, _ = task_folder(saved, lambda line: None)
        write(files, tmp_path / frame)
        found = Tokenizer.load(tmp_path / frame)
        assert found.around(1) == around
        assert found._json.offsets(" the fox") == saved.tokenizer._json.offsets(" the fox")


def write(files, folder):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def test_another_frame_of_transformers_is_refused(tmp_path, monkeypatch):
    write_published(tmp_path / "a", "llama-classify")
    monkeypatch.setattr(Tokenizer, "around", lambda self, n: [[0], [], []][: n + 1])
    with pytest.raises(UserError, match=r"puts other pieces around.*save_pretrained\(FOLDER\)"):
        imported(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_tokenizer_that_says_nothing_of_frames_is_refused(tmp_path):
    saved = tuned("llama", "classify", tmp_path / "run")
    with pytest.raises(UserError, match=r"does not say what .*; leave objective\.frame out"):
        saved.tokenizer.around(1)
    write_published(tmp_path / "a", "llama-classify")
    (tmp_path / "a" / "tokenizer.json").unlink()
    (tmp_path / "a" / "tokenizer.model").write_bytes(saved.tokenizer.model_bytes)
    edit_config(tmp_path / "a", vocab_size=448)
    with pytest.raises(UserError, match=r"holds no tokenizer.json, .* head .*save_pretrained"):
        imported(tmp_path / "a", tmp_path / "b")
