"""The same trial put otherwise: with other arguments, between gaps, with other numbers of axes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanolm.tools.kernel_check.trial import Trial


def spread(x: Tensor) -> Tensor:
    """The same numbers with a gap behind each, as columns of a wider tensor have them."""
    return torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0]


def remade(make: Callable[..., Trial]) -> Callable[..., Trial]:
    """Lets a trial be made again with other arguments: see `Trial.again`."""
    names = inspect.signature(make)

    @functools.wraps(make)
    def made(*given: Any, **options: Any) -> Trial:
        arguments = names.bind(*given, **options).arguments

        def again(**changes: Any) -> Trial:
            return made(**(arguments | changes))

        trial = make(*given, **options)
        return dataclasses.replace(trial, again=again, arguments=frozenset(names.parameters))

    return made


def derived(trial: Trial, change: Callable[[Trial], Trial]) -> Trial:
    """The trial after a change, which stays when it is made again with other arguments."""
    again = trial.again
    assert again is not None  # of trials whose function is `remade`, as all of ops are

    def changed_again(**changes: Any) -> Trial:
        return derived(again(**changes), change)

    return dataclasses.replace(change(trial), again=changed_again)


def strided(trial: Trial) -> Trial:
    """The trial with gaps between the numbers of all its leaves."""

    def change(trial: Trial) -> Trial:
        leaves = {name: spread(x) for name, x in trial.leaves.items()}
        return dataclasses.replace(trial, name=f"{trial.name} strides", leaves=leaves)

    return derived(trial, change)


def with_axes(trial: Trial, words: str, move: Callable[[Tensor], Tensor]) -> Trial:
    """The trial with more or fewer axes before the last ones of its activations."""

    def change(trial: Trial) -> Trial:
        moved = {name: move(x) for name, x in trial.leaves.items() if name in ACTIVATIONS}
        name = f"{trial.name} with {words}"
        return dataclasses.replace(trial, name=name, leaves=trial.leaves | moved)

    return derived(trial, change)


ACTIVATIONS = ("x", "residual", "gate_up")
