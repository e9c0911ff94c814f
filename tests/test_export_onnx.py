"""`nanolm export --format onnx`: onnxruntime computes rows of any number and length as we do."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from nanolm import cli
from nanolm.config.load import load_config
from nanolm.errors import UserError
from nanolm.finetune.onnx_heads import POOLS, READS, compared, task_onnx
from nanolm.finetune.published import answers
from nanolm.finetune.tasks.heads import Layout, pool
from nanolm.inference import export_onnx
from nanolm.inference.export_onnx import FILE, input_names, onnx_folder, traceable, vocabulary
from nanolm.model.trunk import Inputs
from nanolm.ops.masks import Mask
from nanolm.saved import open_saved
from tests.published import write_published
from tests.test_export_tasks import tuned

slow = pytest.mark.slow  # torch's exporter takes many seconds a model


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
    ],
)
def test_a_fine_tuned_head_goes_out(shape, task, pooling, tmp_path):
    """Rows of any number and length, padding and a second segment included, as our head answers."""
    pytest.importorskip("onnxscript")
    saved = tuned(shape, task, tmp_path / "run", pooling=pooling)
    files, figures = task_onnx(saved, lambda line: None)
    assert 0 < figures["largest_difference"] < 1e-5
    graph = session(files, tmp_path / "out")
    model, width = saved.config.model, {"classify": 3, "regress": 2, "tag": 3, "read": 2}[task]
    for lengths in ([12, 5, 3], [7], [40, 1], [1]):
        ids, mask = rows(400, lengths, max(lengths))
        segments = (torch.arange(max(lengths)) > 2).long().expand_as(ids)
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}
        names = input_names(model, masked=True)
        (logits,) = graph.run(None, {name: feed[name].numpy() for name in names})
        two_sided = model.trunk == "encoder"
        own = Mask(key_lengths=mask.sum(1)) if two_sided else Mask()
        segments = segments if model.n_segments > 1 else None
        with torch.no_grad():
            hidden = saved.learner.trunk(Inputs(tokens_BT=ids, segments_BT=segments, mask=own))
            expected = answers(saved, hidden, mask.bool())
        found = torch.from_numpy(logits)
        assert found.shape[-1] == width
        found = found[mask.bool()] if task in ("tag", "read") else found
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert "labels" in files["config.yaml"].decode() or task in ("regress", "read")


@slow
def test_a_graph_that_differs_is_caught(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    saved = tuned("bert", "tag", tmp_path / "run")
    right = READS["tag"](saved, "tag")
    with pytest.raises(UserError, match="onnxruntime computes something else of"):
        onnx_folder(saved, lambda line: None, lambda *words: right(*words) * 1.01, compared)


@pytest.mark.parametrize("pooling", POOLS)
def test_a_padded_row_is_pooled_as_a_packed_one(pooling):
    hidden = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(1))
    keep = (torch.arange(7) < torch.tensor([7, 3, 1])[:, None]).long()
    index = keep.flatten().nonzero()[:, 0]
    starts = torch.arange(3) * 7
    layout = Layout(index, index // 7, starts, starts + keep.sum(1) - 1)
    torch.testing.assert_close(POOLS[pooling](hidden, keep), pool(hidden, layout, pooling))


def test_the_graph_that_is_traced_computes_what_the_model_does(tmp_path):
    saved = tuned("bert", "tag", tmp_path / "run")
    graph = traceable(saved, lambda heads, hidden, keep: hidden)
    names = [choice.kernel.name for choice in graph.trunk.kernels.choices.values()]
    assert "reference" in names and "sdpa" not in names
    ids, mask = rows(400, [12, 5], 12)
    with torch.no_grad():
        found = graph(ids, mask, mask)
        expected = saved.learner.trunk(
            Inputs(tokens_BT=ids, segments_BT=mask, mask=Mask(key_lengths=mask.sum(1)))
        )
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


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
    two_stacks = dataclasses.replace(saved.config.model, trunk="encoder_decoder")
    other = dataclasses.replace(saved, config=dataclasses.replace(saved.config, model=two_stacks))
    with pytest.raises(UserError, match="trunk=encoder_decoder, and --format onnx writes decoder"):
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
