"""`nanolm import PATH OUT`: a published checkpoint as a folder that every command reads.

Before anything is written, transformers' own class and ours compute the same rows; above a
difference of 1e-4 there is no folder. Where transformers is not installed the proof is left out,
and the command says so.
"""

from __future__ import annotations

import dataclasses
import pathlib

from nanolm.commands.json_file import write_json
from nanolm.errors import require
from nanolm.hub.importing import import_folder
from nanolm.inference.import_peft import import_adapter, is_adapter
from nanolm.terminal import say

POSITIONAL = ("path", "out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Make a nanolm checkpoint of a published one: GPT-2, Llama, Qwen3, T5, BERT and its kin."""

    path: str
    """Folder with config.json, weights and tokenizer, as published; or a GGUF file."""
    out: str
    """Folder to write."""
    family: str | None = None
    """gpt2, llama, qwen3, bert, roberta, distilbert, albert, modernbert or t5, where config.json
    has no model_type."""
    allow_pickle: bool = False
    """Read pytorch_model.bin, a pickle: only its tensors, but still only from authors you trust."""
    base: str | None = None
    """Of an adapter of peft (adapter_config.json), the imported model that it belongs to."""
    json: str | None = None
    """Also write the figures to this file."""


def run(arguments: Arguments) -> None:
    """Read, prove, write."""
    out = pathlib.Path(arguments.out)
    require(not out.exists(), f"OUT {out} exists already; name a folder that does not")
    if is_adapter(pathlib.Path(arguments.path)):
        figures = import_adapter(pathlib.Path(arguments.path), out, arguments.base, say)
        write_json(arguments.json, {"out": str(out), **figures})
        return
    require(
        arguments.base is None,
        f"--base is for an adapter, and {arguments.path} holds no adapter_config.json; leave it "
        f"out",
    )
    figures = import_folder(
        pathlib.Path(arguments.path),
        out,
        family=arguments.family,
        pickled=arguments.allow_pickle,
        note=say,
    )
    write_json(arguments.json, {"out": str(out), **figures})
