"""`nanolm kernels …`, and kernels of outsiders: a right one, and one that ignores key lengths."""

import json
import pathlib
import sys

import pytest
import torch

from nanolm import cli
from nanolm.commands.kernels.compile import regression
from nanolm.errors import UserError
from nanolm.ops.contract import candidates
from nanolm.registry import KERNELS, OPS
from nanolm.tools.kernel_check.builds import BUILDS, SAMPLE
from nanolm.tools.kernel_check.matrix import (
    ARCHITECTURES,
    KNOWN_SPILLS,
    builds_for,
    compile_elsewhere,
    faults,
    key,
)

ROOT = pathlib.Path(__file__).parents[1]
PLUGINS = ROOT / "docs" / "plugins"
RECORD = ROOT / "kernels" / "compile_matrix.json"


@pytest.fixture
def plugins(monkeypatch):
    """docs/plugins on the path; what is imported from there is forgotten after the test."""
    candidates("attention")
    monkeypatch.syspath_prepend(str(PLUGINS))
    monkeypatch.setattr(KERNELS["attention"], "_entries", dict(KERNELS["attention"]._entries))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("outsider", "careless"):
            del sys.modules[name]


@pytest.fixture
def check(plugins, capsys):
    """(exit status, words) of `nanolm kernels check` on a module of docs/plugins."""

    def run(module, *words):
        status = 0
        try:
            given = ["--module", module, "--device", "cpu", "--apart", "false", *words]
            cli.run(["kernels", "check", *given])
        except SystemExit as leaving:
            status = leaving.code
        return status, capsys.readouterr().out

    return run


