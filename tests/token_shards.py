"""Prepared directories made of given token ids, for tests of what reads them."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np

from nanolm.data.shards.directory import Manifest, ShardWriter, data_hash, split_totals

EOS = 3


def write_prepared(
    directory: pathlib.Path,
    splits: dict[str, list[list[np.ndarray]]],
    *,
    vocab_size: int = 1000,
    tokenizer_hash: str = "a tokenizer",
    sentences: Callable[[np.ndarray], np.ndarray] | None = None,
) -> pathlib.Path:
    """Write `splits`: for each split a list of shards, each a list of documents (ids with eos);
    sentences(document) are the lengths of its sentences, which are not written where it is None."""
    directory.mkdir(parents=True, exist_ok=True)
    entries: dict[str, list[dict]] = {}
    for split, shards in splits.items():
        entries[split] = []
        for number, documents in enumerate(shards):
            path = directory / f"{split}-{number:05d}.arrow"
            tokens = np.concatenate([np.empty(0, np.int64), *documents])
            with ShardWriter(
                path, tokens=len(tokens), vocab_size=vocab_size, tokenizer_hash=tokenizer_hash
            ) as writer:
                if documents:
                    cut = sentences and np.concatenate([sentences(d) for d in documents])
                    lengths = np.array([len(d) for d in documents])
                    writer.write(tokens, lengths, len(tokens), cut)
            entries[split].append(writer.info)
    Manifest(
        tokenizer="tokenizer.model",
        tokenizer_hash=tokenizer_hash,
        vocab_size=vocab_size,
        special_ids={"eos": EOS},
        splits=entries,
        totals=split_totals(entries),
        inputs=[],
        cleaning={},
        unigram="unigram.npy",
        unigram_sha256="",
        data_hash=data_hash(tokenizer_hash, entries),
        config={},
    ).save(directory)
    return directory


def sentences_of(document: np.ndarray) -> np.ndarray:
    """Lengths of the sentences of a document of random ids: a fifth of the ids end one."""
    ends = np.flatnonzero(document[:-1] % 5 == 0) + 1
    return np.diff(ends, prepend=0, append=len(document))


def random_documents(
    rng: np.random.Generator, tokens: int, mean_length: int, vocab_size: int = 1000
) -> list[np.ndarray]:
    """Documents of random ids (EOS only at the end of each) with `tokens` tokens in all."""
    documents = []
    while tokens > 0:
        length = min(tokens, 1 + int(rng.exponential(mean_length)))
        document = rng.integers(EOS + 1, vocab_size, length)
        document[-1] = EOS
        documents.append(document)
        tokens -= length
    return documents
