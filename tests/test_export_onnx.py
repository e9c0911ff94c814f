"""`nanolm export --format onnx`: onnxruntime computes rows of any number and length as we do."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import torch

from nanolm import build, cli
from nanolm.config.load import load_config
from nanolm.data.prepare.tokenizer_training import train_tokenizer
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError
from nanolm.finetune.onnx_heads import POOLS, READS, compared, task_onnx
from nanolm.finetune.published import answers
from nanolm.finetune.tasks.heads import Layout, pool
from nanolm.inference import export_onnx
from nanolm.inference.export_onnx import (
    FILE,
    input_names,
    onnx_folder,
    shapes_of,
    traceable,
    vocabulary,
)
from nanolm.inference.parity import randomise
from nanolm.model.trunk import Inputs
from nanolm.ops.masks import Mask
from nanolm.saved import Saved, open_saved
from tests.published import write_published
from tests.test_export_tasks import tuned
from tests.test_tokenizer import corpus

slow = pytest.mark.slow  # torch's exporter takes many seconds a model
WIDTHS = {"classify": 3, "regress": 2, "tag": 3, "read": 2, "choose": 1}


def session(files, folder):
    onnxruntime = pytest.importorskip("onnxruntime")
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return onnxruntime.InferenceSession(folder / FILE)


def rows(vocab, lengths, length):
    """(ids, mask) of rows that are filled up on the right."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(5, vocab, (len(lengths), length), generator=generator)
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def kernels_of(graph):
    """The attention kernels of what is traced."""
    chosen = graph.trunk.kernels.choices.values()
    return {choice.kernel.name for choice in chosen if choice.op == "attention"}


def two_stacks():
    """A small encoder-decoder with random weights, as a run would have saved it."""
    shape = {"trunk": "encoder_decoder", "positions": {"name": "t5"}, "norm": "rmsnorm"}
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48, "max_length": 48}
    words = ["--objective.name=span", "--data.row_length=64"]
    config = load_config(words, base={"model": sizes | {"vocab_size": 448, "bias": False} | shape})
    tokenizer = Tokenizer(train_tokenizer(corpus(), vocab_size=390, kind="bpe"))
    objective = build.build_objective(config, tokenizer)
    learner = build.build_learner(config, objective, phase="prefill")
    randomise(learner)
    return Saved(pathlib.Path("run"), config, tokenizer, learner.eval())


@slow
@pytest.mark.parametrize("shape", ["gpt2", "llama", "bert", "modernbert"])
def test_onnxruntime_computes_rows_of_any_shape(shape, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    write_published(tmp_path / "a", shape)
    cli.run(["import", str(tmp_path / "a"), str(tmp_path / "b")])
    out = ["export", str(tmp_path / "b"), f"--out={tmp_path / 'c'}", "--format=onnx"]
    cli.run([*out, f"--json={tmp_path / 'out.json'}"])
    assert 0 < json.loads((tmp_path / "out.json").read_text())["largest_difference"] < 1e-5
    assert "proof: largest difference from onnxruntime" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "c").iterdir()}
    assert names >= {FILE, "config.yaml", "tokenizer.json", "tokenizer_config.json"}
    graph = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "c" / FILE)
    saved = open_saved(tmp_path / "b")
    encoder = saved.config.model.trunk == "encoder"
    for lengths, length in (([9], 9), ([40, 1, 17], 40)):
        ids, mask = rows(saved.config.model.n_tokens, lengths, length)
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        wanted = {given.name for given in graph.get_inputs()}
        (logits,) = graph.run(None, {n: t.numpy() for n, t in feed.items() if n in wanted})
        own = Mask(key_lengths=mask.sum(1)) if encoder else Mask()
        with torch.no_grad():
            hidden = saved.learner.trunk(Inputs(tokens_BT=ids, mask=own))
            expected = saved.learner.heads["lm"](hidden).numpy()
        keep = mask.bool().numpy()
        np.testing.assert_allclose(logits[keep], expected[keep], atol=1e-4)


