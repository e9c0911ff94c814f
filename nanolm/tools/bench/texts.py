"""The examples of `nanolm bench finetune`: texts of a table as token ids with their classes,
prepared once in a file that every contestant reads."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import tempfile
from typing import Any

import numpy as np

from nanolm.data.prepare.tokenizer_training import sentences, train_tokenizer
from nanolm.data.tables.splits import find_split, read_split
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError
from nanolm.tools.bench.shape import Shape

EXAMPLES = pathlib.Path(tempfile.gettempdir()) / "nanolm-bench-finetune"
"""Where prepared examples lie; a job names the file, not the folder."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """Token ids of all sequences and their classes, as `nanolm bench finetune` prepared them."""

    sequences: list[np.ndarray]
    labels: np.ndarray

    @classmethod
    def load(cls, path: pathlib.Path) -> Examples:
        """From a prepared file."""
        with np.load(path) as arrays:
            sequences = np.split(arrays["tokens"].astype(np.int64), arrays["ends"][:-1])
            return cls(sequences, arrays["labels"].astype(np.int64))

    def save(self, path: pathlib.Path) -> None:
        """Into a prepared file."""
        ends = np.cumsum([len(ids) for ids in self.sequences])
        tokens = np.concatenate(self.sequences).astype(np.int32)
        np.savez(path, tokens=tokens, ends=ends, labels=self.labels)


def read_examples(data: str, column: str, label: str | None, shape: Shape) -> tuple[Examples, int]:
    """(examples, number of classes): texts in the ids of a vocabulary trained on them, framed.

    Raises UserError for a table without the columns, or with too few texts.
    """
    where = find_split(data, {}, "train")
    if where is None:
        raise UserError(f"data={data} has no train split")
    table = read_split(where, "train")
    for name in filter(None, (column, label)):
        if name not in table.columns:
            raise UserError(f"{table.path} has no column {name}; it has {', '.join(table.columns)}")
    texts = [str(record[column]) for record in table.records]
    if len(texts) < 2 * shape.batch:
        raise UserError(f"{table.path} has {len(texts)} texts, fewer than two batches")
    tokenizer = tokenizer_of(texts, shape.vocab_size)
    room = shape.row_length - 2
    sequences = [
        np.concatenate([[tokenizer.cls], ids[:room], [tokenizer.sep]])
        for ids in tokenizer.encode_batch(texts)
    ]
    if label is None:
        keys = [str(hashlib.sha256(text.encode()).digest()[0] % 6) for text in texts]
    else:
        keys = [str(record[label]) for record in table.records]
    classes = sorted(set(keys))
    return Examples(sequences, np.array([classes.index(key) for key in keys])), len(classes)


def tokenizer_of(texts: list[str], vocab_size: int) -> Tokenizer:
    """A unigram vocabulary of at most this size; small texts make a smaller one."""
    pieces = [piece for text in texts for piece in sentences(text)]
    size = vocab_size
    while True:
        try:
            return Tokenizer(train_tokenizer(iter(pieces), vocab_size=size, kind="unigram"))
        except UserError:
            if size <= 600:
                raise
            size = size * 3 // 4


def prepared(
    data: str, column: str, label: str | None, shape: Shape
) -> tuple[str, int, dict[str, Any]]:
    """(file of examples, number of classes, facts about lengths); the file's name is its content's
    hash, so cells that were measured on it are found again."""
    examples, n_classes = read_examples(data, column, label, shape)
    lengths = np.array([len(ids) for ids in examples.sequences])
    digest = hashlib.sha256(np.concatenate(examples.sequences).tobytes())
    digest.update(lengths.tobytes() + examples.labels.tobytes())
    EXAMPLES.mkdir(exist_ok=True)
    name = f"{digest.hexdigest()[:16]}.npz"
    examples.save(EXAMPLES / name)
    facts = {
        "data": data,
        "texts": len(lengths),
        "mean_tokens": float(lengths.mean()),
        "longest": int(lengths.max()),
    }
    return name, n_classes, facts
