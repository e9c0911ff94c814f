"""How fast the loader is, beside what people use instead, on the same tokens.

Every contender delivers batches of B x T int64 torch tensors: tokens, targets, positions that
restart in each document, and document indices. Repetitions are interleaved, so that a busy machine
slows all of them; the figures are medians, in input tokens a second.

    nanolm      the public Loader with workers=0, shuffled without replacement
    memmap      random crops of a flat np.memmap, as in nanoGPT, and documents by a sum over eos
    datasets    Hugging Face `datasets`: packed rows in Arrow, torch format, shuffled DataLoader
    *_plain     the same without positions and documents, which many a loader leaves out
"""

from __future__ import annotations

import itertools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from nanolm.data.rows import RowBlock, count_targets, fill_blocks
from nanolm.data.shards.directory import Manifest, open_split
from nanolm.data.stream import RowStream
from nanolm.errors import UserError
from nanolm.tables import open_console, tables
from nanolm.training.loader import Loader

Batches = Iterator[Mapping[str, Tensor]]


class CausalBlocks:
    """The data side of causal language modelling, without a tokenizer or a config."""

    def __init__(self, length: int, documents: bool) -> None:
        self.length, self.documents = length, documents

    def batch(self, rows: RowBlock) -> dict[str, np.ndarray]:
        """tokens, targets and perhaps positions and documents, [B, T]."""
        return fill_blocks(rows, self.length, with_documents=self.documents)

    def counts(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """Targets that are not padding."""
        return {"clm": count_targets(batch["targets"])}


def ours(directory: str, split: str, batch: int, length: int, documents: bool) -> Batches:
    """Batches of the public loader."""
    stream = RowStream([(directory, 1.0)], split, stride=length, span=length + 1, seed=0)
    objective: Any = CausalBlocks(length, documents)  # whose `batch` is all that is called
    for micro_batches in Loader(stream, objective, global_batch=batch, micro_batch=batch):
        yield micro_batches[0].tensors


def memmap(
    path: pathlib.Path, dtype: np.dtype, batch: int, length: int, eos: int | None
) -> Batches:
    """Random crops of a flat file of tokens; opened once, which is kinder than nanoGPT is."""
    data = np.memmap(path, dtype=dtype, mode="r")
    while True:
        ix = torch.randint(len(data) - length, (batch,))
        x = torch.stack([torch.from_numpy(data[i : i + length].astype(np.int64)) for i in ix])
        y = torch.stack(
            [torch.from_numpy(data[i + 1 : i + 1 + length].astype(np.int64)) for i in ix]
        )
        yield {"tokens": x, "targets": y} | ({} if eos is None else documents_of(x, eos))


def hugging_face(
    tokens: np.ndarray, folder: pathlib.Path, batch: int, length: int, eos: int | None
) -> Batches:
    """Packed rows as `datasets` keeps them: an Arrow file on disk, memory-mapped."""
    import datasets  # noqa: PLC0415 (an extra: only this benchmark needs it)

    packed = tokens[: len(tokens) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    quiet = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    datasets.Dataset.from_dict({"input_ids": packed.astype(np.int32)}).save_to_disk(str(folder))
    rows = datasets.load_from_disk(str(folder)).with_format("torch")
    if quiet:
        datasets.enable_progress_bar()
    while True:
        for found in DataLoader(rows, batch_size=batch, shuffle=True, drop_last=True):
            ids = found["input_ids"].long()
            x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            yield {"tokens": x, "targets": y} | ({} if eos is None else documents_of(x, eos))


def documents_of(tokens_BT: Tensor, eos: int) -> dict[str, Tensor]:
    """positions and documents [B, T], found by looking for eos."""
    begins_BT = torch.zeros_like(tokens_BT)
    begins_BT[:, 1:] = tokens_BT[:, :-1] == eos
    places_T = torch.arange(tokens_BT.shape[1])
    latest_BT = (begins_BT * places_T).cummax(dim=1).values
    return {"positions": places_T - latest_BT, "documents": begins_BT.cumsum(dim=1)}


def bench_data(
    directory: str,
    split: str = "train",
    *,
    batch: int = 16,
    length: int = 1024,
    repeats: int = 7,
    seconds: float = 0.3,
    most_tokens: int = 20_000_000,
) -> dict:
    """Measure all contenders on a prepared directory.

    seconds: of each repetition of each contender; most_tokens: of the copies that the others read.
    Returns {batch, length, tokens, threads, tokens_per_second: {name: median}, spread: {name:
    [lowest, highest]}, ratios: {name: nanolm / name}}. `datasets` is left out of the figures, and
    named under "absent", where it is not installed. Raises UserError for a directory without eos.
    """
    manifest, shards = open_split(directory, split)
    eos = _eos(directory, manifest)
    tokens = np.concatenate([shard.tokens for shard in shards])[:most_tokens]
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        tokens.tofile(folder / "tokens.bin")
        flat = folder / "tokens.bin", tokens.dtype, batch, length
        contenders = {
            "nanolm": ours(directory, split, batch, length, True),
            "memmap": memmap(*flat, eos),
            "datasets": hugging_face(tokens, folder / "full", batch, length, eos),
            "nanolm_plain": ours(directory, split, batch, length, False),
            "memmap_plain": memmap(*flat, None),
            "datasets_plain": hugging_face(tokens, folder / "plain", batch, length, None),
        }
        absent = _warm_up(contenders, (batch, length))
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(repeats):
            for name, batches in contenders.items():
                rates[name].append(batch * length * _batches_per_second(batches, seconds))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "batch": batch,
        "length": length,
        "tokens": len(tokens),
        "threads": torch.get_num_threads(),
        "tokens_per_second": medians,
        "spread": {name: [min(found), max(found)] for name, found in rates.items()},
        "ratios": {name: medians[_ours_for(name)] / rate for name, rate in medians.items()},
        "absent": absent,
    }


def _eos(directory: str, manifest: Manifest) -> int:
    if "eos" not in manifest.special_ids:
        raise UserError(f"{directory} has no eos in its manifest; prepare the data again")
    return manifest.special_ids["eos"]


def _warm_up(contenders: dict[str, Batches], shape: tuple[int, int]) -> list[str]:
    """Take a few batches of each, check their form, and drop those that are not installed."""
    absent = []
    for name, batches in list(contenders.items()):
        try:
            for found in itertools.islice(batches, 3):
                expected = 2 if name.endswith("_plain") else 4
                whole = all(
                    values.shape == shape and values.dtype == torch.int64
                    for values in found.values()
                )
                if len(found) != expected or not whole:
                    raise AssertionError(f"{name} does not deliver what it is measured for")
        except ModuleNotFoundError:
            absent.append(name)
            del contenders[name]
    return absent


def _batches_per_second(batches: Batches, seconds: float) -> float:
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        next(batches)
        count += 1
    return count / passed


def _ours_for(name: str) -> str:
    return "nanolm_plain" if name.endswith("_plain") else "nanolm"


def print_bench(figures: dict, console: Console | None = None) -> None:
    """Show the figures of `bench_data` as a table."""
    rows = []
    for name, rate in figures["tokens_per_second"].items():
        low, high = figures["spread"][name]
        rows.append(
            [
                name.removesuffix("_plain"),
                "2 arrays" if name.endswith("_plain") else "4 arrays",
                f"{rate / 1e6:.1f}",
                f"{low / 1e6:.1f} to {high / 1e6:.1f}",
                "" if name == _ours_for(name) else f"{figures['ratios'][name]:.1f}x",
            ]
        )
    console = console or open_console()
    console.print(
        f"{figures['batch']} x {figures['length']} int64 batches; ratio: of nanolm's speed to it",
        highlight=False,
    )
    head = ("loader", "batch", "M tok/s", "lowest to highest", "ratio")
    for table in tables(head, rows, left=2):
        console.print(table)
    console.print(
        "2 arrays: tokens, targets; 4 arrays: positions and documents too", highlight=False
    )
    if figures["absent"]:
        told = "datasets is not installed: pip install 'nanolm[hf]' adds it to the table"
        console.print(told, markup=False)
