"""Lines of mixed text on which two tokenizers are compared, the same ones every time.

    python -m tests.mixed_lines FILE.gguf

compares our ids with those of the package tokenizers, and prints how many of 10,000 lines differ.
English, Chinese, Japanese, Arabic, Thai, code, joined emoji, and what a careless program makes of
bytes: halves of characters as U+FFFD, lone marks and joiners, zeros, characters that are none.
"""

from __future__ import annotations

import pathlib
import random
import sys
from collections.abc import Callable

import gguf
from tokenizers import Tokenizer, models, pre_tokenizers

from nanolm.hub.gguf.reading import GgufFile
from nanolm.hub.gguf.vocabulary import read_vocabulary
from nanolm.hub.samples import sample_texts

COUNT = 10_000
WORDS = {
    "English": "the of and to in is it's don't They'RE NASA 3.14 1,000,000 co-op e.g. naïve (so) "
    "I'll YOU'VE o'clock — “quoted” half-an-hour 2024-01-31 $5.00 50% #1 a@b.org WHO'D 'tis",
    "Chinese": "我们 在 北京 大学 读书 ， 中文 没有 空格 。 《红楼梦》 １２３ 三十 繁體 龘 𠮷 ：“"
    "对！” 2023年",
    "Japanese": "東京 タワー に 行きました 。 カタカナ ﾊﾝｶｸ ひらがな が゙ 々 ー 「はい」 "
    "第１回 ㍿ ㋿",
    "Arabic": "مرحبا بالعالم، كيف الحالُ؟ ١٢٣ لا إِلٰهَ ـــ ﷺ العربيّة ٪ النصّ",
    "Thai": "สวัสดี ชาวโลก ภาษาไทย ไม่มี ช่องว่าง ๑๒๓ ก็ น้ำ เมื่อ ๆ ฿100",
    "code": "def f(x):\\n\treturn x[i]**2 if (i>=0) { }; == != <<= // /* */ self.__init__ 0xFF "
    '1e-5 "\\\\n" &amp; <div class="a"> x+=1 snake_case camelCase HTTPServer2 \t\t #!/bin/sh $HOME',
    "emoji": "👩‍👩‍👧 👍🏽 🇩🇪 ❤️ 👨🏿‍🚀 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ☺︎ 🫠 1️⃣ 🏳️‍🌈 🧑‍🤝‍🧑 ™ ©",
    "other": "Größe İstanbul ſ 'ſ K ẞ Привет мир שלום नमस्ते 안녕하세요 각 ṩ ﬁ Ⅷ ½ ² ᾳ ǅ 𝔘 ჯ",
}
SPACES = (
    " ",
    "",
    "  ",
    "   ",
    "\t",
    "\u00a0",
    "\u3000",
    "\r\n",
    "\n\n",
    " \n ",
    "\u2028",
    "\u200b",
)
ODD = ["\ufffd", "\u0301\u0301", "\u200d", "\ufeff", "\x00", "\ufffe", "\U0010ffff", "\ue000"]
ODD += ["\u202e", "\x1b[0m", "\x7f", "\u2581"]


def mixed_lines(count: int = COUNT) -> list[str]:
    """Words of one to three of the lists, joined by spaces of all kinds, some of them broken."""
    rng = random.Random(20)
    lists = [words.split(" ") for words in WORDS.values()] + [ODD]
    lines = sample_texts(count // 10)
    while len(lines) < count:
        chosen = rng.sample(lists, rng.randint(1, 3))
        line = ""
        for _ in range(rng.randint(1, 24)):
            space = " " if rng.random() < 0.6 else rng.choice(SPACES)
            line += rng.choice(rng.choice(chosen)) + space
        lines.append(broken(line, rng) if rng.random() < 0.2 else line)
    return lines[:count]


def broken(line: str, rng: random.Random) -> str:
    """A line from whose bytes a few are missing, read by a program that replaces what is no
    character."""
    content = bytearray(line.encode())
    for _ in range(rng.randint(1, 4)):
        if content:
            del content[rng.randrange(len(content))]
    return content.decode(errors="replace")


def differing(ours: Callable[[str], list[int]], theirs: Callable[[str], list[int]]) -> list[str]:
    """The lines that get other ids."""
    return [line for line in mixed_lines() if ours(line) != theirs(line)]


def of_gguf(path: str) -> tuple[Callable[[str], list[int]], Callable[[str], list[int]]]:
    """(ours, that of the package tokenizers, built from the vocabulary that the package gguf
    reads); for files that cut words as SmolLM does."""
    fields = gguf.GGUFReader(pathlib.Path(path)).fields
    values = {name: field.contents() for name, field in fields.items()}
    pieces, merges = (values[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges"))
    assert values["tokenizer.ggml.pre"] == "smollm"
    theirs = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            [tuple(line.split(" ")) for line in merges],
        )
    )
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ours = read_vocabulary(GgufFile(path, values, {}, {}))
    return (lambda text: ours.encode(text).tolist()), (lambda text: theirs.encode(text).ids)


def main() -> None:
    """Compare and print."""
    path, *_ = sys.argv[1:]
    found = differing(*of_gguf(path))
    print(f"{len(found)} of {COUNT:,} lines get other ids")
    for line in found[:5]:
        print(repr(line))


if __name__ == "__main__":
    main()
