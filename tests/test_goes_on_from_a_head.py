"""Fine-tuning that goes on from a checkpoint with a head of the same task keeps that head."""

import json

import pytest
import torch

from nanolm.checkpoint.container import read_tensors
from nanolm.errors import UserError
from nanolm.finetune.run import load_task_config, run_finetune
from nanolm.saved import open_saved
from tests.finetuned import QUIET, questions, table
from tests.published import write_published
from tests.test_hub_heads import imported


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """An imported Llama with a head of classification, which reads what its tokenizer frames."""
    folder = tmp_path_factory.mktemp("decoder")
    write_published(folder / "published", "llama-classify")
    imported(folder / "published", folder / "run")
    return folder / "run"


def objective_of(base, *words):
    return load_task_config([f"--init_from={base}", *words]).objective


def test_a_silent_config_takes_the_head_of_the_checkpoint(decoder, tmp_path):
    for words in ([], ["--objective.name=classify"], ["--objective.label_smoothing=0.1"]):
        found = objective_of(decoder, *words)
        assert (found.name, found.head, found.frame) == ("classify", "linear", "tokenizer")
        assert found.labels is None  # what is not of the head is the data's
    told = objective_of(decoder, "--objective.frame=trunk")
    assert (told.head, told.frame) == ("linear", "trunk")
    (tmp_path / "a.yaml").write_text("objective: {name: classify, head: layer}\n")
    told = objective_of(decoder, f"--config={tmp_path / 'a.yaml'}")
    assert (told.head, told.frame) == ("layer", "tokenizer")
    (tmp_path / "b.yaml").write_text(f"init_from: {decoder}\n")
    assert load_task_config([f"--config={tmp_path / 'b.yaml'}"]).objective.head == "linear"


def test_another_task_has_a_head_of_its_own(decoder, tmp_path):
    (tmp_path / "a.yaml").write_text("objective: {name: tag}\n")
    for words in (["--objective.name=tag"], [f"--config={tmp_path / 'a.yaml'}"]):
        found = objective_of(decoder, *words)
        assert (found.name, found.frame) == ("tag", "trunk")
    # A command line has the last word on which task it is.
    found = objective_of(decoder, f"--config={tmp_path / 'a.yaml'}", "--objective.name=classify")
    assert (found.head, found.frame) == ("linear", "tokenizer")
    with pytest.raises(UserError, match="objective"):
        objective_of(decoder, "--objective.name=none_of_them")


def test_the_weights_of_the_head_go_on(decoder, tmp_path, capsys):
    labels = open_saved(decoder).config.objective.labels
    records = [
        {"text": record["text"], "label": labels[number % len(labels)]}
        for number, record in enumerate(questions(12))
    ]
    for name in ("train", "val"):
        table(tmp_path / "data", name, records)
    words = [f"--init_from={decoder}", f"--data.path={tmp_path / 'data'}", "--data.row_length=32"]
    words += [*QUIET, f"--run.dir={tmp_path / 'run'}", "--train.steps=1", "--train.global_batch=4"]
    run_finetune(load_task_config([*words, "--optim.lr=1e-9", "--eval.every=1"]))
    assert "fresh heads" not in capsys.readouterr().out
    run = open_saved(tmp_path / "run")
    before = read_tensors(decoder, "model")
    after = dict(run.learner.state_dict())
    heads = [name for name in before if name.startswith("heads.")]
    assert heads
    for name in heads:
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0)
    assert run.config.objective.frame == "tokenizer"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 1
