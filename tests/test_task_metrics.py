"""Metrics equal their libraries' and SQuAD's own definition, on random and adversarial input."""

import math
import re
import string
from collections import Counter

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score, precision_score, recall_score

from nanolm.errors import UserError
from nanolm.finetune.tasks import metrics

PROFILE = settings(deadline=None, derandomize=True, max_examples=60)


@PROFILE
@given(st.integers(2, 5), st.integers(1, 40), st.integers(0, 10**6))
def test_classification_is_scikit_learns(n_classes, n, seed):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(n_classes), size=n)
    gold = rng.integers(0, n_classes, size=n)
    guess = probabilities.argmax(axis=1)
    labels = [f"l{i}" for i in range(n_classes)]
    report = metrics.classification(gold.tolist(), probabilities, labels)
    found = report.figures
    assert found["accuracy"] == sklearn.metrics.accuracy_score(gold, guess)
    for average in ("macro", "micro", "weighted"):
        value = sklearn.metrics.f1_score(
            gold, guess, labels=range(n_classes), average=average, zero_division=0
        )
        assert found[f"{average}_f1"] == value
    assert found["mcc"] == sklearn.metrics.matthews_corrcoef(gold, guess)
    assert np.trace(report.confusion) == (gold == guess).sum()
    assert (
        np.sum(report.confusion, axis=1).tolist() == np.bincount(gold, minlength=n_classes).tolist()
    )
    if n_classes == 2 and len(set(gold.tolist())) == 2:
        assert found["roc_auc"] == sklearn.metrics.roc_auc_score(gold, probabilities[:, 1])


TAGS = st.sampled_from(["O", "B-A", "I-A", "E-A", "S-A", "B-B", "I-B"])


@PROFILE
@given(st.lists(st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=8), min_size=1, max_size=6))
def test_entities_are_seqevals(sentences):
    gold = [[g for g, _ in s] for s in sentences]
    guess = [[p for _, p in s] for s in sentences]
    found = metrics.tagging(gold, guess, spans=True).figures
    for name, function in (
        ("f1", f1_score),
        ("precision", precision_score),
        ("recall", recall_score),
    ):
        assert found[name] == pytest.approx(float(function(gold, guess, zero_division=0)))
    right = [g == p for s in sentences for g, p in s]
    assert found["token_accuracy"] == pytest.approx(np.mean(right))


def test_plain_tags_have_no_entities_and_no_f1():
    found = metrics.tagging([["NOUN", "VERB"]], [["NOUN", "NOUN"]], spans=False).figures
    assert found["token_accuracy"] == 0.5 and "f1" not in found
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


# SQuAD v2.0's definition, written from the paper's text in another way than the module's.


def official_normalise(s):
    s = "".join(c for c in s.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", s).split())


def official_f1(gold, guess):
    gold, guess = official_normalise(gold).split(), official_normalise(guess).split()
    if not gold or not guess:
        return float(gold == guess)
    same = sum((Counter(gold) & Counter(guess)).values())
    if not same:
        return 0.0
    p, r = same / len(guess), same / len(gold)
    return 2 * p * r / (p + r)


TEXT = st.text(alphabet=st.sampled_from("ab the.,'-A 1é"), max_size=14)


@PROFILE
@given(st.lists(st.tuples(st.lists(TEXT, max_size=3), TEXT), min_size=1, max_size=6))
def test_reading_is_squads(questions):
    golds, guesses = [g for g, _ in questions], [p for _, p in questions]
    exact, f1 = [], []
    for gold, guess in questions:
        gold = [g for g in gold if official_normalise(g)] or [""]
        exact.append(max(official_normalise(g) == official_normalise(guess) for g in gold))
        f1.append(max(official_f1(g, guess) for g in gold))
    found = metrics.reading(golds, guesses).figures
    assert found["exact_match"] == pytest.approx(np.mean(exact))
    assert found["f1"] == pytest.approx(np.mean(f1))


def test_chinese_answers_are_compared_by_character():
    assert metrics.pieces("光荣和ω-force。", by_character=True) == [
        "光",
        "荣",
        "和",
        "ω",
        "force",
    ]
    found = metrics.reading([["北京市"]], ["北京"], by_character=True).figures
    assert found["exact_match"] == 0 and found["f1"] == pytest.approx(0.8)
    found = metrics.reading([["《北京》"]], ["北京"], by_character=True).figures
    assert found["exact_match"] == 1


def test_regression_with_constants_and_with_scipy():
    gold, guess = np.array([[1.0], [2.0], [4.0]]), np.array([[1.5], [1.0], [5.0]])
    found = metrics.regression(gold, guess).figures
    assert found["pearson"] == pytest.approx(np.corrcoef(gold[:, 0], guess[:, 0])[0, 1])
    assert found["spearman"] == pytest.approx(0.5) and found["mse"] == pytest.approx(0.75)
    found = metrics.regression(gold, np.ones((3, 1))).figures
    assert found["pearson"] == found["spearman"] == 0.0


def test_ranking_and_generation():
    found = metrics.ranking([1, 2, 10])
    assert found["mrr"] == pytest.approx((1 + 0.5 + 0.1) / 3) and found["recall@5"] == 2 / 3
    golds = ["the cat sat on the mat today", "a dog"]
    same = metrics.generation(golds, golds).figures
    assert same["exact_match"] == 1 and same["bleu"] == pytest.approx(100) and same["rougeL"] == 1
    other = metrics.generation(golds, ["no", ""]).figures
    assert other["bleu"] < 5 and other["rouge1"] == 0
    chinese = metrics.generation(["今天天气很好"], ["今天天气不好"]).figures
    assert 0 < chinese["bleu"] < 100 and chinese["rouge1"] == pytest.approx(5 / 6)


def test_bleu_and_chrf_tell_what_was_written_from_what_was_right():
    """A text that ends too early, counted by hand: it says nothing wrong, and half of it is
    missing. The other way round nothing would be missing, and half of it wrong."""
    gold = [f"{a}{b}" for a in "abcde" for b in "xy"]
    written = gold[:5]
    found = metrics.generation([" ".join(gold)], [" ".join(written)]).figures
    assert found["bleu"] == pytest.approx(100 * math.exp(1 - 10 / 5))  # precisions 1, brevity
    seen, whole = len("".join(written)), len("".join(gold))
    recall = np.mean([(seen - n + 1) / (whole - n + 1) for n in range(1, 7)])
    assert found["chrf"] == pytest.approx(100 * 5 * recall / (4 + recall))  # recall counts twice


def test_a_missing_library_is_named():
    with pytest.raises(UserError, match=r"pip install 'nanolm\[finetune\]'"):
        metrics.library("no_such_metric_library")
