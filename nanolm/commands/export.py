"""`nanolm export RUN --out DIR`: a model as one folder, whatever number of ranks wrote it.

    model.safetensors   whole tensors, the EMA where the run keeps one
    config.yaml  tokenizer.model  index.json

Every command that takes a run takes this folder. A checkpoint of ddp is such a folder already, with
the optimizer beside it; one of fsdp has a file of rows from each rank, and they are joined here,
a tensor at a time. With `--format transformers` the folder is that of a published family, where the
model is exactly one of these. `AutoTokenizer` opens it: our tokenizer goes out as tokenizer.json
too. transformers' own class and ours compute the same rows before anything is written, and the
command counts the sample texts whose ids differ. With `--format peft` it is the adapter alone of a
LoRA or DoRA run, as `peft` opens it on the exported base.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from nanolm.checkpoint.checkpoints import locate
from nanolm.checkpoint.container import INDEX, read_tensors, write_folder
from nanolm.checkpoint.lazy_tensors import part_files
from nanolm.commands.json_file import write_json
from nanolm.errors import require
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.onnx_heads import task_onnx
from nanolm.finetune.published import task_folder
from nanolm.finetune.published_adapter import task_adapter
from nanolm.inference.export_gguf import gguf_file
from nanolm.inference.export_onnx import onnx_folder
from nanolm.inference.export_peft import PART, adapter_folder
from nanolm.inference.export_transformers import published_folder
from nanolm.saved import Saved, open_saved, read_config
from nanolm.terminal import say

POSITIONAL = ("run",)
Tensors = dict[str, Tensor]
Content = tuple[dict[str, Tensors], dict[str, bytes], dict[str, Any]]
"""What is written, tensors by file and small files, and the figures of the proof."""
RESUMED_ONLY = ("trainer.json", INDEX)
"""Files of a checkpoint that only the run which goes on from it needs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write a model as one folder."""

    run: str
    """Folder of a run, or of one of its checkpoints."""
    out: str
    """Folder to write; with --format gguf the file."""
    format: Literal["nanolm", "transformers", "peft", "onnx", "gguf"] = "nanolm"
    """nanolm: what finetune, evaluate and generate read; transformers: what from_pretrained
    reads, for the shapes of the families that `nanolm import` knows; peft: the adapter of a LoRA or
    DoRA run, for that base; onnx: a graph for other runtimes, with its tokenizer; gguf: what
    llama.cpp reads, for the shapes of Llama and Qwen3."""
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
        config.peft.name == "none" or arguments.format == "peft",
        f"{folder} holds an adapter without its base; --format peft writes the adapter alone, and "
        f"for the other formats make one model of both first: `nanolm merge "
        f"{shlex.quote(arguments.run)} --out FOLDER`",
    )
    require(
        arguments.weights is None or arguments.format == "gguf",
        "--weights says what a GGUF file holds matrices as; leave it out, or add --format gguf",
    )
    if arguments.format == "gguf":  # one file, which is proved before it gets its name
        saved = open_saved(folder, plugins=arguments.plugins, ema=arguments.ema)
        figures: dict[str, Any] = {"out": str(out)}
        figures |= gguf_file(saved, out, arguments.weights or "F32", say)
        write_json(arguments.json, figures)
        return
    proof: dict[str, Any] = {}
    if arguments.format == "nanolm":
        parts = {"model": whole_tensors(folder, arguments.ema)}
        files = small_files(folder)
    else:
        saved = open_saved(folder, plugins=arguments.plugins, ema=arguments.ema)
        parts, files, proof = FORMATS[arguments.format](saved)
    write_folder(out, parts, files)
    tensors = [tensor for named in parts.values() for tensor in named.values()]
    numbers = sum(tensor.numel() for tensor in tensors)
    count = f"{len(tensors)} tensors, {numbers:,} numbers" if parts else f"{len(files)} files"
    say(f"{folder}: {count}, written to {out}")
    figures = {"out": str(out), "format": arguments.format, "tensors": len(tensors)}
    write_json(arguments.json, figures | {"numbers": numbers} | proof)


def for_transformers(saved: Saved) -> Content:
    """A model as a folder for from_pretrained."""
    if isinstance(saved.config, TaskConfig):
        tensors, files, proof = task_folder(saved)
    else:
        tensors, files, proof = published_folder(saved.config, saved.tokenizer, saved.learner)
    return {"model": tensors}, files, proof


def for_peft(saved: Saved) -> Content:
    """An adapter alone."""
    write = task_adapter if isinstance(saved.config, TaskConfig) else adapter_folder
    tensors, files, proof = write(saved)
    return {PART: tensors}, files, proof


def for_onnx(saved: Saved) -> Content:
    """A graph, whose weights are in it."""
    write = task_onnx if isinstance(saved.config, TaskConfig) else onnx_folder
    files, proof = write(saved)
    return {}, files, proof


FORMATS: dict[str, Callable[[Saved], Content]] = {
    "transformers": for_transformers,
    "peft": for_peft,
    "onnx": for_onnx,
}
"""What is written of an opened model, by the name of the format."""


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
