"""Triton attention, interpreted on a CPU or compiled on a GPU, against the float64 reference."""

import contextlib
import dataclasses
import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nanolm.errors import UserError
from nanolm.ops.bias import AlibiBias, DenseBias
from nanolm.ops.contract import KERNELS, AttentionSpec, candidates, choose
from nanolm.ops.masks import Mask
from nanolm.tools.kernel_check.attention_cases import HARD, MIXED, SINGLE, Case
from nanolm.tools.kernel_check.attention_trials import trial_of
from nanolm.tools.kernel_check.leaks import KINDS, leak
from nanolm.tools.kernel_check.sanitizer import sanitized, shuffled
from nanolm.tools.kernel_check.trial import (
    TOLERANCE,
    errors,
    excess,
    execute,
    like,
)
from tests.kernel_tools.covering import AXES, covering_cases, pairwise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COVERING = covering_cases()


@functools.cache
def triton_attention():
    candidates("attention")
    return KERNELS["attention"].get("triton").build()


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Tiles of 16 by 16: several on each axis of 29 by 31."""
    from nanolm.kernels import launch

    with pytest.MonkeyPatch.context() as patch:
        for kind in launch.KINDS:
            patch.setitem(launch.INTERPRETER, kind, launch.Launch(16, 16))
        yield


def check(case):
    trial = trial_of(case, DEVICE, lse=True)
    assert triton_attention().why_not(trial.spec) is None
    with sanitized() if DEVICE == "cpu" else contextlib.nullcontext():
        found = execute(trial, triton_attention(), backward=True)
    off = excess(trial, found)
    assert {"out", "lse", "dq", "dk", "dv"} <= set(off)
    assert max(off.values()) < 1, off
    assert found.outputs["out"].dtype == case.dtype


@pytest.mark.parametrize("name", HARD)
def test_hard_combinations(name):
    check(HARD[name])


EACH = (
    "bf16 autocast, fp32 T5 table",
    "fp16 autocast, fp32 slopes",
    "fp32 queries, fp16 dense bias",
)
"""Every kind of bias, either 16-bit dtype, and biases of more and of fewer bits than queries."""


@pytest.mark.parametrize(
    "name",
    [
        *("bias that hides", *EACH),
        *(pytest.param(name, marks=pytest.mark.slow) for name in MIXED if name not in EACH),
    ],
)
def test_hiding_biases_and_mixed_dtypes(name):
    check((SINGLE | MIXED)[name])


@pytest.mark.parametrize(
    "index",
    [i if i % 5 == 0 else pytest.param(i, marks=pytest.mark.slow) for i in range(len(COVERING))],
)
def test_pairs_of_modes(index):
    check(COVERING[index])


def test_every_pair_of_values_is_covered():
    rows = pairwise(AXES)
    for (a, values_a), (b, values_b) in itertools.combinations(AXES.items(), 2):
        seen = {(row[a], row[b]) for row in rows}
        assert seen == set(itertools.product(values_a, values_b))


def test_order_of_programs_does_not_matter():
    trial = trial_of(HARD["everything at once"], DEVICE, lse=True)
    first = execute(trial, triton_attention(), torch.float32, backward=True).tensors
    with shuffled(1) if DEVICE == "cpu" else contextlib.nullcontext():
        again = execute(trial, triton_attention(), torch.float32, backward=True).tensors
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaks_through_a_mask(kind):
    assert leak(triton_attention(), kind, DEVICE) is None


def problem(n_rows, n_queries, n_keys, n_heads, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n_rows, n, n_heads, width) for n in (n_queries, n_keys, n_keys)]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return [x.to(DEVICE).requires_grad_() for x in tensors]


def test_rows_that_see_nothing_give_zero_and_no_gradient():
    q, k, v = problem(2, 20, 20, 1, 16)
    mask = Mask(causal=True, key_lengths=torch.tensor([0, 7], device=DEVICE), window=3)
    out, lse = triton_attention().run(q, k, v, mask, scale=0.25, return_lse=True)
    blind = ~mask.dense(20, 20, DEVICE).any(-1)[:, 0]
    assert (out[blind] == 0).all() and (lse[:, 0][blind] == -torch.inf).all()
    dq, dk, dv = torch.autograd.grad(out.sum(), [q, k, v])
    assert (dq[blind] == 0).all()
    assert all(torch.isfinite(x).all() for x in (dq, dk, dv))
    assert (dk[0] == 0).all() and (dv[0] == 0).all()


@pytest.mark.skipif(DEVICE != "cpu", reason="counts tiles in the interpreter")
def test_tiles_that_a_mask_rules_out_are_not_visited():
    """Loads of keys and values in the forward pass, in tiles of 16, against the mask's count."""
    documents = torch.arange(64).div(16, rounding_mode="floor")[None]
    cases = {
        "none": (Mask(), 16),
        "causal": (Mask(causal=True), 10),
        "window": (Mask(window=2), 10),
        "causal window": (Mask(causal=True, window=2), 7),
        "lengths": (Mask(key_lengths=torch.tensor([17])), 8),
        "documents": (Mask(documents=documents), 4),
        "prefix": (Mask(causal=True, prefix_lengths=torch.tensor([32])), 11),
        "order": (Mask(order=torch.arange(64)[None]), 10),
    }
    q, k, v = (x.detach() for x in problem(1, 64, 64, 1, 16))
    for name, (mask, n_tiles) in cases.items():
        allowed = mask.dense(64, 64)[0, 0].view(4, 16, 4, 16)
        assert int(allowed.any(3).any(1).sum()) == n_tiles, name
        with sanitized(races=False) as traffic:
            triton_attention().run(q, k, v, mask, scale=0.25)
        tile = 16 * 16 * 4
        read = traffic.loaded["attention_forward_kernel"] - 4 * tile - 2 * tile * n_tiles
        if mask.documents is None and mask.order is None:
            assert 0 <= read < 2 * tile, (name, read)  # lengths, again and again
        else:
            # The ranges of each program's own queries, and in each tile the numbers of both sides.
            assert read == 4 * 2 * 16 * 4 + n_tiles * 2 * 16 * 8, (name, read)


