"""Triton attention, interpreted on a CPU or compiled on a GPU, against the float64 reference."""

import functools

import pytest
import torch

from nanolm.kernel_check.attention_trials import HARD, covering_cases, trial_of
from nanolm.kernel_check.sanitizer import sanitized
from nanolm.kernel_check.trial import TOLERANCE, errors
from nanolm.ops import KERNELS, candidates

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COVERING = covering_cases()


@functools.cache
def triton_attention():
    candidates("attention")
    return KERNELS["attention"].get("triton").build()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16 by 16: several on each axis of 29 by 31."""
    from nanolm.kernels import launch

    for kind in launch.KINDS:
        monkeypatch.setitem(launch.INTERPRETER, kind, launch.Launch(16, 16))


def check(case):
    trial = trial_of(case, DEVICE, lse=True)
    assert triton_attention().why_not(trial.spec) is None
    if DEVICE == "cpu":
        with sanitized():
            found = errors(trial, triton_attention())
    else:
        found = errors(trial, triton_attention())
    assert {"out", "lse", "dq", "dk", "dv"} <= set(found)
    assert max(found.values()) < TOLERANCE[case.dtype], found


@pytest.mark.parametrize("name", HARD)
def test_hard_combinations(name):
    check(HARD[name])


@pytest.mark.parametrize("index", range(len(COVERING)))
def test_pairs_of_modes(index):
    check(COVERING[index])
