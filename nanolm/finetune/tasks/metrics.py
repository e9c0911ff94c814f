"""Metrics of tasks, by the libraries that define them, and what a report is made of.

scikit-learn computes classification and regression figures, seqeval entity scores, sacrebleu BLEU
and chrF, rouge-score ROUGE: users compare with numbers that these print. Reading comprehension has
SQuAD's own definition, which no library carries; it stands below, also by characters for Chinese.

They are the extra `finetune`: importing them takes seconds, so each function imports what it needs.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import re
import string
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nanolm.data.words import MARKED, UNSPACED
from nanolm.errors import UserError


class Metric(NamedTuple):
    """A figure's name, and whether more of it is better: what the best checkpoint, the choice of a
    study and a comparison go by."""

    name: str
    higher_is_better: bool


def higher(*names: str) -> tuple[Metric, ...]:
    """Figures of which more is better."""
    return tuple(Metric(name, True) for name in names)


def lower(*names: str) -> tuple[Metric, ...]:
    """Figures of which less is better."""
    return tuple(Metric(name, False) for name in names)


@dataclasses.dataclass(frozen=True)
class Report:
    """Figures by name; a longer text for people; the confusion matrix [gold, predicted]."""

    figures: dict[str, float]
    text: str | None = None
    labels: list[str] | None = None
    confusion: list[list[int]] | None = None


def library(name: str) -> Any:
    """A metric library; raises UserError saying how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"metrics of tasks need {name.split('.')[0]}: pip install 'nanolm[finetune]'"
        ) from None


PRECISION_RECALL_F1 = ("precision", "recall", "f1")
AVERAGES = [f"{a}_{n}" for a in ("macro", "micro", "weighted") for n in PRECISION_RECALL_F1]
CLASSIFICATION = higher("accuracy", *AVERAGES, "mcc", "roc_auc")


def classification(gold: ArrayLike, probabilities_NC: np.ndarray, labels: Sequence[str]) -> Report:
    """Accuracy, precision, recall and F1 (macro, micro, weighted), MCC; ROC-AUC when binary."""
    metrics = library("sklearn.metrics")
    gold_N = np.asarray(gold)
    predicted = probabilities_NC.argmax(axis=1)
    everything = list(range(len(labels)))
    figures = {"accuracy": float(metrics.accuracy_score(gold_N, predicted))}
    figures |= _averages(metrics, gold_N, predicted, everything)
    figures["mcc"] = float(metrics.matthews_corrcoef(gold_N, predicted))
    if len(labels) == 2 and len(set(gold_N.tolist())) == 2:
        figures["roc_auc"] = float(metrics.roc_auc_score(gold_N, probabilities_NC[:, 1]))
    text = metrics.classification_report(
        gold_N, predicted, labels=everything, target_names=list(labels), digits=4, zero_division=0
    )
    confusion = metrics.confusion_matrix(gold_N, predicted, labels=everything).tolist()
    return Report(figures, text, list(labels), confusion)


def _averages(metrics: Any, gold: Any, predicted: Any, labels: list[int]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for average in ("macro", "micro", "weighted"):
        values = metrics.precision_recall_fscore_support(
            gold, predicted, labels=labels, average=average, zero_division=0
        )
        names = [f"{average}_{name}" for name in PRECISION_RECALL_F1]
        figures |= {name: float(value) for name, value in zip(names, values)}
    return figures


def multi_label(gold_NC: np.ndarray, probabilities_NC: np.ndarray, labels: Sequence[str]) -> Report:
    """Each label by itself at the threshold 1/2; accuracy: all labels of a row are right."""
    metrics = library("sklearn.metrics")
    predicted_NC = (probabilities_NC >= 0.5).astype(int)
    everything = list(range(len(labels)))
    figures = {"accuracy": float(metrics.accuracy_score(gold_NC, predicted_NC))}
    figures |= _averages(metrics, gold_NC, predicted_NC, everything)
    text = metrics.classification_report(
        gold_NC, predicted_NC, target_names=list(labels), digits=4, zero_division=0
    )
    return Report(figures, text)


REGRESSION = (*lower("mse", "mae"), *higher("pearson", "spearman"))


def regression(gold_NC: np.ndarray, predicted_NC: np.ndarray) -> Report:
    """Mean squared and absolute error, Pearson and Spearman correlation (means over the columns).

    A correlation with a constant is 0, and so is one with what differs by float32's rounding only,
    of the scores themselves or, if that is less, of their distance from the gold's mean.
    """
    stats = library("scipy.stats")
    error = predicted_NC - gold_NC
    figures = {"mse": float((error**2).mean()), "mae": float(np.abs(error).mean())}
    for name, function in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        columns = zip(gold_NC.T, predicted_NC.T)
        figures[name] = float(np.mean([_correlation(function, x, y) for x, y in columns]))
    return Report(figures)


def _correlation(function: Callable, x: np.ndarray, y: np.ndarray) -> float:
    apart = max(float(np.abs(y - x.mean()).max()), float(np.ptp(x)))
    rounding = 4 * np.finfo(np.float32).eps * min(float(np.abs(y).max()), apart)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) <= rounding:
        return 0.0
    return float(function(x, y)[0])


