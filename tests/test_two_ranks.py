"""Whole runs of T5 and XLNet on two ranks, under DDP and FSDP2: they resume to the bit, and their
losses are those of one rank."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.prepared import SMALL, prepared_corpus, train

ROOT = pathlib.Path(__file__).parent.parent
COMMON = ["--schedule.name=constant", "--run.log_every=1", "--eval.every=3", "--run.device=cpu"]
DROPOUT = ["--model.dropout=0.1", "--model.attention_dropout=0.1", "--model.final_dropout=0.1"]
MODELS = {
    "t5": [
        "--model.trunk=encoder_decoder", "--model.positions.name=t5", "--objective.name=span",
        "--model.norm=rmsnorm", "--model.bias=false", "--model.attention_scale=1.0",
        "--model.logit_scale=true", "--model.weight_init=t5", "--model.feed_forward=geglu_tanh",
    ],
    "xlnet": [
        "--model.trunk=two_stream", "--model.positions.name=relative", "--model.n_segments=3",
        "--model.norm_position=post", "--objective.name=permutation", "--objective.memory=24",
    ],
    "recurrent xlnet": [
        "--model.trunk=two_stream", "--model.positions.name=relative", "--model.n_segments=3",
        "--model.norm_position=post", "--objective.name=permutation", "--objective.memory=24",
        "--data.row_length=64", "--objective.recurrence=4",
    ],
}  # fmt: skip


def on_two_ranks(folder, *words):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node=2", str(ROOT / "train.py"), *SMALL, *COMMON]
    command += [f"--data.path={prepared_corpus()}", f"--run.dir={folder}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["kind"], line["step"], line["loss"]) for line in lines if "loss" in line]


def weights(run):
    parts = sorted((run / "checkpoints" / "step-00000006").glob("model*.safetensors"))
    return [load_file(part) for part in parts]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_resumed_run_ends_bit_equal(tmp_path, model, strategy):
    words = [*MODELS[model], *DROPOUT, f"--distributed.strategy={strategy}"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    on_two_ranks(whole, *words, "--train.steps=6")
    on_two_ranks(halves, *words, "--train.steps=3")
    on_two_ranks(halves, *words, "--train.steps=6", "--resume=auto")
    assert losses(whole) == losses(halves) and len(losses(whole)) == 8
    assert len(weights(whole)) == (2 if strategy == "fsdp" else 1)
    for mine, other in zip(weights(whole), weights(halves), strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_losses_are_those_of_one_rank(tmp_path, model, strategy):
    alone, two = tmp_path / "alone", tmp_path / "two"
    train(alone, *COMMON, *MODELS[model], "--train.steps=4")
    on_two_ranks(two, *MODELS[model], f"--distributed.strategy={strategy}", "--train.steps=4")
    for mine, other in zip(losses(alone), losses(two), strict=True):
        assert mine[:2] == other[:2] and mine[2] == pytest.approx(other[2], rel=1e-5)
