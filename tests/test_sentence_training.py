"""Training on rows of whole sentences: every objective reads them, a broken run goes on exactly."""

import json

import pytest
import torch
from safetensors.torch import load_file

from nanolm.build import build_objective, build_stream, resolve
from nanolm.config.load import load_config
from nanolm.data.tokenizer import Tokenizer
from nanolm.distributed.world import World
from nanolm.errors import UserError
from nanolm.pretrain import run_train
from nanolm.training.loader import open_loader
from tests.kinds_of_run import call
from tests.prepared import SMALL, TRUNKS, prepared_corpus

ROWS = "--data.rows=sentences"
ENCODER = [*SMALL, "--objective.name=mlm", "--model.trunk=encoder", ROWS]


@pytest.fixture(scope="module")
def folder():
    return prepared_corpus()


def config_of(folder, objective, *words):
    trunk = TRUNKS.get(objective, "decoder")
    positions = "relative" if trunk == "two_stream" else "rotary"
    shape = [f"--model.trunk={trunk}", f"--model.positions.name={positions}"]
    segments = f"--model.n_segments={2 if objective == 'mlm_pair' else 0}"
    name = f"--objective.name={objective}"
    argv = [*SMALL, f"--data.path={folder}", name, *shape, segments, ROWS, *words]
    return resolve(load_config(argv), Tokenizer.load(folder))


@pytest.mark.parametrize("objective", ["clm", "prefix", "mlm", "mlm_pair", "span", "permutation"])
def test_every_objective_makes_batches_of_them(folder, objective):
    config = config_of(folder, objective)
    built = build_objective(config, Tokenizer.load(folder))
    stream = build_stream(config, built, "train")
    loader = open_loader(config, stream, built, World())
    for _, batches in zip(range(3), loader, strict=False):
        for batch in batches:
            assert min(batch.counts.values()) > 0
            assert all(torch.isfinite(tensor).all() for tensor in batch.tensors.values())
    rows = stream.rows(0, len(stream))
    assert len({len(row.tokens) for row in rows}) > 3
    assert max(len(row.tokens) for row in rows) <= built.span


def test_rows_of_mlm_are_padded_behind_their_last_sentence(folder):
    config = config_of(folder, "mlm")
    tokenizer = Tokenizer.load(folder)
    built = build_objective(config, tokenizer)
    stream = build_stream(config, built, "train")
    (batch,) = next(iter(open_loader(config, stream, built, World())))
    rows = stream.rows(0, 8)
    assert batch.tensors["lengths"].tolist() == [len(row.tokens) + 2 for row in rows]
    for line, length in zip(batch.tensors["tokens"], batch.tensors["lengths"], strict=True):
        assert line[0] == tokenizer.cls and line[length - 1] == tokenizer.sep
        assert (line[length:] == tokenizer.pad).all()


def test_memory_needs_rows_of_one_length(folder):
    config = config_of(folder, "permutation", "--objective.memory=8")
    with pytest.raises(UserError, match=r"objective\.memory=8 are the tokens before a row"):
        build_objective(config, Tokenizer.load(folder))


def run(folder, run_dir, *words):
    argv = [*ENCODER, f"--data.path={folder}", f"--run.dir={run_dir}", "--eval.every=0", *words]
    run_train(load_config(argv))
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


def test_a_broken_run_goes_on_exactly_with_any_number_of_workers(folder, tmp_path):
    often = ["--run.log_every=1", "--schedule.name=constant"]
    whole = run(folder, tmp_path / "whole", "--train.steps=6", *often)
    run(folder, tmp_path / "half", "--train.steps=3", *often)
    halves = run(
        folder, tmp_path / "half", "--train.steps=6", *often, "--resume=auto", "--data.workers=2"
    )
    assert halves == whole and len(whole) == 6
    one, two = (
        load_file(tmp_path / name / "checkpoints/step-00000006/model.safetensors")
        for name in ("whole", "half")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = [*ENCODER[:-1], f"--data.path={folder}", f"--run.dir={tmp_path / 'half'}"]
    answer = call(["train", *other, "--train.steps=7", *often, "--resume=auto"])
    assert answer.status == 2 and "data.rows (sentences there, None here)" in answer.err


def test_data_without_sentences_is_refused_by_the_command(corpus, tmp_path):
    run_dir = tmp_path / "run"
    answer = call(["train", *ENCODER, f"--data.path={corpus}", f"--run.dir={run_dir}"])
    assert answer.status == 2
    assert "prepare the data into another folder with --sentences true" in answer.err
    assert len(answer.err.splitlines()) == 1 and not run_dir.exists()
