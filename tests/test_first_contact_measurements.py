"""The measurements of `make gpu`, on a CPU: each finds what is wrong, and times what it says."""

import dataclasses
import pathlib
import sys

import numpy as np
import pytest
import torch

from nanolm.ops.contract import candidates
from nanolm.ops.masks import KINDS, Mask
from nanolm.ops.reference import ReferenceAttention
from nanolm.registry import OPS
from nanolm.tools.first_contact import (
    attention_speed,
    device_time,
    numerics,
    resume,
    training,
)
from nanolm.tools.first_contact.measurement import LEFT_OUT, read_figures
from nanolm.tools.first_contact.real_sizes import attention_cases, checks
from nanolm.tools.kernel_check.attention_cases import SINGLE
from nanolm.tools.kernel_check.attention_trials import make_mask
from nanolm.tools.kernel_check.conformance import check_case
from tests.tiny_run import in_ranks

ROOT = pathlib.Path(__file__).parent.parent
PYTHON = sys.executable


def test_the_checks_are_of_real_sizes():
    cases = attention_cases()
    lengths = {case.n_queries for case in cases.values() if case.phase == "train"}
    assert min(lengths) >= 70 and {256, 512, 1024, 4096} <= lengths
    assert max(case.n_keys for case in cases.values()) == 4097
    assert {16, 64, 80, 96, 128, 256} <= {case.width for case in cases.values()}
    kinds = {kind for case in cases.values() for kind in make_mask(case).kinds()}
    assert kinds == set(KINDS)
    biases = {case.bias for case in cases.values()}
    assert biases == {
        *("none", "alibi", "bucket", "dense", "dense_all", "dense_by_head", "dense_by_row")
    }
    assert {case.order for case in cases.values()} == {"none", "loose", "strict"}
    assert {case.layout for case in cases.values()} == {"contiguous", "heads_first", "sliced"}
    assert {case.dtype for case in cases.values()} == {torch.bfloat16, torch.float16, torch.float32}
    assert any(case.softcap for case in cases.values() if case.phase == "train")
    assert any(case.n_heads > case.n_kv_heads for case in cases.values() if case.phase == "train")
    names = [check.name for check in checks("cpu", 1)]
    for wanted in ("600 16384", "40000 768", "3000 50257", "dropout in bf16"):
        assert any(wanted in name for name in names), wanted
    assert {check.op for check in checks("cpu", 1)} == set(OPS) - {"linear"}
    assert len(names) == len({(check.op, check.name) for check in checks("cpu", 1)})


class Mine(ReferenceAttention):
    """The reference under a name that promises the same bits."""

    name = "triton_mine"

    def why_not(self, spec):
        return None


class Blind(Mine):
    """Forgets windows."""

    def run(self, q, k, v, mask, **options):
        return super().run(q, k, v, dataclasses.replace(mask, window=None), **options)


class Restless(Mine):
    """Right, but never the same bits."""

    def run(self, q, k, v, mask, **options):
        self.turns = getattr(self, "turns", 0) + 1
        return super().run(q, k, v, mask, **options) * (1 + 1e-7 * self.turns)


class RestlessBehind(Mine):
    """Its gradients alone vary."""

    def run(self, q, k, v, mask, **options):
        self.turns = getattr(self, "turns", 0) + 1
        factor = 1 + 1e-7 * self.turns
        out = super().run(q, k, v, mask, **options)
        out.register_hook(lambda grad: grad * factor)
        return out


class Raising(Mine):
    def run(self, *arguments, **options):
        raise RuntimeError("no such tile")


def found_by_numerics(monkeypatch, tmp_path, kernel, only):
    known = candidates("attention") | {kernel.name: kernel}
    monkeypatch.setattr(numerics, "candidates", lambda op: known)
    path = tmp_path / "figures.jsonl"
    options = {"device": "cpu", "divide": 16, "kernels": [kernel.name], "json": str(path)}
    status = numerics.run(numerics.Arguments(only=only, **options))
    return status, read_figures(path)


def test_a_kernel_that_is_right_passes(monkeypatch, tmp_path):
    status, found = found_by_numerics(monkeypatch, tmp_path, Mine(), "attention a causal window")
    assert status == 0 and [row["ok"] for row in found] == [True]
    assert found[0]["promised"] and found[0]["same_bits"]


