"""The Trainer: it learns, refuses what is not finite, averages weights, keeps to its precision."""

import json

import numpy as np
import pytest
import torch

from nanolm.distributed.world import World
from nanolm.errors import UserError
from tests.tiny_run import batch_of, build_learner, build_trainer, in_ranks, tiny_config


def lines(run, kind="train"):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns_in_every_precision_and_writes_what_it_promises(tmp_path, precision, optimizer):
    from nanolm.registry import OPTIMIZERS

    options = OPTIMIZERS.get(optimizer).options(lr=0.02)
    config = tiny_config(tmp_path, train__precision=precision, optim=options)
    figures = build_trainer(config, World()).fit()
    train, val = lines(tmp_path), lines(tmp_path, "val")
    assert [line["step"] for line in train] == list(range(1, 41))
    assert [line["step"] for line in val] == [10, 20, 30, 40]
    assert train[-1]["loss"] < 0.8 * train[0]["loss"]
    assert val[-1]["loss"] == figures["loss"] < val[0]["loss"]
    first = train[0]
    assert first["tokens"] == 42 and first["lr"] == pytest.approx(0.02 / 3)
    assert first["loss"] == pytest.approx(first["token"] + 0.5 * first["row"])
    assert {"grad_norm", "accuracy", "nll", "tokens_per_second", "memory"} <= first.keys()


class Bomb(torch.nn.Module):
    """Multiplies by NaN when it sees a marked batch."""

    def __init__(self, inner, armed):
        super().__init__()
        self.inner, self.armed = inner, armed

    def forward(self, x):
        return self.inner(x) * (float("nan") if self.armed() else 1.0)


def fit_with_bomb(world, config, bad_steps, bad_rank):
    notes = []
    trainer = build_trainer(config, world, notes=notes)
    row = trainer.engine.learner.heads["row"]
    bomb = Bomb(row, lambda: world.rank == bad_rank and trainer.state.done + 1 in bad_steps)
    trainer.engine.learner.heads["row"] = bomb
    trainer.fit()
    weights = {n: p.tolist() for n, p in trainer.engine.learner.named_parameters()}
    return notes, weights


def test_stop_names_step_rows_and_the_first_bad_tensor_on_every_rank(tmp_path):
    config = tiny_config(tmp_path, train__steps=8)
    answers = in_ranks(2, fit_with_bomb, config, [6], 1)
    for answer in answers:
        assert answer.startswith("UserError: step 6: loss or gradient is not finite")
        assert "output of heads.row (rank 1)" in answer and "train.nonfinite" in answer
    (record,) = map(json.loads, (tmp_path / "nonfinite.jsonl").read_text().splitlines())
    assert record["rows"] == [38, 39, 40, 41] and record["policy"] == "stop"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000005\n"


def test_skip_leaves_the_weights_alone_and_has_a_limit(tmp_path):
    config = tiny_config(tmp_path / "a", train__steps=8, train__nonfinite="skip")
    answers = in_ranks(2, fit_with_bomb, config, [3, 6], 0)
    assert answers[0][1] == answers[1][1]
    assert np.isfinite(np.concatenate([np.ravel(w) for w in answers[0][1].values()])).all()
    assert sum("skipped (1 in a row)" in note for note in answers[0][0]) == 2
    assert [line["step"] for line in lines(tmp_path / "a") if line.get("skipped")] == [3, 6]
    config = tiny_config(tmp_path / "b", train__nonfinite="skip", train__max_skips=2)
    for answer in in_ranks(2, fit_with_bomb, config, [3, 4, 5], 0):
        assert "step 5" in answer and "train.max_skips=2" in answer


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    learner = build_learner()
    with torch.no_grad():
        learner.trunk.blocks[1][3].bias[2] = float("inf")
    with pytest.raises(UserError, match=r"weight trunk.blocks.1.3.bias \(rank 0\)"):
        build_trainer(tiny_config(tmp_path), World(), learner=learner).fit()


def test_fp16_overflow_lowers_the_scale_and_is_no_failure(tmp_path):
    config = tiny_config(tmp_path, train__precision="fp16", train__steps=6)
    trainer = build_trainer(config, World())
    before = [p.clone() for p in trainer.engine.learner.parameters()]
    trainer.update.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    result = trainer.step([batch_of([1, 2, 3])])
    assert not result.applied and trainer.update.scaler.get_scale() == 2.0**39
    assert all(map(torch.equal, before, trainer.engine.learner.parameters()))
    assert not (tmp_path / "nonfinite.jsonl").exists()


def test_ema_follows_its_formula_and_is_what_gets_evaluated(tmp_path):
    trainer = build_trainer(tiny_config(tmp_path, train__ema=0.75), World())
    name = "trunk.blocks.0.1.weight"
    expected = trainer.engine.learner.get_parameter(name).detach().clone()
    for step in range(3):
        trainer.step([batch_of([step])])
        expected.lerp_(trainer.engine.learner.get_parameter(name).detach(), 0.25)
    assert torch.equal(trainer.update.ema.tensors[name], expected)
    live = trainer.engine.learner.get_parameter(name).detach().clone()
    with trainer.update.ema.swapped():
        assert torch.equal(trainer.engine.learner.get_parameter(name), expected)
    assert torch.equal(trainer.engine.learner.get_parameter(name), live)


def test_clipping_bounds_the_global_norm(tmp_path):
    from nanolm.training.optim import SgdOptions

    options = SgdOptions(lr=1.0, weight_decay=0.0, momentum=0.0)
    config = tiny_config(tmp_path, train__clip=0.01, optim=options)
    trainer = build_trainer(config, World())
    trainer.state.done = 3  # past the warm-up
    before = [p.detach().clone() for p in trainer.engine.learner.parameters()]
    result = trainer.step([batch_of([0, 1])])
    moved = [b - p.detach() for b, p in zip(before, trainer.engine.learner.parameters())]
    assert result.grad_norm > 0.01
    assert float(torch.nn.utils.get_total_norm(moved)) == pytest.approx(0.01, rel=1e-3)
