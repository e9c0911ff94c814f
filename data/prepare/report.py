"""What `prepare`, `data inspect` and `data verify` show: figures as data, and tables of them."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from nanolm.data.prepare.pipeline import Summary
from nanolm.data.shards.directory import (
    PASSED_OVER,
    SPLITS,
    Manifest,
    open_split,
    open_tokenizer,
    unigram_counts,
)
from nanolm.tables import tables

SAMPLE_TOKENS = 120
COARSE = 2.0
"""A split that is so many times larger or smaller than was asked for is told."""


def bytes_per_token(totals: dict[str, int]) -> float | None:
    """UTF-8 bytes of text for each token, eos included; None for an empty split."""
    return totals["bytes"] / totals["tokens"] if totals["tokens"] else None


def cleaning_counts(manifest: Manifest) -> dict[str, dict[str, int]]:
    """The counts of cleaning as tables: `dropped` documents by reason, what was `changed`, and
    files `passed over` by kind."""
    found: dict[str, dict[str, int]] = {"dropped": {}, "changed": {}, PASSED_OVER: {}}
    for key, count in manifest.cleaning.items():
        table, _, name = key.partition("/")
        found.setdefault(table, {})[name] = count
    return found


def figures(summary: Summary) -> dict[str, Any]:
    """A preparation in numbers, for scripts: splits, cleaning, seconds by phase, speed."""
    manifest = summary.manifest
    seconds = summary.seconds.get("encoding", 0.0)
    return {
        "directory": summary.directory,
        "vocab_size": manifest.vocab_size,
        "splits": {
            split: {**totals, "bytes_per_token": bytes_per_token(totals)}
            for split, totals in manifest.totals.items()
        },
        **cleaning_counts(manifest),
        "workers": summary.workers,
        "seconds": {phase: round(value, 3) for phase, value in summary.seconds.items()},
        "encoded_megabytes_per_second": (
            summary.encoded_bytes / 1e6 / seconds if summary.encoded_bytes and seconds else None
        ),
        "reused": summary.reused,
        "data_hash": manifest.data_hash,
        "tokenizer_hash": manifest.tokenizer_hash,
    }


def render(summary: Summary) -> list[Table | str]:
    """The summary as tables and sentences: splits, what cleaning did, one line of speed."""
    manifest = summary.manifest
    numbers = figures(summary)
    speed = numbers["encoded_megabytes_per_second"]
    if summary.reused:
        line = f"{summary.directory} was prepared already with this configuration; nothing to do"
    elif speed is None:
        line = f"{sum(summary.seconds.values()):.1f} s"
    else:
        line = (
            f"{sum(summary.seconds.values()):.1f} s, of which encoding "
            f"{summary.seconds['encoding']:.1f} s at {speed:.1f} MB/s in {summary.workers} "
            f"process{'es' if summary.workers > 1 else ''}"
        )
    return [
        *_split_tables(manifest, summary.directory),
        *_cleaning_tables(manifest),
        *coarse_splits(manifest),
        line,
    ]


def coarse_splits(manifest: Manifest) -> list[str]:
    """A sentence for each split that is far from the share of text that was asked for, as happens
    where documents are few: they are never divided."""
    whole = sum(totals["bytes"] for totals in manifest.totals.values())
    told = []
    if not manifest.splits["val"]:
        told.append(
            "note: there is no val split, and training needs one to evaluate on; prepare into "
            "another --out with --val_fraction above 0"
        )
    for split in ("val", "test"):
        asked = manifest.config.get(f"{split}_fraction") or 0.0
        totals = manifest.totals[split]
        share = totals["bytes"] / whole
        if asked and not asked / COARSE <= share <= asked * COARSE:
            told.append(
                f"note: {split} is {share:.1%} of the text and not {asked:.1%}: it is chosen by "
                f"whole documents, and there are {totals['documents']} in it; for a finer choice "
                f"prepare shorter documents (--txt_documents line or paragraph)"
            )
    return told


def _split_tables(manifest: Manifest, directory: str) -> list[Table | str]:
    rows = []
    for split in SPLITS:
        totals = manifest.totals[split]
        ratio = bytes_per_token(totals)
        rows.append(
            [
                split,
                f"{len(manifest.splits[split]):,}",
                *(f"{totals[key]:,}" for key in ("documents", "tokens", "bytes")),
                "" if ratio is None else f"{ratio:.3f}",
            ]
        )
    head = ("split", "shards", "documents", "tokens", "bytes", "bytes/token")
    return [f"{directory}: vocabulary {manifest.vocab_size:,}", *tables(head, rows)]


def _cleaning_tables(manifest: Manifest) -> list[Table | str]:
    found = cleaning_counts(manifest)
    if not any(found.values()):
        return []
    rows = [
        [f"{kind}: {name}", f"{count:,}"]
        for kind, counts in found.items()
        for name, count in counts.items()
    ]
    kept = sum(totals["documents"] for totals in manifest.totals.values())
    read = kept + sum(found["dropped"].values())
    rows.append(["kept documents", f"{kept:,} of {read:,}"])
    return ["", *tables(("cleaning", "count"), rows)]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `data inspect` shows.

    document_tokens: split -> {smallest, median, mean, largest} tokens of a document; frequent: the
    commonest pieces of the train split with their share of its tokens; samples: (split, document
    number, beginning of its text).
    """

    directory: str
    manifest: Manifest
    document_tokens: dict[str, dict[str, float]]
    unused_pieces: int
    unigram_bits_per_byte: float
    frequent: list[tuple[str, float]]
    samples: list[tuple[str, int, str]]


