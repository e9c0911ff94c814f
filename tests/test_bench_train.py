"""bench train: fair contestants, resumable contests, honest arithmetic; no time is asserted."""

import itertools
import json
import pathlib

import pytest
import torch
import torch.nn.functional as F

from nanolm.cli import main
from nanolm.errors import UserError
from nanolm.tools.bench import cells as bench_cells
from nanolm.tools.bench import contest as bench_contest
from nanolm.tools.bench import peers, train_contest
from nanolm.tools.bench.admission import why_not
from nanolm.tools.bench.clock import Clock
from nanolm.tools.bench.contest import play
from nanolm.tools.bench.figures import against_best, speed
from nanolm.tools.bench.shape import Shape
from nanolm.tools.bench.step import NanolmStep, build_step
from nanolm.tools.bench.train_contest import contestants
from tests.hidden import hide

ROOT = pathlib.Path(__file__).parents[1]
TINY = {"n_layers": 1, "d_model": 32, "n_heads": 2, "row_length": 16, "batch": 2, "vocab_size": 64}
SHAPE = Shape(**TINY)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def steps_of(name, settings, precision="fp32", count=2):
    step, clock = build_step({"settings": settings, "precision": precision}, SHAPE), Clock()
    step.prepare(clock)
    return step, clock, clock.turn(step, count)["loss"]


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_all_contestants_train_the_same_number_of_parameters_from_the_same_loss(objective):
    counts = {}
    for name, settings in contestants(objective).items():
        if why_not({"settings": settings, "precision": "fp32", "shape": TINY}, "cpu"):
            continue  # what this torch cannot do, such as its own fused loss before 2.13
        step, clock, losses = steps_of(name, settings)
        assert all(3.5 < loss < 5.0 for loss in losses), name  # log 64 = 4.16
        assert list(clock.phases[0]) == ["data", "forward", "loss", "backward", "optimizer"], name
        assert sum(clock.phases[1].values()) <= clock.seconds[1]
        counts[name] = step.n_parameters
    plain = next(name for name in counts if name.startswith("plain"))
    others = {count for name, count in counts.items() if name != plain}
    assert len(others) == 1
    # The plain encoder has neither BERT's segments and transform nor its vocabulary bias.
    assert abs(counts[plain] - others.pop()) <= (0 if objective == "clm" else 2000)


@pytest.mark.parametrize("model", ["nanolm", "plain-gpt"])
def test_a_step_moves_the_weights_by_a_clipped_gradient(model):
    step, _, losses = steps_of(model, {"model": model, "objective": "clm"}, "bf16", count=8)
    assert losses[-1] != losses[0]
    if isinstance(step, NanolmStep):
        assert step.trainer.state.done == 8
        assert step.trainer.config.train.clip == 1.0


def test_batches_of_peers_have_the_objectives_targets():
    tokens, targets = peers.peer_batches(SHAPE, "clm", 1)[0]
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    tokens, targets = peers.peer_batches(SHAPE, "mlm", 1)[0]
    assert ((targets != -100).sum(dim=1) == SHAPE.n_masked).all()
    assert SHAPE.n_masked == 2 and Shape().n_masked == 38


class FakePlayer:
    """A contestant without a process: nanolm takes a second a step, the others two, and compiled
    ones twice as long; every third turn the machine is three times as slow for all."""

    turns_taken = []

    def __init__(self, job, module):
        self.job, self.turns, self.facts = job, [], {"before_bytes": 1e6, "parameters": 5}

    def ready(self):
        pass

    def turn(self):
        settings = self.job["settings"]
        self.turns_taken.append((settings["model"], settings.get("compile")))
        seconds = [1.0 if settings["model"] == "nanolm" else 2.0]
        seconds[0] *= (2 if settings.get("compile") else 1) * (1 if len(self.turns) % 3 else 3)
        phases = dict.fromkeys(("data", "forward", "loss", "backward", "optimizer"), 0.2)
        times = {"seconds": seconds, "cpu_seconds": seconds, "phases": phases}
        figures = times | {"peak_bytes": 3e6, "matmul_flops": 1e11, "loss": [4.0]}
        self.turns.append(figures)
        return figures

    def leave(self):
        pass


