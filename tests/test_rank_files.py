"""Rank files (`*.tiktoken`) behind the tokenizer interface.

Ids are compared with tiktoken's rule, written here as its authors describe it, on a file made from
a small trained byte BPE; with the package tiktoken itself where it is installed.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import pathlib
import random

import pytest
import regex
import tokenizers
import transformers

from nanolm import cli
from nanolm.config.model import ModelConfig
from nanolm.data.json_pieces import byte_alphabet
from nanolm.data.rank_files import ENCODINGS, merges_of
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError
from nanolm.hub.gguf.writing import vocabulary_values
from nanolm.hub.tokenizer_files import tokenizer_files
from tests.mixed_lines import mixed_lines

END = r"|\s++\Z|\s+(?!\S)|\s"
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++" + END
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++\Z|\s*[\r\n]|\s+(?!\S)|\s"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SHORT}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"gpt2": GPT2, "cl100k_base": CL100K, "o200k_base": O200K}
PIECES = 1200


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=PIECES,
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(mixed_lines(2000), trainer)
    table = byte_alphabet()
    found = {
        bytes(table[character] for character in piece): index
        for piece, index in trained.get_vocab().items()
    }
    del found[next(piece for piece, index in found.items() if index == PIECES - 1)]
    found[b" qzxjv"] = PIECES - 1  # a piece to which no merges lead
    assert sorted(found.values()) == list(range(PIECES))
    return found


def lines_of(ranks: dict[bytes, int]) -> list[str]:
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return [f"{base64.b64encode(piece).decode()} {rank}" for piece, rank in ordered]


def write(path: pathlib.Path, lines: list[str]) -> pathlib.Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def merged(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """The pair of neighbours whose whole has the lowest rank is merged, the leftmost first."""
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([byte]) for byte in word]
    while len(parts) > 1:
        wholes = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        lowest = min(wholes)
        if lowest == len(ranks):
            break
        at = wholes.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]


def originals(text: str, encoding: str, ranks: dict[bytes, int]) -> list[int]:
    words = regex.findall(PATTERNS[encoding], text)
    return [index for word in words for index in merged(word.encode(), ranks)]


def texts() -> list[str]:
    rng = random.Random(3)
    repeated = ["".join(rng.choices("ab \n'sS/", k=40)) for _ in range(200)]
    ends = [
        "a \n  ",
        "\n \n",
        "  \t",
        " a\r\n\r\n  b",
        "1234567 89",
        "x'S'll",
        "<|endoftext|>",
        "a qzxjv qzxjvs",
    ]
    return [*ends, *repeated, *mixed_lines(400), *mixed_lines(1500)[-400:]]


@pytest.mark.parametrize("encoding", PATTERNS)
def test_ids_are_those_of_the_rule(
    encoding: str, ranks: dict[bytes, int], tmp_path: pathlib.Path
) -> None:
    path = write(tmp_path / "own.tiktoken", lines_of(ranks))
    tokenizer = Tokenizer.load(f"{encoding}:{path}")
    assert tokenizer.lossless and tokenizer.eos == PIECES
    differing = []
    for text in texts():
        ids, begins, ends = tokenizer.encode_places(text)
        if ids.tolist() != originals(text, encoding, ranks):
            differing.append(text)
        assert tokenizer.decode(ids) == text
        content = text.encode()
        by_rank = {rank: piece for piece, rank in ranks.items()}
        for index, begin, end in zip(ids.tolist(), begins.tolist(), ends.tolist(), strict=True):
            assert content[begin:end] == by_rank[index]
    assert differing == []


@pytest.mark.slow
@pytest.mark.parametrize("encoding", PATTERNS)
def test_ids_are_those_of_tiktoken(
    encoding: str, ranks: dict[bytes, int], tmp_path: pathlib.Path
) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    public = pytest.importorskip("tiktoken_ext.openai_public")
    with pytest.MonkeyPatch.context() as patch:  # the published ranks would be downloaded
        for name in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
            patch.setattr(public, name, lambda *_, **__: {})
        pattern = public.ENCODING_CONSTRUCTORS[encoding]()["pat_str"]
    theirs = tiktoken.Encoding(
        "own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": PIECES}
    )
    path = write(tmp_path / "own.tiktoken", lines_of(ranks))
    ours = Tokenizer.load(f"{encoding}:{path}")
    lines = mixed_lines()
    differing = [
        line for line in lines if ours.encode(line).tolist() != theirs.encode_ordinary(line)
    ]
    assert len(lines) == 10_000 and differing == []


def test_a_published_file_brings_its_special_pieces(
    ranks: dict[bytes, int], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    special = {"<|endoftext|>": PIECES + 1, "<|endofprompt|>": PIECES + 4}
    as_published = dataclasses.replace(ENCODINGS["cl100k_base"], ranks=PIECES, special=special)
    monkeypatch.setitem(ENCODINGS, "cl100k_base", as_published)
    tokenizer = Tokenizer.load(write(tmp_path / "cl100k_base.tiktoken", lines_of(ranks)))
    assert tokenizer.vocab_size == PIECES + 5
    assert tokenizer.eos == PIECES + 1
    assert tokenizer.special_mask[PIECES:].all() and not tokenizer.special_mask[:PIECES].any()
    assert (tokenizer.encode("<|endoftext|>") < PIECES).all()


def test_the_rank_of_a_special_piece_is_free_in_its_file(
    ranks: dict[bytes, int], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 50,256 in p50k_base; the same gap in any other file is a lost line."""
    special = {"<|endoftext|>": 700}
    published = dataclasses.replace(ENCODINGS["p50k_base"], ranks=PIECES - 1, special=special)
    monkeypatch.setitem(ENCODINGS, "p50k_base", published)
    lines = lines_of(ranks)
    tokenizer = Tokenizer.load(write(tmp_path / "p50k_base.tiktoken", lines[:700] + lines[701:]))
    assert tokenizer.vocab_size == PIECES and tokenizer.eos == 700
    with pytest.raises(UserError, match="no line has the rank 800"):
        Tokenizer.load(write(tmp_path / "p50k_base.tiktoken", lines[:800] + lines[801:]))


