"""How Muon multiplies: plainly, unless this GPU was timed to be faster with the Triton kernel."""

import dataclasses
import json
import re

import pytest
import torch

from nanolm import cli
from nanolm.commands.kernels import bench
from nanolm.config.load import parse
from nanolm.errors import UserError
from nanolm.kernels.candidates import TritonSymmetricProduct
from nanolm.ops.chooser import Chooser
from nanolm.ops.contract import Kernels, NormSpec, SymmetricProductSpec, choose
from nanolm.ops.kept import records, spec_record
from nanolm.ops.timings import device_name, read_timings
from nanolm.tools.bench import kernels as timed
from nanolm.tools.bench.kernels import call
from nanolm.tools.kernel_check.problems import PROBLEMS
from nanolm.training import optim
from tests.prepared import train

OP = "symmetric_product"
BF16 = torch.bfloat16
WIDE, SQUARE, OTHER = (64, 192), (64, 64), (64, 320)


def spec(size=WIDE, device="cuda"):
    return SymmetricProductSpec(rows=size[0], columns=size[1], dtype=BF16, device=device)


def timing(kernel, ms, size=WIDE, *, op=OP, name=None, **changes):
    row = {"op": op, "kernel": kernel, "problem": spec(size).size, "ms": ms}
    row["device_name"] = name or device_name("cuda")
    return row | {"spec": spec_record(spec(size)) | changes}


def chosen(timings, requested="auto", kept=(), sizes=(WIDE,), device="cuda"):
    """The kernels' names, size by size, and what the log says."""
    chooser = Chooser(kept, timings, "times.json" if timings else None)
    kernels = Kernels({OP: requested}, device=device, dtype=BF16, decide=chooser.choose)
    names = [
        kernels.choose(OP, SymmetricProductSpec, rows=rows, columns=columns).name
        for rows, columns in sizes
    ]
    return names, chooser.notes


def test_auto_is_the_plain_product_until_this_gpu_was_timed_to_be_faster_without_it():
    assert choose(OP, spec()).kernel.name == "reference"
    faster = [timing("triton", 1.0), timing("reference", 1.01)]
    (name,), (note,) = chosen(faster)
    assert name == "triton"
    where = re.escape(device_name("cuda"))
    said = r"triton for 64 x 192 \(triton 1 ms, reference 1\.01 ms\)"
    assert re.fullmatch(rf"{OP}, by the timings of {where} in times\.json: {said}", note)

    for ms in (1.0, 1.02):  # as fast is not faster
        (name,), (note,) = chosen([timing("triton", ms), timing("reference", 1.0)])
        assert name == "reference" and "reference for 64 x 192 (reference 1 ms, triton" in note

    # What is not of this GPU, dtype, pass or size says nothing, nor does one kernel alone, nor
    # a faster one that auto never takes.
    says_nothing = [
        [],
        faster[:1],
        faster[1:],
        [timing("triton_tf32x3", 0.1), timing("theirs", 0.1), timing("reference", 1.0)],
        [timing("triton", 0.1, name="another GPU"), timing("reference", 1.0)],
        [timing("triton", 0.1, op="norm"), timing("reference", 1.0)],
        [timing("triton", 0.1, OTHER), timing("reference", 1.0, OTHER)],
    ]
    for change in ({"dtype": "float32"}, {"device": "cpu"}, {"phase": "prefill"}, {"rows": 63}):
        says_nothing.append([timing("triton", 0.1, **change), timing("reference", 1.0)])
    for timings in says_nothing:
        (name,), (note,) = chosen(timings)
        assert name == "reference" and note.startswith(f"{OP}: reference for 64 x 192, since ")
        silent = "times.json does not say" if timings else "no file (kernels.timings=null) says"
        assert f"since {silent} whether triton is faster on {device_name('cuda')}: nanolm" in note


