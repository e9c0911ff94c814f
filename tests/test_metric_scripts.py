"""Figures are what they are called: in many scripts, in every scheme of tags, for every task.

Right answers have the best value, a model that tells nothing apart has chance, and one error of a
known size costs what it must.
"""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from seqeval.metrics import f1_score
from seqeval.metrics.sequence_labeling import get_entities

from nanolm.data.tables.files import Table
from nanolm.data.tables.labels import tag_labels
from nanolm.finetune.evaluation import drawn
from nanolm.finetune.splits import Split
from nanolm.finetune.tasks import metrics
from nanolm.finetune.tasks.embed import Embed
from nanolm.finetune.tasks.items import Item
from nanolm.finetune.tasks.tag import entities
from nanolm.finetune.tasks.write import last_answer
from tests import metric_table
from tests.finetuned import checkpoint, command, finetune, table
from tests.metric_table import N_WORDS, SCHEMES, SCRIPTS, SPANS, halves, tags_of
from tests.test_objectives_tasks import build


@pytest.mark.parametrize("script", SCRIPTS)
def test_written_answers(script):
    text, wrong, n = halves(script)
    same = metrics.generation([text, text], [text, text]).figures
    assert same.pop("bleu") == pytest.approx(100) and same.pop("chrf") == pytest.approx(100)
    assert set(same.values()) == {1.0}
    short = " ".join(text.split()[:2]) if script not in N_WORDS else text[:2]
    same = metrics.generation([short], [short]).figures
    assert same["bleu"] == pytest.approx(100) and same["rougeL"] == same["exact_match"] == 1
    found = metrics.generation([text, text], [text, wrong]).figures
    assert found["exact_match"] == 0.5
    assert found["rouge1"] == found["rougeL"] == pytest.approx((1 + (n - 1) / n) / 2)
    assert found["rouge2"] == pytest.approx((1 + (n - 2) / (n - 1)) / 2)
    assert 0 < found["bleu"] < 100 and 0 < found["chrf"] < 100
    nothing = metrics.generation([text], ["0"]).figures
    assert max(nothing[name] for name in ("exact_match", "rouge1", "rouge2", "rougeL")) == 0


def test_words_of_bleu_are_no_longer_than_those_of_the_script():
    """One character that is wrong costs less than a text: Thai was one word to the Chinese rule."""
    for script in SCRIPTS:
        usual = {"Chinese": "zh", "Japanese": "zh", "Thai": "char", "Khmer": "char"}
        assert metrics.bleu_words([SCRIPTS[script]]) == usual.get(script, "13a")
        text, wrong, n = halves(script)
        if script != "Japanese":  # whose kana are no words of their own to sacrebleu
            assert (
                metrics.generation([text] * 9, [text] * 8 + [wrong]).figures["bleu"] > 100 - 50 / n
            )


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("by_character", [False, True])
def test_read_answers(script, by_character):
    text, wrong, n = halves(script)
    found = metrics.reading([[text]] * 2, [text] * 2, by_character=by_character).figures
    assert set(found.values()) == {1.0}
    found = metrics.reading([[text]] * 2, [text, wrong], by_character=by_character).figures
    words = n if by_character or script not in N_WORDS else 1
    assert found["exact_match"] == 0.5
    assert found["f1"] == pytest.approx((1 + (words - 1) / words) / 2)
    empty = metrics.reading([[text], []], ["", ""], by_character=by_character).figures
    assert empty["f1"] == 0.5 and empty["no_answer_f1"] == 1 and empty["has_answer_f1"] == 0


ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=24)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.lists(st.tuples(ASCII, ASCII), min_size=1, max_size=4))
def test_rouge_of_plain_english_is_the_librarys_own(pairs):
    golds, guesses = zip(*pairs, strict=True)
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, tokenizer=DefaultTokenizer(use_stemmer=False))
    found = metrics.generation(list(golds), list(guesses)).figures
    for name in names:
        scores = [scorer.score(g, p)[name].fmeasure for g, p in pairs]
        assert found[name] == pytest.approx(np.mean(scores))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_entities_of_every_scheme(scheme):
    gold = tags_of(SPANS, scheme)
    labels = tag_labels(gold, "t")
    assert labels[0] == "O" and metrics.marks_spans(labels)
    spans = [(e["type"], e["start"], e["stop"]) for e in entities(list("abcdefghi"), gold)]
    assert spans == SPANS
    assert sorted(get_entities(list(map(metrics.as_bioes, gold)))) == sorted(
        (kind, start, stop - 1) for kind, start, stop in SPANS
    )
    same = metrics.tagging([gold], [gold], spans=True).figures
    assert set(same.values()) == {1.0}
    shorter = tags_of([*SPANS[:3], ("LOC", 6, 7)], scheme)  # one of four spans ends too early
    found = metrics.tagging([gold], [shorter], spans=True)
    assert found.figures["f1"] == found.figures["precision"] == found.figures["recall"] == 0.75
    assert any(
        line.split() == ["PER", "1.0000"] + ["1.0000"] * 2 + ["1"]
        for line in found.text.splitlines()
    )
    none = metrics.tagging([gold], [["O"] * 9], spans=True).figures
    assert none["f1"] == 0 and none["token_accuracy"] == pytest.approx(2 / 9)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data())