@pytest.mark.parametrize(
    ("kernel", "only", "told"),
    [
        (Blind(), "a causal window", "of 3e-02"),
        (Restless(), "GPT-2 in fp32", "not the same bits twice"),
        (RestlessBehind(), "GPT-2 in fp32", "not the same bits twice"),
        (Raising(), "GPT-2 in fp32", "it raises RuntimeError: no such tile"),
    ],
)
def test_a_kernel_that_is_wrong_is_found(monkeypatch, tmp_path, capsys, kernel, only, told):
    status, found = found_by_numerics(monkeypatch, tmp_path, kernel, only)
    assert status == 1 and [row["ok"] for row in found] == [False]
    assert told in found[0]["words"]
    assert "FAIL attention" in capsys.readouterr().out


@pytest.mark.parametrize(("kernel", "status"), [(RestlessBehind(), 0), (Restless(), 1)])
def test_gradients_that_say_that_they_vary_are_told_and_pass(monkeypatch, tmp_path, kernel, status):
    kernel.varies_on = {"cpu": "it adds in any order"}
    left, found = found_by_numerics(monkeypatch, tmp_path, kernel, "GPT-2 in fp32")
    assert left == status and not found[0]["same_bits"] and not found[0]["promised"]


def test_a_check_that_cannot_be_made_does_not_end_the_others(monkeypatch, tmp_path):
    def fails():
        raise torch.OutOfMemoryError("no room")

    broken = [dataclasses.replace(c, make=fails) for c in checks("cpu", 16) if c.op == "glu"]
    monkeypatch.setattr(numerics, "checks", lambda *_: broken)
    path = tmp_path / "figures.jsonl"
    status = numerics.run(numerics.Arguments(device="cpu", divide=16, json=str(path)))
    assert status == 1 and len(read_figures(path)) == len(broken) > 1


def test_the_shares_are_all_of_the_checks():
    def names(share, shares):
        options = {"device": "cpu", "share": share, "shares": shares}
        return [check.name for check in numerics.chosen(numerics.Arguments(**options))]

    parts = [names(i, 5) for i in range(5)]
    assert sorted(name for part in parts for name in part) == sorted(names(0, 1))


def test_keyed_dropout_is_checked_against_the_documented_function(monkeypatch, tmp_path):
    path = tmp_path / "figures.jsonl"
    options = {"device": "cpu", "divide": 16, "kernels": ["triton"], "json": str(path)}
    assert numerics.run(numerics.Arguments(only="dropout in fp32", **options)) == 0
    (row,) = read_figures(path)
    assert row["kernel"] == "triton" and row["same_bits"]
    monkeypatch.setattr("nanolm.tools.first_contact.real_sizes.keep_mask", keep_all)
    assert numerics.run(numerics.Arguments(only="dropout in fp32", **options)) == 1


def keep_all(seed, dropout, shape):
    return np.ones(shape, dtype=bool)


class Compiling(ReferenceAttention):
    """Compiles itself for every problem, as FlexAttention does."""

    name = "compiling"

    def why_not(self, spec):
        return None

    def run(self, q, k, v, mask, **options):
        return compiled(q, k, v, mask, options)


def attend(q, k, v, mask, options):
    return ReferenceAttention().run(q, k, v, mask, **options)


compiled = torch.compile(attend, backend="eager", fullgraph=True)


def test_a_kernel_that_compiles_itself_is_not_refused_the_ninth_problem():
    cases = list(SINGLE.items())[:12]
    findings = [check_case(Compiling(), name, case, "cpu") for name, case in cases]
    assert {finding.verdict for finding in findings} == {"pass"}, findings


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 5), (False, 5)])
def test_attentions_pairs_are_those_of_the_mask(causal, window):
    (plain,) = attention_speed.problems("cpu")
    sizes = dataclasses.replace(plain.sizes, length=23, causal=causal)
    problem = dataclasses.replace(plain, sizes=sizes, window=window)
    allowed = Mask(causal=causal, window=window).dense(23, 23)
    assert problem.pairs() == int(allowed.sum())


