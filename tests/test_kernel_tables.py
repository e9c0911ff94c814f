"""Tables with one entry an op have one for every op, and commands that go through them leave no
kernel out, a plug-in's included."""

import json
import pathlib

import pytest

from nanolm import cli
from nanolm.ops.contract import AUTO, candidates, kernel
from nanolm.registry import KERNELS, OPS, SIZED, TIMED
from nanolm.tools.kernel_check import survey
from nanolm.tools.kernel_check.examination import errands as errands_of
from nanolm.tools.kernel_check.op_suites import LARGE, MIXED, TRIALS
from nanolm.tools.kernel_check.problems import PROBLEMS
from nanolm.tools.kernel_check.survey import patients, typical
from nanolm.tools.kernel_check.trial import OP_OF


@pytest.fixture
def outsiders():
    """A kernel of every op that serves everything, as the definition does."""
    for op in OPS:

        @kernel(op)
        class Outsider:
            """From outside."""

            name = "outsider"
            plain = candidates(op)["reference"]

            def why_not(self, spec):
                return None

            def run(self, *inputs, **options):
                return self.plain.run(*inputs, **options)

    yield
    for op in OPS:
        del KERNELS[op]._entries["outsider"]


def test_every_table_of_ops_has_all_of_them():
    assert set(AUTO) == set(PROBLEMS) == set(OP_OF.values()) == set(OPS)
    # Attention has a suite of its own (attention_cases.py).
    assert set(TRIALS) == set(LARGE) == set(MIXED) == {*OPS} - {"attention"}
    assert not set(TIMED) & set(SIZED) and {*TIMED, *SIZED} <= set(OPS)
    for op in OPS:
        spec = typical(op, "cpu")
        assert OP_OF[type(spec).__name__] == op
        assert candidates(op)["reference"].why_not(spec) is None


def test_list_and_doctor_know_a_kernel_of_every_op(outsiders, tmp_path, monkeypatch, capsys):
    path = str(tmp_path / "list.json")
    cli.run(["kernels", "list", "--device", "cpu", "--json", path])
    rows = {(r["op"], r["kernel"]): r for r in json.loads((tmp_path / "list.json").read_text())}
    assert set(rows) == {(op, name) for op in OPS for name in candidates(op)}
    for op in OPS:
        assert rows[op, "outsider"]["status"] == "can serve, when named"
    assert "linear" in capsys.readouterr().out.splitlines()

    checked = patients("cpu")
    assert {p.op for p in checked if p.kernel == "outsider"} == set(OPS)
    linear = [p for p in checked if p.op == "linear" and p.kernel == "outsider"]
    monkeypatch.setattr(survey, "patients", lambda device: linear)
    cli.run(["kernels", "doctor", "--device", "cpu", "--jobs", "1"])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("linear ")]
    assert "outsider" in line and "0 failed" in line


def test_list_says_of_a_product_that_a_timing_can_make_it_autos(tmp_path):
    path = tmp_path / "list.json"
    cli.run(["kernels", "list", "--device", "cuda", "--json", str(path)])
    rows = {(r["op"], r["kernel"]): r["status"] for r in json.loads(path.read_text())}
    assert rows["symmetric_product", "reference"] == "auto takes it"
    assert rows["symmetric_product", "triton"] == "can serve, when named or timed to be faster"
    assert rows["symmetric_product", "triton_tf32x3"] == "can serve, when named"
    assert rows["norm", "reference"] == "can serve, when named"


def test_doctor_takes_plug_ins(tmp_path, monkeypatch, capsys):
    (tmp_path / "theirs_linear.py").write_text(
        "from nanolm.ops import kernel\n"
        "@kernel('linear')\n"
        "class Theirs:\n"
        "    name = 'theirs'\n"
        "    why_not = lambda self, spec: None\n"
        "    run = lambda self, x, weight, bias: x @ weight.mT\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        every = patients
        monkeypatch.setattr(
            survey, "patients", lambda device: [p for p in every(device) if p.kernel == "theirs"]
        )
        words = ["--device", "cpu", "--jobs", "1", "--plugins", "theirs_linear"]
        with pytest.raises(SystemExit) as leaving:
            cli.run(["kernels", "doctor", *words])
    finally:
        KERNELS["linear"]._entries.pop("theirs", None)
    assert leaving.value.code == 1
    assert "it ignores the bias" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_that_share_the_checks_import_the_plug_ins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        survey, "patients", lambda device: [survey.Patient("attention", "outsider", False)]
    )
    monkeypatch.setattr(survey, "errands", lambda *who, quick: errands_of(*who, quick=quick)[:3])
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "docs" / "plugins")
    words = ["--device", "cpu", "--jobs", "2", "--plugins", "outsider.attention"]
    try:
        cli.run(["kernels", "doctor", *words])
    finally:
        KERNELS["attention"]._entries.pop("outsider", None)
    assert "3 passed   0 failed" in capsys.readouterr().out
