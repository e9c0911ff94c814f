"""Files and overrides to a config: merging, round trips, help, and mistakes by key."""

import dataclasses
import re

import pytest

from nanolm.config.choices import CHOICES, choose
from nanolm.config.load import as_mapping, dump, leaf_kinds, load_config, merge, parse
from nanolm.errors import UserError
from nanolm.model.positions import RotaryOptions
from nanolm.objectives.mlm import MlmOptions
from nanolm.registry import KERNELS, OBJECTIVES


def written(folder, name, text):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_files_merge_left_to_right_and_overrides_win(tmp_path):
    first = written(
        tmp_path, "a.yaml", "model: {n_layers: 3, d_model: 64, n_heads: 4}\nresume: auto"
    )
    second = written(tmp_path, "b.yaml", "model:\n  n_layers: 5\noptim: {lr: 3e-4}\n")
    config = load_config(
        ["--config", first, f"--config={second}", "--optim.lr", "1e-5", "--optim.lr=2e-5"]
    )
    assert (config.model.n_layers, config.model.d_model, config.resume) == (5, 64, "auto")
    assert config.optim.lr == 2e-5
    assert load_config(["--config", second, "--config", first]).model.n_layers == 3
    assert load_config(["--config", second]).optim.lr == 3e-4


def test_a_name_switches_the_options(tmp_path):
    assert load_config(["--objective.name", "mlm"]).objective == MlmOptions()
    # The name may stand before or behind the options that it brings, in files and outside.
    path = written(
        tmp_path, "a.yaml", "objective: {mask_rate: 0.3}\nmodel: {positions: {name: t5}}"
    )
    for order in (1, -1):
        words = ["--objective.unit=word", "--objective.name=mlm"][::order]
        config = load_config(["--config", path, *words])
        assert config.objective == MlmOptions(mask_rate=0.3, unit="word")
    rotary = load_config(
        ["--config", path, "--objective.name=mlm", "--model.positions.name", "rotary"]
    )
    assert rotary.model.positions == RotaryOptions()
    with pytest.raises(UserError, match=r"^model\.positions\.n_buckets: there is no such key"):
        load_config(["--model.positions.name", "rotary", "--model.positions.n_buckets", "8"])


def test_a_renamed_choice_starts_afresh():
    left = {"objective": {"name": "mlm", "mask_rate": 0.3}, "model": {"d_model": 64}}
    assert merge(left, {"objective": {"name": "clm"}})["objective"] == {"name": "clm"}
    assert merge(left, {"objective": {"unit": "word"}})["objective"] == {
        "name": "mlm",
        "mask_rate": 0.3,
        "unit": "word",
    }
    assert merge(left, {"model": {"n_layers": 1}})["model"] == {"d_model": 64, "n_layers": 1}
    assert left["model"] == {"d_model": 64}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--objective.name", "mlm_pair", "--objective.pair", "sop"],
        ["--model.positions.name=rotary", "--model.window", "128", "null", "--optim.lr", "1e-9"],
        ["--optim.name", "muon", "--schedule.name", "wsd", "--data.corpora", "[{path: a}]"],
        ["--run.dir", "2024", "--resume", "null", "--data.path", "#: '"],
    ],
)
def test_a_printed_config_loads_back_equal(words, tmp_path, capsys):
    config = load_config(words)
    path = written(tmp_path, "resolved.yaml", dump(config))
    assert load_config(["--config", path]) == config
    assert load_config([], base=as_mapping(config)) == config
    with pytest.raises(SystemExit) as end:
        load_config([*words, "--print_config"])
    assert end.value.code in (0, None) and capsys.readouterr().out == dump(config)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model.d_model", "x"], "model.d_model: expected an integer, got 'x'"),
        (["--modle.d_model", "3"], "modle.d_model: there is no such key (did you mean model.d_m"),
        (["--optim.lrr", "3"], "optim.lrr: there is no such key (did you mean optim.lr?)"),
        (["--model", "x"], "model: this is a group of keys; give one of them, such as --model."),
        (["--train.precision", "fp8"], "train.precision: expected one of fp32, bf16, fp16, got "),
        (["--objective.name", "mml"], "unknown objective 'mml'; choose from choose, "),
        (["--optim.betas", "0.9"], "optim.betas: expected a list of 2"),
        (["--optim.lr", "3", "4"], "'4' belongs to no option"),
        (["--optim.lr", "[1"], "--optim.lr line 1 is not valid YAML"),
        (["train.yaml"], "'train.yaml' belongs to no option; a config file is named by"),
        (["--config"], "config: expected a YAML file, got nothing"),
        (["--config", "/none.yaml"], "cannot read the config /none.yaml"),
        (["--plugins", "no_such_module_x"], "plugins: cannot import no_such_module_x"),
        (["-v"], "'-v' belongs to no option"),
    ],
)
def test_mistakes_on_the_command_line(words, sentence):
    with pytest.raises(UserError) as error:
        load_config(words)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {d_model: x}", "model.d_model: expected an integer, got 'x'"),
        ("model: {d_model: 3.5}", "model.d_model: expected an integer, got 3.5"),
        ("model: {d_model: null}", "model.d_model: expected an integer, got null"),
        ("model: 5", "model: expected keys and values, got 5"),
        ("objective: mlm", "objective: expected keys and values, got 'mlm'"),
        ("objective: {name: 5}", "objective.name: expected text, got 5"),
        ("optm: {lr: 1}", "optm: there is no such key (did you mean optim?)"),
        ("optim: {learning_rate: 1}", "optim.learning_rate: there is no such key"),
        ("train: {compile: 1}", "train.compile: expected true or false, got 1"),
        ("run: {dir: 2024}", "run.dir: expected text, got 2024"),
        ("data: {corpora: [{path: a, weigth: 2}]}", "data.corpora[0].weigth: there is no such"),
        ("data: {corpora: [{weight: 2}]}", "data.corpora[0].path: a value is required"),
        ("data: {corpora: [a]}", "data.corpora[0]: expected keys and values, got 'a'"),
        ("plugins: x", "plugins: expected a list of module names, got 'x'"),
    ],
)
def test_mistakes_in_a_file(text, sentence, tmp_path):
    with pytest.raises(UserError) as error:
        load_config(["--config", written(tmp_path, "a.yaml", text)])
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_a_group_whose_keys_are_commented_out_is_the_default(tmp_path):
    path = written(tmp_path, "a.yaml", "model:\n  # d_model: 8\nobjective:\n")
    assert load_config(["--config", path]) == load_config([])


