"""A run that is told to go saves and leaves; one whose peer died leaves without saving."""

import os
import signal

import pytest

from nanolm.distributed.world import World
from tests.test_resume import assert_same_bits, fit
from tests.tiny_run import build_trainer, in_ranks, in_turn, tiny_config


def fit_with_signal(world, config, rank, step, number):
    """A signal, and a second one, in the middle of a step of one rank."""
    notes = []
    trainer = build_trainer(config, world, notes=notes)
    take_step = trainer.step

    def step_with_signal(micro_batches):
        if (world.rank, trainer.state.done + 1) == (rank, step):
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(micro_batches)

    trainer.step = step_with_signal
    trainer.fit()
    return trainer.state.done, trainer.preempted, notes


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_all_ranks_stop_after_the_same_step_and_the_rest_is_exact(tmp_path, number):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = {"train__ema": 0.9, "model__dropout": 0.1}
    config = tiny_config(broken, **changes)
    stages = (fit, tiny_config(whole, **changes)), (fit_with_signal, config, 1, 17, number)
    for _, (done, preempted, notes) in in_ranks(2, in_turn, *stages):
        assert (done, preempted) == (17, True)
        assert "saved after step 17 of 40" in notes[-1] and "--resume auto" in notes[-1]
    folder = broken / "checkpoints"
    assert (folder / "preempted").is_file()
    assert (folder / "latest").read_text() == "step-00000017\n"
    in_ranks(2, fit, tiny_config(broken, resume="auto", **changes))
    assert not (folder / "preempted").exists()
    assert_same_bits(whole, broken)


def test_a_signal_during_evaluation_ends_it_and_is_made_up_for(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = {"train__ema": 0.9, "run__checkpoint_every": 20}
    in_ranks(1, fit, tiny_config(whole, **changes))
    trainer = build_trainer(tiny_config(broken, **changes), World())
    batches = trainer.evaluator.batches

    def interrupted():
        for number, batch in enumerate(batches()):
            if number == 2 and trainer.state.done == 30:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    trainer.evaluator.batches = interrupted
    trainer.fit()
    assert trainer.preempted and trainer.state.done == 30
    in_ranks(1, fit, tiny_config(broken, resume="auto", **changes))
    assert_same_bits(whole, broken)


def fit_and_die(world, config, step):
    trainer = build_trainer(config, world)
    take_step = trainer.step

    def step_and_die(micro_batches):
        if trainer.state.done + 1 == step:
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(micro_batches)

    trainer.step = step_and_die
    trainer.fit()


def test_a_dead_peer_is_told_and_nothing_is_saved(tmp_path):
    (answer,) = in_ranks(2, fit_and_die, tiny_config(tmp_path), 8, survivors=1)
    assert "a peer is gone during step 8" in answer and "--resume auto" in answer
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000005\n"
    assert not (tmp_path / "checkpoints" / "preempted").exists()
