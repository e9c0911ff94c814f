"""k micro-batches x w ranks give the gradient of one big batch, with uneven target counts."""

import pytest
import torch

from nanolm.distributed.world import World
from tests.tiny_run import batch_of, bounds, build_learner, build_trainer, in_ranks, tiny_config

ROWS = 7


def big_batch_gradient(dtype):
    """The definition: one batch of all rows, each term divided by its own count."""
    learner = build_learner(dtype=dtype)
    terms = learner(batch_of(list(range(ROWS))).tensors)
    loss = sum(w * terms[n].sum / terms[n].count for n, w in learner.objective.weights.items())
    loss.backward()
    gradients = {name: p.grad for name, p in learner.named_parameters()}
    return gradients, float(loss), float(terms["accuracy"].sum / terms["accuracy"].count)


def step_gradient(world, run, micro_batch, dtype_name, rows):
    """The same through Trainer.step, caught just before the optimizer."""
    dtype = getattr(torch, dtype_name)
    config = tiny_config(run, train__micro_batch=micro_batch, train__clip=None)
    trainer = build_trainer(config, world, learner=build_learner(dtype=dtype))
    caught = {}

    def catch(norm):
        for name, p in trainer.engine.learner.named_parameters():
            caught[name] = p.grad.tolist()

    trainer.update.apply = catch
    mine = list(rows)[slice(*bounds(len(rows), world))]
    parts = [mine[i : i + micro_batch] for i in range(0, len(mine), micro_batch)]
    batches = [batch_of(part) for part in parts] or [batch_of([0], empty=True)]
    trainer.engine.warm_up_ddp(batches[0], trainer.weights)
    result = trainer.step(batches)
    return caught, result.loss, result.terms["accuracy"], result.grad_norm


# float64 sees what float32 sees, and more sharply.
@pytest.mark.parametrize(
    ("dtype_name", "tolerance"),
    [("float64", 1e-12), pytest.param("float32", 1e-6, marks=pytest.mark.slow)],
)
def test_two_uneven_ranks_give_the_gradient_of_one_big_batch(tmp_path, dtype_name, tolerance):
    dtype = getattr(torch, dtype_name)
    expected, loss, accuracy = big_batch_gradient(dtype)
    norm = float(torch.nn.utils.get_total_norm(expected.values()))
    for micro_batch in (1, 3):
        run = tmp_path / f"{micro_batch}"
        answers = in_ranks(2, step_gradient, run, micro_batch, dtype_name, range(ROWS))
        for found, found_loss, found_accuracy, found_norm in answers:
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                got = torch.tensor(found[name], dtype=dtype)
                torch.testing.assert_close(got, gradient, rtol=0, atol=tolerance, msg=name)
            assert found_loss == pytest.approx(loss, abs=tolerance)
            assert found_accuracy == pytest.approx(accuracy)
            assert found_norm == pytest.approx(norm, abs=2 * tolerance)


def test_a_rank_without_rows_changes_nothing(tmp_path):
    alone = step_gradient(World(), tmp_path / "alone", 1, "float64", range(1))
    for caught, *figures in in_ranks(3, step_gradient, tmp_path / "3", 1, "float64", range(1)):
        assert figures == pytest.approx(alone[1:], abs=1e-12)
        for name, gradient in alone[0].items():
            torch.testing.assert_close(torch.tensor(caught[name]), torch.tensor(gradient))
