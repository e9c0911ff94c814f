"""`nanolm import`: published folders of every family, both ways; and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from nanolm import cli
from nanolm.checkpoint.container import read_tensors
from nanolm.errors import UserError
from nanolm.finetune.run import load_task_config, run_finetune
from nanolm.hub import importing
from nanolm.hub.configs import Published
from nanolm.hub.families import FAMILIES
from nanolm.hub.published import read_published
from nanolm.inference.parity import difference
from nanolm.saved import open_saved
from tests.finetuned import questions, table
from tests.prepared import train
from tests.published import SHAPES, write_published

SINGLE = "model.safetensors"


def imported(source, out, *words):
    cli.run(["import", str(source), str(out), *words])
    return read_tensors(out, "model")


@pytest.mark.parametrize("shape", SHAPES)
def test_import_export_import_keeps_every_bit_and_transformers_agrees(shape, tmp_path, capsys):
    a, b, c = (tmp_path / name for name in "abc")
    write_published(a, shape)
    first = imported(a, b, f"--json={tmp_path / 'figures.json'}")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert 0 <= figures["largest_difference"] < 1e-5
    fresh = {"bert-trunk": ("cls.predictions.", "cls.seq_relationship.")}.get(shape, ())
    assert bool(figures["fresh"]) == bool(fresh)
    assert all(key.startswith(fresh) for key in figures["fresh"])
    told = capsys.readouterr().out
    assert "proof: largest difference" in told
    assert all(
        f"has no {key}, which starts from random weights" in told for key in figures["fresh"]
    )
    cli.run(["export", str(b), f"--out={c}", "--format=transformers"])
    published = {k: v for k, v in load_file(a / SINGLE).items() if not k.endswith("decoder.bias")}
    back = load_file(c / SINGLE)
    prefix = "bert." if shape == "bert-trunk" else ""
    for key, tensor in published.items():
        assert torch.equal(back[prefix + key], tensor), key
    again = imported(c, tmp_path / "d")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in first.items())


def test_an_imported_decoder_writes_and_an_imported_encoder_fills(tmp_path, capsys):
    write_published(tmp_path / "a", "gpt2")
    imported(tmp_path / "a", tmp_path / "b")
    cli.run(["generate", str(tmp_path / "b"), "--prompt=the quick", "--max_tokens=5"])
    assert "the quick" in capsys.readouterr().out
    write_published(tmp_path / "c", "bert")
    imported(tmp_path / "c", tmp_path / "d")
    cli.run(["fill", str(tmp_path / "d"), "the <mask> fox", f"--json={tmp_path / 'fill.json'}"])
    found = json.loads((tmp_path / "fill.json").read_text())["masks"]
    assert len(found) == 1 and len(found[0]) == 5


@pytest.mark.parametrize("kind", ["byte_bpe", "word_piece"])
def test_ids_of_a_tokenizer_json_are_the_librarys_own(kind, tmp_path):
    write_published(tmp_path / "a", "gpt2" if kind == "byte_bpe" else "bert")
    library = Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    imported(tmp_path / "a", tmp_path / "b")
    ours = open_saved(tmp_path / "b").tokenizer
    texts = ["the quick  brown ▁ fox", "中文 héllo 👩‍👩‍👧\ud7ff", "", " x\n\ty", "\uf4a1\uf4a2"]
    for text in texts:
        ids = ours.encode(text).tolist()
        assert ids == library.encode(text, add_special_tokens=False).ids
        if kind == "byte_bpe":
            assert ours.decode(ids) == text
            assert ours.byte_length[ids].sum() == len(text.encode())
    named = ours.encode("<|endoftext|> [MASK]")  # a special piece's name in a text stays text
    assert not {index for role, index in ours.roles().items() if role != "unk"} & {*named.tolist()}
    wanted = {"byte_bpe": {"bos", "eos"}, "word_piece": {"pad", "unk", "cls", "sep", "mask", "eos"}}
    assert set(ours.roles()) == wanted[kind]
    assert ours.lossless == (kind == "byte_bpe")


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


UNTIDY = {
    "gamma and beta": ("bert", gammas),
    "no prefix": ("gpt2", lambda t: {k.removeprefix("transformer."): v for k, v in t.items()}),
    "no prefix, llama": ("llama", lambda t: {k.removeprefix("model."): v for k, v in t.items()}),
    "no prefix, bert": ("bert", lambda t: {k.removeprefix("bert."): v for k, v in t.items()}),
    "doubled prefix": (
        "bert",
        lambda t: {f"bert.{k}" if k.startswith("bert.") else k: v for k, v in t.items()},
    ),
    "doubled prefix, llama": (
        "llama",
        lambda t: {f"model.{k}" if k.startswith("model.") else k: v for k, v in t.items()},
    ),
    "a wrapper": ("gpt2", lambda t: {f"module.{k}": v for k, v in t.items()}),
    "buffers, gpt2": (
        "gpt2",
        lambda t: (
            t
            | {
                "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4),
                "h.1.attn.masked_bias": -torch.ones(1),
            }
        ),
    ),
    "buffers, bert": (
        "bert",
        lambda t: t | {"bert.embeddings.position_ids": torch.arange(48)[None]},
    ),
    "buffers, llama": (
        "llama",
        lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    ),
    "a tied weight twice, gpt2": (
        "gpt2",
        lambda t: t | {"lm_head.weight": t["transformer.wte.weight"]},
    ),
    "a tied weight twice, bert": (
        "bert",
        lambda t: (
            t
            | {
                "cls.predictions.decoder.weight": t["bert.embeddings.word_embeddings.weight"],
                "cls.predictions.decoder.bias": t["cls.predictions.bias"],
            }
        ),
    ),
}


@pytest.mark.parametrize("kind", UNTIDY)
def test_untidy_files_load_to_the_same_tensors(kind, tmp_path):
    shape, spoil = UNTIDY[kind]
    write_published(tmp_path, shape)
    clean = read_published(tmp_path).theirs
    rewrite(tmp_path, spoil(stored(tmp_path)))
    found = read_published(tmp_path)
    assert found.fresh == () and found.theirs.keys() == clean.keys()
    assert all(torch.equal(found.theirs[key], tensor) for key, tensor in clean.items())


def edit_config(folder, **keys):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


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


def pickled(folder):
    torch.save(stored(folder), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


BAD = {
    "unknown family": ("gpt2", config(model_type="mamba"), "of the family 'mamba'"),
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
        config(rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_parameters=None),
        "'linear'",
    ),
    "biases": ("llama", config(attention_bias=True), "attention_bias"),
    "activation": ("bert", config(hidden_act="silu"), "hidden_act to 'silu'"),
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
    next(shards.glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(UserError, match="which is not there"):
        imported(shards, tmp_path / "d")


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


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rotary_base_is_read_under_its_old_and_new_names(key):
    config = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": 8,
        "intermediate_size": 8,
        "max_position_embeddings": 8,
        "rope_theta": 500.0,
    }
    read = FAMILIES["llama"].to_model
    assert read(Published("x", config, "llama"))["positions"]["base"] == [500.0]
    config[key] = {"rope_type": "default", "rope_theta": 700.0}
    assert read(Published("x", config, "llama"))["positions"]["base"] == [700.0]


@pytest.mark.parametrize(
    ("case", "direction"),
    [
        ("gpt2, untied", "in"),
        ("llama, 2 of 4 heads", "out"),
        ("bert, masked LM and next sentence", "in"),
        ("bert, masked LM, untied", "out"),
    ],
)
def test_rows_of_the_parity_table(case, direction):
    assert 0 < difference(case, direction) < 1e-5


def test_init_from_takes_a_published_folder_for_pretraining_and_fine_tuning(tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "CACHE", str(tmp_path / "cache"))
    source = tmp_path / "published"
    write_published(source, "gpt2")
    tokenizer = str(source / "tokenizer.json")
    prepared = str(tmp_path / "prepared")
    for number in range(12):
        words = " ".join(f"the quick {number} brown fox {word} jumps" for word in range(40))
        (tmp_path / f"text-{number}.txt").write_text(words)
    sources = f"--sources=[{tmp_path / 'text-*.txt'}]"
    options = ("--val_fraction=0.3", "--workers=1", f"--tokenizer={tokenizer}")
    cli.run(["prepare", sources, f"--out={prepared}", *options])
    shape = ("--model.max_length=48", "--model.vocab_size=320", "--model.feed_forward=gelu_tanh")
    words = (f"--init_from=hf:{source}", "--train.steps=0", "--data.row_length=16", *shape)
    train(tmp_path / "run", *words, f"--data.path={prepared}", "--eval.batches=1")
    ours, theirs = open_saved(tmp_path / "run"), stored(source)
    wte = theirs["transformer.wte.weight"]
    assert torch.equal(ours.learner.trunk.embedding.weight, wte)
    assert len(list((tmp_path / "cache").iterdir())) == 1

    for name in ("train", "val"):
        table(tmp_path, name, questions(9))
    options = (
        "--data.row_length=32",
        f"--data.train={tmp_path / 'train.jsonl'}",
        f"--data.val={tmp_path / 'val.jsonl'}",
    )
    config = load_task_config(
        [
            *(f"--init_from=hf:{source}", "--objective.name=classify", *options),
            *("--train.steps=1", "--train.global_batch=4", "--run.wandb.mode=disabled"),
            f"--run.dir={tmp_path / 'tuned'}",
        ]
    )
    run_finetune(config)
    tuned = open_saved(tmp_path / "tuned")
    assert tuned.tokenizer.file_name == "tokenizer.json"
    assert tuned.config.model.n_layers == 2
    assert len(list((tmp_path / "cache").iterdir())) == 1
    with pytest.raises(UserError, match="there is no folder"):
        importing.base_of(f"hf:{tmp_path / 'nowhere'}")
    edit_config(source, model_type=None)
    with pytest.raises(UserError, match=r"nanolm import .* OUT` takes that flag"):
        importing.base_of(f"hf:{source}")