def test_all_schemes_agree(data):
    """The same spans have the same F1, whatever the scheme."""

    def draw():
        spans, at = [], 0
        while at < 9:
            size = data.draw(st.integers(1, 3))
            if data.draw(st.booleans()) and at + size <= 9:
                spans.append((data.draw(st.sampled_from(["A", "B"])), at, at + size))
            at += size
        return spans

    gold, guess = draw(), draw()
    expected = f1_score([tags_of(gold, "BIOES")], [tags_of(guess, "BIOES")], zero_division=0)
    for scheme in SCHEMES:
        pair = [tags_of(gold, scheme)], [tags_of(guess, scheme)]
        assert metrics.tagging(*pair, spans=True).figures["f1"] == pytest.approx(float(expected))


@pytest.mark.parametrize("scheme", ["BIOES", "BILOU", "BMEWO", "BMES"])
def test_tags_out_of_order_are_read_as_seqeval_reads_them(scheme):
    """A model may begin an entity with I, E or M, or never end it: all sequences of three tags."""
    letters = dict(zip("SBIE", SCHEMES[scheme], strict=True))
    kinds = ["O", *(f"{letter}-{kind}" for letter in "SBIE" for kind in "XY")]
    words = list("abc")
    for tags in itertools.product(kinds, repeat=3):
        own = ["O" if tag == "O" else letters[tag[0]] + tag[1:] for tag in tags]
        expected = sorted(get_entities(list(tags)))
        assert sorted(get_entities(list(map(metrics.as_bioes, own)))) == expected
        found = [(e["type"], e["start"], e["stop"] - 1) for e in entities(words, own)]
        assert sorted(found) == expected, own


@pytest.mark.parametrize("tags", [["0", "1", "2"], ["NOUN", "VERB", "ADJ"], ["B", "I", "O"]])
def test_tags_that_mark_no_spans_have_no_f1(tags):
    assert not metrics.marks_spans(tags)
    gold, constant = [tags * 3], [tags[:1] * 9]
    figures = metrics.tagging(gold, constant, spans=False).figures
    assert "f1" not in figures and figures["token_accuracy"] == pytest.approx(1 / 3)
    expected = sklearn.metrics.f1_score(gold[0], constant[0], average="macro")
    assert figures["macro_f1"] == pytest.approx(expected)


