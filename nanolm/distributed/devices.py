"""Which device a command works on, by the word that its user gave."""

from __future__ import annotations

from typing import Literal

import torch

from nanolm.errors import require

DeviceWord = Literal["auto", "cpu", "cuda"]


def device_type(word: str, option: str = "--device") -> str:
    """cpu or cuda; auto is cuda where torch sees such a device.

    Raises UserError, naming the option that gave the word, for cuda where there is none, and for
    any other word.
    """
    require(word in ("auto", "cpu", "cuda"), f"{option} {word}: choose from auto, cpu, cuda")
    seen = torch.cuda.is_available()
    require(
        seen or word != "cuda",
        f"{option} cuda: torch sees no CUDA device here; {option} cpu works without one",
    )
    return "cuda" if seen and word != "cpu" else "cpu"