TAGGING = higher(
    "token_accuracy", *PRECISION_RECALL_F1, *(f"macro_{name}" for name in PRECISION_RECALL_F1)
)
SPAN_PREFIXES = "BIESLUMW"
"""How the tags of spans begin: Begin, Inside, End or Last, Single or Unit or Whole, Middle."""


def marks_spans(tags: Iterable[str]) -> bool:
    """Whether tags mark where entities begin and end: BIO, BIOES and the like."""
    return all(tag == "O" or (tag[:1] in SPAN_PREFIXES and tag[1:2] == "-") for tag in tags)


TO_SEQEVAL = str.maketrans("LUWM", "ESSI")
"""The schemes BILOU and BMEWO in the letters of BIOES, the only ones that seqeval knows."""


def tagging(gold: list[list[str]], predicted: list[list[str]], *, spans: bool) -> Report:
    """Entity precision, recall and F1 as seqeval counts them (one entity right = span and type);
    accuracy of tokens. Tags that mark no spans (parts of speech, numbers) have no entities: theirs
    are scikit-learn's figures, and none of them is called F1 without saying of what."""
    flat_gold = [tag for tags in gold for tag in tags]
    flat_predicted = [tag for tags in predicted for tag in tags]
    right = np.array([g == p for g, p in zip(flat_gold, flat_predicted)], dtype=float)
    figures = {"token_accuracy": float(right.mean()) if len(right) else 0.0}
    if not spans:
        metrics = library("sklearn.metrics")
        values = metrics.precision_recall_fscore_support(
            flat_gold, flat_predicted, average="macro", zero_division=0
        )
        figures |= {f"macro_{n}": float(v) for n, v in zip(PRECISION_RECALL_F1, values)}
        text = metrics.classification_report(flat_gold, flat_predicted, digits=4, zero_division=0)
        return Report(figures, text)
    gold, predicted = ([list(map(as_bioes, tags)) for tags in side] for side in (gold, predicted))
    metrics = library("seqeval.metrics")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # seqeval warns where a class has no sample
        for name in PRECISION_RECALL_F1:
            function = getattr(metrics, f"{name}_score")
            figures[name] = float(function(gold, predicted, zero_division=0))
        any_entity = any(tag != "O" for tag in flat_gold + flat_predicted)
        text = (
            metrics.classification_report(gold, predicted, digits=4, zero_division=0)
            if any_entity
            else None
        )
    return Report(figures, text)


def as_bioes(tag: str) -> str:
    """A tag of any span scheme with the prefix that BIOES has for it."""
    return tag[:1].translate(TO_SEQEVAL) + tag[1:]


