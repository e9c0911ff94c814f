"""Which kernels a run takes: on resume those of its checkpoint, by name, by saved timings."""

import dataclasses
import json
import re

import pytest
import torch

from nanolm import cli
from nanolm.errors import UserError
from nanolm.ops.chooser import Chooser
from nanolm.ops.contract import AUTO, AttentionSpec, Kernels, candidates
from nanolm.ops.kept import read_records, records, spec_record
from nanolm.ops.masks import Mask
from nanolm.ops.timings import device_name, read_timings, save_timings
from nanolm.training.throughput import TIMING
from tests.prepared import train

HEADS = {"n_heads": 4, "n_kv_heads": 4, "head_dim": 8}
SPEC = AttentionSpec(**HEADS, causal=True)
AUTO_TAKES = Kernels().choose("attention", AttentionSpec, **HEADS, causal=True).name


def attention_kernels(run, step):
    saved = json.loads((run / f"checkpoints/step-{step:08d}/trainer.json").read_text())
    return {r["kernel"] for r in read_records(saved) if r["op"] == "attention"}


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def resumed(folder, capsys, *words, first=("--kernels.attention=reference",)):
    """A run of six steps, three before and three after a resume; what was said on the resume."""
    common = ["--run.checkpoint_every=3", "--run.log_every=1", "--schedule.warmup=1"]
    train(folder, *common, "--train.steps=3", *first)
    capsys.readouterr()
    train(folder, *common, "--train.steps=6", "--resume=auto", *words)
    return capsys.readouterr().out


def test_a_resume_takes_the_kernels_of_its_checkpoint(tmp_path, capsys):
    assert AUTO_TAKES != "reference"
    out = resumed(tmp_path / "kept", capsys)
    assert attention_kernels(tmp_path / "kept", 6) == {"reference"}
    assert re.search(rf"attention: reference, with which .*auto would take {AUTO_TAKES}", out)
    assert len(re.findall("with which the checkpoint", out)) == 1

    said = resumed(tmp_path / "named", capsys, "--kernels.attention=reference")
    assert "with which the checkpoint" not in said
    assert losses(tmp_path / "kept") == losses(tmp_path / "named")

    out = resumed(tmp_path / "other", capsys, f"--kernels.attention={AUTO_TAKES}")
    assert attention_kernels(tmp_path / "other", 6) == {AUTO_TAKES}
    words = rf"attention: {AUTO_TAKES} instead of reference, .*kernels.attention={AUTO_TAKES}"
    assert re.search(words, out)

    assert "with which the checkpoint" not in resumed(tmp_path / "auto", capsys, first=())


def chosen(kept, requested="auto", **details):
    chooser = Chooser(kept)
    kernels = Kernels({"attention": requested}, decide=chooser.choose)
    name = kernels.choose("attention", AttentionSpec, **HEADS, **details).name
    return name, chooser.notes


def kept_of(name, **changes):
    spec = spec_record(SPEC) | changes
    return [{"op": "attention", "kernel": name, "spec": spec}]


def test_what_of_a_checkpoint_cannot_go_on_is_told_with_its_reason():
    usual = AUTO_TAKES
    for record, reason in (
        (kept_of("triton", device="cuda"), "that was on cuda, this is cpu"),
        (kept_of("theirs"), "name its module under plugins"),
        (kept_of("triton_decode"), candidates("attention")["triton_decode"].why_not(SPEC)),
    ):
        name, (note,) = chosen(record, causal=True)
        assert name == usual and reason in note and f"{usual} instead of" in note
        name, (note,) = chosen(record, "reference", causal=True)
        assert name == "reference" and "kernels.attention=reference asks for it" in note
    # Another kind of layer says nothing of this one, and the same kernel is no difference.
    assert chosen(kept_of("reference", window=8), causal=True) == (usual, [])
    assert chosen(kept_of(usual), causal=True) == (usual, [])
    assert chosen(kept_of(usual, device="cuda"), causal=True) == (usual, [])
    # What was trained here comes before what was trained elsewhere, whichever was written first.
    here, there = kept_of("reference"), kept_of("triton", device="cuda")
    for both in (here + there, there + here):
        name, (note,) = chosen(both, causal=True)
        assert name == "reference" and "that was on cuda" not in note
    # A spec that knew fewer fields, as an earlier version wrote it.
    (record,) = kept_of("reference")
    del record["spec"]["dropout"]
    assert chosen([record], causal=True)[0] == "reference"