@pytest.mark.parametrize("letters", ["BILOU", "BMEWO"])
def test_other_letters_count_as_those_of_bioes_also_where_tags_are_out_of_order(letters):
    meant = {"L": "E", "U": "S", "M": "I", "W": "S"}
    rng, kinds = np.random.default_rng(7), [letter for letter in letters if letter != "O"]
    told = [["O" if i < 0 else f"{kinds[i]}-X" for i in rng.integers(-1, 4, 6)] for _ in range(400)]
    read = [[meant.get(tag[0], tag[0]) + tag[1:] for tag in tags] for tags in told]
    for one in (0, 200):  # gold and what was predicted
        side = slice(one, one + 100), slice(one + 100, one + 200)
        found, expected = (
            metrics.tagging(tags[side[0]], tags[side[1]], spans=True).figures
            for tags in (told, read)
        )
        assert found == expected and 0 < found["f1"] < 1


def test_the_table_in_the_docs_is_what_is_counted():
    page = pathlib.Path(__file__).parent.parent / "docs" / "metrics.md"
    assert metric_table.table() in page.read_text(encoding="utf-8")


# A model that tells nothing apart.


@pytest.mark.parametrize("apart", [1e-9, 1e-7])  # what float32 makes of one text in two batches
def test_equally_near_documents_are_no_hits(apart):
    task, _ = build("embed", "encoder")
    embed = task.objective
    assert isinstance(embed, Embed)
    noise = np.random.default_rng(0).uniform(-apart, apart, size=(20, 2, 4))
    vectors = (np.array([1.0, 0, 0, 0]) + noise).tolist()
    items = [Item(i, [], f"d{i}") for i in range(20)]
    found = embed.report(None, embed.predictions(None, items, vectors)).figures
    assert found["mrr"] == pytest.approx(1 / 20) and found["accuracy"] == found["recall@10"] == 0
    assert found["loss"] == pytest.approx(np.log(20), abs=1e-5)
    eye = [[row.tolist()] * 2 for row in np.eye(20)]
    found = embed.report(None, embed.predictions(None, items, eye)).figures
    assert found["mrr"] == found["recall@1"] == found["accuracy"] == 1
    eye[3] = [eye[3][0], eye[4][1]]  # one query's own document lies where another one does
    found = embed.report(None, embed.predictions(None, items, eye)).figures
    assert found["recall@1"] == 18 / 20  # itself, and the one that it ties with
    twice = [Item(i, [], "same" if i < 2 else f"d{i}") for i in range(20)]
    found = embed.report(
        None,
        embed.predictions(
            None, twice, [[e[0], eye[0][1]] if i < 2 else e for i, e in enumerate(eye)]
        ),
    )
    assert found.figures["recall@5"] > 0.8  # equal texts are one document, not a tie


@pytest.mark.parametrize("task", ["choose", "choose_dual", "choose_lm"])
def test_equally_probable_candidates_are_no_hits(task):
    objective = build(task, "encoder")[0].objective
    records = [{"question": "q", "choices": ["a", "b", "c"], "label": 0} for _ in range(6)]
    rows = Table("t", records, list(range(6)))
    for apart in (-1e-8, 1e-8, 5e-7):  # the right one is ahead by what float32 makes of batches
        constant = [[1 / 3 + apart, 1 / 3, 1 / 3]] * 6
        found = objective.report(rows, objective.predictions(rows, [], constant)).figures
        assert found["accuracy"] == 0 and found["mrr"] == pytest.approx(1 / 3)
    right = [[0.5, 0.3, 0.2]] * 5
    found = objective.report(
        rows, objective.predictions(rows, [], [*right, [0.3, 0.5, 0.2]])
    ).figures
    assert found["accuracy"] == pytest.approx(5 / 6) and found["mrr"] == pytest.approx(5.5 / 6)
    twins = Table("t", [r | {"choices": ["a", "a", "c"]} for r in records], list(range(6)))
    equal = [[0.4, 0.4, 0.2]] * 6
    assert objective.report(twins, objective.predictions(twins, [], equal)).figures["accuracy"] == 1