def test_list_says_who_serves_and_why_not(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cli.run(["kernels", "list", "--device", "cpu", "--json", str(tmp_path / "list.json")])
    assert "needs a CUDA or ROCm device" in capsys.readouterr().out
    rows = {(r["op"], r["kernel"]): r for r in json.loads((tmp_path / "list.json").read_text())}
    assert rows["attention", "sdpa"]["status"] == "auto takes it"
    assert rows["attention", "triton"]["status"].startswith("no: ")
    assert all(row["what"] for row in rows.values())


def test_check_passes_a_right_outsider(check):
    status, said = check("outsider.attention")
    assert status == 0, said
    assert "0 failed" in said
    assert "it has no bias, no soft-cap and no dropout" in " ".join(said.split())


def test_check_names_the_mask_that_a_careless_kernel_ignores(check):
    status, said = check("careless.attention", "--quick", "true")
    assert status == 1
    assert "it ignores key lengths (padding)" in said
    failed = [line.split()[1:] for line in said.splitlines() if "  FAIL" in line]
    assert failed[0][0] == "lengths"  # told once, the others by their names
    told = " ".join(word for words in failed for word in words)
    assert all(name in told for name in ("lengths", "int32", "nine", "leak:")), told


def test_check_refuses_what_it_cannot_find():
    for arguments, words in (
        (
            ["--module", "nanolm.ops.masks"],
            "registers no kernel.*nanolm.ops.contract import kernel",
        ),
        (["--module", "no.such"], "no.such"),
        (["--module", "outsider/my_norm.py"], "a module's name is due, outsider.my_norm$"),
        ([], "name a kernel"),
        (["--op", "nrm", "--name", "torch"], "there is no op 'nrm'; did you mean norm"),
        (["--op", "norm"], "which kernel of norm.* one of reference, torch"),
        (["--name", "torch"], "torch of which op"),
        (["--op", "norm", "--name", "tor"], "no norm kernel 'tor'; choose from .*torch.*--module"),
    ):
        with pytest.raises(UserError, match=words):
            cli.run(["kernels", "check", "--apart", "false", *arguments])


def test_outsider_trains_by_config(plugins, make_learner):
    from nanolm.config.load import import_plugins

    import_plugins(["outsider.attention"])
    learner = make_learner(kernels={"attention": "outsider"}).train()
    assert "OutsiderAttention" in repr(learner.trunk.blocks[0].attention.attend)
    tokens = torch.randint(512, (2, 16))
    term = learner({"tokens": tokens, "targets": tokens})["clm"]
    term.sum.backward()
    assert learner.trunk.blocks[0].attention.qkv.weight.grad.abs().sum() > 0


def test_recorded_compile_matrix_has_every_build_within_its_budget():
    rows = json.loads(RECORD.read_text())
    recorded = {(row["arch"], row["build"]) for row in rows}
    assert recorded == {(a, b.name) for a in ARCHITECTURES for b in BUILDS if b.exists_on(a)}
    kernels = {}
    for row in rows:
        kernels.setdefault(row["build"], {}).setdefault(row["arch"], set()).add(row["kernel"])
    for build, by_arch in kernels.items():
        assert len(set(map(frozenset, by_arch.values()))) == 1, build
    assert not [(key(row), words) for row in rows for words in faults(row)]


def test_what_is_compiled_is_what_is_named():
    assert builds_for("sm_80") == BUILDS
    without = [build for build in BUILDS if build not in builds_for("gfx942")]
    assert {build.variant for build in without} == {"tf32x3"}
    named = builds_for("sm_80", only="grouped+")
    assert named and named == tuple(build for build in BUILDS if "grouped+" in build.name)
    assert builds_for("sm_80", sample=True) == SAMPLE
    assert builds_for("sm_80", sample=True, only="norm") == SAMPLE[1:]


def test_spills_that_are_accepted_by_name_are_those_of_the_record():
    recorded = {key(row): row["spills"] for row in json.loads(RECORD.read_text())}
    known = {f"{a}/{name}": n for name, by in KNOWN_SPILLS.items() for a, n in by.items()}
    assert {name: recorded.get(name) for name in known} == known
    row = {"arch": "sm_90", "build": "norm/8/bfloat16", "kernel": "k", "spills": 1, "shared": 0}
    row |= {"shared_limit": 1, "precision": [], "tensor_core": {}, "programs": 1}
    assert faults(row) == ["1 spills, 0 allowed"]


def test_compile_refuses_to_compile_nothing():
    for arguments in (["--only", "groupd"], ["--only", "bucket", "--sample", "true"]):
        with pytest.raises(UserError, match=r"only: nothing .*sm_90 has.*grouped"):
            cli.run(["kernels", "compile", "--archs", "sm_90", *arguments])


def test_compile_says_that_it_takes_no_plugin():
    with pytest.raises(UserError, match="compiles this project's kernels alone"):
        cli.run(["kernels", "compile", "--plugins", "outsider.attention"])


def compare(archs, *, sample):
    recorded = {key(row): row for row in json.loads(RECORD.read_text())}
    for row in compile_elsewhere(archs, sample=sample):
        assert not faults(row)
        assert row["programs"] >= 1
        assert regression(row, recorded.get(key(row))) is None, key(row)


def test_a_row_that_got_worse_is_told():
    row = {"spills": 0, "tensor_core": {"mma": 64}, "products": 1.0}
    assert regression(row, row) is None and regression(row, row | {"products": 1.5}) is None
    assert regression(row, {k: v for k, v in row.items() if k != "products"}) is None
    for worse, words in (
        ({"spills": 3}, "3 spills, 0 recorded"),
        ({"tensor_core": {}}, "tensor cores"),
        ({"products": 1.5}, "1.5 products for one that is needed, 1.0 recorded"),
    ):
        assert words in regression(row | worse, row)
    assert "--write" in regression(row, None)


def test_sample_of_the_compile_matrix():
    compare(["sm_80"], sample=True)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compile_matrix(arch):
    compare([arch], sample=False)


def test_bench_roofline_and_doctor_report(tmp_path, capsys):
    path = str(tmp_path / "bench.json")
    sizes = {"batch": 1, "length": 32, "heads": 2, "kv_heads": 1, "width": 16, "ff_width": 24}
    sizes["vocab_size"] = 64
    shape = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    cli.run(["kernels", "bench", *shape, "--device", "cpu", "--repetitions", "1", "--json", path])
    rows = {(r["op"], r["kernel"]): r for r in json.loads(pathlib.Path(path).read_text())}
    assert {op for op, _ in rows} == set(OPS)
    sdpa, flex = rows["attention", "sdpa"], rows["attention", "flex"]
    assert min(sdpa["ms"], sdpa["tflops"], sdpa["gb_per_s"], sdpa["peak_mb"]) > 0
    assert "no backward pass" in flex["left_out"]
    # Logits of 32 x 64 and their gradient are the most that the plain loss holds.
    plain = rows["linear_cross_entropy", "reference"]["peak_mb"]
    assert plain > 2 * 32 * 64 * 4 / 1e6
    cli.run(["kernels", "roofline"])
    assert "no kernel of this project has been timed" in capsys.readouterr().out
