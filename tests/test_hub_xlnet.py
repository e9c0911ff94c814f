"""XLNet in the hub: folders come in and go out bit for bit, and a wrong table is caught."""

import dataclasses
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, XLNetConfig, XLNetLMHeadModel, XLNetModel

from nanolm import cli
from nanolm.checkpoint.container import read_tensors
from nanolm.config.load import load_config
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError
from nanolm.hub.families import FAMILIES
from nanolm.hub.families.xlnet import TABLE, Output, Projections, Vectors, of_attention
from nanolm.hub.keys import Rule
from nanolm.hub.proof import LIMIT, prove
from nanolm.hub.published import read_published
from nanolm.hub.tokenizer_files import tokenizer_files
from nanolm.inference.export_transformers import transformers_folder
from nanolm.inference.parity import CASES, DIRECTIONS, difference
from nanolm.model.positions import POSITIONS
from nanolm.saved import open_saved
from tests.prepared import train
from tests.published import VOCAB, byte_bpe, edit_config

SINGLE = "model.safetensors"
ROLES = {"pad": "<pad>", "cls": "<cls>", "sep": "<sep>", "eos": "</s>", "mask": "<mask>"}
ATTENTION = "transformer.layer.1.rel_attn"


def write_xlnet(folder, model_class=XLNetLMHeadModel):
    """A folder as XLNet's authors publish it, with random weights."""
    config = XLNetConfig(
        vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48, mem_len=None, untie_r=True
    )
    model = model_class(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.2 * noise + (parameter.data == 1)
    model.save_pretrained(folder)
    byte_bpe(list(ROLES.values())).save(str(folder / "tokenizer.json"))
    names = {f"{role}_token": piece for role, piece in ROLES.items()}
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "a"
    write_xlnet(folder)
    return folder


@pytest.mark.parametrize(
    ("case", "way"), itertools.product([c for c in CASES if "xlnet" in c], DIRECTIONS)
)
def test_rows_of_the_parity_table(case, way):
    assert 0 < difference(case, way) < 1e-5


def test_import_export_import_keeps_every_bit(published, tmp_path, capsys):
    b, c, d = (tmp_path / name for name in "bcd")
    cli.run(["import", str(published), str(b), f"--json={tmp_path / 'in.json'}"])
    figures = json.loads((tmp_path / "in.json").read_text())
    assert 0 < figures["largest_difference"] < 1e-5
    assert figures["fresh"] == figures["left_out"] == [] and figures["texts_with_other_ids"] == 0
    cli.run(
        ["export", str(b), f"--out={c}", "--format=transformers", f"--json={tmp_path / 'o.json'}"]
    )
    assert 0 < json.loads((tmp_path / "o.json").read_text())["largest_difference"] < 1e-5
    theirs, back = load_file(published / SINGLE), load_file(c / SINGLE)
    assert all(torch.equal(back[key], tensor) for key, tensor in theirs.items())
    assert back.keys() - theirs.keys() <= {"lm_loss.weight"}  # the tied one, which we name too
    assert json.loads((c / "config.json").read_text())["model_type"] == "xlnet"
    cli.run(["import", str(c), str(d)])
    first, again = read_tensors(b, "model"), read_tensors(d, "model")
    assert first.keys() == again.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in first.items())


def test_a_trunk_alone_comes_in_with_a_fresh_head(tmp_path):
    write_xlnet(tmp_path / "a", XLNetModel)
    assert not any(key.startswith("transformer.") for key in load_file(tmp_path / "a" / SINGLE))
    imported = read_published(tmp_path / "a")
    assert imported.fresh and all(key.startswith("lm_loss.") for key in imported.fresh)
    assert 0 < prove(imported).largest < 1e-5


def config(**keys):
    return lambda folder: edit_config(folder, **keys)


def tensors(change):
    def spoil(folder):
        named = change(load_file(folder / SINGLE))
        save_file({k: v.contiguous().clone() for k, v in named.items()}, folder / SINGLE)

    return spoil


def lacks(key):
    return tensors(lambda named: {k: v for k, v in named.items() if k != key})


def holds(key, *shape):
    return tensors(lambda named: named | {key: torch.zeros(*shape)})


