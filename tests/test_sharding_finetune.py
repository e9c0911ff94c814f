"""Fine-tuning with divided weights: the same losses, figures and adapters as with whole ones."""

import contextlib
import dataclasses
import io
import json

import pytest
import torch
from safetensors.torch import load_file

from nanolm import run
from nanolm.build import build_learner, build_objective, resolve
from nanolm.checkpoint.container import read_tensors
from nanolm.config.load import load_config
from nanolm.distributed.sharding import whole
from nanolm.finetune.run import run_finetune
from nanolm.peft.base import attach
from nanolm.registry import PEFT
from nanolm.training.engine import Engine
from tests.conftest import TINY, tiny_tokenizer
from tests.finetuned import checkpoint, config, questions, table
from tests.tiny_run import in_ranks, in_turn

WORDS = ("--train.steps=7", "--train.global_batch=7", "--train.micro_batch=2", "--eval.every=3")
WORDS += ("--optim.name=sgd", "--optim.lr=0.1", "--objective.head_dropout=0")


def tune(world, config, strategy):
    """A fine-tuning run in ranks that are joined already."""
    run.launch, run.close = lambda *_: world, lambda _: None
    changed = dataclasses.replace(config.distributed, strategy=strategy)
    with contextlib.redirect_stdout(io.StringIO()):
        summary = run_finetune(dataclasses.replace(config, distributed=changed))
    return summary["val"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    table(folder, "train", questions(60))
    table(folder, "val", questions(31, 1000))
    return folder


@pytest.mark.parametrize("peft", [pytest.param("none", marks=pytest.mark.slow), "lora"])
def test_fine_tuning_equals_ddp(peft, data, tmp_path):
    """31 records in batches of 7 on two ranks: one rank has a batch more to evaluate."""
    base, strategies = checkpoint("mlm"), ("ddp", "fsdp")
    words = (*WORDS, f"--peft.name={peft}")
    stages = [(tune, config(base, data, tmp_path / name, *words), name) for name in strategies]
    (ddp, fsdp), (_, other) = in_ranks(2, in_turn, *stages)
    assert ddp == pytest.approx(fsdp, abs=1e-5)
    assert fsdp == other
    runs = [(tmp_path / name / "metrics.jsonl").read_text() for name in strategies]
    for left, right in zip(*(map(json.loads, lines.splitlines()) for lines in runs), strict=True):
        assert (left["step"], left["kind"]) == (right["step"], right["kind"])
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)
    expected = load_file(tmp_path / "ddp/checkpoints/step-00000007/model.safetensors")
    found = read_tensors(tmp_path / "fsdp/checkpoints/step-00000007", "model")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


def gradients(world, method):
    """(largest gradient of any small weight, largest error relative to it), with the base divided
    over the ranks against whole."""
    tokenizer = tiny_tokenizer()
    base = {"model": TINY, "data": {"row_length": 16}, "distributed": {"strategy": "fsdp"}}
    settled = resolve(load_config([], base=base), tokenizer)
    divided, plain = (build_learner(settled, build_objective(settled, tokenizer)) for _ in range(2))
    for learner in (divided, plain):
        attach(learner, PEFT.get(method).options())
        learner.eval()
    engine = Engine(divided, world, settled)
    tokens = torch.arange(48).view(3, 16) % 512
    batch = {"tokens": tokens, "targets": tokens}
    for number in range(2):
        with engine.synchronised(number == 1):
            engine.module(batch)["clm"].sum.backward()
    (2 * world.size * plain(batch)["clm"].sum).backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    live = dict(divided.named_parameters())
    largest = max(gradient.abs().max() for gradient in expected.values())
    errors = {n: (whole(live[n].grad) - g).abs().max() / largest for n, g in expected.items()}
    return float(largest), max(errors.values()).item()


def of_all_methods(world, methods):
    return {method: gradients(world, method) for method in methods}


def test_every_adapter_has_the_gradients_that_it_has_with_whole_weights():
    methods = [name for name in PEFT.names() if name not in ("none", "adalora")]
    for found in in_ranks(2, of_all_methods, methods):
        for method, (largest, error) in found.items():
            assert largest > 1e-2 and error < 1e-5, (method, largest, error)