@slow
@pytest.mark.parametrize(
    ("shape", "task", "pooling"),
    [
        ("bert", "classify", "mean"),
        ("bert", "regress", "cls"),
        ("bert", "tag", "cls"),
        ("bert", "read", "cls"),
        ("modernbert", "read", "cls"),
        ("llama", "classify", "last"),
        ("t5-encoder", "classify", "mean"),
        ("t5-encoder", "tag", "mean"),
        ("xlnet", "classify", "last"),
        ("xlnet", "regress", "mean"),
        ("xlnet", "tag", "last"),
        ("xlnet", "read", "last"),
        ("xlnet", "choose", "last"),
    ],
)
def test_a_fine_tuned_head_goes_out(shape, task, pooling, tmp_path):
    """Rows of any number and length, padding and a second segment included, as our head answers."""
    pytest.importorskip("onnxscript")
    saved = tuned(shape, task, tmp_path / "run", pooling=pooling)
    files, figures = task_onnx(saved, lambda line: None)
    assert 0 < figures["largest_difference"] < 1e-5
    graph = session(files, tmp_path / "out")
    model, width = saved.config.model, WIDTHS[task]
    for lengths in ([12, 5, 3], [7], [40, 1], [1]):
        ids, mask = rows(400, lengths, max(lengths))
        segments = (torch.arange(max(lengths)) > 2).long().expand_as(ids)
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}
        names = input_names(model, masked=True)
        (logits,) = graph.run(None, {name: feed[name].numpy() for name in names})
        own = Mask() if model.trunk == "decoder" else Mask(key_lengths=mask.sum(1))
        segments = segments if model.n_segments > 1 else None
        with torch.no_grad():
            hidden = saved.learner.trunk(Inputs(tokens_BT=ids, segments_BT=segments, mask=own))
            expected = answers(saved, hidden, mask.bool())
        found = torch.from_numpy(logits)
        assert found.shape[-1] == width
        found = found[mask.bool()] if task in ("tag", "read") else found
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert "labels" in files["config.yaml"].decode() or task in ("regress", "read", "choose")


@slow
@pytest.mark.parametrize("shape", ["t5", "t5-gated"])
def test_an_encoder_decoder_goes_out(shape, tmp_path):
    """Sources and targets of any number and length, either the longer one, padding included."""
    pytest.importorskip("onnxscript")
    write_published(tmp_path / "a", shape)
    cli.run(["import", str(tmp_path / "a"), str(tmp_path / "b")])
    saved = open_saved(tmp_path / "b")
    files, figures = onnx_folder(saved, lambda line: None)
    assert 0 < figures["largest_difference"] < 1e-5
    graph = session(files, tmp_path / "out")
    for lengths, n_target in (([12, 5, 3], 7), ([7], 40), ([40, 1], 1), ([1], 3)):
        ids, mask = rows(saved.config.model.n_tokens, lengths, max(lengths))
        targets, _ = rows(saved.config.model.n_tokens, [n_target] * len(lengths), n_target)
        targets[:, 0] = saved.tokenizer.pad
        feed = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": targets}
        (logits,) = graph.run(None, {name: given.numpy() for name, given in feed.items()})
        inputs = Inputs(
            tokens_BT=targets,
            source_tokens_BS=ids,
            source_mask=Mask(key_lengths=mask.sum(1)),
        )
        with torch.no_grad():
            expected = saved.learner.heads["lm"](saved.learner.trunk(inputs))
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=0)


@slow
def test_a_graph_that_differs_is_caught(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    saved = tuned("bert", "tag", tmp_path / "run")
    right = READS["tag"](saved, "tag")
    with pytest.raises(UserError, match="onnxruntime computes something else of"):
        onnx_folder(saved, lambda line: None, lambda *words: right(*words) * 1.01, compared)
    wrong = iter([float("nan"), 1.0])  # the first rows alone

    def compared_with_nan(*words):
        ours, theirs = compared(*words)
        return ours, theirs * next(wrong)

    with pytest.raises(UserError, match="the largest difference is nan"):
        onnx_folder(saved, lambda line: None, right, compared_with_nan)


@pytest.mark.parametrize("pooling", POOLS)
def test_a_padded_row_is_pooled_as_a_packed_one(pooling):
    hidden = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(1))
    keep = (torch.arange(7) < torch.tensor([7, 3, 1])[:, None]).long()
    index = keep.flatten().nonzero()[:, 0]
    starts = torch.arange(3) * 7
    layout = Layout(index, index // 7, starts, starts + keep.sum(1) - 1)
    torch.testing.assert_close(POOLS[pooling](hidden, keep), pool(hidden, layout, pooling))


@pytest.mark.parametrize("shape", ["bert", "xlnet", "t5-encoder"])
def test_the_graph_that_is_traced_computes_what_the_model_does(shape, tmp_path):
    saved = tuned(shape, "tag", tmp_path / "run")
    graph = traceable(saved, lambda heads, hidden, keep: hidden)
    assert kernels_of(graph) == {"reference"}
    ids, mask = rows(400, [12, 5], 12)
    with torch.no_grad():
        found = graph(ids, mask, mask)
        expected = saved.learner.trunk(
            Inputs(tokens_BT=ids, segments_BT=mask, mask=Mask(key_lengths=mask.sum(1)))
        )
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[12, 5, 1], [3]])
def test_the_graph_of_two_stacks_computes_what_the_model_does(lengths):
    """What fills a source up is not seen, and no token of a target sees one behind it."""
    saved = two_stacks()
    graph = traceable(saved, vocabulary)
    assert kernels_of(graph) == {"reference"}
    ids, mask = rows(400, lengths, max(lengths))
    targets, _ = rows(400, [6] * len(lengths), 6)
    with torch.no_grad():
        found = graph(ids, mask, targets)
        for row, length in enumerate(lengths):
            alone = Inputs(
                tokens_BT=targets[row : row + 1, :4], source_tokens_BS=ids[row : row + 1, :length]
            )
            expected = saved.learner.heads["lm"](saved.learner.trunk(alone))
            torch.testing.assert_close(found[row : row + 1, :4], expected, atol=1e-4, rtol=1e-5)


