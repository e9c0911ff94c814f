"""`nanolm prepare`: raw text to a tokenizer and token shards, read from top to bottom.

    sources -> pieces -> units -> cleaned spool -> de-duplication -> split -> tokenizer -> shards

Every phase runs over independent items in any number of processes, writes each result atomically,
and skips what a run before it finished: so a preparation killed at any moment goes on where it was,
and neither workers nor kills change a byte of the result. Memory stays bounded: a unit's ids, one
partition of digests, one shard. `manifest.json` comes last and makes the directory whole.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

import nanolm.data.prepare.huggingface
import nanolm.data.prepare.table_text  # noqa: F401  (registers the source `table`)
from nanolm.data.prepare.config import PrepareConfig
from nanolm.data.prepare.dedup import find_duplicates, partition_count
from nanolm.data.prepare.encode import assemble, encode, plan_shards
from nanolm.data.prepare.jobs import Jobs
from nanolm.data.prepare.progress import ProgressReport, default_progress
from nanolm.data.prepare.sampling import sample
from nanolm.data.prepare.sources import SHARED_KEYS, Piece, build_source, require_heeded
from nanolm.data.prepare.split import Split, choose_split
from nanolm.data.prepare.spool import Unit, ingest, read_unit_info
from nanolm.data.prepare.tokenizer_training import sentences, train_tokenizer
from nanolm.data.prepare.workspace import Workspace
from nanolm.data.shards.directory import (
    PASSED_OVER,
    SPLITS,
    UNIGRAM_FILE,
    Manifest,
    data_hash,
    split_totals,
)
from nanolm.data.tokenizer import MODEL_FILE, Tokenizer
from nanolm.data.tokenizer_warning import load_with_warning
from nanolm.errors import UserError
from nanolm.files import AtomicFile

__all__ = ["PrepareConfig", "Summary", "prepare"]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a preparation made, and how long this run took.

    seconds: phase -> wall-clock seconds of this run; `reused` is true when the directory was whole
    already and nothing was done.
    """

    directory: str
    manifest: Manifest
    workers: int
    seconds: dict[str, float]
    encoded_bytes: int
    reused: bool


def prepare(config: PrepareConfig, progress: ProgressReport | None = None) -> Summary:
    """Run or continue a preparation; see `PrepareConfig`.

    Raises UserError, in one sentence, for everything that is wrong with the input, the
    configuration, the directory or the disk.
    """
    config.check()
    fingerprint = config.fingerprint()
    pieces, inputs, passed_over = list_pieces(config)
    with Workspace(config.out) as workspace, Jobs(config.processes()) as jobs:
        if manifest := workspace.finished(fingerprint):
            if manifest.inputs != inputs:
                raise UserError(
                    f"the input changed since {config.out} was prepared; delete it to prepare "
                    f"again, or choose another --out"
                )
            return Summary(config.out, manifest, config.processes(), {}, 0, reused=True)
        units = workspace.adopt_plan(fingerprint, pieces)
        run = Preparation(config, workspace, jobs, units, progress or default_progress())
        manifest = run.run(fingerprint, inputs, passed_over)
        return Summary(
            config.out,
            manifest,
            config.processes(),
            run.seconds,
            run.encoded_bytes,
            reused=False,
        )


def list_pieces(config: PrepareConfig) -> tuple[list[Piece], list[dict], Counter]:
    """All pieces of all sources in order, what the manifest says of each source, and how many
    files were passed over, by kind."""
    common = {name: getattr(config, name) for name in (*SHARED_KEYS, "out")}
    common["exclude"] = tuple(config.exclude)
    sources = [(spec, build_source(spec, common, config.source_options)) for spec in config.sources]
    require_heeded(sources, config.told(SHARED_KEYS), config.source_options)
    passed_over: Counter = Counter()
    pieces: list[Piece] = []
    inputs = []
    for spec, source in sources:
        found = list(source.pieces())
        passed_over += getattr(source, "passed_over", Counter())
        size = sum(piece.size for piece in found)
        inputs.append({"source": spec, "pieces": len(found), "bytes": size})
        pieces += found
    return pieces, inputs, passed_over


