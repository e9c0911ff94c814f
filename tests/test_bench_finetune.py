"""bench finetune: one model and one set of examples for all, tokens counted; no time asserted."""

import argparse
import json
import pathlib

import numpy as np
import pytest
import torch

from nanolm.cli import main
from nanolm.commands.bench import finetune as bench_finetune
from nanolm.tools.bench import cells as bench_cells
from nanolm.tools.bench import contest, finetune_contest
from nanolm.tools.bench.clock import Clock
from nanolm.tools.bench.finetune import TuneShape, build_tuning, peer_order
from nanolm.tools.bench.finetune_contest import CONTESTANTS
from nanolm.tools.bench.texts import Examples, read_examples
from tests.finetuned import table
from tests.hidden import hide

ROOT = pathlib.Path(__file__).parents[1]

TINY = {"n_layers": 1, "d_model": 32, "n_heads": 2, "batch": 4, "vocab_size": 64, "row_length": 24}


def source_lines():
    """300 lines of text that supports a vocabulary of 600 pieces."""
    lines = pathlib.Path(argparse.__file__).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip()][:300]


def examples(n=40):
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 24, n)
    return Examples([rng.integers(4, 64, length) for length in lengths], rng.integers(0, 3, n))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_all_contestants_train_one_model_on_real_tokens(precision):
    given, counts, tokens = examples(), {}, {}
    for name, settings in CONTESTANTS.items():
        shape = TINY | {"n_classes": 3}
        job = {"shape": shape, "precision": precision, "settings": settings | {"compile": False}}
        step, clock = build_tuning(job, given), Clock()
        seen = []
        for _ in range(10):  # one epoch
            figures = clock.take(step)
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
    shape = TuneShape(batch=4, vocab_size=600)
    found, n_classes = read_examples(str(tmp_path), "text", "kind", shape)
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
        assert module == "nanolm.tools.bench.finetune"
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


def command(folder):
    """The command on a small table, which is written to the folder."""
    table(folder, "train", [{"text": line} for line in source_lines()])
    words = ["bench", "finetune", "--data", str(folder), "--column", "text", "--batch", "4"]
    words += ["--vocab_size", "600", "--rounds", "2", "--precisions", "fp32"]
    return [*words, "--results", str(folder / "cells.json"), "--json", str(folder / "figures.json")]


def test_the_command_reports_rates_and_ratios(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contest, "Player", FakePlayer)
    words = [*command(tmp_path), "--device", "cpu"]
    main(words)
    printed = capsys.readouterr().out
    assert "nanolm / transformers, padded: 4.00x" in printed
    assert "nanolm / transformers, grouped by length: 2.00x" in printed
    (report,) = json.loads((tmp_path / "figures.json").read_text())["reports"]
    assert report["rows"]["nanolm"]["tokens_per_second"] == pytest.approx(1000)
    assert report["rows"]["transformers, padded"]["useful"] == 0.25
    monkeypatch.setattr(contest, "Player", None)  # nothing is measured twice
    main(words)
    assert capsys.readouterr().out == printed