def test_contestants_take_turns_and_finished_contests_are_found(tmp_path, monkeypatch, capsys):
    turns = FakePlayer.turns_taken = []
    monkeypatch.setattr(bench_contest, "Player", FakePlayer)
    words = ["bench", "train", "--objectives=[clm]", "--precisions=[fp32]", "--rounds", "6"]
    words += ["--device", "cpu"]
    words += ["--results", str(tmp_path / "cells.json"), "--json", str(tmp_path / "figures.json")]
    main(words)
    n_turns, printed = len(turns), capsys.readouterr().out
    main(words)
    assert len(turns) == n_turns and capsys.readouterr().out == printed  # nothing measured twice
    # Of nanolm's contestants, torch's own fused loss needs torch 2.13; the machine's product ends.
    size = len(contestants("clm")) + 1 - (not hasattr(F, "linear_cross_entropy"))
    rounds = [turns[-size * n :][:size] for n in range(6, 0, -1)]
    assert all(order == rounds[0] for order in rounds)  # A B C A B C
    assert rounds[0][-1][0] == "matmul"
    assert not any(compiled for order in rounds for _, compiled in order)  # slower in the trial
    report = json.loads((tmp_path / "figures.json").read_text())["reports"][0]
    assert report["against_best"]["speed"] == 2.0
    assert report["against_best"]["speed_quartiles"] == [2.0, 2.0]
    assert report["rows"]["nanolm"]["tokens_per_second"] == Shape().tokens
    assert "2.00x" in printed
    main([*words, "--fresh", "true"])
    assert len(turns) == 2 * n_turns


def test_a_results_file_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "cells.json").write_text("[]")
    with pytest.raises(SystemExit) as leaving:
        main(["bench", "train", "--results", str(tmp_path / "cells.json")])
    assert leaving.value.code == 2
    assert "cells.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--objectives=[nlp]"], "--objectives: 'nlp' is none of clm; mlm"),
        (["--precisions=[fp8]"], "--precisions: 'fp8' is none of fp32; bf16; fp16"),
        (["--only=[plain]"], "--only: 'plain' is none of nanolm; nanolm, reference kernels;"),
        (["--rounds=0"], "rounds=0"),
        (["--precisions=[fp16]"], "--precisions fp16 is for CUDA"),
        (["--device=cuda"], "--device cuda: torch sees no CUDA device here; --device cpu"),
    ],
)
def test_what_cannot_be_is_one_sentence(words, told, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_contest, "Player", None)
    with pytest.raises(SystemExit) as leaving:
        main(["bench", "train", *words])
    assert leaving.value.code == 2
    assert told in capsys.readouterr().err


class Telling(FakePlayer):
    """Says on the terminal that it begins."""

    def __init__(self, job, module):
        super().__init__(job, module)
        print(f"begins: {job['settings']['model']}")


def test_contestants_that_cannot_take_part_are_named_first_and_the_others_go_on(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(bench_contest, "Player", Telling)
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    hide(monkeypatch, "transformers")
    words = ["bench", "train", "--rounds=1", "--device=cpu", "--compile=false"]
    words += ["--results", str(tmp_path / "cells.json")]
    main([*words, "--json", str(tmp_path / "figures.json")])
    printed = capsys.readouterr().out.splitlines()
    told = [line for line in printed if line.startswith("left out")]
    assert printed[: len(told)] == told and len(told) == 3  # each once, before all else
    assert all("nanolm[hf]" in line for line in told if "transformers" in line)
    assert sum("transformers is not installed" in line for line in told) == 2
    (kernel,) = [line for line in told if "linear_cross_entropy=torch cannot serve" in line]
    assert f"torch {torch.__version__} has no linear_cross_entropy" in kernel
    reports = json.loads((tmp_path / "figures.json").read_text())["reports"]
    assert len(reports) == 4
    for report in reports:
        plain = "gpt" if report["objective"] == "clm" else "bert"
        assert set(report["rows"]) == {
            "nanolm",
            "nanolm, reference kernels",
            f"plain {plain} loop",
        }
        assert len(report["left_out"]) == 2 and report["against_best"]
    with pytest.raises(SystemExit):
        main([*words, "--only=[nanolm, transformers gpt2]"])
    left = capsys.readouterr()
    assert "--only: 'transformers gpt2' cannot take part here: transformers is not" in left.err
    assert "begins" not in left.out


def test_only_measures_what_it_names_where_that_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_contest, "Player", FakePlayer)
    words = ["bench", "train", "--rounds=1", "--device=cpu", "--precisions=[fp32]"]
    words += ["--results", str(tmp_path / "cells.json"), "--only=[plain bert loop]"]
    main([*words, "--json", str(tmp_path / "figures.json")])
    (report,) = json.loads((tmp_path / "figures.json").read_text())["reports"]
    assert list(report["rows"]) == ["plain bert loop"] and report["against_best"] == {}


