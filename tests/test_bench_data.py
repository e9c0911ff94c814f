"""The loader benchmark compares like with like."""

import numpy as np
import torch
from rich.console import Console
from token_shards import EOS, random_documents, write_prepared

from nanolm.data.rows import fill_blocks
from nanolm.data.stream import RowStream
from nanolm.tools.bench.data import bench_data, documents_of, print_bench


def test_contenders_deliver_the_same_arrays_and_the_figures_are_whole(tmp_path):
    documents = random_documents(np.random.default_rng(0), 6000, 50)
    directory = str(write_prepared(tmp_path / "data", {"train": [documents]}))
    stream = RowStream([(directory, 1)], "train", stride=64, span=65, seed=0)
    ours = fill_blocks(stream.rows(0, 30), 64)
    theirs = documents_of(torch.from_numpy(ours["tokens"]), EOS)
    assert all(np.array_equal(theirs[name].numpy(), ours[name]) for name in theirs)

    figures = bench_data(directory, batch=4, length=64, repeats=2, seconds=0.02)
    names = set(figures["tokens_per_second"])
    assert {"nanolm", "memmap", "nanolm_plain", "memmap_plain"} <= names
    assert names | set(figures["absent"]) >= {"datasets", "datasets_plain"}
    assert figures["ratios"]["nanolm"] == figures["ratios"]["nanolm_plain"] == 1
    assert all(low <= high for low, high in figures["spread"].values())
    console = Console(record=True, width=140)
    print_bench(figures, console)
    assert "memmap" in console.export_text()
