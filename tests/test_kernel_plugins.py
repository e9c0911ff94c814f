"""`kernels check` on plug-ins that are Triton kernels: the sanitizer watches them as ours."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from nanolm import cli
from nanolm.ops.contract import candidates
from nanolm.registry import KERNELS

if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)

ROOT = pathlib.Path(__file__).parents[1]
PLUGIN = """
import torch
import triton
import triton.language as tl
from nanolm.ops import kernel


@triton.jit
def rms_kernel(x, weight, out, n_rows, eps, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    inside = column < WIDTH
    y = tl.load(x + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    y *= 1 / tl.sqrt(tl.sum(y * y, axis=0) / WIDTH + eps)
    tl.store(out + row * WIDTH + column, (y * w).to(out.dtype.element_ty), mask=inside)


class Rms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = torch.zeros_like(rows)
        width = rows.shape[1]
        rms_kernel[(len(rows),)](
            rows, weight.contiguous(), out, len(rows), eps, width, triton.next_power_of_2(width)
        )
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        x, weight = (z.detach().requires_grad_() for z in ctx.saved_tensors)
        with torch.enable_grad():
            wide = x.float()
            y = wide * (wide.square().mean(-1, keepdim=True) + ctx.eps).rsqrt() * weight.float()
        return *torch.autograd.grad(y, (x, weight), grad.float()), None


@kernel("norm")
class Mine:
    name = "mine"

    def why_not(self, spec):
        plain = spec.kind == "rmsnorm" and not spec.bias and not spec.residual
        return None if plain else "it is an RMSNorm without bias and residual"

    def run(self, x, weight, bias, *, kind, eps, residual=None):
        assert kind == "rmsnorm" and bias is None and residual is None  # as it was told
        return Rms.apply(x, weight, eps), x
"""
LOAD = "y = tl.load(x + row * WIDTH + column, mask=inside, other=0.0)"
STORE = "tl.store(out + row * WIDTH + column, (y * w).to(out.dtype.element_ty), mask=inside)"
WRONG = {
    "a load that begins one later": (
        LOAD,
        LOAD.replace("row * WIDTH", "row * WIDTH + 1"),
        "load of 1 elements out of bounds of its tensors, +1 elements from the nearest, x, by",
    ),
    "a load without a mask": (
        LOAD,
        "y = tl.load(x + row * WIDTH + column)",
        "elements out of bounds of its tensors, without a mask",
    ),
    "a mask without other": (LOAD, LOAD.replace(", other=0.0", ""), "depend on masked lanes"),
    "a store without a mask": (
        STORE,
        STORE.replace(", mask=inside", ""),
        "store of 8 elements out of bounds of its tensors, without a mask, +",
    ),
    "a mask that is forgotten": (  # reads beyond the rows first, and then writes there
        "inside = column < WIDTH",
        "inside = column >= 0",
        "store of 8 elements out of bounds",
    ),
    "programs that write one element": (
        STORE,
        f"{STORE}\n    tl.store(out, (tl.load(out) * 1.0).to(out.dtype.element_ty))",
        "elements of out are stored by several programs",
    ),
    "a program that reads what another writes": (
        STORE,
        f"y += 0 * tl.load(out, mask=row > 0, other=0.0)\n    {STORE}",
        "elements of out; program",
    ),
}


COMMAND = ["kernels", "check", "--device", "cpu", "--module"]


def test_a_right_kernel_of_triton_passes_and_was_watched(tmp_path, monkeypatch, capsys):
    """Also in bfloat16, which the interpreter as it stands computes on bit patterns."""
    (tmp_path / "plugin_of_triton.py").write_text(PLUGIN)
    candidates("norm")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(KERNELS["norm"], "_entries", dict(KERNELS["norm"]._entries))
    cli.run([*COMMAND, "plugin_of_triton", "--apart", "false"])
    lines = capsys.readouterr().out.splitlines()
    said = " ".join(" ".join(lines).split())
    assert "0 failed" in said and "trials of rms_kernel watched" in said
    assert any("pass" in line and "bfloat16" in line for line in lines)


# Beside test_kernel_apart.py, which watches one process end.
@pytest.mark.slow
def test_where_kernels_are_compiled_a_process_of_its_own_watches(tmp_path):
    """As on a GPU; without one its other checks fail, since there is nothing to compile for."""
    text = PLUGIN.replace(*WRONG["a mask without other"][:2])
    (tmp_path / "compiled_plugin.py").write_text(text)
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "nanolm", *COMMAND, "compiled_plugin"],
        capture_output=True, text=True, cwd=tmp_path, env=inherited | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1
    (said,) = re.findall(r"FAIL +sanitizer(.*?)\n  \w", done.stdout, re.S)
    assert "depend on masked lanes" in said
    assert done.stdout.count("interpret it, with TRITON_INTERPRET=1") == 1
    assert "checks are left out: they would raise the same" in done.stdout


@pytest.fixture
def found(tmp_path, monkeypatch):
    """What memory_finding says of a plug-in."""
    import importlib

    from nanolm.tools.kernel_check.interpreter import prepare_interpreter
    from nanolm.tools.kernel_check.safety import memory_finding

    candidates("norm")
    prepare_interpreter()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(KERNELS["norm"], "_entries", dict(KERNELS["norm"]._entries))

    def finding(text, name):
        (tmp_path / f"{name}.py").write_text(text)
        return memory_finding("norm", importlib.import_module(name).Mine())

    return finding


@pytest.mark.parametrize("number", range(len(WRONG)), ids=list(WRONG))
def test_a_kernel_that_is_careless_with_memory_is_told_so(found, number):
    right, wrong, words = list(WRONG.values())[number]
    assert right in PLUGIN
    said = found(PLUGIN.replace(right, wrong), f"careless_{number}")
    assert said.verdict == "FAIL" and words in said.words, said
    assert ("left out" in said.words) == ("store of" in words)


def test_a_kernel_for_gpus_alone_is_watched_too(found):
    text = PLUGIN.replace("plain = ", 'plain = spec.device == "cuda" and ')
    assert found(text, "for_gpus").verdict == "pass"


def test_what_is_no_triton_kernel_is_not_watched(found):
    text = PLUGIN.replace("Rms.apply(x, weight, eps), x", "x * weight, x")
    assert found(text, "of_torch") is None


def test_what_the_interpreter_cannot_run_is_said(found):
    text = PLUGIN.replace("rms_kernel[(len(rows),)]", "rms_kernel[(rows.no_such,)]")
    said = found(text, "raises")
    assert said.verdict == "refused" and "not watched: in the interpreter it raises" in said.words
