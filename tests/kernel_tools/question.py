"""A question to a kernel: a trial under the sanitizer or a test, and which mutants it concerns."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nanolm.ops.contract import candidates
from nanolm.tools.kernel_check.attention_cases import Case
from nanolm.tools.kernel_check.attention_trials import trial_of
from nanolm.tools.kernel_check.sanitizer import sanitized
from nanolm.tools.kernel_check.trial import Trial, excess, execute
from nanolm.tools.kernel_check.watch import KernelFaultError
from tests.kernel_tools.mutation import Mutant, words_of


def anyone(mutant: Mutant) -> bool:
    """A question for every mutant."""
    return True


def of_far(mutant: Mutant) -> bool:
    """A question for what may count in 64 bits: it takes longer than most."""
    return bool(mutant.about & {"int64", "stride", "contiguous"})


def of_ranges(mutant: Mutant) -> bool:
    """A question about which tiles are visited."""
    return mutant.file == "attention/ranges.py"


def of_integers(mutant: Mutant) -> bool:
    """A question about the width of integers."""
    return "int64" in mutant.about


def of_wrapper(mutant: Mutant) -> bool:
    """A question about what stands around the kernels."""
    return not mutant.interpreted


EDGES = "range full begin end low high"
WIDTHS = "int64 tl cast row"
"""Words of the places that such questions are put for, which they are asked about first."""
TRAINED = ("attention", "norm", "rotary", "glu", "symmetric_product")


@dataclasses.dataclass(frozen=True)
class Question:
    """`ask` says by what it sees a fault ("numbers", "sanitizer", …), or None.

    `words` are what it is about, to put the likeliest first; `concerns` says whether a mutant is
    asked at all.
    """

    name: str
    ask: Callable[[], str | None]
    words: frozenset[str] = frozenset()
    concerns: Callable[[Mutant], bool] = anyone


def kernel_of(op: str, name: str = "triton") -> Any:
    """A kernel by its name."""
    return candidates(op)[name]


def judged(op: str, name: str, make: Callable[[], Trial]) -> str | None:
    """By what a kernel is seen to be wrong on a trial: "sanitizer" (memory), "dtype", "random" (it
    draws random numbers), "numbers", "poison" (numbers that are wrong only when undefined lanes
    are), "error", or None."""
    trial = make()
    kernel = kernel_of(op, name)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    try:
        with sanitized():
            found = execute(trial, kernel, backward=trial.differentiable)
    except KernelFaultError:
        return "sanitizer"
    except Exception:  # noqa: BLE001  (a mutant may raise anything)
        return "error"
    if any(found.outputs[key].dtype != dtype for key, dtype in trial.dtypes.items()):
        return "dtype"
    if not torch.equal(state, torch.get_rng_state()):
        return "random"
    if max(excess(trial, found).values()) < 1:
        return None
    again = execute(trial, kernel, backward=trial.differentiable)
    return "poison" if max(excess(trial, again).values()) < 1 else "numbers"


def test_of(
    function: Callable[..., Any],
    *arguments: Any,
    about: str = "",
    concerns: Callable[[Mutant], bool] = anyone,
) -> Question:
    """A test as a question."""

    def ask() -> str | None:
        try:
            function(*arguments)
        except AssertionError:
            return "test"
        except Exception:  # noqa: BLE001  (a mutant may raise anything)
            return "error"
        return None

    name = " ".join([function.__name__, *map(str, arguments)])
    return Question(name, ask, frozenset(about.split()), concerns)


@contextlib.contextmanager
def tiles(m: int, n: int) -> Iterator[None]:
    """Attention in tiles of m by n."""
    from nanolm.kernels import launch

    before = dict(launch.INTERPRETER)
    launch.INTERPRETER.update(dict.fromkeys(launch.KINDS, launch.Launch(m, n)))
    try:
        yield
    finally:
        launch.INTERPRETER.update(before)


def tiled(question: Question, m: int, n: int) -> Question:
    """The question, put in tiles of m by n."""

    def ask() -> str | None:
        with tiles(m, n):
            return question.ask()

    return dataclasses.replace(question, name=f"{question.name} ({m} x {n})", ask=ask)


def case_question(name: str, case: Case, kernel: str = "triton", *, lse: bool = True) -> Question:
    """An attention problem as a question, its log-sum-exp compared too."""
    make = functools.partial(trial_of, case, lse=lse)
    ask = functools.partial(judged, "attention", kernel, make)
    words = words_of(case.features()) - {"n", "torch", "false", "none"}
    words |= {"group"} if case.n_heads != case.n_kv_heads else set()
    words |= {"strict"} if case.order == "strict" else set()
    return Question(name, ask, frozenset(words))


def small(case: Case, **sizes: int) -> Case:
    """The case with less to compute: whole tiles of 16 and partial ones on both axes."""
    less = {"n_queries": 20, "n_keys": 37, "n_heads": 1, "n_kv_heads": 1, "n_rows": 1} | sizes
    return dataclasses.replace(case, **less)
