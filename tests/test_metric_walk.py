"""No figure is forgotten: a walk over the registry asks every task for its own report, on right
answers, on answers of a model that tells nothing apart, and on one error in twenty.

The numbers are counted by hand. A figure that a task declares and that stands neither here nor
among the terms of its loss fails the walk. (Scripts and schemes: test_metric_scripts.py.)
"""

import math

import numpy as np
import pytest

from nanolm.data.tables.files import Table
from nanolm.finetune.tasks import metrics
from nanolm.finetune.tasks.base import Item
from tests.metric_table import SCRIPTS, SPANS, halves, tags_of
from tests.test_objectives_tasks import build
from tests.test_task_directions import tasks

N = 20
LOSSES = {"loss", "nll", "perplexity"}
BEST, CHANCE, ONE = "right", "the same for all", "one error in twenty"

MACRO = {"precision": (1 + 10 / 11) / 2, "recall": 0.95, "f1": (18 / 19 + 20 / 21) / 2}
CLASSES = {  # ten records of each of two classes, one of the first taken for the second
    "accuracy": (1, 0.5, 0.95),
    **{f"micro_{name}": (1, 0.5, 0.95) for name in MACRO},
    **{
        f"{average}_{name}": (1, {"precision": 0.25, "recall": 0.5, "f1": 1 / 3}[name], value)
        for average in ("macro", "weighted")
        for name, value in MACRO.items()
    },
    "mcc": (1, 0, 90 / math.sqrt(10 * 11 * 9 * 10)),
    "roc_auc": (1, 0.5, 0.95),
}
LINE, BENT = np.arange(N, dtype=float), np.append(19.0, np.arange(1.0, N))  # 0 is taken for 19
PEARSON = float(np.corrcoef(LINE, BENT)[0, 1])
RANKS = np.append(18.5, np.append(np.arange(0.0, 18), 18.5))  # its two 19 share the last two places
SPEARMAN = float(np.corrcoef(LINE, RANKS)[0, 1])
SCORES = {"pearson": (1, 0, PEARSON), "spearman": (1, 0, SPEARMAN)}
RANKED = {"accuracy": (1, 0, 0.95), "mrr": (1, 1 / N, (19 + 1 / 2) / N)}
TAGS = {  # of four entities the last is a word too short: one of eighteen words is wrong
    "token_accuracy": (1, 4 / 18, 17 / 18),
    **dict.fromkeys(metrics.PRECISION_RECALL_F1, (1, 0, 7 / 8)),
}
PLAIN = {  # three tags, six of each; one of the first taken for the second
    "token_accuracy": (1, 1 / 3, 17 / 18),
    "macro_precision": (1, 1 / 9, (1 + 6 / 7 + 1) / 3),
    "macro_recall": (1, 1 / 3, (5 / 6 + 2) / 3),
    "macro_f1": (1, 1 / 6, (10 / 11 + 12 / 13 + 1) / 3),
}
READ = {  # ten answers of five words, one with a wrong word; ten times none
    "exact_match": (1, 0.5, 0.95),
    "f1": (1, 0.5, 1 - 0.2 / N),
    "has_answer_exact_match": (1, 0, 0.9),
    "has_answer_f1": (1, 0, 1 - 0.2 / 10),
    "no_answer_exact_match": (1, 1, 1),
    "no_answer_f1": (1, 1, 1),
}
WRITTEN = {
    "exact_match": (1, 0, 0.95),
    "rouge1": (1, 0, 1 - 0.2 / N),
    "rouge2": (1, 0, 1 - 0.25 / N),
    "rougeL": (1, 0, 1 - 0.2 / N),
    "bleu": (100, 0, None),  # between, as sacrebleu counts
    "chrf": (100, 0, None),
}
EXPECTED = {
    "classify": CLASSES,
    "prompt": CLASSES,
    "regress": SCORES | {"mse": (0, 33.25, 361 / N), "mae": (0, 5, 19 / N)},
    "similar": SCORES,
    "tag": TAGS,
    "plain tags": PLAIN,
    "read": READ,
    "embed": RANKED | {"recall@1": (1, 0, 0.95), "recall@5": (1, 0, 1), "recall@10": (1, 0, 1)},
    "write": WRITTEN,
    **{
        name: {"accuracy": (1, 0, 0.95), "mrr": (1, 1 / 4, (19 + 1 / 2) / N)}
        for name in ("choose", "choose_dual", "choose_lm")
    },
}
COUNTED_IN_THE_LOSS = {"tag": {"accuracy"}, "read": {"accuracy"}, "write": {"accuracy"}}


def replies(right, same, wrong):
    """{case: N predictions}; with the error in the first."""
    return {BEST: right, CHANCE: same, ONE: [wrong, *right[1:]]}