def test_sizes_are_chosen_each_for_itself_and_told_once():
    timings = [
        *(timing("triton", 1.0), timing("reference", 2.0)),
        *(timing("triton", 0.2, SQUARE), timing("reference", 0.1, SQUARE)),
    ]
    names, notes = chosen(timings, sizes=(SQUARE, OTHER, WIDE, (8, 320)))
    assert names == ["reference", "reference", "triton", "reference"]
    timed, rest = notes
    assert "reference for 64 x 64 (" in timed and "; triton for 64 x 192 (" in timed
    assert (
        "320" not in timed
        and "reference for 64 x 320, 8 x 320, since times.json does not say" in rest
    )
    # The command times what was not timed: these sizes, in Muon's dtype, on its device.
    command = re.search(r"nanolm kernels bench (.*?) times them", rest).group(1)
    command = command.replace("--device cuda", "--device cpu")
    arguments = parse(bench.Arguments, command.split(), prog="nanolm kernels bench")
    asked = [PROBLEMS[OP](sizes).spec for sizes in arguments.of(OP)]
    assert asked == [spec(OTHER, "cpu"), spec((8, 320), "cpu")]
    assert arguments.save == "FILE" and "--kernels.timings FILE" in rest


def test_a_name_is_taken_at_its_word_and_a_cpu_has_no_choice():
    slower = [timing("triton", 2.0), timing("reference", 1.0)]
    assert chosen(slower, "triton") == (["triton"], [])
    assert chosen(slower, "reference") == (["reference"], [])
    assert chosen([], device="cpu") == (["reference"], [])
    record = {"op": OP, "kernel": "triton", "spec": spec_record(spec())}
    for kept in ((), (record,)):
        with pytest.raises(UserError, match=f"unknown {OP} kernel 'fastest'; choose from"):
            chosen(slower, "fastest", kept)
    with pytest.raises(UserError, match="unknown norm kernel 'fastest'"):
        Chooser().choose("norm", NormSpec(kind="rmsnorm", width=8), "fastest")


def test_a_resume_multiplies_as_its_checkpoint_did_size_by_size():
    chooser = Chooser((), [timing("triton", 1.0), timing("reference", 2.0)], "times.json")
    kernels = Kernels(device="cuda", dtype=BF16, decide=chooser.choose)
    for rows, columns in (WIDE, SQUARE):
        kernels.choose(OP, SymmetricProductSpec, rows=rows, columns=columns)
    kept = json.loads(json.dumps(records(kernels.choices.values())))
    names, notes = chosen([], kept=kept, sizes=(SQUARE, WIDE))  # the file is gone
    assert names == ["reference", "triton"]
    (note,) = notes
    assert note.startswith(f"{OP} of 64 x 192: triton, with which the checkpoint was trained; auto")
    assert f"reference now, which --kernels.{OP} reference says for every size" in note
    # With the same file all is as it was; a size that the checkpoint lacks is chosen afresh.
    same = [timing("triton", 1.0), timing("reference", 2.0)]
    assert chosen(same, kept=kept, sizes=(SQUARE, WIDE)) == (["reference", "triton"], [])
    assert chosen([], kept=kept, sizes=(OTHER,))[0] == ["reference"]
    (name,), (note,) = chosen([], "reference", kept)
    assert name == "reference" and f"{OP} of 64 x 192: reference instead of triton" in note
    # An earlier version kept one record, without a size: it speaks for all of them.
    del kept[1:], kept[0]["spec"]["rows"], kept[0]["spec"]["columns"]
    kept[0]["kernel"] = "triton"
    assert chosen([], kept=kept, sizes=(SQUARE, WIDE))[0] == ["triton", "triton"]


def test_muon_multiplies_each_matrix_with_the_kernel_of_its_size(make_learner):
    learner = make_learner()
    blocks = learner.trunk.blocks.parameters()
    shapes = {tuple(p.shape) for p in blocks if p.ndim == 2}
    sizes = {tuple(sorted(shape)) for shape in shapes}
    assert len(sizes) > 1 and any(rows > columns for rows, columns in shapes)
    fast = max(sizes)
    dtype = {"dtype": str(optim.iteration_dtype("cpu")).removeprefix("torch.")}
    timings = [timing("triton", 1.0, fast, **dtype), timing("reference", 2.0, fast, **dtype)]
    learner.trunk.kernels = Kernels(device="cuda", decide=Chooser((), timings, "a").choose)
    muon, _ = optim.build_optimizers(learner, optim.MuonOptions())
    names = {size: run.__self__.name for size, run in muon.products.items()}
    assert names == dict.fromkeys(sizes, "reference") | {fast: "triton"}

    met = {size: set() for size in sizes}
    muon.products = {
        size: lambda x, size=size: met[size].add(tuple(x.shape)) or x @ x.mT for size in sizes
    }
    for weight in muon.param_groups[0]["params"]:
        weight.grad = torch.ones_like(weight)
    muon.step()
    assert met == {size: {size} for size in sizes}