BAD = {
    "one direction": (config(attn_type="uni"), "attn_type to 'uni'"),
    "shared biases": (config(untie_r=False), "untie_r to False"),
    "clamped distances": (config(clamp_len=400), "clamp_len to 400"),
    "one length": (config(same_length=True), "same_length to True"),
    "both directions of data": (config(bi_data=True), "bi_data to True"),
    "narrow heads": (config(d_head=4), "d_head to 4"),
    "activation": (config(ff_activation="silu"), "ff_activation to 'silu'"),
    "no size": (config(d_inner=None), "d_inner"),
    "no segments": (lacks(f"{ATTENTION}.seg_embed"), "lacks .*seg_embed"),
    "no vector": (lacks("transformer.mask_emb"), "lacks transformer.mask_emb"),
    "half a head": (lacks("lm_loss.bias"), None),
    "another layer": (holds("transformer.layer.2.rel_attn.q", 32, 4, 8), "layer.2.rel_attn.q"),
    "another shape": (holds(f"{ATTENTION}.r", 32, 32), "rel_attn.r as 32 x 32"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_sentence_and_nothing_is_written(kind, tmp_path):
    spoil, said = BAD[kind]
    write_xlnet(tmp_path / "a")
    spoil(tmp_path / "a")
    if said is None:  # a tied head whose bias is gone is a head that the file lacks
        assert "lm_loss.bias" in read_published(tmp_path / "a").fresh
        return
    with pytest.raises(UserError, match=said) as caught:
        cli.run(["import", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "\n" not in str(caught.value) and not (tmp_path / "b").exists()


@dataclasses.dataclass(frozen=True)
class NotTransposed(Projections):
    """As if a head's features came before its number of the model's."""

    def join(self, parts):
        return torch.cat([part.reshape(-1, part.shape[0]) for part in parts])


@dataclasses.dataclass(frozen=True)
class HeadsLast(Output):
    def join(self, parts):
        return parts[0].transpose(1, 2).flatten(1)


@dataclasses.dataclass(frozen=True)
class Turned(Rule):
    def join(self, parts):
        return parts[0].flip(0)


BLOCK = "trunk.stack.blocks.{}.attention"
WRONG = {
    "queries and keys": Projections(of_attention("k q v"), f"{BLOCK}.qkv.weight"),
    "rows for columns": NotTransposed(of_attention("q k v"), f"{BLOCK}.qkv.weight"),
    "rows of distances": NotTransposed(of_attention("r"), f"{BLOCK}.distance.weight"),
    "heads and features": HeadsLast(of_attention("o"), f"{BLOCK}.out.weight"),
    "u and w": Vectors(of_attention("r_r_bias r_w_bias r_s_bias"), f"{BLOCK}.vectors"),
    "w and v": Vectors(of_attention("r_w_bias r_s_bias r_r_bias"), f"{BLOCK}.vectors"),
    "same and other segment": Turned(of_attention("seg_embed"), f"{BLOCK}.segments"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_rule_is_caught_by_the_proof(kind, published, monkeypatch):
    wrong = WRONG[kind]
    rules = tuple(wrong if rule.ours == wrong.ours else rule for rule in TABLE.layers)
    table = dataclasses.replace(TABLE, layers=rules)
    assert table != TABLE
    monkeypatch.setitem(FAMILIES, "xlnet", dataclasses.replace(FAMILIES["xlnet"], table=table))
    assert prove(read_published(published)).largest > 100 * LIMIT


def two_stream_run(folder, *words):
    keys = ("--model.trunk=two_stream", "--model.positions.name=relative")
    keys += ("--objective.name=permutation", "--model.n_segments=3", "--schedule.name=constant")
    train(folder, *keys, "--model.norm_position=post", "--train.steps=1", *words)
    return open_saved(folder)


def test_a_run_goes_out_and_its_tokenizer_frames_texts_as_its_tasks_do(tmp_path):
    saved = two_stream_run(tmp_path / "run")
    words = ["export", str(tmp_path / "run"), f"--out={tmp_path / 'out'}", "--format=transformers"]
    cli.run([*words, f"--json={tmp_path / 'o.json'}"])
    assert 0 < json.loads((tmp_path / "o.json").read_text())["largest_difference"] < 1e-5
    theirs, tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out"), saved.tokenizer
    a, b = tokenizer.encode("quick").tolist(), tokenizer.encode("fox").tolist()
    one, two = theirs("quick"), theirs("quick", "fox")
    sep, cls = tokenizer.sep, tokenizer.cls
    assert one.input_ids == [*a, sep, cls] and one.token_type_ids == [*[0] * (len(a) + 1), 2]
    assert two.input_ids == [*a, sep, *b, sep, cls]
    assert two.token_type_ids == [*[0] * (len(a) + 1), *[1] * (len(b) + 1), 2]
    assert isinstance(tokenizer, Tokenizer) and tokenizer_files(tokenizer, saved.config.model)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"n_segments": 0}, "model.n_segments is 0"),
        ({"norm_position": "pre"}, "model.norm_position is pre"),
        ({"positions": {"name": "relative", "base": 500.0}}, "model.positions.base is 500.0"),
        ({"bias": False}, "model.bias is False"),
        ({"feed_forward": "swiglu"}, "model.feed_forward is swiglu"),
    ],
)
def test_what_xlnet_does_not_compute_is_refused_by_name(keys, said):
    shape = {"trunk": "two_stream", "norm_position": "post", "n_segments": 3, "vocab_size": 64}
    shape |= {"positions": {"name": "relative"}} | keys
    config = load_config([], base={"model": shape})
    with pytest.raises(UserError, match=f"xlnet is nearest, but {said}"):
        transformers_folder(config, NoRoles(), {})


class NoRoles:
    """A tokenizer that names no role."""

    def roles(self):
        return {}


@pytest.mark.parametrize("window", [[None], [None, 4]], ids=str)
@pytest.mark.parametrize("positions", POSITIONS.names())
def test_every_family_says_of_every_model_why_it_does_not_fit(positions, window):
    """A key that two kinds of positions name alike is a list in one of them only."""
    model = load_config([], base={"model": {"positions": {"name": positions}, "window": window}})
    for family in FAMILIES.values():
        assert all(isinstance(reason, str) for reason in family.why_not(model.model))


def test_configs_are_compared_in_their_full_size(tmp_path, capsys):
    path = tmp_path / "small.yaml"
    shape = "trunk: two_stream, d_model: 32, n_layers: 1, n_heads: 4, n_segments: 3, tied: true"
    shape += ", norm_position: post, positions: {name: relative}, vocab_size: 96"
    path.write_text(f"model: {{{shape}}}\nobjective: {{name: permutation}}\n")
    cli.run(["parity", str(path), f"--json={tmp_path / 'found.json'}"])
    found = json.loads((tmp_path / "found.json").read_text())["small"]
    assert found["parameters"] == found["theirs"] > 0 and 0 < found["largest"] < 1e-5
    assert found["family"] == "xlnet" and "small" in capsys.readouterr().out
    path.write_text(path.read_text().replace(", vocab_size: 96", ""))
    with pytest.raises(UserError, match=r"small\.yaml leaves model\.vocab_size to its data"):
        cli.run(["parity", str(path)])