class Preparation:
    """One run through all phases."""

    def __init__(
        self,
        config: PrepareConfig,
        workspace: Workspace,
        jobs: Jobs,
        units: list[Unit],
        progress: ProgressReport,
    ) -> None:
        self.config = config
        self.out, self.work = workspace.out, workspace.work
        self.jobs = jobs
        self.units = units
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.encoded_bytes = 0

    def run(
        self, fingerprint: dict[str, Any], inputs: list[dict], passed_over: Counter
    ) -> Manifest:
        """All phases in order; returns the manifest, written last."""
        infos = self.read()
        counts = sum((Counter(info["counts"]) for info in infos), Counter())
        documents = [info["documents"] for info in infos]
        if not sum(documents):
            raise UserError(empty_corpus(self.config, counts))
        duplicates, repeated, repeated_bytes = self.deduplicate(sum(documents))
        counts["dropped/duplicate"] += repeated
        text_bytes = sum(info["bytes"] for info in infos) - repeated_bytes
        split = choose_split(
            (info["hash_range"] for info in infos),
            self.config.val_fraction,
            self.config.test_fraction,
            self.config.seed,
        )
        counts.update({f"{PASSED_OVER}/{what}": count for what, count in passed_over.items()})
        tokenizer = self.tokenizer(documents, duplicates, split, text_bytes)
        self.encode(documents, duplicates, split, [info["bytes"] for info in infos], tokenizer)
        splits, unigram = self.assemble(tokenizer)
        with AtomicFile(self.out / UNIGRAM_FILE) as file:
            np.lib.format.write_array(file, unigram)
        manifest = Manifest(
            tokenizer=MODEL_FILE,
            tokenizer_hash=tokenizer.hash,
            vocab_size=tokenizer.vocab_size,
            special_ids=tokenizer.roles(),
            splits=splits,
            totals=split_totals(splits),
            cleaning={key: count for key, count in sorted(counts.items()) if count},
            unigram=UNIGRAM_FILE,
            unigram_sha256=file.sha256,
            data_hash=data_hash(tokenizer.hash, splits),
            inputs=inputs,
            config=fingerprint,
        )
        manifest.save(self.out)
        return manifest

    def read(self) -> list[dict]:
        """Read and clean every unit; their counts in input order."""
        infos: list[Any] = [read_unit_info(unit) for unit in self.units]
        todo = [index for index, info in enumerate(infos) if info is None]
        calls = [(self.units[index], self.config.cleaning(), self.config.seed) for index in todo]
        sizes = [unit.size for unit in self.units]
        for number, info in self.phase("reading", "bytes", ingest, calls, sizes, todo):
            infos[todo[number]] = info
        return infos

    def deduplicate(self, documents: int) -> tuple[list[pathlib.Path], int, int]:
        """Find duplicates; the files that list them, their number, their bytes."""
        if not self.config.deduplicate:
            return [], 0, 0
        partitions = partition_count(documents)
        files = [self.work / f"duplicates-{index:05d}.npy" for index in range(partitions)]
        calls = [(self.units, index, partitions, file) for index, file in enumerate(files)]
        sizes = [1] * partitions
        results = [
            result
            for _, result in self.phase(
                "removing duplicates", "partitions", find_duplicates, calls, sizes
            )
        ]
        return files, sum(count for count, _ in results), sum(size for _, size in results)

    def tokenizer(
        self, documents: list[int], duplicates: list[pathlib.Path], split: Split, text_bytes: int
    ) -> Tokenizer:
        """The given tokenizer, the one an earlier run trained, or a new one."""
        path = self.out / MODEL_FILE
        if not path.exists():
            if self.config.tokenizer is not None:
                model = load_with_warning(self.config.tokenizer).model_bytes
            else:
                model = self.train(documents, duplicates, split, text_bytes)
            with AtomicFile(path) as file:
                file.write(model)
        tokenizer = load_with_warning(path)
        tokenizer.role("eos")  # a foreign model without one cannot end documents
        return tokenizer

    def train(
        self, documents: list[int], duplicates: list[pathlib.Path], split: Split, text_bytes: int
    ) -> bytes:
        """Sample the training documents and train a tokenizer on their sentences."""
        train_bytes = text_bytes * (1 - self.config.val_fraction - self.config.test_fraction)
        rate = min(1.0, self.config.training_bytes() / max(1.0, train_bytes))
        calls = [
            (unit, count, duplicates, split, rate)
            for unit, count in zip(self.units, documents, strict=True)
        ]
        found: list[list[str]] = [[] for _ in self.units]
        sizes = [unit.size for unit in self.units]
        for number, chunks in self.phase("sampling", "bytes", sample, calls, sizes):
            found[number] = chunks
        samples = [chunk for chunks in found for chunk in chunks]
        if not samples:
            raise UserError(no_training_documents(self.config))
        size = sum(len(chunk.encode()) for chunk in samples)
        call = (samples, self.config)
        ((_, model),) = self.phase("training tokenizer", "bytes", train_on, [call], [size])
        return model

    def encode(
        self,
        documents: list[int],
        duplicates: list[pathlib.Path],
        split: Split,
        sizes: list[int],
        tokenizer: Tokenizer,
    ) -> None:
        """Encode every unit into its token arrays."""
        calls = [
            (unit, count, duplicates, split, tokenizer.path, self.config.sentences)
            for unit, count in zip(self.units, documents, strict=True)
        ]
        self.encoded_bytes = sum(sizes)
        totals: Counter = Counter()
        for _, info in self.phase("encoding", "bytes", encode, calls, sizes):
            totals.update({name: counts["documents"] for name, counts in info.items()})
        if not totals["train"]:
            raise UserError(no_training_documents(self.config))

    def assemble(self, tokenizer: Tokenizer) -> tuple[dict[str, list[dict]], np.ndarray]:
        """Write the shards; their manifest entries by split, and the train split's id counts."""
        plans = [
            plan
            for name in SPLITS
            for plan in plan_shards(self.units, name, self.config.shard_tokens)
        ]
        source = " ".join(self.config.sources)
        calls = [
            (plan, self.out, self.work / f"{plan.name}.json", tokenizer.path, source)
            for plan in plans
        ]
        entries: list[dict] = [{} for _ in plans]
        unigram = np.zeros(tokenizer.vocab_size, np.int64)
        for number, (entry, counts) in self.phase(
            "writing shards", "shards", assemble, calls, [1] * len(plans)
        ):
            entries[number] = entry
            if plans[number].split == "train":
                unigram += counts
        splits: dict[str, list[dict]] = {name: [] for name in SPLITS}
        for plan, entry in zip(plans, entries, strict=True):
            splits[plan.split].append(entry)
        return splits, unigram

    def phase(
        self,
        name: str,
        unit: str,
        function: Callable,
        calls: list[tuple],
        sizes: list[int],
        todo: list[int] | None = None,
    ) -> list[tuple[int, Any]]:
        """Run a phase with progress and a clock; (number of the call, result) in any order.

        sizes: how much each item weighs; todo: which items the calls are, when not all of them.
        """
        todo = list(range(len(calls))) if todo is None else todo
        started = time.monotonic()
        self.progress.begin(name, sum(sizes), unit)
        self.progress.advance(sum(sizes) - sum(sizes[index] for index in todo))
        results = list(
            self.jobs.run(
                function, calls, lambda number: self.progress.advance(sizes[todo[number]])
            )
        )
        self.progress.end()
        self.seconds[name] = time.monotonic() - started
        return results