def test_merges_are_found_in_a_time_that_grows_with_the_bytes() -> None:
    """A piece of a million bytes: to cut it everywhere would take minutes."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"a" * 10**6: 257}
    assert list(merges_of(ranks)) == [(b"a", b"b")]


def test_merges_are_all_pairs_of_pieces_by_their_ranks() -> None:
    """Every way to cut every piece in two, tried one by one."""
    rng = random.Random(5)
    words = {bytes(rng.choices(b"abc", k=rng.randint(2, 5))) for _ in range(150)}
    pieces = [*map(bytes, itertools.product(b"abc")), *rng.sample(sorted(words), len(words))]
    ranks = {piece: rank for rank, piece in enumerate(rng.sample(pieces, len(pieces)))}
    every = [
        (ranks[left + right], ranks[left], ranks[right], (left, right))
        for left, right in itertools.product(pieces, pieces)
        if left + right in ranks
    ]
    assert len(every) > 2 * len(words) / 3
    assert list(merges_of(ranks)) == [pair for *_, pair in sorted(every)]


@pytest.mark.parametrize(
    "encoding",
    ["gpt2", *(pytest.param(e, marks=pytest.mark.slow) for e in ("cl100k_base", "o200k_base"))],
)
def test_it_is_copied_with_the_data_and_goes_out_as_a_tokenizer_json(
    encoding: str, ranks: dict[bytes, int], tmp_path: pathlib.Path
) -> None:
    """transformers gives the same ids, texts and end; llama.cpp would cut words otherwise."""
    path = write(tmp_path / "own.tiktoken", lines_of(ranks))
    (tmp_path / "corpus.txt").write_text("\n".join(texts()[:200]), encoding="utf-8")
    named, out = f"--tokenizer={encoding}:{path}", str(tmp_path / "data")
    cut = ("--txt_documents=line", named)
    cli.run(["prepare", str(tmp_path / "corpus.txt"), "--out", out, *cut])
    path.unlink()
    tokenizer = Tokenizer.load(tmp_path / "data")
    for name, content in tokenizer_files(tokenizer, ModelConfig()).items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in texts():
        ids = originals(text, encoding, ranks)
        assert tokenizer.encode(text).tolist() == ids
        assert theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == PIECES
    with pytest.raises(UserError, match="export with --format transformers"):
        vocabulary_values(tokenizer, tokenizer.vocab_size)


def test_a_file_of_unknown_encoding_is_refused_with_a_remedy_that_works(
    ranks: dict[bytes, int], tmp_path: pathlib.Path
) -> None:
    path = write(tmp_path / "own.tiktoken", lines_of(ranks))
    with pytest.raises(UserError, match=r"own\.tiktoken .* as in gpt2:FILE\.tiktoken"):
        Tokenizer.load(path)
    assert Tokenizer.load(f"gpt2:{path}").vocab_size == PIECES + 1


DAMAGES = {
    "bad base64": (lambda lines: [*lines[:300], "!!x 300", *lines[301:]], "line 301: .* no base64"),
    "half a base64": (lambda lines: [*lines[:-1], "YWJ"], "line 1200: .* has 1 parts"),
    "no rank": (lambda lines: [*lines[:-1], "YWJj x"], "line 1200: .* is no rank"),
    "a huge rank": (lambda lines: [*lines[:-1], "YWJj " + "9" * 5000], "line 1200: .* is no rank"),
    "negative": (lambda lines: [*lines[:-1], "YWJj -1"], "line 1200: .* is no rank"),
    "piece twice": (
        lambda lines: [*lines, lines[0].split(" ")[0] + " 1200"],
        "line 1201: .* already in line 1;",
    ),
    "rank twice": (lambda lines: [*lines, "AAAAAAA= 7"], "line 1201: the rank 7 .* in line 8;"),
    "gap": (lambda lines: [*lines[:700], *lines[701:]], "line 1199 is the last.* the rank 700;"),
    "one byte less": (lambda lines: lines[1:], "no piece for 1 of the 256 single bytes"),
    "empty": (lambda lines: [], "no piece for 256 of the 256"),
    "an empty piece": (lambda lines: [*lines[:-1], "== 1199"], "line 1200: .*no base64|is empty"),
    "a special piece": (
        lambda lines: [*lines[:-1], f"{base64.b64encode(b'<|endoftext|>').decode()} 1199"],
        "called like a special piece",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_ends_in_a_sentence_that_names_file_and_line(
    damage: str, ranks: dict[bytes, int], tmp_path: pathlib.Path
) -> None:
    change, sentence = DAMAGES[damage]
    path = write(tmp_path / "own.tiktoken", change(lines_of(ranks)))
    with pytest.raises(UserError, match=sentence) as caught:
        Tokenizer.load(f"gpt2:{path}")
    assert str(path) in str(caught.value)
