"""`nanolm export RUN --out DIR`: a model as one folder, whatever number of ranks wrote it.

    model.safetensors   whole tensors, the EMA where the run keeps one
    config.yaml  tokenizer.model  index.json

Every command that takes a run takes this folder. A checkpoint of ddp is such a folder already, with
the optimizer beside it; one of fsdp has a file of rows from each rank, and they are joined here,
a tensor at a time. With `--format transformers` the folder is that of a published family, where the
model is exactly one of these. `AutoTokenizer` opens it: our tokenizer goes out as tokenizer.json
too. transformers' own class and ours compute the same rows before anything is written, and the
command counts the sample texts whose ids differ.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
from typing import Any, Literal

from torch import Tensor

from nanolm.checkpoint.checkpoints import locate
from nanolm.checkpoint.container import INDEX, read_tensors, write_folder
from nanolm.checkpoint.lazy_tensors import part_files
from nanolm.commands.json_file import write_json
from nanolm.errors import require
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.published import task_folder
from nanolm.inference.export_gguf import gguf_file
from nanolm.inference.export_transformers import published_folder
from nanolm.saved import open_saved, read_config

POSITIONAL = ("run",)
RESUMED_ONLY = ("trainer.json", INDEX)
"""Files of a checkpoint that only the run which goes on from it needs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write a model as one folder."""

    run: str
    """Folder of a run, or of one of its checkpoints."""
    out: str
    """Folder to write; with --format gguf the file."""
    format: Literal["nanolm", "transformers", "gguf"] = "nanolm"
    """nanolm: what finetune, evaluate and generate read; transformers: what from_pretrained
    reads, for the shapes of the families that `nanolm import` knows; gguf: what llama.cpp reads,
    for those of Llama and Qwen3."""
    weights: Literal["F32", "F16", "Q8_0"] | None = None
    """What a GGUF file holds matrices as; F32 unless told."""
    ema: bool = True
    """Take the moving average of the weights where the run keeps one."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Plug-ins that the checkpoint was trained with."""
    json: str | None = None
    """Also write the figures to this file."""


def run(arguments: Arguments) -> None:
    """Read, join, write."""
    out = pathlib.Path(arguments.out)
    require(not out.exists(), f"--out {out} exists already; name a folder that does not")
    folder = locate(arguments.run, best=True)
    config = read_config(folder, arguments.plugins)
    require(
        config.peft.name == "none",
        f"{folder} holds an adapter without its base; make one model of both first: `nanolm merge "
        f"{shlex.quote(arguments.run)} --out FOLDER`",
    )
    require(
        arguments.weights is None or arguments.format == "gguf",
        "--weights says what a GGUF file holds matrices as; leave it out, or add --format gguf",
    )
    figures: dict[str, Any] = {"out": str(out)}
    if arguments.format == "gguf":
        saved = open_saved(folder, plugins=arguments.plugins, ema=arguments.ema)
        figures |= gguf_file(saved, out, arguments.weights or "F32", print)
        write_json(arguments.json, figures)
        return
    if arguments.format == "transformers":
        saved = open_saved(folder, plugins=arguments.plugins, ema=arguments.ema)
        if isinstance(saved.config, TaskConfig):
            tensors, files, proof = task_folder(saved)
        else:
            tensors, files, proof = published_folder(saved.config, saved.tokenizer, saved.learner)
        figures |= proof
    else:
        tensors, files = whole_tensors(folder, arguments.ema), small_files(folder)
    write_folder(out, {"model": tensors}, files)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    print(f"{folder}: {len(tensors)} tensors, {numbers:,} numbers, written to {out}")
    figures |= {"format": arguments.format, "tensors": len(tensors), "numbers": numbers}
    write_json(arguments.json, figures)


def whole_tensors(folder: pathlib.Path, ema: bool) -> dict[str, Tensor]:
    """The model's tensors, whole, with the average in place of the weights where there is one."""
    tensors = read_tensors(folder, "model")
    if ema and part_files(folder, "ema"):
        tensors |= read_tensors(folder, "ema")
    return tensors


def small_files(folder: pathlib.Path) -> dict[str, bytes]:
    """What stands beside the tensors and describes the model."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix != ".safetensors" and path.name not in RESUMED_ONLY
    }