def train_on(samples: list[str], config: PrepareConfig) -> bytes:
    """Train a tokenizer on chunks of text, cut into sentences."""
    return train_tokenizer(
        (sentence for chunk in samples for sentence in sentences(chunk)),
        vocab_size=config.vocab_size,
        kind=config.tokenizer_type,
        character_coverage=config.character_coverage,
        extra_tokens=config.extra_tokens,
    )


def empty_corpus(config: PrepareConfig, counts: Counter) -> str:
    """The sentence for a corpus of which nothing is left."""
    reasons = ", ".join(
        f"{count} {key.removeprefix('dropped/')}"
        for key, count in sorted(counts.items())
        if key.startswith("dropped/")
    )
    remedy = "check the sources and the cleaning options"
    if "no text in field" in reasons:
        remedy = f"choose another --text_field, or {remedy}"
    return (
        f"no document is left of {', '.join(config.sources)} ({reasons or 'the files are empty'}); "
        f"{remedy}"
    )


def no_training_documents(config: PrepareConfig) -> str:
    """The sentence for a corpus too small to be split."""
    return (
        f"no document of {', '.join(config.sources)} is left to train on after val_fraction "
        f"{config.val_fraction} and test_fraction {config.test_fraction}; lower them, add text, or "
        f"cut .txt files with txt_documents line or paragraph"
    )
