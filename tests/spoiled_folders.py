"""Published folders and what is done to them: helpers of the tests of `nanolm import`."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanolm import cli
from nanolm.checkpoint.container import read_tensors
from nanolm.errors import UserError
from tests.published import edit_config, write_published

SINGLE = "model.safetensors"


def imported(source, out, *words):
    cli.run(["import", str(source), str(out), *words])
    return read_tensors(out, "model")


def require_refusal(folder, shape, spoil, said):
    """A spoiled folder of this shape is refused in one sentence, and nothing is written."""
    write_published(folder / "a", shape)
    spoil(folder / "a")
    with pytest.raises(UserError, match=said) as caught:
        imported(folder / "a", folder / "b")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["a"]


def stored(folder):
    return load_file(folder / SINGLE)


def rewrite(folder, tensors):
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / SINGLE)


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
