"""`nanolm export RUN --out DIR`: a model as one folder, whatever number of ranks wrote it.

    model.safetensors   whole tensors, the EMA where the run keeps one
    config.yaml  tokenizer.model  index.json

Every command that takes a run takes this folder. A checkpoint of ddp is such a folder already, with
the optimizer beside it; one of fsdp has a file of rows from each rank, and they are joined here,
a tensor at a time. With `--format transformers` the folder is that of a published family, where the
model is exactly one of these. `AutoTokenizer` opens it: our tokenizer goes out as tokenizer.json
too, and the command counts the sample texts whose ids differ.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from nanolm.checkpoint.checkpoints import locate
from nanolm.checkpoint.container import INDEX, read_tensors, write_folder
from nanolm.checkpoint.lazy_tensors import part_files
from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.commands.figures import write_json
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import require
from nanolm.hub.tokenizer_files import compared, tokenizer_files
from nanolm.inference.export_transformers import transformers_folder
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
    """Folder to write."""
    format: Literal["nanolm", "transformers"] = "nanolm"
    """nanolm: what finetune, evaluate and generate read; transformers: what from_pretrained
    reads, for the shapes of the families that `nanolm import` knows."""
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
        f"{folder} holds an adapter without its base; `nanolm merge` makes one model of both",
    )
    tensors, files, differing = whole_tensors(folder, arguments.ema), small_files(folder), 0
    if arguments.format == "transformers":
        saved = open_saved(folder, plugins=arguments.plugins, ema=arguments.ema)
        tensors, more = transformers_folder(config, saved.tokenizer, learner_tensors(saved.learner))
        files = more | tokenizer_files(saved.tokenizer, config.model)
        differing = told_ids(saved.tokenizer, files)
    write_folder(out, {"model": tensors}, files)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    print(f"{folder}: {len(tensors)} tensors, {numbers:,} numbers, written to {out}")
    figures = {"out": str(out), "tensors": len(tensors), "numbers": numbers}
    if arguments.format == "transformers":
        figures["texts_with_other_ids"] = differing
    write_json(arguments.json, {"format": arguments.format, **figures})


def whole_tensors(folder: pathlib.Path, ema: bool) -> dict[str, Tensor]:
    """The model's tensors, whole, with the average in place of the weights where there is one."""
    tensors = read_tensors(folder, "model")
    if ema and part_files(folder, "ema"):
        tensors |= read_tensors(folder, "ema")
    return tensors


def told_ids(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> int | None:
    """Sample texts that get other ids by the files than by our tokenizer, told; None where
    transformers is not there to open them."""
    found = compared(tokenizer, files)
    if found is None:
        print("the proof of the tokenizer was left out: transformers is not installed")
        return None
    differing, texts = found
    print(f"tokenizer: ids of {texts} sample texts, {differing} of them other than here")
    return differing


def small_files(folder: pathlib.Path) -> dict[str, bytes]:
    """What stands beside the tensors and describes the model."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix != ".safetensors" and path.name not in RESUMED_ONLY
    }
