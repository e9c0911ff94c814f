"""`nanolm import`: untidy folders that load, and bad ones that are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanolm import cli
from nanolm.checkpoint.container import read_tensors
from nanolm.errors import UserError
from nanolm.hub import importing, proof
from nanolm.hub.families import FAMILIES
from nanolm.hub.folder import read_weights
from nanolm.hub.published import read_published
from tests.published import edit_config, write_published

SINGLE = "model.safetensors"


def imported(source, out, *words):
    cli.run(["import", str(source), str(out), *words])
    return read_tensors(out, "model")


def stored(folder):
    return load_file(folder / SINGLE)


def rewrite(folder, tensors):
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / SINGLE)


def gammas(tensors):
    return {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for key, tensor in tensors.items()
    }


def put_all(**more):
    return lambda tensors: tensors | {key.replace("__", "."): more[key] for key in more}


def without(prefix):
    return lambda tensors: {key.removeprefix(prefix): value for key, value in tensors.items()}


def doubled(prefix):
    return lambda tensors: {
        prefix + key if key.startswith(prefix) else key: value for key, value in tensors.items()
    }


def twin(**names):
    return lambda tensors: (
        tensors | {other.replace("__", "."): tensors[own] for other, own in names.items()}
    )


UNTIDY = {
    "gamma and beta": ("bert", gammas),
    "gamma and beta, distilbert": ("distilbert", gammas),
    "no prefix": ("gpt2", without("transformer.")),
    "no prefix, llama": ("llama", without("model.")),
    "no prefix, bert": ("bert", without("bert.")),
    "no prefix, roberta": ("roberta", without("roberta.")),
    "no prefix, distilbert": ("distilbert", without("distilbert.")),
    "no prefix, albert": ("albert", without("albert.")),
    "no prefix, modernbert": ("modernbert", without("model.")),
    "doubled prefix": ("bert", doubled("bert.")),
    "doubled prefix, llama": ("llama", doubled("model.")),
    "doubled prefix, albert": ("albert", doubled("albert.")),
    "gamma and beta, albert": ("albert", gammas),
    "doubled prefix, roberta": ("roberta", doubled("roberta.")),
    "a wrapper": ("gpt2", lambda t: {f"module.{k}": v for k, v in t.items()}),
    "buffers, gpt2": (
        "gpt2",
        put_all(
            transformer__h__0__attn__bias=torch.ones(1, 1, 4, 4),
            h__1__attn__masked_bias=-torch.ones(1),
        ),
    ),
    "buffers, bert": ("bert", put_all(bert__embeddings__position_ids=torch.arange(48)[None])),
    "buffers, roberta": (
        "roberta",
        put_all(roberta__embeddings__position_ids=torch.arange(50)[None]),
    ),
    "buffers, llama": (
        "llama",
        put_all(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)),
    ),
    "a tied weight twice, gpt2": ("gpt2", twin(lm_head__weight="transformer.wte.weight")),
    "a tied weight twice, llama": (
        "llama-tied",
        twin(lm_head__weight="model.embed_tokens.weight"),
    ),
    "a tied weight twice, bert": (
        "bert",
        twin(
            cls__predictions__decoder__weight="bert.embeddings.word_embeddings.weight",
            cls__predictions__decoder__bias="cls.predictions.bias",
        ),
    ),
    "a tied weight twice, roberta": (
        "roberta",
        twin(
            lm_head__decoder__weight="roberta.embeddings.word_embeddings.weight",
            lm_head__decoder__bias="lm_head.bias",
        ),
    ),
    "a tied weight twice, albert": (
        "albert",
        twin(
            predictions__decoder__weight="albert.embeddings.word_embeddings.weight",
            predictions__decoder__bias="predictions.bias",
        ),
    ),
    "a tied weight twice, distilbert": (
        "distilbert",
        twin(vocab_projector__weight="distilbert.embeddings.word_embeddings.weight"),
    ),
    "double precision": ("bert", lambda t: {k: v.double() for k, v in t.items()}),
}
STALE = {
    "_name_or_path": "somewhere",
    "transformers_version": "4.8.2",
    "torch_dtype": "float16",
    "gradient_checkpointing": False,
    "position_embedding_type": "absolute",
    "n_ctx": 48,
    "summary_type": "cls_index",
    "task_specific_params": {"text-generation": {"max_length": 50}},
    "use_cache": True,
}
"""Keys that config.json files of earlier years hold."""


@pytest.mark.parametrize("kind", UNTIDY)
def test_untidy_files_load_to_the_same_tensors(kind, tmp_path):
    shape, spoil = UNTIDY[kind]
    write_published(tmp_path, shape)
    clean = read_published(tmp_path).theirs
    rewrite(tmp_path, spoil(stored(tmp_path)))
    edit_config(tmp_path, **STALE)
    found = read_published(tmp_path)
    assert found.fresh == () and found.theirs.keys() == clean.keys()
    assert all(torch.equal(found.theirs[key], tensor) for key, tensor in clean.items())


def change(key, make):
    def spoil(folder):
        tensors = stored(folder)
        make(tensors, key)
        rewrite(folder, tensors)

    return spoil


def drop(name):
    return change(name, lambda tensors, key: tensors.pop(key))


def put(name, tensor):
    return change(name, lambda tensors, key: tensors.update({key: tensor}))


def config(**keys):
    return lambda folder: edit_config(folder, **keys)


def truncate(name):
    def spoil(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return spoil


def edit_tokenizer(folder, **keys):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def pickled(folder):
    torch.save(stored(folder), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


def pickled_shards(folder):
    """The same shards as torch wrote them, with the index that names them."""
    index = folder / "model.safetensors.index.json"
    described = json.loads(index.read_text())
    for path in folder.glob("model-*.safetensors"):
        torch.save(load_file(path), folder / f"pytorch_{path.stem}.bin")
        path.unlink()
    described["weight_map"] = {
        key: f"pytorch_{name.removesuffix('.safetensors')}.bin"
        for key, name in described["weight_map"].items()
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(described))
    index.unlink()


BAD = {
    "unknown family": ("gpt2", config(model_type="mamba"), "of the family 'mamba'"),
    "a family that is no text": ("gpt2", config(model_type=["gpt2"]), r"of the family \['gpt2'\]"),
    "heads that do not divide": (
        "gpt2",
        config(n_head=5),
        r"config.json make no model: .*n_heads=5",
    ),
    "dropout of two": (
        "bert",
        config(hidden_dropout_prob=2.0),
        r"config.json make no model: .*=2.0",
    ),
    "kinds of layers that are no list": ("qwen3", config(layer_types=5), "layer_types to 5"),
    "padding that is no row": ("llama", config(pad_token_id=10**6), r"transformers refuses .*json"),
    "a NaN": (
        "gpt2",
        put("transformer.h.0.ln_1.bias", torch.tensor([float("nan")] * 32)),
        "h.0.ln_1.bias with numbers that are NaN",
    ),
    "a number without end": (
        "bert",
        put("cls.predictions.bias", torch.tensor([float("inf")] * 320)),
        "cls.predictions.bias with numbers that are NaN or infinite",
    ),
    "a template that is no text": (
        "gpt2",
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff{{"),
        "chat_template.jinja is no text in UTF-8",
    ),
    "half a frame": (
        "bert",
        lambda f: edit_tokenizer(f, post_processor={"type": "BertProcessing", "cls": ["[CLS]", 2]}),
        "tokenizer.json is no tokenizer.json that",
    ),
    "a frame of numbers": (
        "bert",
        lambda f: edit_tokenizer(f, post_processor={"type": "BertProcessing", "cls": 5, "sep": 6}),
        "tokenizer.json is no tokenizer.json that",
    ),
    "no family": ("gpt2", config(model_type=None), "--family"),
    "unknown key": ("gpt2", put("transformer.h.0.attn.c_rot.weight", torch.ones(2)), "c_rot"),
    "a layer too many": ("llama", config(num_hidden_layers=1), "model.layers.1."),
    "a layer too few": ("llama", config(num_hidden_layers=3), "lacks model.layers.2."),
    "missing key": ("bert", drop("bert.encoder.layer.1.output.dense.bias"), "output.dense.bias"),
    "half a head": ("bert", drop("cls.predictions.transform.dense.bias"), "transform.dense.bias"),
    "no head that must be there": ("llama", drop("lm_head.weight"), "lacks lm_head.weight"),
    "another shape": ("gpt2", put("transformer.ln_f.weight", torch.ones(31)), "ln_f.weight as 31,"),
    "a row too many": ("gpt2", config(vocab_size=321), "wte.weight as 320 x 32"),
    "quantised": (
        "llama",
        put("model.norm.weight", torch.ones(32, dtype=torch.int8)),
        "not quantised",
    ),
    "twins that differ": (
        "gpt2",
        put("lm_head.weight", torch.ones(320, 32)),
        "lm_head.weight.*different|different values",
    ),
    "scaled rope": (
        "llama",
        config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, rope_parameters=None),
        "'dynamic'",
    ),
    "scaled rope without its factor": (
        "llama",
        config(rope_parameters={"rope_type": "linear", "rope_theta": 500.0}),
        "without factor",
    ),
    "rope scaled by less than nothing": (
        "llama",
        config(rope_parameters={"rope_type": "linear", "factor": 0.5}),
        "factor as 0.5",
    ),
    "frequencies in the wrong order": (
        "llama",
        config(
            rope_parameters={
                "rope_type": "llama3",
                "factor": 2.0,
                "original_max_position_embeddings": 16,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
            }
        ),
        "low_freq_factor as 4.0",
    ),
    "a type of rope that is no text": (
        "llama",
        config(rope_parameters={"rope_type": ["default"]}),
        r"\['default'\]",
    ),
    "biases": ("llama", config(attention_bias=True), "attention_bias"),
    "activation": ("bert", config(hidden_act="silu"), "hidden_act to 'silu'"),
    "windows": ("qwen3", config(use_sliding_window=True), "use_sliding_window"),
    "kinds of layers": ("modernbert", config(layer_types=["full_attention"]), "layer_types"),
    "a gate": ("modernbert", config(hidden_activation="silu"), "hidden_activation"),
    "sines": ("distilbert", config(sinusoidal_pos_embds=True), "sinusoidal_pos_embds"),
    "blocks in groups": ("albert", config(num_hidden_groups=2), "num_hidden_groups"),
    "embeddings as wide as the blocks": (
        "albert",
        config(embedding_size=32),
        "albert.embeddings.LayerNorm.bias as 12, and by its config.json it is 32",
    ),
    "no projection": (
        "albert",
        drop("albert.encoder.embedding_hidden_mapping_in.bias"),
        "lacks albert.encoder.embedding_hidden_mapping_in.bias",
    ),
    "another padding": ("roberta", config(pad_token_id=0), "pad_token_id"),
    "no norm of queries": (
        "qwen3",
        drop("model.layers.1.self_attn.q_norm.weight"),
        "lacks model.layers.1.self_attn.q_norm.weight",
    ),
    "no size": ("gpt2", config(n_layer=None), "n_layer"),
    "tokenizer too large": ("gpt2", config(vocab_size=8), "tokenizer"),
    "no tokenizer": ("gpt2", lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "half a tokenizer": ("gpt2", truncate("tokenizer.json"), "tokenizer.json"),
    "half a file": ("gpt2", truncate(SINGLE), SINGLE),
    "half a config": ("gpt2", truncate("config.json"), "config.json"),
    "no config": ("gpt2", lambda f: (f / "config.json").unlink(), "config.json"),
    "no weights": ("gpt2", lambda f: (f / SINGLE).unlink(), "no weights"),
    "a pickle": ("gpt2", pickled, "--allow_pickle true"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_sentence_and_nothing_is_written(kind, tmp_path):
    shape, spoil, said = BAD[kind]
    write_published(tmp_path / "a", shape)
    spoil(tmp_path / "a")
    with pytest.raises(UserError, match=said) as caught:
        imported(tmp_path / "a", tmp_path / "b")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_pickle_of_other_things_is_refused_without_advice_to_trust_it(tmp_path):
    write_published(tmp_path, "gpt2")
    path, tensors = tmp_path / "pytorch_model.bin", stored(tmp_path)
    (tmp_path / SINGLE).unlink()
    torch.save(dict(enumerate(tensors.values())), path)
    with pytest.raises(UserError, match="something else than named tensors"):
        read_weights(tmp_path, pickled=True)
    path.write_bytes(b"x")
    with pytest.raises(UserError, match=r"damaged \(Weights only load failed\); choose"):
        read_weights(tmp_path, pickled=True)


def test_a_place_for_figures_that_is_none_is_told_before_anything_is_written(tmp_path):
    write_published(tmp_path / "a", "gpt2")
    for path in (tmp_path / "none" / "x.json", tmp_path):
        with pytest.raises(UserError, match=r"--json .*: name a file in a folder that exists"):
            imported(tmp_path / "a", tmp_path / "b", f"--json={path}")
        with pytest.raises(UserError, match=r"--json .*: name a file in a folder that exists"):
            cli.run(["export", str(tmp_path / "a"), f"--out={tmp_path / 'b'}", f"--json={path}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_nan_is_no_agreement_wherever_it_stands(tmp_path, monkeypatch):
    write_published(tmp_path / "a", "bert")
    small, nan = torch.zeros(2), torch.tensor([0.0, float("nan")])
    for found in ([small, nan], [nan, small], [small, nan, small]):
        monkeypatch.setattr(proof, "differences_of_a_stack", lambda *_, found=found: found)
        with pytest.raises(UserError, match="computes numbers that are NaN or infinite"):
            imported(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_what_no_head_reads_is_left_out_and_told(tmp_path, capsys):
    write_published(tmp_path / "a", "roberta")
    clean = imported(tmp_path / "a", tmp_path / "b")
    pooler = {"dense.weight": torch.ones(32, 32), "dense.bias": torch.ones(32)}
    more = {f"roberta.pooler.{key}": tensor for key, tensor in pooler.items()}
    rewrite(tmp_path / "a", stored(tmp_path / "a") | more)
    found = imported(tmp_path / "a", tmp_path / "c")
    assert all(torch.equal(found[key], tensor) for key, tensor in clean.items())
    told = capsys.readouterr().out
    assert all(f"left out: {key}" in told for key in more)


def test_shards_and_pickles_give_the_same_tensors_and_a_family_can_be_named(tmp_path):
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    write_published(whole, "gpt2")
    write_published(shards, "gpt2", max_shard_size="40KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    first = imported(whole, tmp_path / "a")
    second = imported(shards, tmp_path / "b")
    pickled(whole)
    edit_config(whole, model_type=None)
    third = imported(whole, tmp_path / "c", "--family=gpt2", "--allow_pickle=true")
    for other in (second, third):
        assert other.keys() == first.keys()
        assert all(torch.equal(other[key], tensor) for key, tensor in first.items())
    pickled_shards(shards)
    fourth = imported(shards, tmp_path / "e", "--allow_pickle=true")
    assert all(torch.equal(fourth[key], tensor) for key, tensor in first.items())
    next(shards.glob("*-00002-*.bin")).unlink()
    with pytest.raises(UserError, match="which is not there"):
        imported(shards, tmp_path / "d", "--allow_pickle=true")


class Malicious:
    def __reduce__(self):
        return print, ("code ran",)


def test_a_pickle_with_code_is_refused_and_its_code_does_not_run(tmp_path, capsys):
    write_published(tmp_path / "a", "gpt2")
    torch.save({"x": Malicious()}, tmp_path / "a" / "pytorch_model.bin")
    (tmp_path / "a" / SINGLE).unlink()
    with pytest.raises(UserError, match="something else than tensors"):
        imported(tmp_path / "a", tmp_path / "b", "--allow_pickle=true")
    assert "code ran" not in capsys.readouterr().out


def test_a_wrong_table_is_caught_by_the_proof_and_nothing_is_written(tmp_path, monkeypatch):
    write_published(tmp_path / "a", "gpt2")
    wrong = FAMILIES["gpt2"].to_model
    object.__setattr__(
        FAMILIES["gpt2"], "to_model", lambda config: wrong(config) | {"norm_eps": 0.01}
    )
    try:
        with pytest.raises(UserError, match="computes something else"):
            imported(tmp_path / "a", tmp_path / "b")
    finally:
        object.__setattr__(FAMILIES["gpt2"], "to_model", wrong)
    assert not (tmp_path / "b").exists()
    monkeypatch.setattr(importing, "can_prove", lambda: False)
    told = []
    importing.import_folder(tmp_path / "a", tmp_path / "b", note=told.append)
    assert any("proof was left out" in line for line in told)
