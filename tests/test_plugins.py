"""A package outside nanolm that registers a name of every kind, used by a config and a run."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
import yaml

from nanolm.build import build_learner, build_objective, resolve
from nanolm.config.load import load_config
from nanolm.errors import UserError

PLUGIN = '''
"""An example plug-in: one of everything that a config can name."""

import dataclasses

import torch
from torch import nn

from nanolm.data.prepare.sources import SOURCES, SourceOptions
from nanolm.model.heads import HeadRequest
from nanolm.objectives.base import Term
from nanolm.objectives.clm import Clm, ClmOptions
from nanolm.ops.contract import kernel
from nanolm.ops.reference import ReferenceAttention
from nanolm.training.optim import OptimOptions, decay_groups
from nanolm.model.positions import Positions
from nanolm.registry import HEADS, OBJECTIVES, OPTIMIZERS, POSITIONS, SCHEDULES, Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class EchoOptions(ClmOptions):
    """Predict the next token, and how long the row is."""

    name: str = "echo"
    length_weight: float = 0.5
    """Weight of the second term."""


@OBJECTIVES.register("echo", options=EchoOptions)
class Echo(Clm):
    def __init__(self, options, config, tokenizer):
        super().__init__(options, config, tokenizer)
        self.heads["length"] = HeadRequest("mean_value", {"scale": 2.0})
        self.weights["length"] = options.length_weight

    def counts(self, batch):
        return super().counts(batch) | {"length": len(batch["tokens"])}

    def loss(self, hidden_BTD, heads, batch):
        value_B = heads["length"](hidden_BTD)
        error = (value_B - 1.0).square().sum()
        count = torch.tensor(len(value_B))
        return super().loss(hidden_BTD, heads, batch) | {"length": Term(error, count)}


@HEADS.register("mean_value")
class MeanValue(nn.Module):
    def __init__(self, model, kernels, trunk, *, scale):
        super().__init__()
        self.out, self.scale = nn.Linear(model.d_model, 1), scale

    def forward(self, hidden_BTD):
        return self.scale * self.out(hidden_BTD.mean(1))[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RampOptions(Options):
    """Adds the position times a learned vector."""

    name: str = "ramp"
    slope: float = 0.01
    """Growth per token."""


@POSITIONS.register("ramp", options=RampOptions)
class Ramp(Positions):
    def __init__(self, options, model, kernels):
        super().__init__()
        self.slope = options.slope
        self.direction = nn.Parameter(torch.ones(model.d_model))

    def embed(self, x_BTD, positions_BT):
        return x_BTD + self.slope * positions_BT[..., None] * self.direction


@dataclasses.dataclass(frozen=True, kw_only=True)
class SignOptions(OptimOptions):
    """Steps by the sign of the gradient."""

    name: str = "sign"
    damping: float = 0.0
    """Share of the step that is left out."""


class SignStep(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight -= group["lr"] * group["keep"] * weight.grad.sign()


@OPTIMIZERS.register("sign", options=SignOptions)
def sign(learner, options):
    groups = decay_groups(learner.named_parameters(), options.lr, options.weight_decay)
    return [SignStep(groups, {"keep": 1 - options.damping})]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StairsOptions(Options):
    """Halves at regular steps."""

    name: str = "stairs"
    every: int = 2
    """Steps between halvings."""


@SCHEDULES.register("stairs", options=StairsOptions)
def stairs(options, steps):
    return lambda step: 0.5 ** (step // options.every)


@kernel("attention")
class NamedAttention(ReferenceAttention):
    """The reference under another name."""

    name = "example"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountingOptions(SourceOptions):
    """Documents of numbers."""

    name: str = "counting"
    documents: int = 3
    """How many."""


class CountingPiece:
    size, label = 800, "numbers"

    def __init__(self, number):
        self.number = number

    def documents(self, counts):
        yield " ".join(str(i) for i in range(self.number, self.number + 200))

    def identity(self):
        return ["counting", self.number]


@SOURCES.register("counting", options=CountingOptions)
class Counting:
    def __init__(self, options):
        self.options = options

    def pieces(self):
        return [CountingPiece(i) for i in range(self.options.documents)]
'''
CONFIG = {
    "plugins": ["example_plugin.parts"],
    "model": {
        "d_model": 32,
        "n_layers": 1,
        "n_heads": 4,
        "max_length": 64,
        "positions": {"name": "ramp", "slope": 0.02},
    },
    "objective": {"name": "echo", "length_weight": 0.25},
    "optim": {"name": "sign", "lr": 1e-3, "damping": 0.5},
    "schedule": {"name": "stairs", "every": 3},
    "kernels": {"attention": "example"},
    "data": {"row_length": 32},
    "train": {"steps": 3, "global_batch": 4},
    "run": {"device": "cpu", "log_every": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the plug-in package, on the path of this process."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "example_plugin").mkdir()
    (folder / "example_plugin" / "__init__.py").write_text("")
    (folder / "example_plugin" / "parts.py").write_text(textwrap.dedent(PLUGIN))
    (folder / "twice.py").write_text(
        "from nanolm.registry import OBJECTIVES\nOBJECTIVES.register('clm')(len)\n"
    )
    (folder / "broken.py").write_text("import a_module_that_is_nowhere\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def test_a_config_uses_every_kind_of_plugin(folder, tokenizer):
    config = load_config(["--config", str(folder / "config.yaml"), "--schedule.every", "5"])
    assert config.objective.length_weight == 0.25 and config.schedule.every == 5
    assert load_config([], base={**CONFIG, "schedule": {"name": "stairs", "every": 5}}) == config
    config = resolve(config, tokenizer)
    learner = build_learner(config, build_objective(config, tokenizer))
    assert "heads.length.out.weight" in learner.state_dict()
    assert "trunk.positions.direction" in learner.state_dict()
    assert learner.trunk.positions.slope == 0.02
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    terms = learner({"tokens": tokens, "targets": tokens})
    assert terms["length"].count == 2 and terms["clm"].count == 64


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--objective.lenght_weight", "1"], "objective.lenght_weight: there is no such key (did"),
        (["--model.positions.slope", "x"], "model.positions.slope: expected a number, got 'x'"),
        (["--optim.damping", "null"], "optim.damping: expected a number, got null"),
        (["--schedule.every", "1.5"], "schedule.every: expected an integer, got 1.5"),
        (["--plugins", "broken"], "plugins: cannot import broken: No module named 'a_module"),
        (["--plugins", "[]", "--objective.name", "nope"], "unknown objective 'nope'"),
    ],
)
def test_a_plugins_own_keys_are_typed_and_refused(folder, words, sentence):
    with pytest.raises(UserError) as error:
        load_config(["--config", str(folder / "config.yaml"), *words])
    assert str(error.value).startswith(sentence)


def test_a_line_of_a_plugin_that_is_no_python_is_told(tmp_path, monkeypatch):
    (tmp_path / "half_written.py").write_text("x = 1\ndef f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as error:
        load_config(["--plugins", "half_written"])
    told = str(error.value)
    assert told.startswith("plugins: cannot import half_written: invalid syntax in ")
    assert told.endswith("half_written.py, line 2; correct that line")


def test_a_plugins_keys_are_in_the_help(folder, capsys):
    with pytest.raises(SystemExit):
        load_config(["--config", str(folder / "config.yaml"), "--help"])
    assert "Weight of the second term." in capsys.readouterr().out


def test_a_name_that_is_taken_is_an_error(folder):
    with pytest.raises(UserError, match=r"objective 'clm' is registered already, by nanolm"):
        load_config(["--plugins", "twice"])


@pytest.mark.slow
def test_data_is_prepared_and_a_model_trained_with_plugins_alone(folder, tmp_path):
    """The commands in processes of their own, as a user runs them."""

    def nanolm(*words):
        return subprocess.run(
            [sys.executable, "-m", "nanolm", *words],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.getcwd()])},
            capture_output=True,
            text=True,
        )

    prepared = nanolm(
        *("prepare", "counting", "--plugins", "example_plugin.parts", "--out", str(tmp_path / "d")),
        *("--source_options", "{counting: {documents: 12}}", "--vocab_size", "320"),
        *("--val_fraction", "0.2", "--workers", "1"),
    )
    assert prepared.returncode == 0, prepared.stderr
    trained = nanolm(
        *("train", "--config", str(folder / "config.yaml"), "--data.path", str(tmp_path / "d")),
        *("--run.dir", str(tmp_path / "run"), "--run.wandb.mode", "disabled"),
    )
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"train"') >= 3
