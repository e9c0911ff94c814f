"""Training a SentencePiece tokenizer so that it is lossless and the same on every machine.

SentencePiece's defaults rewrite text (NFKC, collapsed spaces, tabs and newlines to spaces); all of
that is switched off, byte fallback covers every character outside the vocabulary, and newline and
tab are pieces of their own. Runs of spaces may form pieces, which is what indented code needs
(3.4 instead of 2.0 bytes a token on Python sources). The thread count is fixed because the unigram
trainer sums its statistics per thread: another count gives other pieces.

Unigram: Kudo 2018, arXiv:1804.10959. BPE: Sennrich et al. 2016, arXiv:1508.07909. SentencePiece and
byte fallback: Kudo & Richardson 2018, arXiv:1808.06226.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from typing import Any

import sentencepiece

from nanolm.data.tokenizer import EXTRA_PIECES, EXTRA_TOKENS, ROLE_PIECES, escape
from nanolm.errors import UserError

TRAINING_THREADS = 2
# Candidates that the unigram trainer prunes down from; its own default, a million, takes a third
# longer on a vocabulary of 8,192 and ends at the same bytes a token.
SEEDS_PER_PIECE = 12
MAX_SENTENCE_BYTES = 4000
MAX_SENTENCE_CHARACTERS = MAX_SENTENCE_BYTES // 4
BYTE_PIECES = 256
# SentencePiece skips a whole training line that holds its unknown-character mark, or is cut by NUL.
RESERVED_CHARACTERS = re.compile("[\u2585\0]")
SENTENCE_END = re.compile(r"(?<=[.!?])(?= )|(?<=[。！？\n])")


def sentences(text: str) -> Iterator[str]:
    """Cut a text into training sentences of at most 1,000 characters, dropping nothing.

    SentencePiece silently ignores longer lines, so a sentence without an end is cut at a space, or
    where it must be.
    """
    for sentence in SENTENCE_END.split(text):
        while len(sentence) > MAX_SENTENCE_CHARACTERS:
            cut = sentence.rfind(" ", 1, MAX_SENTENCE_CHARACTERS)
            cut = cut if cut > 0 else MAX_SENTENCE_CHARACTERS
            yield sentence[:cut]
            sentence = sentence[cut:]
        if sentence:
            yield sentence


def train_tokenizer(
    samples: Iterable[str],
    *,
    vocab_size: int,
    kind: str,
    character_coverage: float = 0.9995,
    extra_tokens: int = EXTRA_TOKENS,
) -> bytes:
    """Train on sentences (see `sentences`) and return the bytes of a `.model` file.

    kind: "unigram" or "bpe"; extra_tokens: number of further control pieces, which mark spans and
    whatever a task needs. Raises UserError when the vocabulary does not fit the sample.
    """
    reserved = len(ROLE_PIECES) + extra_tokens + BYTE_PIECES
    roles = [ROLE_PIECES[role] for role in ("cls", "sep", "mask")]
    extras = [EXTRA_PIECES[0].format(index) for index in range(extra_tokens)]
    model = io.BytesIO()
    raised: list[BaseException] = []
    cleaned = (RESERVED_CHARACTERS.sub("", escape(sentence)) for sentence in samples)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=kept(cleaned, raised),
            model_writer=model,
            model_type=kind,
            # SentencePiece counts what this sample needs, and names it where the size is smaller,
            # but for sizes without room for the special pieces themselves.
            vocab_size=max(vocab_size, reserved),
            character_coverage=character_coverage,
            num_threads=TRAINING_THREADS,
            seed_sentencepiece_size=max(50_000, min(1_000_000, SEEDS_PER_PIECE * vocab_size)),
            max_sentence_length=MAX_SENTENCE_BYTES,
            control_symbols=[*roles, *extras],
            **LOSSLESS,
            **PIECES,
        )
    except RuntimeError as error:
        if raised:
            raise raised[0] from None
        raise UserError(explain(str(error), vocab_size)) from error
    return model.getvalue()


def kept(samples: Iterator[str], raised: list[BaseException]) -> Iterator[str]:
    """The samples; what reading them raises is put into `raised` too, since SentencePiece makes a
    RuntimeError of it, of Ctrl-C as well."""
    try:
        yield from samples
    except (Exception, KeyboardInterrupt) as error:
        raised.append(error)
        raise


LOSSLESS: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "byte_fallback": True,
    "allow_whitespace_only_pieces": True,
    # A space is ▁ inside pieces. Where the sample has none, as in Chinese, or too few for
    # `character_coverage`, it would go by the three bytes of ▁, and come back as a ▁.
    "required_chars": "▁",
    "user_defined_symbols": ["\n", "\t"],
    "minloglevel": 2,
}
PIECES: dict[str, Any] = {
    **{f"{role}_id": index for index, role in enumerate(("pad", "unk", "bos", "eos"))},
    **{f"{role}_piece": ROLE_PIECES[role] for role in ("pad", "unk", "bos", "eos")},
}


def explain(message: str, vocab_size: int) -> str:
    """One sentence for a user out of SentencePiece's own error message."""
    if limit := re.search(r"value <= (\d+)", message):
        return (
            f"vocab_size {vocab_size} is larger than this corpus supports; "
            f"use at most {limit[1]}, or add text"
        )
    if needed := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too small: bytes, special pieces and the characters of "
            f"this corpus take {needed[1]}; use at least {needed[1]}, or lower character_coverage"
        )
    return f"SentencePiece cannot train a tokenizer on this corpus: {message.strip()}"
