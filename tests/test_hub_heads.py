"""Fine-tuned models of others come in with their heads and labels, and go out again."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from nanolm import cli
from nanolm.finetune import parity
from nanolm.hub.samples import sample_texts
from nanolm.hub.task_heads import KINDS, TASK_HEADS
from nanolm.saved import open_saved
from tests.published import HEADED, LABELS, edit_config, write_published
from tests.spoiled_folders import imported, require_refusal

SINGLE = "model.safetensors"
BERTS = ("bert", "roberta", "distilbert", "albert")
DECODERS = ("gpt2", "llama", "qwen3")


ENCODERS = ("bert-classify", "bert-tag", "bert-read", "bert-choose")
EACH = [s for s in HEADED if s in (*ENCODERS, "llama-regress") or "classify" in s]
"""Every kind of head, of encoders and decoders, and one head of every family."""


@pytest.mark.parametrize(
    "shape", [s if s in EACH else pytest.param(s, marks=pytest.mark.slow) for s in HEADED]
)
def test_import_export_import_keeps_every_bit_and_the_labels(shape, tmp_path):
    a, b, c, d = (tmp_path / name for name in "abcd")
    write_published(a, shape)
    first = imported(a, b, f"--json={tmp_path / 'figures.json'}")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert 0 < figures["largest_difference"] < 1e-5 and figures["fresh"] == []
    cli.run(["export", str(b), f"--out={c}", "--format=transformers"])
    back = load_file(c / SINGLE)
    for key, tensor in load_file(a / SINGLE).items():
        # RoBERTa's first two positions are read by no token, so they come back as zeros.
        rows = slice(2, None) if "roberta" in shape and "position_emb" in key else slice(None)
        assert torch.equal(back[key][rows], tensor[rows]), key
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (a, c))
    assert new["architectures"] == old["architectures"]
    task = shape.partition("-")[2]
    if task in LABELS:
        assert new["id2label"] == old["id2label"]
    again = imported(c, d)
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in first.items())
    assert open_saved(d).config.objective == open_saved(b).config.objective


@pytest.mark.parametrize("direction", ["in", "out"])
@pytest.mark.parametrize("case", parity.CASES)
def test_rows_of_the_parity_table(case, direction):
    assert 0 < parity.difference(case, direction) < 1e-5


def test_the_table_has_every_family_with_every_head():
    assert set(parity.SHAPES) == set(TASK_HEADS) == {*BERTS, "modernbert", *DECODERS}
    assert {kind for kind, _ in parity.HEADS.values()} == set(KINDS.values())
    without = {f"{family}, multiple choice" for family in DECODERS}  # nor has transformers
    every = {f"{family}, {head}" for family in parity.SHAPES for head in parity.HEADS}
    assert every - parity.CASES.keys() == without


RECORDS = [
    {"text": "the quick brown fox"},
    {"text": "héllo wörld", "text_pair": "def f(x): return x"},
    {"text": "over the lazy dog", "text_pair": "jumps"},
]


def asked(run, records, folder):
    table, out = folder / "ask.jsonl", folder / "said.jsonl"
    table.write_text("".join(json.dumps(record) + "\n" for record in records))
    cli.run(["predict", str(run), str(table), f"--out={out}"])
    return [json.loads(line) for line in out.read_text().splitlines()]


def theirs_of(model, tokenizer, texts):
    with torch.no_grad():
        return model(**tokenizer(*texts, return_tensors="pt"))


@pytest.mark.parametrize("family", BERTS)
def test_predictions_are_those_of_transformers(family, tmp_path):
    """Also of records with a second text, although nobody said that they have one."""
    model = write_published(tmp_path / "a", f"{family}-classify")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    imported(tmp_path / "a", tmp_path / "b")
    for record, said in zip(RECORDS, asked(tmp_path / "b", RECORDS, tmp_path), strict=True):
        logits = theirs_of(model, tokenizer, record.values()).logits[0]
        assert list(said["probabilities"]) == ["no", "yes", "perhaps"]
        found = torch.tensor(list(said["probabilities"].values()))
        torch.testing.assert_close(found, logits.softmax(-1), rtol=1e-4, atol=1e-5)
        assert said["label"] == model.config.id2label[int(logits.argmax())]


@pytest.mark.parametrize("family", BERTS)
def test_scores_and_choices_are_those_of_transformers(family, tmp_path):
    model = write_published(tmp_path / "a", f"{family}-regress")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    imported(tmp_path / "a", tmp_path / "b")
    for record, said in zip(RECORDS, asked(tmp_path / "b", RECORDS, tmp_path), strict=True):
        logits = theirs_of(model, tokenizer, record.values()).logits
        assert said == {"warmth": pytest.approx(float(logits), abs=1e-5)}
    model = write_published(tmp_path / "c", f"{family}-choose")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "c")
    imported(tmp_path / "c", tmp_path / "d")
    question, choices = "the quick brown", ["fox", "lazy dog jumps", "x"]
    (said,) = asked(tmp_path / "d", [{"question": question, "choices": choices}], tmp_path)
    words = tokenizer([question] * 3, choices, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**{key: value[None] for key, value in words.items()}).logits
    np.testing.assert_allclose(said["probabilities"], logits[0].softmax(-1), atol=1e-5)


@pytest.mark.parametrize("family", BERTS)
def test_an_answer_is_cut_out_where_transformers_finds_it(family, tmp_path):
    """Through a tokenizer that drops case, accents and spaces, too."""
    model = write_published(tmp_path / "a", f"{family}-read")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    imported(tmp_path / "a", tmp_path / "b")
    question, context = "the fox", "Héllo wörld, the QUICK brown 中文 fox"
    (said,) = asked(tmp_path / "b", [{"question": question, "context": context}], tmp_path)
    words = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    offsets, parts = words.pop("offset_mapping")[0], words.sequence_ids(0)
    with torch.no_grad():
        found = model(**words)
    place = torch.tensor([part == 1 for part in parts])
    start, end = (s[0].masked_fill(~place, -torch.inf) for s in (found[0], found[1]))
    scores = (start[:, None] + end[None]).triu()
    scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).triu(), -torch.inf)
    first, last = divmod(int(scores.argmax()), len(parts))
    begin, stop = int(offsets[first][0]), int(offsets[last][1])
    assert said["answer"] == context[begin:stop].strip()
    assert context[said["start"] : said["end"]] == said["answer"]


def test_tags_stand_at_first_pieces_and_evaluation_knows_the_labels(tmp_path):
    model = write_published(tmp_path / "a", "bert-tag")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    imported(tmp_path / "a", tmp_path / "b")
    words = ["the", "quickest", "lazydog", "x"]
    (said,) = asked(tmp_path / "b", [{"tokens": words}], tmp_path)
    read = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    owners = read.word_ids(0)
    with torch.no_grad():
        best = model(**read).logits[0].argmax(-1)
    expected = [model.config.id2label[int(best[owners.index(n)])] for n in range(len(words))]
    assert said["tags"] == expected
    table = tmp_path / "gold.jsonl"
    table.write_text(json.dumps({"tokens": words, "tags": expected}) + "\n")
    figures = tmp_path / "figures.json"
    cli.run(["evaluate", str(tmp_path / "b"), f"--data={table}", f"--json={figures}"])
    assert json.loads(figures.read_text())["accuracy"] == 1.0


def test_pairs_are_framed_as_transformers_frames_them(tmp_path):
    texts = [text for text in sample_texts(120) if text.strip()]
    for family in BERTS:
        write_published(tmp_path / family, f"{family}-classify")
        theirs = AutoTokenizer.from_pretrained(tmp_path / family)
        imported(tmp_path / family, tmp_path / f"{family}-in")
        task = open_saved(tmp_path / f"{family}-in").learner.objective
        task.length = 10_000
        for first, second in zip(texts, reversed(texts), strict=True):
            sequence, cut = task.frame(task.encode(first), task.encode(second))
            words = {"split_special_tokens": True, "truncation": False}
            assert sequence.tokens.tolist() == theirs(first, second, **words).input_ids
            alone, _ = task.frame(task.encode(first))
            assert alone.tokens.tolist() == theirs(first, **words).input_ids
            assert cut == 0
            tail = [*task.encode(second).tolist(), task.tokenizer.sep]
            assert sequence.tokens[sequence.second :].tolist() == tail
        task.length = 12  # a pair that is cut fills the row exactly
        sequence, cut = task.frame(np.full(20, 5), np.full(20, 6))
        assert len(sequence.tokens) == 12 and cut == 40 - (12 - task.n_specials(2))


def stored(folder):
    return load_file(folder / SINGLE)


def edited(change):
    def spoil(folder):
        tensors = stored(folder)
        change(tensors)
        save_file({key: t.contiguous().clone() for key, t in tensors.items()}, folder / SINGLE)

    return spoil


def config(**keys):
    return lambda folder: edit_config(folder, **keys)


def ended(folder):
    """An end behind every text, which is the padding too."""
    path = folder / "tokenizer.json"
    parsed = json.loads(path.read_text())
    single = parsed["post_processor"]["processors"][1]["single"]
    single.append(single[0])
    path.write_text(json.dumps(parsed))


BAD = {
    "no head": (
        "bert-classify",
        edited(lambda t: [t.pop(f"classifier.{end}") for end in ("weight", "bias")]),
        "lacks classifier.weight",
    ),
    "half a head": (
        "roberta-classify",
        edited(lambda t: t.pop("classifier.dense.bias")),
        "lacks classifier.dense.bias",
    ),
    "no pooler": (
        "albert-choose",
        edited(lambda t: t.pop("albert.pooler.weight")),
        "lacks albert.pooler.weight",
    ),
    "a head too many": (
        "distilbert-read",
        edited(lambda t: t.update({"classifier.weight": torch.ones(2, 32)})),
        "holds classifier.weight",
    ),
    "a label too few": (
        "bert-tag",
        config(id2label={"0": "O", "1": "B-X"}),
        "classifier.bias as 5, and by its config.json it is 2",
    ),
    "labels with a gap": (
        "bert-classify",
        config(id2label={"0": "no", "2": "yes"}),
        "id2label",
    ),
    "labels alike": (
        "bert-classify",
        config(id2label={"0": "no", "1": "no", "2": "yes"}),
        "label of its own",
    ),
    "labels that are none": ("bert-classify", config(id2label=["no", "yes"]), "id2label"),
    "an unknown problem": ("bert-classify", config(problem_type="ranking"), "problem_type"),
    "no class": ("bert-classify", config(architectures=None), "names no class"),
    "no class, a reader": ("roberta-read", config(architectures=None), "names no class"),
    "a head that its family has not": (
        "gpt2-classify",
        config(architectures=["GPT2ForMultipleChoice"]),
        "nanolm imports heads of MultipleChoice for roberta, distilbert, bert, albert, modernbert",
    ),
    "no class, a decoder": (
        "llama-classify",
        config(architectures=None),
        r"LlamaForSequenceClassification",
    ),
    "a head of words without a bias": (
        "llama-tag",
        edited(lambda t: t.pop("score.bias")),
        "lacks score.bias",
    ),
    "a bias that decoders have not": (
        "qwen3-classify",
        edited(lambda t: t.update({"score.bias": torch.ones(3)})),
        "holds score.bias",
    ),
    "no transform": (
        "modernbert-tag",
        edited(lambda t: t.pop("head.dense.weight")),
        "lacks head.dense.weight",
    ),
    "another pooling": (
        "modernbert-classify",
        config(classifier_pooling="max"),
        "classifier_pooling as 'max'; it must be cls or mean",
    ),
    "padding that ends every text": (
        "llama-classify",
        lambda folder: ended(folder),
        "pad_token_id as 0.*decides by the token before it",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_sentence_and_nothing_is_written(kind, tmp_path):
    require_refusal(tmp_path, *BAD[kind])


@pytest.mark.parametrize("shape", ["bert-tag", "albert-read", "roberta-classify", "roberta-tag"])
def test_a_pooler_that_the_head_does_not_read_is_left_out_and_told(shape, tmp_path, capsys):
    write_published(tmp_path / "a", shape)
    clean = imported(tmp_path / "a", tmp_path / "b")
    pooler = f"{shape.split('-')[0]}.pooler" + ("" if "albert" in shape else ".dense")
    more = {f"{pooler}.weight": torch.ones(32, 32), f"{pooler}.bias": torch.ones(32)}
    edited(lambda tensors: tensors.update(more))(tmp_path / "a")
    found = imported(tmp_path / "a", tmp_path / "c")
    assert found.keys() == clean.keys()
    told = capsys.readouterr().out
    assert all(f"left out: {key}" in told for key in more)