def test_the_rows_of_the_proof_pad_sources_and_have_longer_targets():
    model = load_config([], base={"model": {"trunk": "encoder_decoder", "vocab_size": 448}}).model
    (first, inputs, keep), (second, _, _) = shapes_of(model)
    assert not first["attention_mask"].all() and keep.all()
    assert inputs.source_mask.key_lengths.tolist() == first["attention_mask"].sum(1).tolist()
    lengths = [{name: given[name].shape for name in given} for given in (first, second)]
    assert lengths[0]["input_ids"][1] > lengths[0]["decoder_input_ids"][1]
    assert lengths[1]["input_ids"][1] < lengths[1]["decoder_input_ids"][1]
    assert lengths[0]["input_ids"][0] != lengths[1]["input_ids"][0]  # a number of rows that froze


@pytest.mark.parametrize(
    ("keys", "masked", "names"),
    [
        ({"trunk": "decoder"}, False, ["input_ids"]),
        ({"trunk": "decoder"}, True, ["input_ids", "attention_mask"]),
        (
            {"trunk": "encoder", "n_segments": 2},
            False,
            ["input_ids", "attention_mask", "token_type_ids"],
        ),
        (
            {"trunk": "encoder_decoder"},
            False,
            ["input_ids", "attention_mask", "decoder_input_ids"],
        ),
    ],
)
def test_what_a_graph_reads(keys, masked, names):
    assert input_names(load_config([], base={"model": keys}).model, masked=masked) == names


def test_what_is_missing_or_of_another_kind_is_refused(tmp_path, monkeypatch):
    saved = tuned("bert", "classify", tmp_path / "run")
    monkeypatch.setattr(export_onnx.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs onnx and onnxscript: pip install 'nanolm\[onnx\]'"):
        task_onnx(saved, lambda line: None)
    monkeypatch.setattr(export_onnx.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="has no vocabulary head, whose logits"):
        onnx_folder(saved, lambda line: None)
    for trunk, said in (
        ("of_a_plugin", "trunk=of_a_plugin, and --format onnx writes decoder"),
        (
            "two_stream",
            "trunk=two_stream, whose logits of the vocabulary are of places in an order",
        ),
    ):
        model = dataclasses.replace(saved.config.model, trunk=trunk)
        other = dataclasses.replace(saved, config=dataclasses.replace(saved.config, model=model))
        with pytest.raises(UserError, match=said):
            onnx_folder(other, lambda line: None)
    object.__setattr__(saved.config.objective, "name", "embed")
    with pytest.raises(UserError, match=r"objective.name=embed\), and --format onnx writes class"):
        task_onnx(saved, lambda line: None)


def test_without_onnxruntime_the_proof_is_left_out(tmp_path, monkeypatch):
    saved = tuned("bert", "classify", tmp_path / "run")
    monkeypatch.setattr(export_onnx.importlib.util, "find_spec", lambda name: None)
    told = []
    assert export_onnx.proved(saved, {}, [], vocabulary, told.append) is None
    assert told == ["the proof was left out: onnxruntime is not installed"]