def test_finished_contests_on_a_cpu_are_found_by_the_keys_they_have_always_had(
    tmp_path, monkeypatch, capsys
):
    record = json.loads((ROOT / "docs" / "bench_train.json").read_text())["cells"]
    assert len(record) == 4
    (machine,) = {json.dumps(cell["machine"]) for cell in record.values()}
    machine = json.loads(machine)
    monkeypatch.setattr(bench_cells, "cpu_name", lambda: machine["cpu"])
    monkeypatch.setattr(bench_cells.os, "cpu_count", lambda: machine["cores"])
    monkeypatch.setattr(torch, "__version__", machine["torch"])
    monkeypatch.setattr(train_contest, "why_not", lambda job, device: None)
    monkeypatch.setattr(bench_contest, "Player", None)  # nothing is measured
    names = {name for cell in record.values() for name in cell["jobs"]} - {"matmul"}
    copy = tmp_path / "cells.json"
    copy.write_text((ROOT / "docs" / "bench_train.json").read_text())
    words = ["bench", "train", "--device=cpu", "--rounds=5", f"--results={copy}"]
    main([*words, f"--only={json.dumps(sorted(names))}"])
    printed = capsys.readouterr().out
    assert printed.count("nanolm / ") == 4 and "1,478" in printed


@pytest.mark.slow
def test_contestants_in_processes_of_their_own_and_one_that_fails(tmp_path):
    common = {"precision": "fp32", "shape": TINY, "threads": 1, "warmup": 1, "steps": 2}
    settings = {"model": "nanolm", "objective": "mlm"}
    jobs = {
        "nanolm": [common | {"settings": settings}],
        "matmul": [common | {"settings": train_contest.MATMUL}],
    }
    contest = play(jobs, 2, "nanolm.tools.bench.step", speed)
    played = contest["players"]
    assert len(contest["stolen"]) == 2 and all(0 <= share <= 1 for share in contest["stolen"])
    assert played["nanolm"]["facts"]["parameters"] > 0
    for turn in played["nanolm"]["turns"]:
        assert len(turn["seconds"]) == len(turn["loss"]) == 2
        assert turn["peak_bytes"] > played["nanolm"]["facts"]["before_bytes"] > 0
    assert all(turn["matmul_flops"] > 0 for turn in played["matmul"]["turns"])
    nobody = common | {"settings": {"model": "nobody", "objective": "clm"}}
    with pytest.raises(UserError, match="KeyError"):
        play({"nobody": [nobody]}, 1, "nanolm.tools.bench.step", speed)


def test_rounds_that_the_host_disturbed_are_taken_again(monkeypatch):
    stolen, rests = [0, 0, 0, 50, 0, 0, 0, 10, 0, 0], []  # before and after each round
    total = itertools.accumulate(stolen)
    monkeypatch.setattr(bench_contest, "stolen_seconds", lambda: next(total))
    monkeypatch.setattr(bench_contest.time, "sleep", rests.append)
    players = [FakePlayer({"settings": {"model": name}}, "") for name in ("nanolm", "a")]
    shares = bench_contest.take_rounds(players, 3)
    assert shares == [0, 0, 0] and len(rests) == 2
    assert [len(player.turns) for player in players] == [3, 3]
    noisy = itertools.count()
    monkeypatch.setattr(bench_contest, "stolen_seconds", lambda: next(noisy))
    for player in players:
        player.turns = []
    assert len(bench_contest.take_rounds(players, 2)) == 2 and min(shares) == 0
    assert [len(player.turns) for player in players] == [2, 2]


def test_a_variant_that_fails_ends_those_that_started(monkeypatch):
    left = []

    class Failing(FakePlayer):
        def ready(self):
            if self.job["settings"].get("compile"):
                raise UserError("does not compile")

        def leave(self):
            left.append(self.job["settings"].get("compile"))

    monkeypatch.setattr(bench_contest, "Player", Failing)
    jobs = [{"settings": {"model": "a", "compile": compiled}} for compiled in (False, True)]
    with pytest.raises(UserError, match="does not compile"):
        play({"a": jobs}, 1, "nanolm.tools.bench.step", speed)
    assert left == [True, False]


def test_ratios_are_against_the_fastest_of_the_others_round_by_round():
    def entry(seconds, peak, before):
        turns = [{"seconds": [s], "cpu_seconds": [1.0], "peak_bytes": peak} for s in seconds]
        return {"turns": turns, "facts": {"before_bytes": before}}

    played = {
        "nanolm": entry([1, 1, 10], 8.0, 6.0),
        "nanolm, reference kernels": entry([0.5, 0.5, 0.5], 8.0, 6.0),
        "a": entry([3, 3, 30], 10.0, 6.0),
        "b": entry([2, 2, 20], 10.0, 6.0),
    }
    ratio = against_best(played)
    assert ratio["best"] == "b" and ratio["speed"] == 2.0 and ratio["cpu_time"] == 1.0
    assert ratio["peak_memory"] == 0.8 and ratio["training_memory"] == 0.5
