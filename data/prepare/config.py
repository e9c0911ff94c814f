"""What `nanolm prepare` can be told; every field's docstring is its help on the command line."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from nanolm.config.ranges import Amount, Count, Fraction, Seed, Within
from nanolm.config.typed import require_ranges
from nanolm.data.prepare.clean import CleaningOptions
from nanolm.data.text_files import check_encoding
from nanolm.data.tokenizer import EXTRA_TOKENS, Tokenizer
from nanolm.errors import UserError, require, require_whole_path

SAMPLE_BYTES_PER_PIECE = 300
TRAINING = ("tokenizer_type", "vocab_size", "character_coverage", "extra_tokens", "sample_bytes")
"""Keys that say how a tokenizer is trained."""
YOUNGER = {
    "encoding": "auto",
    "exclude": [],
    "extra_tokens": EXTRA_TOKENS,
    "sentences": False,
}
"""Keys that the first manifests do not have: at their default they are left out of later ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """From raw text to a tokenizer and token shards."""

    out: str
    """Directory to write; an interrupted preparation in it is continued."""
    sources: list[str]
    """Files, globs, folders, `stdlib`, `hf:NAME[:SPLIT[:CONFIG]]`, or a plug-in source by name."""
    exclude: list[str] = dataclasses.field(default_factory=list)
    """Patterns (`*.json`, `drafts`, `old/*`) of names or paths that are left out of folders, globs
    and files that are named."""
    source_options: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Keys of a plug-in source's own options, by its name."""
    text_field: str = "text"
    """Field or column that holds the text, in .jsonl, .parquet and Hugging Face data sets."""
    txt_documents: Literal["auto", "file", "line", "paragraph"] = "auto"
    """What a document is in a .txt file. auto: the whole file up to 1 MiB; in a larger one each
    line when lines are long (400 bytes on average), else what stands between blank lines."""
    unicode_normalisation: Literal["none", "nfc", "nfkc"] = "nfc"
    """Unicode normal form to bring text to; none keeps every code point."""
    control_characters: Literal["remove", "keep"] = "remove"
    """Remove control characters and byte-order marks, and make all line ends LF; or keep them."""
    encoding: str = "auto"
    """Encoding of text files without a byte-order mark, by Python's name: cp1251, gb18030,
    utf-16-le, …; auto is UTF-8. A byte-order mark (UTF-8, UTF-16, UTF-32) decides by itself."""
    undecodable: Literal["drop", "replace", "refuse"] = "drop"
    """Documents that are not in their encoding: drop and count them, replace the bytes by U+FFFD,
    or stop."""
    min_characters: Amount = 1
    """Drop shorter documents."""
    max_characters: Count | None = None
    """Drop longer documents."""
    mask_pii: bool = False
    """Replace mail addresses, phone numbers, IP addresses and ID-like numbers by [MAIL] etc."""
    deduplicate: bool = True
    """Keep only the first of documents with the same cleaned text."""
    val_fraction: Fraction = 0.02
    """Share of documents for validation, chosen by hash (at least one document)."""
    test_fraction: Fraction = 0.0
    """Share of documents for a test split, chosen by hash (at least one document if not 0)."""
    tokenizer: str | None = None
    """An existing SentencePiece .model, tokenizer.json or prepared directory to use instead of
    training one; or a .tiktoken file of ranks after its encoding: gpt2:FILE, cl100k_base:FILE."""
    tokenizer_type: Literal["unigram", "bpe"] = "unigram"
    """Kind of tokenizer to train. unigram encodes five times as fast; bpe trains in a tenth of the
    time, so below about 40 MB of text it is done sooner, and needs 1 or 2 % fewer tokens."""
    vocab_size: Count = 8192
    """Size of the vocabulary to train, special pieces and 256 bytes included."""
    extra_tokens: Amount = EXTRA_TOKENS
    """Special pieces without a role in the vocabulary to train. objective=span marks with them what
    it cuts out: 28 for rows of 512 tokens, 57 for 1,024; T5's vocabulary has 100."""
    character_coverage: Annotated[float, Within(0.98, 1)] = 0.9995
    """Share of the sample's characters that get a piece; the others are written as bytes."""
    sample_bytes: Annotated[int, Within(1)] | None = None
    """Text to train the tokenizer on; by default 300 bytes for each entry of the vocabulary."""
    sentences: bool = False
    """Also keep where sentences begin, for training with data.rows=sentences."""
    shard_tokens: Count = 1 << 26
    """A shard holds at most so many tokens (unless one document alone is longer)."""
    seed: Seed = 0
    """Decides the splits and the tokenizer's sample."""
    workers: Count | None = None
    """Processes; by default one for each CPU core. The result does not depend on it."""

    def check(self) -> None:
        """Raise UserError naming the first key that cannot be right."""
        require_ranges(self)
        check_encoding(self.encoding)
        require_whole_path("out", self.out)
        given = [key for key in TRAINING if getattr(self, key) != getattr(PrepareConfig, key)]
        require_one_tokenizer(self.tokenizer, given)
        for wrong, sentence in (
            (
                not is_utf8(self.out),
                f"out={self.out!a} is no UTF-8, and Arrow opens no such name; choose another --out",
            ),
            (not self.sources, "sources is empty; name at least one file, folder or `stdlib`"),
            (
                self.val_fraction + self.test_fraction >= 1,
                "val_fraction and test_fraction must be below 1 together",
            ),
            (
                self.max_characters is not None and self.max_characters < self.min_characters,
                "max_characters is smaller than min_characters, which would drop everything",
            ),
        ):
            if wrong:
                raise UserError(sentence)

    def told(self, keys: Iterable[str]) -> list[str]:
        """Which of these keys are not at their default."""
        usual = type(self)(out=self.out, sources=self.sources)
        return [key for key in keys if getattr(self, key) != getattr(usual, key)]

    def processes(self) -> int:
        """How many processes to use."""
        return self.workers or len(os.sched_getaffinity(0))

    def training_bytes(self) -> int:
        """How much text the tokenizer is trained on, at most."""
        return self.sample_bytes or SAMPLE_BYTES_PER_PIECE * self.vocab_size

    def cleaning(self) -> CleaningOptions:
        """The part that concerns cleaning."""
        names = [field.name for field in dataclasses.fields(CleaningOptions)]
        return CleaningOptions(**{name: getattr(self, name) for name in names})

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the result depends on: a foreign tokenizer by its hash, no `out`.

        The usual number of extra tokens is left out, as in folders from before it was a choice.
        """
        keys = dataclasses.asdict(self)
        for key in ("out", "workers"):
            del keys[key]
        for key, default in YOUNGER.items():  # so that folders of earlier versions are known again
            if keys[key] == default:
                del keys[key]
        if self.tokenizer is not None:
            keys["tokenizer"] = Tokenizer.load(self.tokenizer).hash
            for key in TRAINING:
                keys.pop(key, None)
        return keys


def require_one_tokenizer(tokenizer: str | None, given: list[str]) -> None:
    """Raises UserError where a tokenizer is given, and also how to train one."""
    require(
        tokenizer is None or not given,
        f"{', '.join(given)} says how to train a tokenizer, and tokenizer={tokenizer} is used as "
        f"it is; leave out one of them",
    )


def is_utf8(name: str) -> bool:
    """Whether a file's name is text: Python keeps other bytes as halves of surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in name)
