"""`nanolm import`: bad folders are refused in one sentence, and nothing is written."""

import pytest
import torch

from nanolm.errors import UserError
from nanolm.hub import importing, proof
from nanolm.hub.families import FAMILIES
from nanolm.hub.folder import read_weights
from tests.published import write_published
from tests.spoiled_folders import (
    SINGLE,
    config,
    drop,
    edit_tokenizer,
    imported,
    pickled,
    put,
    require_refusal,
    stored,
    truncate,
)

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
    require_refusal(tmp_path, *BAD[kind])


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


def test_a_nan_is_no_agreement_wherever_it_stands(tmp_path, monkeypatch):
    write_published(tmp_path / "a", "bert")
    small, nan = torch.zeros(2), torch.tensor([0.0, float("nan")])
    for found in ([small, nan], [nan, small], [small, nan, small]):
        monkeypatch.setattr(proof, "differences_of_a_stack", lambda *_, found=found: found)
        with pytest.raises(UserError, match="computes numbers that are NaN or infinite"):
            imported(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


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
