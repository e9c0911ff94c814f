"""bench finetune: one model and one set of examples for all, tokens counted; no time asserted."""

import argparse
import json
import pathlib

import numpy as np
import pytest

from nanolm import bench_contest
from nanolm.bench_finetune import Examples, build_tuning, peer_order
from nanolm.bench_shape import Clock
from nanolm.cli import main
from nanolm.commands.bench_finetune import CONTESTANTS, Arguments, read_examples
from tests.finetuned import table

TINY = {"n_layers": 1, "d_model": 32, "n_heads": 2, "batch": 4, "vocab_size": 64, "row_length": 24}


def source_lines():
    """300 lines of text that supports a vocabulary of 600 pieces."""
    lines = pathlib.Path(argparse.__file__).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip()][:300]


def examples(n=40):
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 24, n)
    return Examples([rng.integers(4, 64, length) for length in lengths], rng.integers(0, 3, n))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_contestants_train_one_model_on_real_tokens(precision):
    given, counts, tokens = examples(), {}, {}
    for name, settings in CONTESTANTS.items():
        shape = TINY | {"n_classes": 3}
        job = {"shape": shape, "precision": precision, "settings": settings | {"compile": False}}
        step, clock = build_tuning(job, given), Clock()
        seen = []
        for _ in range(10):  # one epoch
            clock.start()
            figures = step(clock)
            clock.stop()
            assert 0.5 < figures["loss"] < 3 and figures["tokens"] <= figures["places"]
            seen.append((figures["tokens"], figures["places"]))
        counts[name], tokens[name] = step.n_parameters, sum(real for real, _ in seen)
        if name == "nanolm":
            assert all(real == places for real, places in seen)  # nothing is padding
    assert len(set(counts.values())) == 1
    assert set(tokens.values()) == {sum(len(ids) for ids in given.sequences)}


def test_grouped_batches_hold_every_example_once_and_little_padding():
    lengths = np.random.default_rng(1).integers(3, 60, 320)
    wasted = []
    for grouped in (False, True):
        order = peer_order(len(lengths), 8, lengths, grouped=grouped)
        batches = [next(order) for _ in range(40)]
        assert sorted(np.concatenate(batches)) == list(range(320))
        wasted.append(sum(8 * lengths[b].max() - lengths[b].sum() for b in batches))
    assert wasted[1] < 0.1 * wasted[0]


def test_texts_become_framed_ids_and_columns_are_checked(tmp_path, capsys):
    records = [{"text": line, "kind": "ab"[i % 2]} for i, line in enumerate(source_lines())]
    table(tmp_path, "train", records)
    words = {"data": str(tmp_path), "column": "text", "batch": 4, "vocab_size": 600}
    found, n_classes = read_examples(Arguments(label="kind", **words))
    assert n_classes == 2 and len(found.sequences) == 300
    assert len({int(ids[0]) for ids in found.sequences}) == 1
    found.save(tmp_path / "kept.npz")
    again = Examples.load(tmp_path / "kept.npz")
    assert all(map(np.array_equal, again.sequences, found.sequences))
    with pytest.raises(SystemExit):
        main(["bench", "finetune", "--data", str(tmp_path), "--column", "query"])
    assert "has no column query; it has text, kind" in capsys.readouterr().err


class FakePlayer:
    """A contestant without a process, four times, twice or just as slow as nanolm."""

    def __init__(self, job, module):
        assert module == "nanolm.bench_finetune"
        self.job, self.turns, self.facts = job, [], {"parameters": 5}

    def ready(self):
        pass

    def turn(self):
        settings, count = self.job["settings"], self.job["steps"]
        slow = {"nanolm": 1, "padded": 4, "grouped": 2}[settings["model"]]
        seconds = [0.1 * slow * (3 if settings["compile"] else 1)] * count
        times = {"seconds": seconds, "cpu_seconds": seconds, "peak_bytes": 1e6}
        self.turns.append(times | {"tokens": [100] * count, "places": [100 * slow] * count})
        return self.turns[-1]

    def leave(self):
        pass


def test_the_command_reports_rates_and_ratios(tmp_path, monkeypatch, capsys):
    table(tmp_path, "train", [{"text": line} for line in source_lines()])

    monkeypatch.setattr(bench_contest, "Player", FakePlayer)
    words = ["bench", "finetune", "--data", str(tmp_path), "--column", "text", "--batch", "4"]
    words += ["--vocab_size", "600", "--rounds", "2", "--precisions", "fp32"]
    words += ["--results", str(tmp_path / "cells.json"), "--json", str(tmp_path / "figures.json")]
    main(words)
    printed = capsys.readouterr().out
    assert "nanolm / transformers, padded: 4.00x" in printed
    assert "nanolm / transformers, grouped by length: 2.00x" in printed
    (report,) = json.loads((tmp_path / "figures.json").read_text())["reports"]
    assert report["rows"]["nanolm"]["tokens_per_second"] == pytest.approx(1000)
    assert report["rows"]["transformers, padded"]["useful"] == 0.25
    monkeypatch.setattr(bench_contest, "Player", None)  # nothing is measured twice
    main(words)
    assert capsys.readouterr().out == printed