def of_classes(names):
    right = [dict(zip(names, p, strict=True)) for p in np.eye(2)[[0, 1] * (N // 2)].tolist()]
    half = [dict.fromkeys(names, 0.5)] * N
    found = replies(right, half, dict(zip(names, (0.0, 1.0), strict=True)))
    return {case: [{"probabilities": p} for p in each] for case, each in found.items()}


def asked(kind):
    """(what the kind's task is built with, its records, its predictions in the three cases)."""
    text, wrong, _ = halves("Latin")
    if kind in ("classify", "prompt"):
        names = ["a", "b"] if kind == "classify" else ["no", "yes"]
        given = {"labels": names} if kind == "classify" else {}
        return given, [{"text": "t", "label": names[i % 2]} for i in range(N)], of_classes(names)
    if kind in ("regress", "similar"):
        name = "score" if kind == "regress" else "similarity"
        values = {BEST: LINE, CHANCE: np.full(N, 9.5), ONE: BENT}
        found = {case: [{name: float(v)} for v in each] for case, each in values.items()}
        return {}, [{"score": v} for v in LINE], found
    if kind in ("tag", "plain tags"):
        gold = tags_of(SPANS, "BIO") if kind == "tag" else ["X", "Y", "Z"] * 3
        wrong = tags_of([*SPANS[:3], ("LOC", 6, 7)], "BIO") if kind == "tag" else ["Y", *gold[1:]]
        same = (["O"] if kind == "tag" else ["X"]) * 9
        rows = {BEST: [gold] * 2, CHANCE: [same] * 2, ONE: [wrong, gold]}
        found = {case: [{"tags": tags} for tags in each] for case, each in rows.items()}
        return (
            {"labels": sorted({"O", *gold} if kind == "tag" else set(gold))},
            [{"tokens": list("abcdefghi"), "tags": gold}] * 2,
            found,
        )
    if kind == "read":
        golds = [text if i % 2 == 0 else "" for i in range(N)]
        records = [{"answers": [{"text": g, "answer_start": 0}] if g else []} for g in golds]
        found = replies([{"answer": g} for g in golds], [{"answer": ""}] * N, {"answer": wrong})
        return {}, records, found
    if kind == "write":
        found = replies([{"text": text}] * N, [{"text": "0"}] * N, {"text": wrong})
        return {"chat": False}, [{"prompt": "p", "response": text}] * N, found
    records = [{"question": "q", "choices": list("abcd"), "label": 0}] * N
    values = replies([[0.7, 0.1, 0.1, 0.1]] * N, [[0.25] * 4] * N, [0.3, 0.5, 0.1, 0.1])
    return {}, records, {c: [{"probabilities": p} for p in each] for c, each in values.items()}


def embedded(task):
    """{case: what `embed` makes of vectors}: its figures are of places among the others."""
    eye = np.eye(N)
    items = [Item(i, [], f"d{i}", 0, f"q{i}") for i in range(N)]
    right = [[row, row] for row in eye]
    bent = [[0.6 * eye[0] + 0.8 * eye[1], eye[0]], *right[1:]]
    cases = {BEST: right, CHANCE: [[eye[0], eye[0]]] * N, ONE: bent}
    return {case: task.predictions(None, items, vectors) for case, vectors in cases.items()}


def test_the_walk_knows_every_task():
    assert set(tasks()) - {"multi"} == set(EXPECTED) - {"plain tags"}


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_figure_of_every_task(kind):
    name = "tag" if kind == "plain tags" else kind
    given, records, cases = ({}, [{}] * N, {}) if kind == "embed" else asked(kind)
    task = build(name, "decoder" if name == "write" else "encoder")[0].objective
    if "labels" in given:
        task.labels = given["labels"]
    if name == "classify":
        task.number = {label: i for i, label in enumerate(task.labels)}
    cases = embedded(task) if kind == "embed" else cases
    rows = Table("t", records, list(range(1, len(records) + 1)))
    found = [task.report(rows, cases[case]).figures for case in (BEST, CHANCE, ONE)]
    expected = EXPECTED[kind]
    declared = {metric.name for metric in task.metrics(task.options)}
    other = EXPECTED["plain tags" if kind == "tag" else "tag"] if name == "tag" else {}
    unseen = declared - set(expected) - set(other) - LOSSES - {task.term}
    assert unseen == COUNTED_IN_THE_LOSS.get(name, set())
    higher = dict(task.metrics(task.options))
    for figure, values in expected.items():
        for report, value in zip(found, values, strict=True):
            if value is not None:
                assert report[figure] == pytest.approx(value, abs=1e-6), figure
        best, chance, one = (report[figure] for report in found)
        if figure not in ("no_answer_exact_match", "no_answer_f1", "recall@5", "recall@10"):
            assert (best > one > chance) if higher[figure] else (best < one), figure


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["read", "write"])
def test_right_answers_are_right_in_every_script(kind, script):
    text, wrong, _ = halves(script)
    task = build(kind, "decoder" if kind == "write" else "encoder")[0].objective
    key = {"read": "answer", "write": "text"}[kind]
    records = [
        {"prompt": "p", "response": text, "answers": [{"text": text, "answer_start": 0}]}
    ] * 2
    if kind == "write":
        task.options = type(task.options)(chat=False)
    rows = Table("t", records, [1, 2])
    best = task.report(rows, [{key: text}] * 2).figures
    other = task.report(rows, [{key: text}, {key: wrong}]).figures
    assert all(
        value == pytest.approx(100 if n in ("bleu", "chrf") else 1) for n, value in best.items()
    )
    assert all(other[name] < value for name, value in best.items())
