"""bench train: fair contestants, resumable contests, honest arithmetic; no time is asserted."""

import itertools
import json

import pytest
import torch

from nanolm import bench_contest, bench_peers
from nanolm.bench_contest import play
from nanolm.bench_shape import Clock, Shape
from nanolm.bench_step import NanolmStep, build_step
from nanolm.cli import main
from nanolm.commands import bench_train
from nanolm.commands.bench_train import against_best, contestants
from nanolm.errors import UserError

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
    losses = []
    for _ in range(count):
        clock.start()
        losses.append(step(clock)["loss"])
        clock.stop()
    return step, clock, losses


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_all_contestants_train_the_same_number_of_parameters_from_the_same_loss(objective):
    counts = {}
    for name, settings in contestants(objective).items():
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
        assert step.trainer.done == 8
        assert step.trainer.config.train.clip == 1.0


def test_batches_of_peers_have_the_objectives_targets():
    tokens, targets = bench_peers.peer_batches(SHAPE, "clm", 1)[0]
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    tokens, targets = bench_peers.peer_batches(SHAPE, "mlm", 1)[0]
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
        figures = times | {"peak_bytes": 3e6, "matmul_flops": 1e11}
        self.turns.append(figures)
        return figures

    def leave(self):
        pass


def test_contestants_take_turns_and_finished_contests_are_found(tmp_path, monkeypatch, capsys):
    turns = FakePlayer.turns_taken = []
    monkeypatch.setattr(bench_contest, "Player", FakePlayer)
    words = ["bench", "train", "--objectives=[clm]", "--precisions=[fp32]", "--rounds", "6"]
    words += ["--results", str(tmp_path / "cells.json"), "--json", str(tmp_path / "figures.json")]
    main(words)
    n_turns, printed = len(turns), capsys.readouterr().out
    main(words)
    assert len(turns) == n_turns and capsys.readouterr().out == printed  # nothing measured twice
    rounds = [turns[-6 * n :][:6] for n in range(6, 0, -1)]
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
    with pytest.raises(SystemExit):
        main(["bench", "train", "--objectives=[nlp]"])
    assert "nlp" in capsys.readouterr().err


def test_contestants_in_processes_of_their_own_and_one_that_fails(tmp_path):
    common = {"precision": "fp32", "shape": TINY, "threads": 1, "warmup": 1, "steps": 2}
    settings = {"model": "nanolm", "objective": "mlm"}
    jobs = {
        "nanolm": [common | {"settings": settings}],
        "matmul": [common | {"settings": bench_train.MATMUL}],
    }
    contest = play(jobs, 2, "nanolm.bench_step", bench_train.speed)
    played = contest["players"]
    assert len(contest["stolen"]) == 2 and all(0 <= share <= 1 for share in contest["stolen"])
    assert played["nanolm"]["facts"]["parameters"] > 0
    for turn in played["nanolm"]["turns"]:
        assert len(turn["seconds"]) == len(turn["loss"]) == 2
        assert turn["peak_bytes"] > played["nanolm"]["facts"]["before_bytes"] > 0
    assert all(turn["matmul_flops"] > 0 for turn in played["matmul"]["turns"])
    nobody = common | {"settings": {"model": "nobody", "objective": "clm"}}
    with pytest.raises(UserError, match="KeyError"):
        play({"nobody": [nobody]}, 1, "nanolm.bench_step", bench_train.speed)


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
        play({"a": jobs}, 1, "nanolm.bench_step", bench_train.speed)
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
