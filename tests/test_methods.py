"""Fine-tuning by every method, end to end: adapters, rules, freezing and noise on a tiny task."""

import json

import pytest

from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.errors import UserError
from nanolm.saved import open_saved
from tests.finetuned import checkpoint, command, finetune, questions, table

SHORT = ("--optim.lr=1e-2", "--train.global_batch=12", "--objective.head_dropout=0")

METHODS = {
    "lora": ["--peft.name=lora", "--peft.targets", "q", "v", "up"],
    "adalora": ["--peft.name=adalora", "--peft.rank=4", "--peft.target_rank=2"],
    "prefix": ["--peft.name=prefix", "--peft.length=4"],
    "prompt": [
        "--peft.name=prompt",
        "--peft.length=4",
        "--data.pack=false",
        "--data.row_length=48",
    ],
    "packed prompt": ["--peft.name=prompt", "--peft.length=4", "--data.row_length=48"],
    "last": ["--tune.what=last", "--tune.n_layers=1", "--tune.layer_decay=0.8"],
    # Whole blocks that begin to move with this file's rate, 1e-2, overshoot from some starts.
    "gradual": ["--tune.unfreeze_every=3", "--optim.lr=3e-3"],
    "fgm": [
        "--train.rule.name=fgm",
        # Embeddings of so few steps are short: an epsilon of 1 leaves nothing of them.
        "--train.rule.epsilon=0.1",
        "--train.rule.inner.name=rdrop",
        "--train.micro_batch=7",
    ],
    "noise": ["--augment.dropout=0.1", "--augment.swap=0.1", "--augment.mask=0.1"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    table(folder, "train", questions(96))
    table(folder, "val", questions(30, 1000))
    table(folder, "test", questions(30, 2000))
    return folder


# A packed prompt is the harder one, and tests/test_tuning.py unfreezes on two ranks.
SLOW = ("prompt", "gradual")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in METHODS]
)
def test_a_classifier_by_every_method(name, data, tmp_path):
    run, report = tmp_path / name, tmp_path / "report.json"
    finetune(checkpoint("mlm"), data, run, *SHORT, *METHODS[name], "--train.epochs=2")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < 0.97 * losses[0]
    command("evaluate", str(run), f"--json={report}")
    assert json.loads(report.read_text())["rows"] == 30
    if METHODS[name][0].startswith("--peft"):
        small = learner_tensors(open_saved(run, phase="train").learner)
        assert any(key.startswith("heads.") for key in small)
        assert not any(key.endswith("embedding.weight") for key in small)


def test_a_fine_tuned_adapter_is_merged(data, tmp_path):
    run, out = tmp_path / "run", tmp_path / "merged"
    finetune(checkpoint("mlm"), data, run, *SHORT, *METHODS["lora"], "--train.epochs=1")
    command("merge", str(run), f"--out={out}")
    left, right = tmp_path / "left.json", tmp_path / "right.json"
    command("evaluate", str(run), f"--json={left}")
    command("evaluate", str(out), f"--json={right}")
    left, right = (json.loads(path.read_text()) for path in (left, right))
    assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)
    assert left["accuracy"] == right["accuracy"]


def test_what_cannot_go_together_is_refused(data, tmp_path):
    base, run = checkpoint("mlm"), tmp_path / "run"
    with pytest.raises(UserError, match=r"peft=prompt .*data\.pack"):
        masked = ("--peft.name=prompt", "--kernels.attention=sdpa")
        finetune(base, data, run / "1", *SHORT, *masked)
    with pytest.raises(UserError, match=r"tune\.what=heads cannot go with peft"):
        finetune(base, data, run / "2", *SHORT, "--peft.name=lora", "--tune.what=heads")
    with pytest.raises(UserError, match="not random ones"):
        finetune(base, data, run / "3", *SHORT, "--peft.name=lora", "--weights=random")
