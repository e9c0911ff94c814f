"""In 16 bits the loops over whole tiles are entered, and what is wrong in them alone is seen: by
the suite's problems, and by 20 steps of training in bfloat16 against float32."""

import dataclasses

import pytest
import torch

from nanolm.ops.contract import candidates
from nanolm.tools import gpu_check
from nanolm.tools.first_contact import sixteen_bits
from nanolm.tools.first_contact.measurement import read_figures
from nanolm.tools.first_contact.sixteen_bits import DEFINITIONS, MODELS, Setting, compare
from nanolm.tools.kernel_check import main_loops
from nanolm.tools.kernel_check.attention_cases import LARGE, MIXED, SINGLE, Case
from nanolm.tools.kernel_check.attention_trials import trial_of
from nanolm.tools.kernel_check.conformance import check_case
from nanolm.tools.kernel_check.main_loops import LONG, long_trials, whole_tiles
from nanolm.tools.kernel_check.op_conformance import check_trial
from nanolm.tools.kernel_check.op_trials import glu_trial, norm_trial, rotary_trial
from nanolm.tools.kernel_check.trial import OP_OF, execute, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARCHES = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
OWN = DEFINITIONS | {"attention": "triton", "norm": "triton"}
"""The interpreter takes a second for a step of these, and several for one of the others."""
ENCODER = "post-norm encoder"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="it changes what is interpreted")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 by 16 where kernels are interpreted."""
    from nanolm.kernels import launch

    for kind in launch.KINDS:
        monkeypatch.setitem(launch.INTERPRETER, kind, launch.Launch(16, 16))


def triton_attention():
    return candidates("attention")["triton"]


def ask(name, tiles=True):
    case = whole_tiles(LONG[name], DEVICE) if tiles else (SINGLE | MIXED | LARGE)[name]
    return check_case(triton_attention(), name, case, DEVICE)


@pytest.mark.parametrize("name", LONG)
def test_attention_is_right_over_whole_tiles(small_tiles, name):
    found = ask(name)
    assert found.verdict == "pass" and found.words == "", found


@pytest.mark.parametrize("op", main_loops.LONG_TRIALS)
def test_other_ops_are_right_over_what_they_loop_over(op):
    trials = long_trials(op, DEVICE)
    assert {trial.spec.dtype for trial in trials} == {torch.bfloat16, torch.float16}
    for trial in trials:
        found = check_trial(candidates(op)["triton"], trial)
        assert found.verdict == "pass", found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_computed_in_float32_is_rounded_once(dtype):
    """Each output and gradient is the 16-bit number nearest to the exact one, but for what float32
    sums are off by: where a product is rounded on the way, some are off by twice as much."""
    common = {"dtype": dtype, "device": DEVICE}
    for trial in (
        # Not beside a residual, whose sum is rounded before it is normalized, as it is kept.
        # 150 rows are more than the programs take at a time: each has a sum, and a second step.
        norm_trial("layernorm", 150, 24, bias=True, residual=False, **common),
        norm_trial("rmsnorm", 5, 129, bias=False, residual=False, **common),
        rotary_trial(3, 16, 5, per_row=False, **common),
        glu_trial("swiglu", 3, 127, **common),
        glu_trial("geglu", 3, 127, **common),
    ):
        trial = dataclasses.replace(trial, detached=frozenset({"total"}))
        op = OP_OF[type(trial.spec).__name__]
        found = execute(trial, candidates(op)["triton"], backward=True).tensors
        exact = execute(trial, reference(op), torch.float64, backward=True).tensors
        for name, x in found.items():
            difference = (x.double() - exact[name]).abs()
            rounding = exact[name].abs() * torch.finfo(dtype).eps / 2
            assert (difference <= rounding + 5e-6 * exact[name].abs().max()).all(), (op, name)


def test_the_gradient_of_a_16_bit_table_is_rounded_once(small_tiles):
    """Ten sums, of two rows and five diagonals of tiles, go into each number."""
    sizes = {"n_queries": 40, "n_keys": 40, "n_heads": 1, "n_kv_heads": 1}
    trial = trial_of(Case(**sizes, bias="bucket", bias_dtype=torch.bfloat16), DEVICE)
    found = execute(trial, triton_attention(), backward=True).gradients["bias"]
    exact = execute(trial, reference("attention"), torch.float64, backward=True).gradients["bias"]
    rounding = exact.abs() * torch.finfo(found.dtype).eps / 2
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= rounding + 2e-5 * exact.abs().max()).all()


def test_sizes_are_three_of_the_largest_tile_of_the_device_and_five():
    from nanolm.kernels import launch

    assert {case.dtype for case in LONG.values()} == {torch.bfloat16, torch.float16}
    for arch in ARCHES:
        with launch.forced_arch(arch):
            for case in LONG.values():
                sized = whole_tiles(case, "cpu")
                words = {"grouped"} if case.n_heads > case.n_kv_heads else set()
                words |= {"bucket"} if case.bias == "bucket" else set()
                tiles = [
                    launch.attention_launch(
                        kind, torch.device("cpu"), case.width, case.dtype, frozenset(words)
                    )
                    for kind in launch.KINDS
                ]
                largest = max(max(tile.m, tile.n) for tile in tiles)
                assert sized.n_queries == sized.n_keys == 3 * largest + 5, (arch, case)
    assert whole_tiles(LONG["whole tiles in float16"], "cpu").n_keys == 3 * 32 + 5


def test_without_triton_the_same_problems_are_asked(monkeypatch):
    def sizes():
        trials = [trial for op in main_loops.LONG_TRIALS for trial in long_trials(op, "cpu")]
        shapes = [{name: x.shape for name, x in trial.leaves.items()} for trial in trials]
        return shapes, [whole_tiles(case, "cpu") for case in LONG.values()]

    with_it = sizes()
    monkeypatch.setattr(main_loops, "has_triton", lambda: False)
    assert sizes() == with_it


@pytest.fixture
def blind(monkeypatch):
    """Every load of the loops without masks is multiplied by 0."""
    import triton
    import triton.language as tl

    from nanolm.kernels.attention import backward, forward
    from nanolm.kernels.tiles import load_tile

    @triton.jit
    def blind_tile(
        view,
        base,
        first,
        n_rows,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        CHECKED: tl.constexpr,
    ):
        tile = load_tile(view, base, first, n_rows, WIDTH, ROWS, COLUMNS, CHECKED)
        if not CHECKED:
            tile = tile * 0.0
        return tile

    # A function of Triton's finds others by the globals of its module.
    for name, value in {"blind_tile": blind_tile, "load_tile": load_tile, "tl": tl}.items():
        monkeypatch.setitem(globals(), name, value)

    def put(*modules):
        for module in modules or (forward, backward):
            monkeypatch.setattr(module, "load_tile", blind_tile)

    return put


@interpreted
def test_loads_of_the_loops_without_masks_are_seen(small_tiles, blind):
    from nanolm.kernels.attention import backward

    blind(backward)
    assert "backward pass is not" in ask("whole tiles in bfloat16, causal").words
    blind()
    assert "its out is off by" in ask("whole tiles in float16, causal").words


@interpreted
@pytest.mark.slow
def test_with_the_tiles_of_an_h100_only_whole_tiles_see_them(blind):
    from nanolm.kernels.launch import forced_arch

    with forced_arch("sm_90"):
        assert ask("whole tiles in float16, causal").verdict == "pass"
        blind()
        for name in LONG:
            assert ask(name).verdict == "FAIL", name
        for name in ("float16", "bfloat16", "large scores in bfloat16"):
            assert ask(name, tiles=False).verdict == "pass", name


@pytest.mark.parametrize("model", MODELS)
def test_two_steps_with_the_kernels_of_auto(model):
    row = compare(Setting(model=model, device=DEVICE, steps=2), {})
    assert row["ok"], row["words"]
    assert len(row["off_by"]) == len(row["allowed"]) == 2
    assert min(min(step) for step in row["allowed"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_twenty_steps_with_own_kernels(small_tiles, model):
    row = compare(Setting(model=model, device=DEVICE), {} if DEVICE == "cuda" else OWN)
    assert row["ok"] and "20 steps in bf16" in row["words"], row["words"]


@interpreted
@pytest.mark.slow
def test_one_step_sees_a_loop_without_masks_that_is_blind(small_tiles, blind, monkeypatch):
    monkeypatch.setattr(sixteen_bits, "PLAIN_RUNS", 1)
    setting = Setting(model=ENCODER, device="cpu", steps=1)
    assert compare(setting, OWN | {"norm": "reference"})["ok"]
    blind()
    assert not compare(setting, OWN | {"norm": "reference"})["ok"]


def test_one_step_sees_a_stream_of_16_bits(monkeypatch):
    """What a fused norm that casts the residual to x's dtype makes of post-norm layers."""
    torch_norm = type(candidates("norm")["torch"])
    right = torch_norm.run

    def narrow(self, x, *parameters, residual=None, **options):
        residual = residual if residual is None else residual.to(x.dtype)
        return right(self, x, *parameters, residual=residual, **options)

    setting = Setting(model=ENCODER, device=DEVICE, steps=1)
    kernels = DEFINITIONS | {"norm": "torch"}
    assert compare(setting, kernels)["ok"]
    monkeypatch.setattr(torch_norm, "run", narrow)
    row = compare(setting, kernels)
    assert not row["ok"] and row["off_by"][0][1] > 2 * row["allowed"][0][1]