def test_attention_is_measured_beside_others_and_a_refusal_is_a_row(monkeypatch, tmp_path):
    path = tmp_path / "figures.jsonl"
    arguments = attention_speed.Arguments(device="cpu", repetitions=1, json=str(path))
    assert attention_speed.run(arguments) == 0
    found = {row["kernel"]: row for row in read_figures(path)}
    assert list(found) == ["nanolm sdpa", "SDPA flash", "SDPA math"]
    assert all(row["differs"] < 0.02 and row["both_ms"] > 0 for row in found.values())

    def refused(problem, backend):
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(attention_speed, "sdpa_call", refused)
    assert attention_speed.run(arguments) == 0
    assert "no kernel for this" in read_figures(path)[1]["raises"]
    monkeypatch.setattr(attention_speed, "nanolm_call", refused)
    assert attention_speed.run(arguments) == 1


def test_flex_attention_gets_the_mask_of_the_problem(monkeypatch):
    """Not compiled here: that its arguments mean what they should."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    (plain,) = attention_speed.problems("cpu")
    sizes = dataclasses.replace(plain.sizes, heads=4, dtype="float32", backward=False, length=130)
    problem = dataclasses.replace(plain, sizes=sizes, window=40)
    q, k, v = (sizes.leaf(1, 130, heads, 16) for heads in (4, 2, 2))
    expected = attention_speed.nanolm_call(problem, "sdpa")(q, k, v)
    assert torch.allclose(attention_speed.flex_call(problem)(q, k, v), expected, atol=1e-5)


def test_device_time_is_taken_with_a_cold_cache_and_a_host_that_is_ahead(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = len(done)
            done.append("record")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, other):
            return other.at - self.at

    class Cache:
        def zero_(self):
            done.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep"))
    monkeypatch.setattr(device_time.torch, "empty", lambda *_, **__: Cache())
    assert device_time.milliseconds(lambda: done.append("call"), "cuda", 2) == 2
    turn = ["flush", "sleep", "record", "call", "record", "wait"]
    assert done == ["call"] * device_time.WARM_UP + turn * 2


def test_a_contestant_that_is_not_installed_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(training, "why_not", lambda job, device: "transformers is not installed")
    arguments = training.Arguments(model="transformers-gpt2", device="cpu", shape="tiny")
    assert training.run(arguments) == LEFT_OUT
    assert capsys.readouterr().out == "transformers is not installed\n"


def test_a_loss_that_is_no_number_fails_the_step(monkeypatch, tmp_path, capsys):
    path = tmp_path / "figures.jsonl"
    options = {"device": "cpu", "shape": "tiny", "precision": "fp32", "json": str(path)}
    arguments = training.Arguments(kernels="torch", **options)
    assert arguments.job["settings"]["kernels"]["linear_cross_entropy"] == "chunked"
    row = training.measure(arguments.job)
    monkeypatch.setattr(training, "measure", lambda job: dict(row))
    assert training.run(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("nanolm clm, torch's kernels: ") and " ms a step" in out
    (found,) = read_figures(path)
    assert found["kernels"]["attention"] == "sdpa" and found["size"] == "tiny"
    row["losses"] = [6.2, float("nan")]
    assert training.run(arguments) == 1


def test_the_first_difference_of_a_resumed_run_is_named():
    calm = [{"step": s, "kind": "train", "loss": float(s), "lr": 0.1} for s in range(3)]
    assert resume.difference(calm, [dict(record) for record in calm]) == ""
    hit = [*calm[:2], calm[2] | {"loss": 2.0000001}]
    told = resume.difference(calm, hit)
    assert told == "step 2 (train): loss is 2.0000001 and was 2.0"
    assert resume.difference(calm, calm[:2]) == "2 lines of metrics where 3 were"


def alone_in_a_group(_):
    from nanolm.distributed.world import World
    from nanolm.tools.first_contact.groups import group_of_one, trained

    _, plain = trained(World(), "ddp", "fp32", 2)
    world = group_of_one(torch.device("cpu"))
    found = {name: trained(world, name, "fp32", 2) for name in ("ddp", "fsdp")}
    names = [type(module).__name__ for module, _ in found.values()]
    return [plain, *(figures for _, figures in found.values()), names, world.gather({"a": 1})]


def test_one_rank_with_a_group_goes_the_ways_of_many():
    ((plain, ddp, fsdp, names, gathered),) = in_ranks(1, alone_in_a_group)
    assert names == ["DistributedDataParallel", "FSDPLearner"] and gathered == [{"a": 1}]
    assert len(plain) == 4 and plain[1] > 0  # losses and norms
    assert ddp == pytest.approx(plain, abs=1e-5) and fsdp == pytest.approx(plain, abs=1e-5)
