"""Fine-tuning that goes on from a checkpoint with a head of the same task keeps that head."""

import json

import pytest
import torch

from nanolm.checkpoint.container import read_tensors
from nanolm.errors import UserError
from nanolm.finetune.label_order import labels_by_head
from nanolm.finetune.run import load_task_config, run_finetune
from nanolm.saved import open_saved
from tests.finetuned import QUIET, checkpoint, questions, table
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


ORDER = ["perhaps", "no", "yes"]


def labelled(folder, labels):
    records = [
        {"text": record["text"], "label": labels[number % len(labels)]}
        for number, record in enumerate(questions(12))
    ]
    for name in ("train", "val"):
        table(folder, name, records)
    return folder


def words_for(base, data, run, *words):
    more = ["--data.row_length=32", *QUIET, "--train.steps=1", "--train.global_batch=4"]
    more += ["--optim.lr=1e-9", "--eval.every=1", *words]
    return [f"--init_from={base}", f"--data.path={data}", f"--run.dir={run}", *more]


@pytest.fixture(scope="module")
def ordered(tmp_path_factory):
    """A run whose labels stand in an order that is not that of their names."""
    folder = tmp_path_factory.mktemp("ordered")
    data = labelled(folder / "data", ORDER)
    words = words_for(checkpoint(), data, folder / "run", f"--objective.labels=[{','.join(ORDER)}]")
    run_finetune(load_task_config([*words, "--objective.name=classify"]))
    return folder / "run"


def test_labels_keep_their_rows_whatever_the_order_of_their_names(ordered, tmp_path, capsys):
    """A table's labels are numbered by name; a head that goes on answers with the names that it
    had, balanced weights among them."""
    data = labelled(tmp_path / "data", ORDER)
    words = words_for(ordered, data, tmp_path / "run", "--objective.class_weights=balanced")
    run_finetune(load_task_config(words))
    assert "fresh heads" not in capsys.readouterr().out
    before, after = open_saved(ordered), open_saved(tmp_path / "run")
    assert after.config.objective.labels == before.config.objective.labels == ORDER
    weight = "heads.classify.out.weight"
    torch.testing.assert_close(
        after.learner.state_dict()[weight],
        before.learner.state_dict()[weight],
        atol=1e-6,
        rtol=0,
    )


def test_another_order_in_the_config_is_refused_and_the_remedy_works(ordered, tmp_path):
    data = labelled(tmp_path / "data", ORDER)
    told = words_for(ordered, data, tmp_path / "a", "--objective.labels=[no,perhaps,yes]")
    said = r"was trained with \[perhaps, no, yes\], so that answers .* name them in that order"
    with pytest.raises(UserError, match=said):
        run_finetune(load_task_config(told))
    mended = words_for(ordered, data, tmp_path / "b", f"--objective.labels=[{','.join(ORDER)}]")
    assert run_finetune(load_task_config(mended))["steps"] == 1
    # A head that starts fresh has no rows that could get a wrong name.
    fresh = words_for(ordered, data, tmp_path / "c", "--objective.labels=[no,perhaps,yes]")
    assert run_finetune(load_task_config([*fresh, "--objective.head=linear"]))["steps"] == 1


def test_other_labels_are_told(ordered, tmp_path, capsys):
    data = labelled(tmp_path / "data", ["no", "yes", "never"])
    run_finetune(load_task_config(words_for(ordered, data, tmp_path / "run")))
    said = "heads.classify was trained for perhaps, no, yes and goes on, row by row, for never, no"
    assert said in capsys.readouterr().out


def test_the_rows_of_several_tasks_have_names_too():
    part = {"objective": {"name": "tag", "labels": ["O", "B-X"]}}
    several = {"name": "multi", "tasks": {"names": part, "spans": {"objective": {"name": "read"}}}}
    assert labels_by_head(several) == {"names_tag": ["O", "B-X"]}
    assert labels_by_head({"name": "regress", "scores": ["a"]}) == {"regress": ["a"]}
    assert labels_by_head({"name": "clm"}) == {}