def test_what_is_further_off_than_plain_bfloat16_explains_fails(monkeypatch, tmp_path):
    """Runs of the definitions are off by 1, of the second seed by 2: 4 are allowed everywhere."""
    losses = torch.tensor([3.0, 2.0])[:, None, None].expand(2, 2, 5).double()
    told = {}

    def made(setting, kernels, precision, seed):
        if precision == "fp32":
            return losses + seed
        return losses + seed + (1 + (seed == 1) if kernels == DEFINITIONS else told["off"])

    monkeypatch.setattr(sixteen_bits, "losses", made)
    for off, right in (
        (0.0, True),
        (3.9, True),
        (-4.1, False),
        (torch.tensor([0.0, 4.1])[:, None, None], False),  # the second step
        (torch.tensor([0.0, 4.1])[None, :, None], False),  # the loss in float32
        (float("nan"), False),
    ):
        told["off"] = off
        path = tmp_path / "rows.jsonl"
        arguments = sixteen_bits.Arguments(device="cpu", steps=2, json=str(path))
        assert sixteen_bits.run(arguments) == int(not right), off
        assert [row["ok"] for row in read_figures(path)] == [right] * len(MODELS)
        assert gpu_check.check_bfloat16("cpu").passed == right
    told["off"] = 0.0
    losses = losses.flip(0)  # it does not learn
    assert sixteen_bits.run(sixteen_bits.Arguments(device="cpu", steps=2)) == 1
