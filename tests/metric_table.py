"""Every figure on right answers, on one error of known size, and on a model that tells nothing
apart: `python -m tests.metric_table` prints the tables of docs/metrics.md."""

from __future__ import annotations

import numpy as np

from nanolm.finetune.tasks import metrics
from nanolm.finetune.tasks.tag import entities

SCRIPTS = {
    "Latin": "parser reads one long file",
    "Latin with marks": "žluťoučký kůň pěl ďábelské ódy",
    "Cyrillic": "привет мир как твои дела",
    "Greek": "η γρήγορη αλεπού πηδάει ψηλά",
    "Arabic": "القط يجلس على السجادة الحمراء",
    "Hebrew": "החתול יושב על השטיח האדום",
    "Devanagari": "बिल्ली लाल चटाई पर बैठी",
    "Hangul": "고양이가 빨간 매트 위에 앉았다",
    "Chinese": "今天天气很好",
    "Japanese": "猫が赤い敷物に座る",
    "Thai": "แมวนั่งบนเสื่อสีแดง",
    "Khmer": "ឆ្មាអង្គុយលើកន្ទេលក្រហម",
}
UNSPACED = ("Chinese", "Japanese", "Thai", "Khmer")
N_WORDS = {script: len(SCRIPTS[script]) for script in UNSPACED}


def halves(script: str) -> tuple[str, str, int]:
    """(a text, the same with its last word turned into another one, its number of words)."""
    text, n = SCRIPTS[script], N_WORDS.get(script, 5)
    if script in N_WORDS:
        return text, text[:-1] + "国", n
    *others, last = text.split()
    return text, " ".join([*others, last + others[0]]), n


# Schemes of tags. Spans: (type, start, stop) of a sentence of 9 words.

SPANS = [("LOC", 0, 1), ("LOC", 1, 2), ("PER", 3, 6), ("LOC", 6, 8)]
SCHEMES = {  # single, first, inside, last
    "BIO": "BBII",
    "IOE": "EIIE",
    "BIOES": "SBIE",
    "BILOU": "UBIL",
    "BMEWO": "WBME",
    "BMES": "SBME",
}


def tags_of(spans: list[tuple[str, int, int]], scheme: str) -> list[str]:
    """The spans of a sentence of nine words as tags."""
    single, first, inside, last = SCHEMES[scheme]
    tags = ["O"] * 9
    for kind, start, stop in spans:
        tags[start:stop] = [f"{inside}-{kind}"] * (stop - start)
        tags[start], tags[stop - 1] = f"{first}-{kind}", f"{last}-{kind}"
        if stop - start == 1:
            tags[start] = f"{single}-{kind}"
    return tags


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def short(value: float) -> str:
    """Three digits, and no zeros behind them."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


def pair(same: float, wrong: float) -> str:
    """A figure where all is right, and beside it with the error."""
    return f"{short(same)} / {short(wrong)}"


def written() -> str:
    """Figures of texts, script by script."""
    names = [metric.name for metric in metrics.GENERATION]
    rows = []
    for script in SCRIPTS:
        text, wrong, _ = halves(script)
        same = metrics.generation([text, text], [text, text]).figures
        other = metrics.generation([text, text], [text, wrong]).figures
        cells = [pair(same[name], other[name]) for name in names]
        for by_character in (False, True):
            found = [
                metrics.reading([[text]] * 2, [text, guess], by_character=by_character)
                for guess in (text, wrong)
            ]
            cells.append(pair(*(report.figures["f1"] for report in found)))
        rows.append([script, *cells])
    return grid(["script", *names, "read: f1", "read: f1, by_character"], rows)


def tagged() -> str:
    """Figures of tags, scheme by scheme."""
    rows = []
    for scheme in SCHEMES:
        gold = tags_of(SPANS, scheme)
        shorter = tags_of([*SPANS[:3], ("LOC", 6, 7)], scheme)
        guesses = [gold, shorter, ["O"] * 9]
        found = [metrics.tagging([gold], [tags], spans=True).figures for tags in guesses]
        decoded = [(e["type"], e["start"], e["stop"]) for e in entities(list("abcdefghi"), gold)]
        figures = [
            " / ".join(short(f[name]) for f in found) for name in ("f1", "precision", "recall")
        ]
        accuracy = " / ".join(short(f["token_accuracy"]) for f in found)
        rows.append([scheme, *figures, accuracy, "all" if decoded == SPANS else "not all"])
    return grid(["scheme", "f1", "precision", "recall", "token_accuracy", "spans told"], rows)


def decided() -> str:
    """Figures of classes and scores: right, one error in twenty, and one answer for all."""
    gold, right = [0, 1] * 10, np.eye(2)[[0, 1] * 10]
    wrong = right.copy()
    wrong[0] = wrong[0, ::-1]
    cases = [right, wrong, np.full((20, 2), 0.5)]
    found = [metrics.classification(gold, p_NC, ["a", "b"]).figures for p_NC in cases]
    scores = np.arange(20.0)[:, None]
    one = scores.copy()
    one[0] = 19.0
    guesses = [scores, one, np.full((20, 1), 9.5)]
    figures = [metrics.regression(scores, guess).figures for guess in guesses]
    ranks = [[1] * 20, [2] + [1] * 19, [20] * 20]
    ranked = [metrics.ranking(r) for r in ranks]
    rows = [
        [f"{kind}: {name}", *(short(case[name]) for case in cases)]
        for kind, cases in (("classify", found), ("regress", figures), ("embed", ranked))
        for name in cases[0]
    ]
    return grid(["figure", "right", "one error in 20", "the same for all"], rows)


def table() -> str:
    """All three, with their headings."""
    parts = [
        "## Texts, by script",
        "Two answers that are right / one of them with its last word (where words have no spaces "
        "between them: its last character) turned into another.",
        written(),
        "## Tags, by scheme",
        "Four entities in nine words, found as they are / one of them a word too short / none "
        "found; and whether `nanolm predict` tells the spans that the tags mark.",
        tagged(),
        "## Classes, scores and ranks",
        "Twenty records. A model that gives the same answer to all has what chance gives: a tie is "
        "no hit, and nothing correlates with a constant.",
        decided(),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(table())