def inspect(directory: str, *, samples: int = 3) -> Inspection:
    """Open a prepared directory and describe it; raises UserError as `open_split` does."""
    manifest = Manifest.load(directory)
    tokenizer = open_tokenizer(directory, manifest)
    lengths: dict[str, dict[str, float]] = {}
    texts: list[tuple[str, int, str]] = []
    for split in SPLITS:
        if not manifest.splits[split]:
            continue
        _, shards = open_split(directory, split)
        sizes = np.concatenate([np.diff(shard.offsets) for shard in shards])
        lengths[split] = {
            "smallest": int(sizes.min()),
            "median": float(np.median(sizes)),
            "mean": float(sizes.mean()),
            "largest": int(sizes.max()),
        }
        shard = shards[0]
        for index in np.unique(np.linspace(0, len(shard) - 1, samples).astype(int)).tolist():
            document = shard.document(index)
            texts.append((split, index, tokenizer.decode(document[:SAMPLE_TOKENS], specials=True)))
    counts = unigram_counts(directory, manifest)
    order = np.argsort(-counts, kind="stable")[:20]
    shares = counts / counts.sum()
    used = shares[shares > 0]
    bits = -(counts[counts > 0] * np.log2(used)).sum() / manifest.totals["train"]["bytes"]
    return Inspection(
        directory=str(pathlib.Path(directory)),
        manifest=manifest,
        document_tokens=lengths,
        unused_pieces=int((counts == 0).sum()),
        unigram_bits_per_byte=float(bits),
        frequent=[(tokenizer.piece(int(index)), float(shares[index])) for index in order],
        samples=texts,
    )


def inspection_figures(inspection: Inspection) -> dict[str, Any]:
    """An inspection for scripts."""
    return dataclasses.asdict(inspection)


def render_inspection(inspection: Inspection) -> list[Table | Text | str]:
    """An inspection as tables, sentences and sample texts."""
    manifest = inspection.manifest
    lengths = [
        [split, *(f"{value:,.0f}" for value in numbers.values())]
        for split, numbers in inspection.document_tokens.items()
    ]
    facts = (
        f"\ndata {manifest.data_hash}\ntokenizer {manifest.tokenizer_hash}\n"
        f"special pieces {manifest.special_ids}\n"
        f"pieces that the train split never uses: {inspection.unused_pieces:,}\n"
        f"entropy of the train split's pieces: "
        f"{inspection.unigram_bits_per_byte:.3f} bits per byte\n"
        f"commonest pieces: "
        + " ".join(f"{piece!r} {100 * share:.1f} %" for piece, share in inspection.frequent)
    )
    samples = [
        Text.assemble((f"\n{split} document {index}\n", "bold"), text)
        for split, index, text in inspection.samples
    ]
    return [
        *_split_tables(manifest, inspection.directory),
        *_cleaning_tables(manifest),
        "\ntokens in a document",
        *tables(("split", "smallest", "median", "mean", "largest"), lengths),
        facts,
        *samples,
    ]
