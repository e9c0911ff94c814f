"""Who can take part in a benchmark on this machine, found out before anything is measured.

A contestant is left out, with its reason, when the package that it comes from is not installed, or
when a kernel that it names cannot serve the model here. The others are measured.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanolm.build import build_learner, build_objective
from nanolm.errors import UserError, require
from nanolm.terminal import say
from nanolm.tools.bench.shape import Shape
from nanolm.tools.bench.step import nanolm_config
from nanolm.tools.stand_in import stand_in_tokenizer

Settings = dict[str, Any]
Job = dict[str, Any]


def missing(package: str) -> str | None:
    """What to install for a contestant whose package is not there, or None."""
    if importlib.util.find_spec(package) is not None:
        return None
    return f"{package} is not installed: pip install 'nanolm[hf]' adds it"


def refusal(config: Any, tokenizer: Any, device: str) -> str | None:
    """Why nanolm cannot build the config's learner on the device, or None; nothing is allocated."""
    objective = build_objective(config, tokenizer)
    try:
        build_learner(config, objective, device, meta=True)
    except UserError as error:
        return str(error)
    return None


def why_not(job: Job, device: str) -> str | None:
    """Why the contestant of a job of `nanolm bench train` cannot take part on cpu or cuda, with
    what helps, or None. Raises UserError for a shape that no model has."""
    settings, shape = job["settings"], Shape(**job["shape"])
    if settings["model"].startswith("transformers"):
        return missing("transformers")
    if settings["model"] != "nanolm":
        return None
    config = nanolm_config(settings, shape, job["precision"], "nowhere", device)
    return refusal(config, stand_in_tokenizer(shape.vocab_size), device)


def job_of(shape: Shape, precision: str, threads: int | None, warmup: int, steps: int) -> Job:
    """What all jobs of one contest have in common; no number of threads means all cores."""
    return {
        "precision": precision,
        "shape": dataclasses.asdict(shape),
        "threads": threads or os.cpu_count(),
        "warmup": warmup,
        "steps": steps,
    }


@dataclasses.dataclass(frozen=True)
class Entries:
    """Who takes part in a contest: `jobs` are contestant -> its variants, of which the fastest will
    play; `left_out` are name -> reason."""

    jobs: dict[str, list[Job]]
    left_out: dict[str, str]


def enter_all(
    contestants: Mapping[str, Settings],
    common: Job,
    device: str,
    *,
    why_not: Callable[[Job, str], str | None],
    variants: Callable[[Settings], list[Settings]],
    only: Sequence[str] | None,
) -> Entries:
    """Contestants with the keys that all jobs have in common, as far as they can take part on cpu
    or cuda; with `only`, of these. Raises UserError when one that `only` names cannot."""
    if device != "cpu":  # not said of a CPU, where finished contests are found by a job without it
        common = common | {"device": device}
    jobs, left_out = {}, {}
    for name, settings in contestants.items():
        if only is not None and name not in only:
            continue
        reason = why_not(common | {"settings": settings}, device)
        if reason is None:
            jobs[name] = [common | {"settings": variant} for variant in variants(settings)]
        else:
            require(only is None, f"--only: {name!r} cannot take part here: {reason}")
            left_out[name] = reason
    return Entries(jobs, left_out)


def require_fast(precisions: Sequence[str], device: str) -> None:
    """Raises UserError for fp16 on a CPU: a product of 2048 x 2048 then takes minutes."""
    require(
        device != "cpu" or "fp16" not in precisions,
        "--precisions fp16 is for CUDA: most CPUs multiply it in software, a thousand times slower "
        "than fp32; leave it out on a CPU",
    )


def announce(contests: Sequence[Entries]) -> None:
    """Prints who is left out of a benchmark's contests, each reason once."""
    told = [item for entries in contests for item in entries.left_out.items()]
    for name, reason in dict.fromkeys(told):
        say(f"left out: {name}: {reason}")