def test_bench_times_both_kernels_at_given_sizes_and_a_run_takes_what_it_saved(
    tmp_path, monkeypatch, capsys
):
    # The interpreted kernel stands for that of a GPU: `auto` may take it here.
    monkeypatch.setattr(TritonSymmetricProduct, "only_by_name_on", frozenset())
    monkeypatch.setattr(timed, "would_be_interpreted", lambda *_: False)
    times = str(tmp_path / "times.json")
    run = ["--optim.name=muon", "--train.steps=1", "--schedule.warmup=1"]
    train(tmp_path / "untimed", *run)
    said = " ".join(capsys.readouterr().out.split())
    (command,) = re.findall(r"nanolm (kernels bench .*?) --save FILE times them", said)
    words = [*command.split(), "--repetitions=1", "--save", times]
    cli.run(words)
    shown = capsys.readouterr().out
    rows = read_timings(times)
    assert {row["kernel"] for row in rows} >= {"reference", "triton"}
    sizes = [word for word in words if re.fullmatch(r"\d+x\d+", word)]
    assert len(sizes) > 1
    for size in sizes:
        assert re.search(rf"{OP}: {size.replace('x', ' x ')}, \w+, forward\n", shown)
        assert {r["kernel"] for r in rows if r["problem"].replace(" ", "") == size} >= {
            "reference",
            "triton",
        }
    for row in rows:  # the last size is the one that the kernel is faster at
        here = row["problem"].replace(" ", "") == sizes[-1]
        row["ms"] = 1.0 if (row["kernel"] == "triton") == here else 2.0
    (tmp_path / "times.json").write_text(json.dumps(rows))
    train(tmp_path / "timed", *run, f"--kernels.timings={times}")
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(f"{OP}, by the timings of") == 1 and "times them" not in said
    saved = json.loads((tmp_path / "timed/checkpoints/step-00000001/trainer.json").read_text())
    kept = {f"{r['spec']['rows']}x{r['spec']['columns']}": r["kernel"]
            for r in saved["kernels"] if r["op"] == OP}  # fmt: skip
    assert kept == dict.fromkeys(sizes, "reference") | {sizes[-1]: "triton"}


def test_a_product_is_timed_as_muon_asks_for_it_without_a_gradient():
    sizes = bench.Arguments(width=6, ff_width=8, device="cpu", matrices=["8x6", "5x5"])
    assert [(s.width, s.ff_width) for s in sizes.of(OP)] == [(6, 8), (5, 5)]
    assert sizes.of("norm") == [sizes] and bench.Arguments().of(OP) == [bench.Arguments()]
    for backward in (True, False):
        problem = PROBLEMS[OP](dataclasses.replace(sizes, backward=backward))
        assert problem.spec.phase == "train" and not problem.backward
        assert problem.flops == 2 * 6 * 6 * 8
        (product,) = found = call(problem, choose(OP, problem.spec).kernel, sizes)
        torch.testing.assert_close(product, problem.leaves[0] @ problem.leaves[0].mT)
        assert problem.n_bytes(found) == 4 * (6 * 8 + 6 * 6)
    norm = PROBLEMS["norm"](dataclasses.replace(sizes, batch=1, length=2))
    results = call(norm, choose("norm", norm.spec).kernel, sizes)
    assert norm.backward and len(results) == 2 + 3
    # Inputs (x, residual, gain) twice and their gradients, outputs and incoming gradients.
    assert norm.n_bytes(results) == 4 * (3 * (12 + 12 + 6) + 2 * (12 + 12))
    for wrong in ("64", "64x", "0x64", "64x64x64", "a x b", "64*64", ""):
        with pytest.raises(UserError, match=r"--matrices .*as 768x3072"):
            bench.matrix_size(wrong)
