"""Every product of an index and a stride is 64 bits wide, also where only a result of more than
2^31 numbers would show it: integers of 12 bits in the interpreter (tests/kernel_tools/narrow.py).
"""

import pytest
import torch

from nanolm.ops.contract import candidates
from nanolm.tools.kernel_check.attention_cases import Case
from nanolm.tools.kernel_check.attention_trials import trial_of
from nanolm.tools.kernel_check.op_trials import (
    FP32,
    cross_entropy_trial,
    glu_trial,
    norm_trial,
    rotary_trial,
    symmetric_trial,
)
from nanolm.tools.kernel_check.trial import execute

if torch.cuda.is_available():
    pytest.skip("a GPU's integers have 32 bits", allow_module_level=True)

COMMON = {"dtype": FP32, "device": "cpu"}
HEADS = {"n_rows": 1, "n_heads": 28, "n_kv_heads": 7, "n_queries": 8, "n_keys": 97, "width": 3}
ATTENTION = {
    "rows": Case(
        n_rows=34, n_heads=1, n_kv_heads=1, n_queries=64, n_keys=64, width=3, documents=True,
        order="loose", lengths=True,
    ),
    "table": Case(**HEADS, bias="bucket"),
    "dense bias": Case(**HEADS, bias="dense_by_head"),
}  # fmt: skip
TILES = {"rows": (64, 64), "table": (16, 64), "dense bias": (16, 64)}
"""Of so few rows that an offset within a tile has room."""
DECODE = Case(
    n_rows=3, n_heads=256, n_kv_heads=8, n_queries=1, n_keys=70, width=3, phase="decode"
)  # fmt: skip
OTHERS = {
    "norm": lambda: norm_trial("layernorm", 100, 24, bias=True, residual=True, **COMMON),
    "rotary": lambda: rotary_trial(1, 64, 32, per_row=True, n_tokens=33, **COMMON),
    "glu": lambda: glu_trial("swiglu", 50, 48, **COMMON),
    "linear_cross_entropy": lambda: cross_entropy_trial(
        20, 127, bias=False, softcap=None, label_smoothing=0.1, z_loss=0.0, **COMMON
    ),
    "symmetric_product": lambda: symmetric_trial(100, 5, **COMMON),
}
NAMES = [*ATTENTION, "decode", *OTHERS]


def problem(name):
    """(trial, kernel) by a name."""
    if name in ATTENTION:
        return trial_of(ATTENTION[name], lse=True), candidates("attention")["triton"]
    if name == "decode":
        return trial_of(DECODE), candidates("attention")["triton_decode"]
    return OTHERS[name](), candidates(name)["triton"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ATTENTION)) for n in NAMES]
)
def test_indices_times_strides_are_64_bits_wide(name):
    from nanolm.kernels import launch
    from nanolm.tools.kernel_check.sanitizer import sanitized
    from tests.kernel_tools.narrow import short_integers

    trial, kernel = problem(name)
    before = dict(launch.INTERPRETER)
    tile = launch.Launch(*TILES.get(name, (16, 16)))
    launch.INTERPRETER.update(dict.fromkeys(launch.KINDS, tile))
    try:
        right = execute(trial, kernel, backward=trial.differentiable).tensors
        with short_integers(), sanitized(races=False):  # what wraps around points anywhere
            found = execute(trial, kernel, backward=trial.differentiable).tensors
    finally:
        launch.INTERPRETER.update(before)
    assert all(torch.equal(found[key], x) for key, x in right.items())
