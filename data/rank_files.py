"""Rank files (`cl100k_base.tiktoken` and its like) as a tokenizer.json.

A line holds the bytes of a piece in base64 and its rank, which is its id too. Of two neighbouring
pieces the pair is merged whose whole has the lowest rank, so ranks say the merges as well. The
file says neither how a text is cut into words first nor which special pieces there are: that is
known of a published encoding, by its name. `<|endoftext|>` follows the last rank of a file that is
not the published one.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import pathlib
from collections.abc import Iterator

from nanolm.data.byte_level_json import (
    AROUND,
    ENGLISH,
    GPT2_WORDS,
    REST,
    Words,
    by_pattern,
    byte_level_json,
)
from nanolm.data.json_pieces import byte_alphabet
from nanolm.errors import UserError, require

SUFFIX = ".tiktoken"
END = "<|endoftext|>"
PROMPT_END = "<|endofprompt|>"
OTHERS, SPACES = REST.split("|", 1)
CL100K = rf"{ENGLISH}|{AROUND}\p{{L}}+|\p{{N}}{{1,3}}|{OTHERS}|\s+\z|{SPACES}"
"""Llama 3 took this over without `\\s+\\z`: here spaces that end a text stay together, be there
line ends among them or not."""
CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"{AROUND}{UPPER}*{LOWER}+{CONTRACTION}|{AROUND}{UPPER}+{LOWER}*{CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Encoding:
    """What is published of an encoding beside its ranks."""

    words: Words
    ranks: int
    """How many lines the published file has."""
    special: dict[str, int]
    """Its special pieces, whose ids are free in the published file."""


WHOLE_WORDS = dataclasses.replace(GPT2_WORDS, whole_pieces=True)
"""A word that is a piece is that piece for tiktoken, also where no merges lead there."""
GPT2 = Encoding(WHOLE_WORDS, 50256, {END: 50256})
ENCODINGS = {
    "gpt2": GPT2,
    "r50k_base": GPT2,
    "p50k_base": Encoding(WHOLE_WORDS, 50280, {END: 50256}),
    "cl100k_base": Encoding(
        by_pattern(CL100K, whole_pieces=True),
        100256,
        {
            END: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            PROMPT_END: 100276,
        },
    ),
    "o200k_base": Encoding(
        by_pattern(O200K, whole_pieces=True), 199998, {END: 199999, PROMPT_END: 200018}
    ),
}
"""Encodings by the names that their authors gave them (tiktoken, openai_public.py)."""


def named_rank_file(path: str | pathlib.Path) -> tuple[str, pathlib.Path] | None:
    """(encoding, file) of `ENCODING:FILE`, or of a rank file that is called as published.

    None where the path is of no rank file. Raises UserError for a rank file of unknown encoding.
    """
    name, colon, rest = str(path).partition(":")
    if colon and name in ENCODINGS:
        return name, pathlib.Path(rest)
    file = pathlib.Path(path)
    if file.suffix != SUFFIX or file.is_dir():
        return None
    if file.stem in ENCODINGS:
        return file.stem, file
    raise UserError(
        f"{path} holds ranks and does not say how a text is cut into words; name the encoding "
        f"before it, as in gpt2:FILE{SUFFIX} (known: {', '.join(ENCODINGS)})"
    )


def json_of_ranks(content: bytes, name: str, path: str) -> bytes:
    """The tokenizer.json of a rank file's content, whose encoding has this name.

    Raises UserError, with file and line, for content that is no rank file or not a whole one.
    """
    encoding = ENCODINGS[name]
    ranks = read_ranks(content, path)
    is_published = len(ranks) == encoding.ranks
    special = encoding.special if is_published else {END: len(ranks)}
    named = {rank: spelt(piece) for piece, rank in ranks.items()}
    require_no_gap(named, special if is_published else {}, path)
    named |= {index: piece for piece, index in special.items()}
    unused = [index for index in range(max(named)) if index not in named]
    named |= {index: f"<|unused_{index}|>" for index in unused}
    pieces = [named[index] for index in range(len(named))]
    require(
        len(set(pieces)) == len(pieces),
        f"{path} has a piece that is called like a special piece; take it out of the file",
    )
    merges = [(spelt(left), spelt(right)) for left, right in merges_of(ranks)]
    return byte_level_json(pieces, merges, encoding.words, special=[*special.values(), *unused])


def read_ranks(content: bytes, path: str) -> dict[bytes, int]:
    """piece -> rank; every single byte is among the pieces, and no piece or rank stands twice."""
    ranks: dict[bytes, int] = {}
    lines: dict[int, int] = {}
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        piece, rank = read_line(line, where)
        require(
            piece not in ranks,
            f"{where}: the piece {piece!r} stands already in line "
            f"{lines.get(ranks.get(piece, -1))}; fetch the file again",
        )
        require(
            rank not in lines,
            f"{where}: the rank {rank} stands already in line {lines.get(rank)}; fetch the file "
            f"again",
        )
        ranks[piece], lines[rank] = rank, number
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    require(
        not missing,
        f"{path}, lines 1 to {max(lines.values(), default=1)}: there is no piece for "
        f"{len(missing)} of the 256 single bytes ({missing[0] if missing else 0:#04x} is the "
        f"first), so not every text could be written; fetch the file again",
    )
    return ranks


def read_line(line: bytes, where: str) -> tuple[bytes, int]:
    """The piece and rank of a line; raises UserError where they are none."""
    parts = line.split()
    wanted = "wanted are a piece in base64 and its rank; fetch the file again"
    require(len(parts) == 2, f"{where}: {line[:40]!r} has {len(parts)} parts, and {wanted}")
    try:
        piece = base64.b64decode(parts[0], validate=True)
    except binascii.Error as error:
        raise UserError(f"{where}: {parts[0][:40]!r} is no base64, and {wanted}") from error
    # isdigit of bytes knows ASCII alone; int of more digits than any rank has would raise
    require(
        parts[1].isdigit() and len(parts[1]) < 10,
        f"{where}: {parts[1][:40]!r} is no rank; {wanted}",
    )
    require(piece != b"", f"{where}: the piece is empty; {wanted}")
    return piece, int(parts[1])


def require_no_gap(named: dict[int, str], special: dict[str, int], path: str) -> None:
    """Raises UserError where a rank below the highest is neither a piece's nor a special one's."""
    taken = named.keys() | set(special.values())
    gap = next((rank for rank in range(max(named)) if rank not in taken), None)
    require(
        gap is None,
        f"{path}, line {len(named)} is the last, and no line has the rank {gap}; fetch the file "
        f"again",
    )


def merges_of(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pairs of pieces whose whole is a piece, by its rank; of one piece the pair first that
    has the lowest ranks itself."""
    lengths = {len(piece) for piece in ranks}  # or a piece of n bytes would cost n cuts of n bytes
    for piece in sorted(ranks, key=ranks.__getitem__):
        whole = len(piece)
        cuts = (cut for cut in range(1, whole) if cut in lengths and whole - cut in lengths)
        pairs = ((piece[:cut], piece[cut:]) for cut in cuts)
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def spelt(piece: bytes) -> str:
    """Bytes as the characters that byte-level BPE writes for them."""
    return piece.decode("latin-1").translate(CHARACTERS)


CHARACTERS = {byte: character for character, byte in byte_alphabet().items()}
