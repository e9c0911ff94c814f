"""`nanolm import`: untidy folders that load as tidy ones do."""

import json

import pytest
import torch

from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError
from nanolm.hub.published import read_published
from tests.published import edit_config, write_published
from tests.spoiled_folders import imported, pickled, pickled_shards, rewrite, stored


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


def test_a_role_whose_piece_the_vocabulary_lacks_is_told(tmp_path, capsys):
    """As where a pad piece was named for training and never put into tokenizer.json."""
    write_published(tmp_path / "a", "gpt2")
    path = tmp_path / "a" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "[FILL]"}))
    imported(tmp_path / "a", tmp_path / "b")
    told = capsys.readouterr().out
    assert f"no pad piece: {tmp_path / 'a'} names [FILL], which its vocabulary lacks" in told
    tokenizer = Tokenizer.load(tmp_path / "b" / "tokenizer.json")
    assert tokenizer.missing == {"pad": "[FILL]"} and "eos" in tokenizer.roles()
    with pytest.raises(UserError, match=r"has no pad piece \(looked for \[FILL\]\)"):
        tokenizer.role("pad")


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