# Reading comprehension: SQuAD's evaluation script v1.1 and v2.0 (Rajpurkar et al. 2016, 2018).

ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces."""
    text = "".join(ch for ch in text.lower() if ch not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", text).split())


def pieces(text: str, *, by_character: bool) -> list[str]:
    """Words after normalisation; by character, every character of an unspaced script is a word and
    punctuation of any script is dropped (the evaluation of CMRC 2018, Cui et al. 2019)."""
    if not by_character:
        return normalised(text).split()
    parts, word = [], ""
    for ch in text.lower():
        alone = bool(UNSPACED.match(ch))
        dropped = ch.isspace() or unicodedata.category(ch)[0] in "PS"
        if alone or dropped:
            parts += [word] if word else []
            parts += [ch] if alone else []
            word = ""
        else:
            word += ch
    return parts + ([word] if word else [])


def overlap_f1(gold: list[str], predicted: list[str]) -> float:
    """F1 of two bags of words; when either is empty, 1 if both are."""
    if not gold or not predicted:
        return float(gold == predicted)
    common = sum((collections.Counter(gold) & collections.Counter(predicted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(gold)
    return 2 * precision * recall / (precision + recall)


READING = higher(
    *(f"{of}{name}" for of in ("", "has_answer_", "no_answer_") for name in ("exact_match", "f1"))
)


def reading(golds: list[list[str]], predicted: list[str], *, by_character: bool = False) -> Report:
    """Exact match and F1, each question by its best gold answer; no gold means no answer."""
    exact, f1 = [], []
    for answers, guess in zip(golds, predicted, strict=True):
        texts = [a for a in answers if pieces(a, by_character=by_character)] or [""]
        bags = [pieces(a, by_character=by_character) for a in texts]
        mine = pieces(guess, by_character=by_character)
        exact.append(max(float(bag == mine) for bag in bags))
        f1.append(max(overlap_f1(bag, mine) for bag in bags))
    figures = {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}
    answerable = np.array([any(answers) for answers in golds])
    if answerable.any() and not answerable.all():
        for name, chosen in (("has_answer", answerable), ("no_answer", ~answerable)):
            figures[f"{name}_exact_match"] = float(np.array(exact)[chosen].mean())
            figures[f"{name}_f1"] = float(np.array(f1)[chosen].mean())
    return Report(figures)


RANKING = higher("mrr", "recall@1", "recall@5", "recall@10")


def ranking(ranks: Sequence[int], cutoffs: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Mean reciprocal rank and recall@k of the ranks (from 1) of the right candidates."""
    ranks_N = np.asarray(ranks, dtype=float)
    recalls = {f"recall@{k}": float((ranks_N <= k).mean()) for k in cutoffs}
    return {"mrr": float((1 / ranks_N).mean()), **recalls}


GENERATION = higher("exact_match", "bleu", "chrf", "rouge1", "rouge2", "rougeL")


def generation(golds: list[str], predicted: list[str]) -> Report:
    """Exact match, BLEU and chrF (sacrebleu; characters where the script is unspaced), ROUGE F1.

    BLEU's n-grams are no longer than the longest text, or short texts that are all right had 0.
    """
    sacrebleu = library("sacrebleu")
    bleu_of = sacrebleu.BLEU(tokenize=bleu_words(golds), effective_order=True)
    bleu = bleu_of.corpus_score(predicted, [golds])
    figures = {
        "exact_match": float(np.mean([g.strip() == p.strip() for g, p in zip(golds, predicted)])),
        "bleu": float(bleu.score),
        "chrf": float(sacrebleu.corpus_chrf(predicted, [golds]).score),
    }
    scorer = library("rouge_score.rouge_scorer")
    rouge = scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Words())
    scores = [rouge.score(g, p) for g, p in zip(golds, predicted)]
    for name in ("rouge1", "rouge2", "rougeL"):
        figures[name] = float(np.mean([score[name].fmeasure for score in scores]))
    return Report(figures)


def bleu_words(texts: list[str]) -> str:
    """What sacrebleu calls the rule by which these texts are cut into words: its usual one, that
    for Chinese, or, as it knows no words of Thai and the like either, every character."""
    unspaced, marked = (
        sum(len(pattern.findall(text)) for text in texts) for pattern in (UNSPACED, MARKED)
    )
    if unspaced <= 0.3 * max(1, sum(map(len, texts))):
        return "13a"
    return "char" if marked > unspaced / 2 else "zh"


class _Words:
    """rouge-score's tokenizer interface, for every script: its own drops all but a-z and 0-9. Words
    are the same where there is nothing else; of unspaced scripts, every character is one."""

    def tokenize(self, text: str) -> list[str]:
        """The pieces of a text."""
        return pieces(text, by_character=True)
