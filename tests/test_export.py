"""`nanolm export`: one folder that every command reads, from one file or many; and exactly the
same function in `transformers`, or a refusal."""

import json

import pytest
import torch
import transformers

from nanolm import cli
from nanolm.checkpoint.checkpoints import locate
from nanolm.checkpoint.container import INDEX, read_tensors, write_folder
from nanolm.checkpoint.lazy_tensors import part_name
from nanolm.config.model import ModelConfig
from nanolm.errors import UserError
from nanolm.hub.families import FAMILIES
from nanolm.inference.export_transformers import family_of, published_tensors
from nanolm.model.trunk import Inputs
from nanolm.registry import Options
from nanolm.saved import open_saved
from tests.prepared import train, trained_run


def tensors_of(folder):
    return read_tensors(folder, "model")


def divided(folder, out, parts):
    """The same checkpoint as `parts` ranks of fsdp write it: rows in order, small ones in the
    first."""
    whole = tensors_of(folder)
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".safetensors"}
    files.pop(INDEX)
    found = {}
    for number in range(parts):
        name = part_name("model", number, parts).removesuffix(".safetensors")
        rows = {key: tensor.chunk(parts) for key, tensor in whole.items() if tensor.ndim}
        found[name] = {key: part[number] for key, part in rows.items() if len(part) > number}
    write_folder(out, found, files)
    return out


def test_one_file_or_many_give_the_same_folder(tmp_path):
    run = trained_run("clm")
    folder = locate(run)
    many = divided(folder, tmp_path / "many", 3)
    cli.run(["export", str(run), f"--out={tmp_path / 'a'}", f"--json={tmp_path / 'a.json'}"])
    cli.run(["export", str(many), f"--out={tmp_path / 'b'}"])
    for name in ("a", "b"):
        out = tmp_path / name
        assert tensors_of(out).keys() == tensors_of(folder).keys()
        for key, tensor in tensors_of(folder).items():
            assert torch.equal(tensors_of(out)[key], tensor), key
        files = {path.name for path in out.iterdir()}
        assert files == {"config.yaml", "tokenizer.model", "model.safetensors", INDEX}
    assert json.loads((tmp_path / "a.json").read_text())["tensors"] == len(tensors_of(folder))
    cli.run(["generate", f"--run={tmp_path / 'b'}", "--prompt=def ", "--max_tokens=4"])
    with pytest.raises(UserError, match="exists already"):
        cli.run(["export", str(run), f"--out={tmp_path / 'a'}"])


SHAPES = {
    "gpt2": ("--objective.name=clm", "--model.feed_forward=gelu_tanh"),
    "llama": (
        *("--objective.name=clm", "--model.feed_forward=swiglu", "--model.norm=rmsnorm"),
        *("--model.bias=false", "--model.positions.name=rotary", "--model.n_kv_heads=2"),
        *("--model.tied=false", "--model.positions.base=[5000.0]"),
    ),
    "bert": (
        *("--objective.name=mlm_pair", "--model.trunk=encoder", "--model.norm_position=post"),
        *("--model.embedding_norm=true", "--model.n_segments=2", "--model.norm_eps=1e-12"),
    ),
}
MODELS = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "bert": "BertForPreTraining",
}


@pytest.mark.parametrize("family", SHAPES)
def test_transformers_computes_the_same_logits(family, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    words = ("--train.steps=3", "--optim.lr=0.02", "--schedule.warmup=0", *SHAPES[family])
    train(run, *words, "--train.ema=0.5" if family == "gpt2" else "--run.seed=1")
    cli.run(["export", str(run), f"--out={out}", "--format=transformers"])
    theirs = getattr(transformers, MODELS[family]).from_pretrained(
        out, attn_implementation="eager", local_files_only=True
    )
    theirs.eval()
    saved = open_saved(run)
    tokens = torch.randint(
        0, saved.tokenizer.vocab_size, (3, 24), generator=torch.Generator().manual_seed(2)
    )
    segments = (torch.arange(24) >= 10).long().expand(3, 24)
    with torch.no_grad():
        inputs = Inputs(tokens_BT=tokens, segments_BT=segments if family == "bert" else None)
        hidden = saved.learner.trunk(inputs)
        ours = saved.learner.heads["lm"](hidden)
        if family == "bert":
            answer = theirs(tokens, token_type_ids=segments)
            pair = saved.learner.heads["pair"](hidden)
            torch.testing.assert_close(pair, answer.seq_relationship_logits, atol=1e-5, rtol=1e-5)
            logits = answer.prediction_logits
        else:
            logits = theirs(tokens).logits
    torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)
    assert ours.std() > 0.01


def test_what_transformers_would_compute_differently_is_refused(tmp_path):
    run = trained_run("clm")  # learned GPT-2 shapes, but rotary positions
    with pytest.raises(UserError, match=r"gpt2 is nearest, but model\.positions\.name is rotary"):
        cli.run(["export", str(run), f"--out={tmp_path / 'out'}", "--format=transformers"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"attention_scale": 1.0}, r"model\.attention_scale is 1\.0"),
        ({"logit_scale": True}, r"model\.logit_scale is True"),
        ({"feed_forward": "relu"}, r"model\.feed_forward is relu"),
        ({"trunk": "encoder_decoder"}, r"model\.trunk is encoder_decoder"),
    ],
)
def test_what_t5_has_and_no_family_knows_is_refused(keys, words):
    assert family_of(ModelConfig(positions=Options(name="learned"))).name == "gpt2"
    with pytest.raises(UserError, match=words):
        family_of(ModelConfig(positions=Options(name="learned"), **keys))


@pytest.mark.parametrize(
    ("names", "blamed"),
    [
        (["heads.lm.bias"], "its vocabulary head has no transform"),
        (["heads.classify.out.weight"], "this model has heads.classify in its place"),
        (["heads.a_tag.out.bias", "heads.b.x"], "this model has heads.a_tag, heads.b in its place"),
        ([], "this model has no head in its place"),
    ],
)
def test_an_encoder_without_a_vocabulary_head_is_told_what_it_has(names, blamed):
    tensors = dict.fromkeys(["trunk.embedding.weight", *names], torch.zeros(1))
    with pytest.raises(UserError, match=f"{blamed}; export it with --format nanolm"):
        published_tensors(FAMILIES["bert"], None, tensors)
