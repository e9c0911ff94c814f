"""The schema: what it computes, and every impossible value or combination that it refuses."""

import dataclasses

import pytest

from nanolm.build import resolve
from nanolm.config.load import load_config
from nanolm.config.model import ModelConfig
from nanolm.config.schema import Config, DataConfig
from nanolm.data.prepare.config import PrepareConfig
from nanolm.errors import UserError
from nanolm.objectives.mlm import MlmOptions


def test_derived_widths():
    model = ModelConfig(d_model=96, n_heads=6, n_kv_heads=2)
    assert (model.kv_heads, model.head_width, model.ff_width) == (2, 16, 384)
    assert ModelConfig(d_model=96, n_heads=6).kv_heads == 6
    assert ModelConfig(d_model=100, n_heads=3, head_dim=32).head_width == 32
    assert ModelConfig(feed_forward="geglu", d_model=384).ff_width == 1024
    assert ModelConfig(feed_forward="swiglu", d_ff=100).ff_width == 100


def test_mixture():
    assert DataConfig(path="a").mixture == [("a", 1.0)]
    config = load_config(["--data.corpora", "[{path: a, weight: 2}, {path: b}]"])
    assert config.data.mixture == [("a", 2.0), ("b", 1.0)]
    with pytest.raises(UserError, match=r"data\.path"):
        _ = DataConfig().mixture


def test_loaded_configs_have_the_plain_classes():
    config = load_config(["--objective.name", "mlm"])
    assert type(config) is Config and type(config.model) is ModelConfig
    assert type(config.objective) is MlmOptions
    assert dataclasses.replace(config.model, n_layers=3).n_layers == 3


REFUSED = [
    ("--model.n_heads 7", "model.n_heads=7 does not divide model.d_model=384"),
    ("--model.n_kv_heads 4", "model.n_kv_heads=4 does not divide model.n_heads=6"),
    ("--model.n_layers 0", "model.n_layers=0"),
    ("--model.n_heads 0", "model.n_heads=0"),
    ("--model.n_kv_heads 0", "model.n_kv_heads=0"),
    ("--model.d_model -384", "model.d_model=-384"),
    ("--model.head_dim 0", "model.head_dim=0"),
    ("--model.d_ff -1", "model.d_ff=-1"),
    ("--model.vocab_size 0", "model.vocab_size=0"),
    ("--model.n_segments -1", "model.n_segments=-1"),
    ("--model.norm_eps -1", "model.norm_eps=-1.0"),
    ("--model.init_std -1", "model.init_std=-1.0"),
    ("--model.dropout 1", "model.dropout=1.0"),
    ("--model.attention_dropout -0.1", "model.attention_dropout=-0.1"),
    ("--model.attention_softcap 0", "model.attention_softcap=0.0"),
    ("--model.logit_softcap -3", "model.logit_softcap=-3.0"),
    ("--model.window []", "model.window"),
    ("--model.window 0", "model.window"),
    ("--model.max_length 0", "model.max_length=0"),
    ("--data.row_length 1", "data.row_length=1"),
    ("--data.workers -1", "data.workers=-1"),
    ("--data.path a --data.corpora [{path: b}]", "data.path and data.corpora"),
    ("--data.corpora [{path: b, weight: 0}]", "data.corpora"),
    ("--objective.z_loss -1", "objective.z_loss=-1.0"),
    ("--objective.label_smoothing 1", "objective.label_smoothing=1.0"),
    ("--objective.name mlm --objective.mask_rate 0", "objective.mask_rate=0.0"),
    ("--objective.name mlm --objective.mask_share 0.95", "objective.mask_share"),
    ("--optim.lr -1", "optim.lr=-1.0"),
    ("--schedule.warmup -1", "schedule.warmup=-1"),
    ("--schedule.floor 2", "schedule.floor=2.0"),
    ("--train.steps -1", "train.steps=-1"),
    ("--train.global_batch 0", "train.global_batch=0"),
    ("--train.micro_batch 0", "train.micro_batch=0"),
    ("--train.clip 0", "train.clip=0.0"),
    ("--train.ema 1", "train.ema=1.0"),
    ("--train.max_skips -1", "train.max_skips=-1"),
    ("--eval.every -1", "eval.every=-1"),
    ("--eval.batches 0", "eval.batches=0"),
    ("--eval.batch 0", "eval.batch=0"),
    ("--run.log_every 0", "run.log_every=0"),
    ("--run.checkpoint_every -1", "run.checkpoint_every=-1"),
    ("--run.keep_last 0", "run.keep_last=0"),
    ("--run.threads 0", "run.threads=0"),
    ("--run.seed -1", "run.seed=-1"),
    ("--distributed.timeout 0", "distributed.timeout=0.0"),
    ("--distributed.timeout 1e-38", "distributed.timeout=1e-38 must be at least 1"),
    ("--distributed.hang_timeout 1e-38", "distributed.hang_timeout=1e-38 must be at least 1,"),
]


@pytest.mark.parametrize(("line", "begins"), REFUSED)
def test_impossible_values_are_refused_by_key(line, begins):
    words = [word for part in line.split(" --") for word in part.split(" ", 1)]
    words = [f"--{word}" if i % 2 == 0 else word for i, word in enumerate(words)]
    words[0] = words[0].replace("----", "--")
    with pytest.raises(UserError) as error:
        load_config(words)
    assert str(error.value).startswith(begins) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "contains"),
    [
        ("--model.trunk sideways", "unknown trunk 'sideways'; choose from decoder, encoder"),
        ("--model.trunk encoder", "objective=clm trains decoder trunks"),
        ("--objective.name mlm", "objective=mlm trains encoder trunks"),
        ("--data.row_length 2000", "data.row_length=2000 exceeds model.max_length=1024"),
        ("--model.vocab_size 100", "model.vocab_size=100 is smaller than the tokenizer's 512"),
    ],
)
def test_impossible_combinations_are_refused_when_the_tokenizer_is_known(line, contains, tokenizer):
    with pytest.raises(UserError) as error:
        resolve(load_config(line.split()), tokenizer)
    assert contains in str(error.value)


def test_resolve_fills_in_the_vocabulary_and_can_be_repeated(tokenizer):
    config = resolve(load_config([]), tokenizer)
    assert config.model.vocab_size == 512  # a multiple of 64 already
    assert resolve(config, tokenizer) == config


def test_a_folder_named_tilde_is_no_accident():
    for words in (["--run.dir=~/x"], ["--run.dir", "~"]):
        with pytest.raises(UserError, match=r"begins with ~"):
            load_config(words)
    assert load_config(["--run.dir=./~/x"]).run.dir == "./~/x"
    with pytest.raises(UserError, match="out=~/x begins with ~"):
        PrepareConfig(out="~/x", sources=["a"]).check()