def test_a_duplicate_key_names_file_and_line(tmp_path):
    path = written(tmp_path, "a.yaml", "optim:\n  lr: 1\n  lr: 2\n")
    with pytest.raises(UserError, match=r"a\.yaml line 3 .*'lr' stands twice"):
        load_config(["--config", path])


def test_help_shows_every_field_with_its_docstring(capsys):
    with pytest.raises(SystemExit) as end:
        load_config(["--objective.name", "mlm", "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for key in leaf_kinds(choose({"objective": "mlm"})):
        described = re.search(rf"\n  --{re.escape(key)}[ \n,].*?(?=\n  --|\n\n|$)", text, re.S)
        assert described, key
        body = " ".join(described[0].split()).removeprefix(f"--{key}")
        prose = re.sub(r"\(type: .*|\{[^}]*\}|\[ITEM,...\]|\b[A-Z_]+\b", "", body)
        assert len(prose.split()) >= 1, f"{key} has no docstring"
    assert "Share of a row's maskable tokens" in " ".join(text.split())
    flowing = re.sub(r"- (?=in's)", "-", " ".join(text.split()))
    keys = {f"kernels.{op}": registry for op, registry in KERNELS.items()}
    for key, registry in {**keys, "objective.name": OBJECTIVES}.items():
        listed = re.search(rf"--{re.escape(key)} .*? One of (.*?), or a plug", flowing)[1]
        names = set(listed.split(", ")) - {"auto", "fastest"}
        tasks = {n for n in registry.names() if hasattr(registry.get(n).build, "schema")}
        assert names == set(registry.names()) - tasks, key  # tasks are fine-tuned, and listed there
    assert "configuration file" not in text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A command."""

    runs: list[str]
    """Folders."""
    out: str
    """A file."""
    smooth: bool = False
    """Whether to smooth."""
    n: int = 1
    """How many."""


@pytest.mark.parametrize(
    "line",
    ["a b --out o", "--out o a b", "--runs a b --out=o", "--out o --runs=[a,b]"],
)
def test_words_without_a_key_fill_the_positional_field(line):
    command = parse(Command, line.split(), prog="x", positional=("runs",))
    assert command == Command(runs=["a", "b"], out="o")


def test_flags_and_single_values_leave_the_words_behind_them():
    command = parse(Command, ["--smooth", "a", "b", "--out", "o"], prog="x", positional=("runs",))
    assert command == Command(runs=["a", "b"], out="o", smooth=True)
    words = ["a", "--out", "o", "--n", "3", "b"]
    assert parse(Command, words, prog="x", positional=("runs",)).n == 3
    with pytest.raises(UserError, match=r"^out: a value is required$"):
        parse(Command, ["a"], prog="x", positional=("runs",))
    with pytest.raises(UserError, match=r"^'a' belongs to no option"):
        parse(Command, ["a"], prog="x")


def test_every_choice_is_a_field_of_the_schema():
    wrapped = {"name": "fgm", "inner": {"name": "fgm"}}
    config = load_config([], base={"train": {"rule": {"name": "fgm", "inner": wrapped}}})
    for key, registry in CHOICES.items():
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        assert value.name in registry.names()


@pytest.mark.parametrize("word", ["true", "True", "TRUE", "false", "False", "FALSE"])
@pytest.mark.parametrize("equals", [True, False])
def test_truth_values_as_yaml_and_as_python_write_them(word, equals):
    words = [f"--train.compile={word}"] if equals else ["--train.compile", word]
    assert load_config(words).train.compile is (word.lower() == "true")
