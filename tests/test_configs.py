"""Every YAML in configs/ is read, built, and takes two shrunken steps."""

import pathlib

import pytest

from nanolm.config.choices import choose
from nanolm.config.load import load_config
from nanolm.finetune.config import TaskConfig
from nanolm.pretrain import run_train
from tests.prepared import SMALL, prepared_corpus

ROOT = pathlib.Path(__file__).parent.parent
SIZES = ("t5_base", "t5_v1_1_base")
"""Of a family that has a config of another size: shrunken, they are the same model."""
CONFIGS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in SIZES))
    for path in sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))
]


def test_the_schema_of_the_same_choices_is_made_once():
    """To make one takes longer than all else in reading a config."""
    rule = {"objective": "mlm", "train.rule": "fgm", "train.rule.inner": "rdrop"}
    assert choose(rule) is choose(dict(rule)) is not choose({"objective": "mlm"})
    assert choose(rule, TaskConfig) is not choose(rule)


@pytest.mark.parametrize("path", CONFIGS)
def test_two_shrunken_steps(path, tmp_path):
    full = load_config([f"--config={path}"])
    grouped = full.model.kv_heads < full.model.n_heads
    argv = [
        f"--config={path}",
        *SMALL,
        f"--model.n_kv_heads={2 if grouped else 'null'}",
        "--model.head_dim=null",
        "--model.d_ff=null",
        "--model.vocab_size=null",
        "--train.micro_batch=4",
        "--train.steps=2",
        "--schedule.warmup=0",
        "--run.checkpoint_every=0",
        f"--data.path={prepared_corpus()}",
        f"--run.dir={tmp_path / 'run'}",
    ]
    summary = run_train(load_config(argv))
    assert summary["steps"] == 2 and summary["val_loss"] > 0