def test_a_constant_classifier_has_chance_and_one_error_costs_its_share():
    gold = [0, 1] * 10
    found = metrics.classification(gold, np.full((20, 2), 0.5), ["a", "b"]).figures
    assert found["accuracy"] == found["roc_auc"] == 0.5 and found["mcc"] == 0
    right = np.eye(2)[gold]
    best = metrics.classification(gold, right, ["a", "b"]).figures
    assert set(best.values()) == {1.0}
    right[0] = right[0, ::-1]
    found = metrics.classification(gold, right, ["a", "b"]).figures
    assert found["accuracy"] == found["micro_f1"] == 0.95
    several = np.eye(3)[[0, 1, 2, 0]]
    assert set(metrics.multi_label(several, several, list("abc")).figures.values()) == {1.0}
    half = metrics.multi_label(several, np.full((4, 3), 0.4), list("abc")).figures
    assert half["accuracy"] == half["micro_f1"] == 0


@pytest.mark.parametrize("at", [0.0, 3.0, 2000.0])
def test_a_constant_score_correlates_with_nothing(at):
    gold = np.arange(10.0)[:, None]
    noise = np.random.default_rng(1).normal(size=(10, 1)) * 6e-8 * at
    found = metrics.regression(gold, (at + noise).astype(np.float32).astype(float)).figures
    assert found["pearson"] == found["spearman"] == 0
    assert metrics.regression(gold, -gold).figures["pearson"] == pytest.approx(-1)
    small = metrics.regression(gold * 1e-7, gold * 1e-7).figures
    assert small["pearson"] == pytest.approx(1) and small["mse"] == 0


# What is scored, and on which records.

TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "say set"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "thanks a lot and goodbye"},
    {"role": "assistant", "content": "set"},
]


@pytest.mark.parametrize(
    ("n_turns", "answer"),
    [(3, 2), *(pytest.param(*turns, marks=pytest.mark.slow) for turns in ((4, 2), (5, 4)))],
)
def test_a_dialogue_is_scored_against_its_last_answer(n_turns, answer, tmp_path):
    dialogue = {"messages": TURNS[:n_turns]}
    assert last_answer(dialogue["messages"]) == answer
    writer = build("write", "decoder")[0].objective
    writer.options = dataclasses.replace(writer.options, chat=True)
    before = writer.prompt({"messages": TURNS[: answer + 1]})
    assert writer.prompt(dialogue, with_gold=True) == before
    assert before.endswith(f"{TURNS[answer - 1]['content']}\nassistant: ")
    assert ("goodbye" in writer.prompt(dialogue)) == (n_turns > 3)  # `nanolm predict` goes on
    for split in ("train", "val", "test"):
        table(tmp_path / "data", split, [dialogue] * 6)
    words = ("--objective.name=write", "--objective.max_new_tokens=3", "--optim.lr=1e-2")
    words += ("--objective.chat=true",)
    quick = ("--train.steps=40", "--train.global_batch=6", "--data.row_length=64")
    quick += ("--schedule.warmup=0",)
    finetune(checkpoint("clm"), tmp_path / "data", tmp_path / "run", *words, *quick)
    command("evaluate", str(tmp_path / "run"), f"--json={tmp_path / 'out.json'}")
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["rouge1"] == figures["exact_match"] == 1


def test_a_limited_evaluation_reads_whole_records_from_all_over_the_file():
    rows = Table("t", [{"n": i} for i in range(100)], list(range(1, 101)))
    items = [Item(i, [], (i, part)) for i in range(100) for part in range(1 + i % 3)]
    found = drawn(Split("val", rows, items, []), 30)
    assert 20 < len(found.items) <= 30
    read = {record["n"] for record in found.table.records}
    assert min(read) < 30 and max(read) > 70
    for number, record in enumerate(found.table.records):
        mine = [item.target for item in found.items if item.record == number]
        assert mine == [(record["n"], part) for part in range(1 + record["n"] % 3)]
    assert drawn(Split("val", rows, items, []), 30).table.records == found.table.records
    assert drawn(Split("val", rows, items, []), 1000).items == items