def test_records_are_json_and_damaged_ones_are_refused():
    kernels = Kernels()
    kernels.choose("attention", AttentionSpec, **HEADS, masks=frozenset({"window", "causal"}))
    found = json.loads(json.dumps(records(kernels.choices.values())))
    assert found[0]["spec"]["masks"] == ["causal", "window"]
    assert found[0]["spec"]["dtype"] == "float32"
    assert read_records({"kernels": found}) == found
    assert read_records({}) == read_records(None) == []
    for damaged in (3, ["attention"], [{"op": "attention"}], [found[0] | {"spec": 3}]):
        with pytest.raises(UserError, match="no usable 'kernels'"):
            read_records({"kernels": damaged})


def timing(kernel, ms, *, problem="1 x 32", name=None, **changes):
    spec = spec_record(SPEC) | changes
    device = name or device_name("cpu")
    row = {"op": "attention", "kernel": kernel, "device_name": device, "problem": problem}
    return row | {"ms": ms, "spec": spec}


def fastest(timings, requested="fastest", **details):
    chooser = Chooser((), timings, "times.json")
    kernels = Kernels({"attention": requested}, decide=chooser.choose)
    details = HEADS | {"causal": True} | details
    return kernels.choose("attention", AttentionSpec, **details).name, chooser.notes


def test_fastest_takes_what_was_timed_on_this_device_for_this_layer():
    name, (note,) = fastest([timing("sdpa", 3.0), timing("reference", 2.0)])
    assert name == "reference" and "reference 2 ms, sdpa 3 ms" in note and "times.json" in note
    assert fastest([timing("sdpa", 1.0), timing("reference", 2.0)])[0] == "sdpa"
    # The fastest of those that can serve: softcap is beyond sdpa.
    both = [timing("sdpa", 1.0), timing("reference", 2.0)]
    name, (note,) = fastest(both, softcap=30.0)
    assert name == "reference" and "without the layer's softcap" in note
    # Of two problems the one with as many heads, else the last that was saved.
    far = [timing("reference", 9.0, problem="far", n_heads=16), timing("sdpa", 99.0, problem="far")]
    assert fastest([*both, far[0], timing("sdpa", 10.0, problem="far", n_heads=16)])[0] == "sdpa"
    for strange in (
        {"dtype": "bfloat16"},
        {"head_dim": 16},
        {"causal": False},
        {"phase": "prefill"},
        {"name": "another processor"},
    ):
        rows = [timing("reference", 0.1, **strange), timing("sdpa", 1.0), timing("reference", 2.0)]
        assert fastest(rows)[0] == "sdpa", strange
        with pytest.raises(UserError, match=r"kernels bench --op attention .*--head_dim 8 "):
            fastest(rows[:1])


def test_fastest_goes_on_with_the_kernel_of_the_checkpoint():
    """It names no kernel: what was timed since then is for new runs."""
    rows = [timing("sdpa", 1.0), timing("reference", 2.0)]
    chooser = Chooser(kept_of("reference"), rows, "times.json")
    kernels = Kernels({"attention": "fastest"}, decide=chooser.choose)
    assert kernels.choose("attention", AttentionSpec, **HEADS, causal=True).name == "reference"
    another = kernels.choose("attention", AttentionSpec, **HEADS, causal=True, window=4)
    assert another.name == "sdpa"  # a kind of layer that the checkpoint does not know


def test_fastest_without_timings_says_what_to_run_and_inference_needs_none():
    with pytest.raises(UserError, match=r"kernels\.timings=null.*--kernels\.timings FILE") as error:
        chooser = Chooser()
        Kernels({"attention": "fastest"}, decide=chooser.choose).choose(
            "attention", AttentionSpec, **HEADS
        )
    command = re.search(r"nanolm (kernels bench .*?) --save FILE", str(error.value)).group(1)
    assert command.split()[:4] == ["kernels", "bench", "--op", "attention"]
    kernels = Kernels({"attention": "fastest"}, phase="prefill", decide=Chooser().choose)
    assert (
        kernels.choose("attention", AttentionSpec, **HEADS, causal=True).name in AUTO["attention"]
    )


