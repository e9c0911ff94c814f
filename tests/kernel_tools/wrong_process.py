"""Kernels that change the process they run in, write where nothing trains, or take what they were
asked last for what they are handed; each with the words that must name its fault."""

from __future__ import annotations

import logging
import os
import random
import warnings

import numpy as np
import torch

from tests.kernel_tools.outsider import wrong


def after(run, act):
    """The kernel that does something else when it has computed."""

    def kernel(*given, **options):
        found = run(*given, **options)
        act()
        return found

    return kernel


@wrong("linear", "it prints to standard output: 'compiling'")
def prints(run):
    return after(run, lambda: print("compiling"))


@wrong("symmetric_product", "it calls numpy.random.seed")
def seeds_numpy(run):
    return after(run, lambda: np.random.seed(0))


@wrong("rotary", "it calls random.seed")
def draws_from_random(run):
    return after(run, random.random)


@wrong("symmetric_product", "it calls os.putenv (os.environ)")
def sets_the_environment(run):
    return after(run, lambda: os.environ.update(NANOLM_TEST_WORKSPACE=":4096:8"))


@wrong("glu", "it calls warnings.simplefilter")
def silences_warnings(run):
    return after(run, lambda: warnings.simplefilter("ignore"))


@wrong("glu", "it calls logging.disable")
def silences_the_log(run):
    return after(run, lambda: logging.disable(logging.WARNING))


@wrong("linear", "it calls torch.set_autocast_enabled")
def leaves_autocast_switched_off(run):
    return after(run, lambda: torch.set_autocast_enabled("cpu", False))


@wrong("linear_cross_entropy", "it calls torch.set_grad_enabled")
def switches_gradients_on(run):
    return after(run, lambda: torch.set_grad_enabled(True))


@wrong("norm", "under torch.no_grad it changes its input in place: residual", at="evaluation")
def adds_in_place_where_nothing_trains(run):
    def norm(x, *given, residual=None, **options):
        if torch.is_grad_enabled() or residual is None or residual.dtype != x.dtype:
            return run(x, *given, residual=residual, **options)
        return run(residual.add_(x), *given, **options)

    return norm


@wrong("glu", "under torch.no_grad it gives inference tensors", at="other numbers")
def infers_where_nothing_trains(run):
    def glu(x, *, kind):
        with torch.inference_mode(not torch.is_grad_enabled()):
            return run(x.clone(), kind=kind)

    return glu


@wrong(
    "linear",
    "after its inputs were given other numbers in place: under torch.no_grad",
    at="other numbers",
)
def keeps_the_weights_of_its_first_evaluation(run):
    casts = {}

    def linear(x, weight, bias):
        if not torch.is_autocast_enabled("cpu") or torch.is_grad_enabled():
            return run(x, weight, bias)
        key = weight.data_ptr(), weight.shape, torch.get_autocast_dtype("cpu")
        return run(x, casts.setdefault(key, weight.to(key[2])), bias)

    return linear


@wrong("rotary", "after its inputs were given other numbers in place", at="other numbers")
def keeps_tables_by_their_place_in_memory(run):
    tables = {}

    def rotary(x, cos, sin):
        key = cos.data_ptr(), cos.shape
        held = tables.setdefault(key, (cos, cos.clone(), sin.clone()))
        return run(x, *held[1:])

    return rotary


ASKED = []


def notes(spec):
    """Serves everything, and notes what it was asked last."""
    ASKED.append(spec.vocab_size)


@wrong(
    "linear_cross_entropy",
    "that why_not was asked about last, and one kernel serves all layers: it raises",
    notes,
    at="answers",
)
def takes_its_width_from_the_last_question(run):
    def loss(hidden, weight, *given, **options):
        if len(weight) != ASKED[-1]:
            raise ValueError(f"{len(weight)} classes, compiled for {ASKED[-1]}")
        return run(hidden, weight, *given, **options)

    return loss


def once_only(spec):
    """Serves what it is asked for the first time."""
    seen = SEEN.count(spec)
    SEEN.append(spec)
    return "it is busy" if seen > 2 else None


SEEN = []


@wrong("norm", "asked again after other specs", once_only, at="answers")
def says_yes_a_few_times(run):
    return lambda *given, **options: run(*given, **options)
