"""Texts on which two tokenizers are compared: many scripts, code, emoji, and what is rarely met.

The same texts every time; no data is needed.
"""

from __future__ import annotations

import random

SCRIPTS = {
    "ASCII": (0x20, 0x7E),
    "Latin": (0xA0, 0x24F),
    "Greek": (0x370, 0x3FF),
    "Cyrillic": (0x400, 0x4FF),
    "Hebrew": (0x590, 0x5FF),
    "Arabic": (0x600, 0x6FF),
    "Devanagari": (0x900, 0x97F),
    "Thai": (0xE00, 0xE7F),
    "Georgian": (0x10A0, 0x10FF),
    "Hangul parts": (0x1100, 0x11FF),
    "punctuation": (0x2000, 0x206F),
    "arrows and signs": (0x2190, 0x22FF),
    "kana": (0x3040, 0x30FF),
    "Chinese": (0x4E00, 0x9FFF),
    "Hangul": (0xAC00, 0xD7A3),
    "private use": (0xF4A0, 0xF4A3),
    "full width": (0xFF00, 0xFFEE),
    "emoji": (0x1F300, 0x1FAFF),
    "rare Chinese": (0x20000, 0x2A6D6),
}
PHRASES = (
    "The quick brown fox jumps over the lazy dog.",
    "Don't panic: it's 3.14 (or 22/7), isn't it?",
    "def add(a, b):\n\treturn a + b  # sum\n\n",
    "for (int i = 0; i < 10; ++i) { x[i] = '\\n'; }",
    "https://example.org/a?b=c&d=%20",
    "我们在北京大学读书。",
    "東京タワーに行きました",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "שלום עולם",
    "สวัสดีชาวโลก",
    "नमस्ते दुनिया",
    "Привет, мир!",
    "Größe Ünïcödé é e\u0301",
    "👩‍👩‍👧 👍🏽 🇩🇪 ❤️",
    "▁ ▁▁ \uf4a1\uf4a2",
    "a\u200bb \ufeff \u2028",
    "   ",
    "\n\n\t",
)


def sample_texts(count: int = 500) -> list[str]:
    """Every phrase, then texts of phrases and random characters of all scripts."""
    rng = random.Random(0)
    texts = list(PHRASES)
    while len(texts) < count:
        parts = [a_part(rng) for _ in range(rng.randint(1, 6))]
        texts.append(rng.choice(("", " ", "  ")).join(parts))
    return texts[:count]


def a_part(rng: random.Random) -> str:
    """A phrase, a piece of one, or up to ten characters of one script."""
    kind = rng.random()
    if kind < 0.5:
        low, high = rng.choice(list(SCRIPTS.values()))
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 10)))
    phrase = rng.choice(PHRASES)
    return phrase if kind < 0.75 else phrase[: rng.randint(1, len(phrase))]