@pytest.mark.parametrize(
    "bias", [pytest.param("none", marks=pytest.mark.slow), "bucket", "dense_by_head"]
)
def test_gradcheck(bias):
    """Derivatives by finite differences, with float64 sums."""
    case = Case(
        n_rows=1, n_queries=3, n_keys=4, n_heads=2, n_kv_heads=1, width=3, causal=True,
        softcap=2.0, bias=bias, dtype=torch.float64,
    )  # fmt: skip
    trial = trial_of(case, DEVICE, lse=True)
    leaves = [like(x, torch.float64) for x in trial.leaves.values()]

    def function(*given):
        outputs = trial.run(triton_attention(), dict(zip(trial.leaves, given, strict=True)))
        return outputs["out"], outputs["lse"]

    assert torch.autograd.gradcheck(
        function, leaves, eps=1e-5, atol=1e-5, rtol=1e-4, fast_mode=True
    )


@pytest.mark.parametrize("bias", ["bucket", "dense_by_head"])
def test_float64_is_as_exact_as_float64(bias):
    """Finite differences do not tell whether a sum was taken in float32 on its way."""
    sizes = {"n_rows": 1, "n_queries": 5, "n_keys": 20, "n_kv_heads": 1, "width": 20}
    case = Case(**sizes, causal=True, softcap=2.0, bias=bias, dtype=torch.float64)
    trial = trial_of(case, DEVICE, lse=True)
    off = errors(trial, triton_attention())
    assert max(off.values()) < 1e-12, off


def test_whole_tiles_of_narrow_heads_read_nothing_beside_them():
    """Tiles without a mask still end where the head does: behind the last one is no memory."""
    check(Case(n_rows=1, n_kv_heads=1, n_queries=32, n_keys=32, width=20))


@pytest.mark.slow  # test_kernel_operators.py has another shape of the same bias
def test_operator_is_registered_as_pytorch_wants_it():
    from nanolm.kernels.attention.call import flatten
    from nanolm.kernels.attention.operator import attention_op

    q, k, v = problem(1, 9, 9, 2, 16)
    bias = DenseBias(torch.randn(1, 2, 9, 9, device=DEVICE, requires_grad=True))
    arguments = flatten(q, k, v, Mask(causal=True), bias, scale=0.25, softcap=None)
    torch.library.opcheck(attention_op, arguments)


