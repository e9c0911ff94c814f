"""`nanolm import`: published folders of every family, both ways; and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nanolm import cli
from nanolm.build import build_learner, build_objective
from nanolm.checkpoint.container import read_tensors
from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.errors import UserError
from nanolm.finetune.run import load_task_config, run_finetune
from nanolm.hub import importing, proof
from nanolm.hub.configs import Published
from nanolm.hub.families import FAMILIES
from nanolm.hub.folder import read_tokenizer
from nanolm.hub.published import as_config, model_keys
from nanolm.hub.samples import sample_texts
from nanolm.inference.export_transformers import published_folder, transformers_folder
from nanolm.inference.parity import CASES, VOCABULARY, NoTokenizer, difference
from nanolm.saved import open_saved
from tests.finetuned import questions, table
from tests.prepared import train
from tests.published import LINES, SHAPES, edit_config, write_published

SINGLE = "model.safetensors"

FRESH = {
    "bert-trunk": ("cls.predictions.", "cls.seq_relationship."),
    "distilbert-trunk": ("vocab_",),
    "albert-trunk": ("predictions.", "sop_classifier."),
}


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
    assert figures["greedy_tokens"] == (None if "bert" in shape or "t5" in shape else 32)
    # T5's class in transformers opens no tokenizer but a unigram one, and so leaves that proof out.
    alike = None if shape.startswith("t5") else 0
    assert figures["texts_with_other_ids"] == alike
    fresh = FRESH.get(shape, ())
    assert bool(figures["fresh"]) == bool(fresh)
    assert all(key.startswith(fresh) for key in figures["fresh"])
    told = capsys.readouterr().out
    assert "proof: largest difference" in told
    assert all(
        f"has no {key}, which starts from random weights" in told for key in figures["fresh"]
    )
    out = ["export", str(b), f"--out={c}", "--format=transformers"]
    cli.run([*out, f"--json={tmp_path / 'out.json'}"])
    figures = json.loads((tmp_path / "out.json").read_text())
    assert 0 <= figures["largest_difference"] < 1e-5 and figures["texts_with_other_ids"] == 0
    published = {k: v for k, v in load_file(a / SINGLE).items() if not k.endswith("decoder.bias")}
    back = load_file(c / SINGLE)
    prefix = f"{shape.removesuffix('-trunk')}." if shape.endswith("-trunk") else ""
    for key, tensor in published.items():
        # RoBERTa's first two positions are read by no token, so they come back as zeros.
        rows = slice(2, None) if shape == "roberta" and "position_emb" in key else slice(None)
        assert torch.equal(back[prefix + key][rows], tensor[rows]), key
    assert json.loads((c / "config.json").read_text())["model_type"] == shape.split("-")[0]
    again = imported(c, tmp_path / "d")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in first.items())


def test_an_export_that_differs_is_caught_and_nothing_is_written(tmp_path, monkeypatch):
    write_published(tmp_path / "a", "llama")
    imported(tmp_path / "a", tmp_path / "b")
    right = FAMILIES["llama"].to_config
    monkeypatch.setitem(
        vars(FAMILIES["llama"]),
        "to_config",
        lambda *words: right(*words) | {"rms_norm_eps": 0.01},
    )
    words = ["export", str(tmp_path / "b"), f"--out={tmp_path / 'c'}", "--format=transformers"]
    with pytest.raises(UserError, match="computes something else of this model"):
        cli.run(words)
    assert not (tmp_path / "c").exists()
    monkeypatch.setattr(importing, "can_prove", lambda: False)
    told = []
    saved = open_saved(tmp_path / "b")
    _, _, figures = published_folder(saved.config, saved.tokenizer, saved.learner, told.append)
    assert figures["largest_difference"] is None
    assert any("proof was left out" in line for line in told)


def test_a_decoder_that_writes_something_else_is_caught(tmp_path, monkeypatch):
    write_published(tmp_path / "a", "gpt2")
    monkeypatch.setattr(proof, "KeyValueCache", lambda *shape: None)  # it forgets what it read
    with pytest.raises(UserError, match=r"another token than nanolm after \d+ "):
        imported(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


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


def test_roles_of_roberta_are_read_from_its_frame_and_positions_begin_at_the_edge(tmp_path):
    write_published(tmp_path / "a", "roberta")
    imported(tmp_path / "a", tmp_path / "b")
    saved = open_saved(tmp_path / "b")
    roles = {"bos": 0, "cls": 0, "pad": 1, "sep": 2, "eos": 2, "unk": 3, "mask": 4}
    assert saved.tokenizer.roles() == roles
    assert saved.config.model.max_length == 48
    found = saved.learner.trunk.positions.table.weight
    table = load_file(tmp_path / "a" / SINGLE)["roberta.embeddings.position_embeddings.weight"]
    assert torch.equal(found, table[2:])


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


def test_a_unigram_tokenizer_json_has_the_librarys_ids_and_places(tmp_path):
    library = Tokenizer(models.Unigram())
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator(LINES, trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    names = {"eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    ours = read_tokenizer(tmp_path)
    assert ours.roles() == {"eos": 1, "unk": 0}
    for text in [*sample_texts(300), "the quick brown fox"]:
        ids, begins, ends = ours.encode_places(text)
        assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
        assert (begins <= ends).all() and ends[-1:] <= len(text.encode())
    assert ours.decode(ids) == "the quick brown fox"
    told = b"the quick brown fox"
    assert [told[a:b] for a, b in zip(begins, ends, strict=True)][-1] in b"fox"


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
    config[key] = {"type": "linear", "factor": 2.0}
    read_options = read(Published("x", config, "llama"))["positions"]
    assert read_options == {"name": "rotary", "base": [500.0], "scaling": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("case", "direction"),
    [
        ("gpt2, untied", "in"),
        ("llama, 2 of 4 heads", "out"),
        ("llama, scaled as Llama 3.1", "in"),
        ("llama, scaled as Llama 3.1", "out"),
        ("llama, scaled linearly", "in"),
        ("llama, scaled linearly", "out"),
        ("bert, masked LM and next sentence", "in"),
        ("bert, masked LM, untied", "out"),
        ("t5, v1.0", "out"),
        ("t5, v1.1", "in"),
        ("qwen3, 2 of 4 heads, tied", "in"),
        ("roberta, masked LM", "out"),
        ("distilbert, masked LM", "out"),
        ("albert, masked LM and sentence order", "in"),
        ("albert, masked LM, untied", "out"),
        ("bert, masked LM, tanh gelu", "in"),
        ("bert, masked LM, tanh gelu", "out"),
        ("modernbert, masked LM", "in"),
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
    ours, theirs = open_saved(tmp_path / "run"), load_file(source / SINGLE)
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
    with pytest.raises(
        UserError, match=r"`nanolm import .* OUT --family NAME`, and init_from takes OUT"
    ):
        importing.base_of(f"hf:{source}")


@pytest.mark.parametrize("case", [case for case in CASES if "untied" in case or "v1.1" in case])
def test_tensors_of_an_export_share_no_memory(case, tmp_path):
    """A file of safetensors refuses those that do, and untied heads may have duplicates."""
    name, _, keys = CASES[case]
    family = FAMILIES[name]
    tokenizer = NoTokenizer(pad=1 if family.pad is None else family.pad)
    published = Published(case, keys | {"vocab_size": VOCABULARY}, name)
    config = as_config(family, model_keys(family, published), frozenset(), tokenizer)
    learner = build_learner(config, build_objective(config, tokenizer))
    tensors, _ = transformers_folder(config, tokenizer, learner_tensors(learner))
    save_file(tensors, tmp_path / SINGLE)
    assert load_file(tmp_path / SINGLE).keys() == tensors.keys()