def test_without_transformers_it_says_what_to_install_and_measures_the_rest(
    tmp_path, monkeypatch, capsys
):
    words = [*command(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(contest, "Player", FakePlayer)
    hide(monkeypatch, "transformers")
    main(words)
    first, second, third, *_ = capsys.readouterr().out.splitlines()
    for line in (first, second):
        assert line.startswith("left out: transformers, ") and "pip install 'nanolm[hf]'" in line
    assert "texts of" in third
    (report,) = json.loads((tmp_path / "figures.json").read_text())["reports"]
    assert set(report["rows"]) == {"nanolm", "nanolm, masked rectangle"}
    assert set(report["left_out"]) == {"transformers, padded", "transformers, grouped by length"}
    monkeypatch.setattr(bench_finetune, "prepared", None)  # it is refused before that
    with pytest.raises(SystemExit):
        main([*words, '--only=["transformers, padded"]'])
    assert "'transformers, padded' cannot take part here" in capsys.readouterr().err


def test_finished_contests_on_a_cpu_are_found_by_the_keys_they_have_always_had(
    tmp_path, monkeypatch, capsys
):
    text = (ROOT / "docs" / "bench_finetune.json").read_text()
    record = list(json.loads(text)["cells"].values())
    machine, job = record[0]["machine"], record[0]["jobs"]["nanolm"][0]
    monkeypatch.setattr(bench_cells, "cpu_name", lambda: machine["cpu"])
    monkeypatch.setattr(bench_cells.os, "cpu_count", lambda: machine["cores"])
    monkeypatch.setattr(torch, "__version__", machine["torch"])
    facts = {"texts": 1, "mean_tokens": 1.0, "longest": 1}
    given = job["data"], job["shape"]["n_classes"], facts
    monkeypatch.setattr(bench_finetune, "prepared", lambda *words: given)
    monkeypatch.setattr(finetune_contest, "why_not", lambda job, device: None)
    monkeypatch.setattr(contest, "Player", None)  # nothing is measured
    (tmp_path / "cells.json").write_text(text)
    words = ["bench", "finetune", "--device=cpu", "--rounds=5"]
    main([*words, f"--results={tmp_path / 'cells.json'}"])
    assert capsys.readouterr().out.count("nanolm / ") == 6


class FakeGpuPlayer(FakePlayer):
    """The same on a GPU."""

    def __init__(self, job, module):
        super().__init__(job, module)
        assert job["device"] == "cuda"
        self.facts |= {"host_waits": 2, "kernels": {}}

    def turn(self):
        waited = [0.5] * self.job["steps"]
        self.turns[-1:] = [super().turn() | {"waited_seconds": waited, "reserved_bytes": 9e6}]
        return self.turns[-1]


def test_on_a_gpu_the_table_shows_waits_and_what_the_allocator_keeps(tmp_path, monkeypatch, capsys):
    words = command(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Fake 1")
    monkeypatch.setattr(finetune_contest, "why_not", lambda job, device: None)
    monkeypatch.setattr(contest, "Player", FakeGpuPlayer)
    main(words)
    printed = capsys.readouterr().out
    for word in ("fp32 (NVIDIA Fake 1; ", "host waits", "500.00 ms", "reserved MB"):
        assert word in printed
    (report,) = json.loads((tmp_path / "figures.json").read_text())["reports"]
    row = report["rows"]["nanolm"]
    assert (row["waited_seconds"], row["host_waits"], row["reserved_bytes"]) == (0.5, 2, 9e6)


def test_no_step_of_a_peer_waits_to_read_a_number(monkeypatch):
    job = {"shape": TINY | {"n_classes": 3}, "precision": "bf16"}
    step = build_tuning(job | {"settings": {"model": "padded", "compile": False}}, examples())
    clock = Clock()
    clock.take(step)

    def read(*_):
        raise AssertionError("a step read a tensor's number")

    for name in ("item", "tolist", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, read)
    figures = clock.take(step)
    monkeypatch.undo()
    assert isinstance(figures["loss"], torch.Tensor)
    assert isinstance(figures["tokens"], int) and figures["tokens"] <= figures["places"]


def test_what_cannot_be_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for word, told in (
        ("--device=cuda", "torch sees no CUDA device"),
        ("--precisions=[fp16]", "--precisions fp16 is for CUDA"),
        ("--precisions=[fp8]", "--precisions: 'fp8' is none of"),
        ("--only=[padded]", "--only: 'padded' is none of nanolm; nanolm, masked rectangle;"),
        ("--steps=0", "steps=0 must be at least 1"),
    ):
        with pytest.raises(SystemExit) as leaving:
            main(["bench", "finetune", word])
        assert leaving.value.code == 2
        assert told in capsys.readouterr().err