def test_compiles_into_one_graph_and_recomputes_and_counts():
    q, k, v = problem(1, 20, 20, 2, 16)
    mask = Mask(causal=True)

    def attend(q, k, v):
        return triton_attention().run(q, k, v, mask, scale=0.25, dropout=0.2)

    torch.manual_seed(0)
    plain = attend(q, k, v)
    expected = torch.autograd.grad(plain.sum(), [q, k, v])
    torch.manual_seed(0)
    again = checkpoint(attend, q, k, v, use_reentrant=False)
    assert torch.equal(plain, again)
    for actual, wanted in zip(torch.autograd.grad(again.sum(), [q, k, v]), expected, strict=True):
        assert torch.equal(actual, wanted)

    kernel = triton_attention()

    def attend_surely(q, k, v):
        return kernel.run(q, k, v, mask, scale=0.25)

    compiled = torch.compile(attend_surely, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), attend_surely(q, k, v))
    with FlopCounterMode(display=False) as counter:
        attend_surely(q, k, v).sum().backward()
    assert counter.get_total_flops() == 4 * 2 * 20 * 20 * 16 * (1 + 5 / 2)


def test_autocast_and_refusals():
    q, k, v = problem(1, 9, 9, 2, 16)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert triton_attention().run(q, k, v, Mask(), scale=0.25).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="one dtype"):
        triton_attention().run(q, k.half(), v.half(), Mask(), scale=0.25)
    with pytest.raises(ValueError, match="ALiBi slopes"):
        slopes = torch.ones(2, device=DEVICE, requires_grad=True)
        triton_attention().run(q, k, v, Mask(), scale=0.25, bias=AlibiBias(slopes))
    wide = AttentionSpec(n_heads=1, n_kv_heads=1, head_dim=512, device=DEVICE)
    assert "256" in triton_attention().why_not(wide)


def test_auto_never_takes_the_interpreter(monkeypatch):
    spec = AttentionSpec(n_heads=1, n_kv_heads=1, head_dim=16)
    assert choose("attention", spec).kernel.name == "sdpa"
    assert "named" in choose("attention", spec).refused["triton"]
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "needs a CUDA or ROCm device" in choose("attention", spec).refused["triton"]
    with pytest.raises(UserError, match="TRITON_INTERPRET"):
        choose("attention", spec, "triton")


DECODE = {
    "one query": Case(n_queries=1, n_keys=150, causal=True, n_heads=4, n_kv_heads=2),
    "padded": Case(n_queries=1, n_keys=70, lengths=True, window=9, bias="alibi"),
    "three queries": Case(n_queries=3, n_keys=131, causal=True, softcap=3.0, bias="bucket"),
    "bfloat16": Case(n_queries=1, n_keys=65, documents=True, dtype=torch.bfloat16, width=24),
    # Four parts are asked for; two tiles each leave three of them, the last with one tile.
    "five tiles in three parts": Case(n_rows=1, n_queries=1, n_keys=300),
    "strides": Case(n_queries=2, n_keys=20, n_heads=4, layout="sliced", width=24),
}


@pytest.mark.parametrize("name", DECODE)
def test_decoding(name):
    candidates("attention")
    kernel = KERNELS["attention"].get("triton_decode").build()
    for phase in ("train", "prefill"):
        other = dataclasses.replace(DECODE[name], phase=phase)
        assert "only decodes" in kernel.why_not(trial_of(other, DEVICE).spec)
    case = dataclasses.replace(DECODE[name], phase="decode")
    trial = trial_of(case, DEVICE, lse=True)
    assert kernel.why_not(trial.spec) is None
    with sanitized() if DEVICE == "cpu" else contextlib.nullcontext():
        found = errors(trial, kernel)
    assert max(found.values()) < TOLERANCE[case.dtype], found


@settings(max_examples=4)
@given(
    n_queries=st.sampled_from([1, 2, 13, 31, 127, 129]),
    n_keys=st.sampled_from([1, 3, 17, 64, 127, 129]),
    causal=st.booleans(),
    width=st.integers(1, 33),
)
def test_any_length_and_width(n_queries, n_keys, causal, width):
    from nanolm.kernels import launch

    case = Case(
        n_rows=1, n_heads=1, n_kv_heads=1, n_queries=n_queries, n_keys=n_keys, causal=causal,
        width=width,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for kind in launch.KINDS:
            patch.setitem(launch.INTERPRETER, kind, launch.Launch(64, 32))
        check(case)