def test_auto_tells_once_of_a_kernel_that_is_a_tenth_faster():
    slow = [timing(AUTO_TAKES, 1.2), timing("reference", 1.0)]
    name, (note,) = fastest(slow, "auto")
    assert name == AUTO_TAKES and "reference took 1 ms" in note and "fastest takes that" in note
    assert fastest([timing(AUTO_TAKES, 1.05), timing("reference", 1.0)], "auto")[1] == []
    assert fastest([timing("reference", 1.0)], "auto")[1] == []
    chooser = Chooser((), slow, "times.json")
    kernels = Kernels(decide=chooser.choose)
    for window in (None, None, 4):  # two kinds of layer, the same figures
        kernels.choose("attention", AttentionSpec, **HEADS, causal=True, window=window)
    assert len([n for n in chooser.notes if "window" not in n]) == 1


def test_timings_are_kept_by_kernel_and_problem_and_other_files_are_refused(tmp_path):
    path = str(tmp_path / "times.json")
    save_timings(path, [timing("sdpa", 1.0), timing("reference", 2.0)])
    save_timings(path, [timing("sdpa", 3.0), timing("sdpa", 4.0, problem="2 x 32")])
    assert [(row["kernel"], row["ms"]) for row in read_timings(path)] == [
        ("sdpa", 3.0),
        ("reference", 2.0),
        ("sdpa", 4.0),
    ]
    for text, words in (("{", "is not JSON"), ("{}", "no timings"), ('[{"op": 1}]', "no timings")):
        (tmp_path / "times.json").write_text(text)
        with pytest.raises(UserError, match=words):
            read_timings(path)
    with pytest.raises(UserError, match=r"No such file.*kernels bench --save"):
        read_timings(str(tmp_path / "none.json"))


def test_bench_saves_what_a_run_then_takes(tmp_path, capsys):
    path = str(tmp_path / "times.json")
    words = "--op attention --batch 1 --length 32 --heads 4 --kv_heads 4 --head_dim 8"
    cli.run(["kernels", "bench", *words.split(), "--repetitions=1", "--device=cpu", "--save", path])
    shown = capsys.readouterr().out
    assert re.search(r"kernel +ms +host µs", shown) and re.search(r"sdpa +[\d.]+ +[\d.]+", shown)
    rows = read_timings(path)
    assert {"sdpa", "reference"} <= {row["kernel"] for row in rows}
    for row in rows:
        row["ms"] = 0.5 if row["kernel"] == "reference" else 1.0
    save_timings(path, rows)
    with pytest.raises(UserError, match="--backward false"):
        cli.run(["kernels", "bench", "--op=norm", "--backward=false", "--save", path])
    short = ["--train.steps=1", "--schedule.warmup=1", "--data.document_mask=false"]
    short += ["--kernels.attention=fastest", f"--kernels.timings={path}"]
    train(tmp_path / "run", *short)
    assert attention_kernels(tmp_path / "run", 1) == {"reference"}
    assert "reference is the fastest on" in capsys.readouterr().out
    train(tmp_path / "auto", *short, "--kernels.attention=auto")
    assert "fastest takes that" in capsys.readouterr().out


def test_cudnn_is_a_candidate_on_hopper_alone_and_computes_what_sdpa_does(monkeypatch):
    kernel, sdpa = (candidates("attention")[name] for name in ("sdpa_cudnn", "sdpa"))
    assert "sdpa_cudnn" not in AUTO["attention"]
    on_gpu = dataclasses.replace(SPEC, device="cuda", dtype=torch.bfloat16)
    assert "NVIDIA" in kernel.why_not(SPEC)
    assert "float32" in kernel.why_not(dataclasses.replace(on_gpu, dtype=torch.float32))
    assert "soft-cap" in kernel.why_not(dataclasses.replace(on_gpu, softcap=30.0))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100")
    for capability, refused in (((8, 0), True), ((9, 0), False), ((10, 0), True)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda c=capability: c)
        assert (kernel.why_not(on_gpu) is not None) == refused
    q, k, v = torch.randn(3, 2, 7, 4, 8, generator=torch.Generator().manual_seed(0)).unbind()
    mask = Mask(causal=True)
    ours, theirs = (found.run(q, k, v, mask, scale=0.3) for found in (kernel, sdpa))
    torch.testing.assert_close(ours, theirs)
