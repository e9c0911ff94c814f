"""Which tokens are masked and what replaces them: exact counts, distributions, whole words.

The statistical tests allow five standard deviations: a right implementation fails one in a million
times, and the generators are fixed, so it fails never or always.
"""

import math
import pathlib
import re
import sysconfig
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.data.prepare.tokenizer_training import train_tokenizer
from nanolm.data.tokenizer import Tokenizer
from nanolm.objectives.masking import SELECTORS, budget, corrupt, select_spans, words


@pytest.fixture(scope="module")
def text_ids(tokenizer):
    """Ids of Python source, with an end-of-document after every 200 tokens."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    ids = tokenizer.encode((library / "configparser.py").read_text(encoding="utf-8"))
    ids = ids[: len(ids) // 200 * 200].astype(np.int64).reshape(-1, 200)
    return np.concatenate([ids, np.full((len(ids), 1), tokenizer.eos)], axis=1)


@given(n=st.integers(0, 3000), rate=st.floats(0.001, 0.999))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_budget(n, rate):
    assert budget(n, rate) == (0 if n == 0 else max(1, round(rate * n)))


@pytest.mark.parametrize("unit", SELECTORS)
@pytest.mark.parametrize("rate", [0.02, 0.15, 0.4])
def test_exact_counts_without_specials(tokenizer, text_ids, unit, rate):
    spared = 0
    for number, row in enumerate(text_ids):
        row = row[number % 50 : 60 + 3 * (number % 50)]
        row = np.concatenate([[tokenizer.cls], row, [tokenizer.sep], [tokenizer.pad] * 5])
        chosen = SELECTORS[unit](row, tokenizer, rate, np.random.default_rng(number))
        allowed = budget(np.count_nonzero(~tokenizer.special_mask[row]), rate)
        assert not tokenizer.special_mask[row[chosen]].any()
        assert np.array_equal(chosen, np.unique(chosen))
        assert len(chosen) == allowed if unit == "token" else len(chosen) <= allowed
        spared += allowed - len(chosen)
    if rate > 0.1:  # words are short, so a budget of several tokens is nearly always used up
        assert spared <= 0.05 * len(text_ids) * rate * 60


def test_token_selection_is_uniform(tokenizer, text_ids):
    row, n_draws, rate = text_ids[0], 4000, 0.15
    counts = np.zeros(len(row))
    for number in range(n_draws):
        counts[SELECTORS["token"](row, tokenizer, rate, np.random.default_rng((1, number)))] += 1
    share = budget(200, rate) / 200
    deviation = math.sqrt(n_draws * share * (1 - share))
    assert counts[-1] == 0  # the end of the document
    assert np.abs(counts[:-1] - n_draws * share).max() < 5 * deviation


def test_eighty_ten_ten(tokenizer, text_ids):
    n = masked = changed = 0
    random_tokens = []
    for number in range(30):
        for row in text_ids:
            rng = np.random.default_rng((2, number, int(row[0])))
            chosen = SELECTORS["token"](row, tokenizer, 0.15, rng)
            corrupted = corrupt(row, chosen, tokenizer, rng)
            untouched = np.setdiff1d(np.arange(len(row)), chosen)
            assert np.array_equal(corrupted[untouched], row[untouched])
            hidden = corrupted[chosen] == tokenizer.mask
            other = ~hidden & (corrupted[chosen] != row[chosen])
            n, masked, changed = n + len(chosen), masked + hidden.sum(), changed + other.sum()
            random_tokens.append(corrupted[chosen][other])
    ordinary = np.count_nonzero(~tokenizer.special_mask)
    assert n > 25_000
    for count, share in ((masked, 0.8), (changed, 0.1 * (1 - 1 / ordinary))):
        assert abs(count - n * share) < 5 * math.sqrt(n * share * (1 - share))
    random_tokens = np.concatenate(random_tokens)
    assert not tokenizer.special_mask[random_tokens].any()
    assert len(np.unique(random_tokens)) > 0.95 * ordinary  # the whole vocabulary is drawn from


def test_shares_are_options(tokenizer, text_ids):
    chosen = np.arange(0, 200, 3)
    rng = np.random.default_rng(0)
    all_masked = corrupt(text_ids[0], chosen, tokenizer, rng, mask_share=1.0, random_share=0.0)
    assert (all_masked[chosen] == tokenizer.mask).all()
    kept = corrupt(text_ids[0], chosen, tokenizer, rng, mask_share=0.0, random_share=0.0)
    assert np.array_equal(kept, text_ids[0])


def spelled_words(tokenizer, row):
    """For each word as a reader sees it, the indices of the tokens that spell it."""
    spans, begin = [], 0
    texts = [tokenizer.decode([token]) for token in row]
    for text in texts:
        spans.append((begin, begin + len(text)))
        begin += len(text)
    for match in re.finditer(r"[^\W_]+", "".join(texts)):
        first, last = match.span()
        yield [i for i, (start, stop) in enumerate(spans) if start < last and stop > first]


@pytest.mark.parametrize("unit", ["word", "span"])
def test_words_are_never_split(tokenizer, text_ids, unit):
    split_by_tokens = 0
    for number, row in enumerate(text_ids[:60]):
        rng = np.random.default_rng(number)
        chosen = set(SELECTORS[unit](row, tokenizer, 0.3, rng).tolist())
        by_token = set(SELECTORS["token"](row, tokenizer, 0.3, rng).tolist())
        for spelled in spelled_words(tokenizer, row[:-1]):
            assert len(chosen.intersection(spelled)) in (0, len(spelled))
            split_by_tokens += len(by_token.intersection(spelled)) not in (0, len(spelled))
    assert split_by_tokens > 50  # the test would see it


def test_words_tile_the_maskable_tokens(tokenizer, text_ids):
    row = np.concatenate([[tokenizer.cls], text_ids[0], [tokenizer.sep]])
    starts, stops = words(row, tokenizer)
    covered = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
    assert np.array_equal(covered, np.flatnonzero(~tokenizer.special_mask[row]))
    assert (stops > starts).all()


def test_spans_have_geometric_lengths(tokenizer):
    """With a budget that never binds, mean word count of a span is that of min(Geometric, 10)."""
    word = tokenizer.encode(" a")
    row = np.tile(word, 400).astype(np.int64)
    n_words, runs, lengths = 0, 0, []
    for number in range(400):
        chosen = select_spans(row, tokenizer, 0.02, np.random.default_rng(number))
        pieces = np.split(chosen, np.flatnonzero(np.diff(chosen) > 1) + 1)
        first = [len(piece) / len(word) for piece in pieces]
        lengths += first
        n_words, runs = n_words + len(chosen) / len(word), runs + len(pieces)
    # The 8 words of the budget cut the last span, so runs are a little shorter than 4.46 words.
    assert 2.0 < n_words / runs < 4.46
    assert max(lengths) <= 8


def test_a_row_of_specials_has_nothing_to_mask(tokenizer):
    row = np.array([tokenizer.cls, tokenizer.sep, tokenizer.pad])
    for select in SELECTORS.values():
        assert len(select(row, tokenizer, 0.15, np.random.default_rng(0))) == 0


@pytest.mark.parametrize("unit", ["word", "span"])
def test_a_row_without_a_word_that_fits_is_masked_by_token(tokenizer, unit):
    row = tokenizer.encode("7")[-1:].repeat(50).astype(np.int64)  # one long number
    assert len(words(row, tokenizer)[0]) == 1
    chosen = SELECTORS[unit](row, tokenizer, 0.2, np.random.default_rng(0))
    assert len(chosen) == 10


def test_characters_spelt_in_bytes_are_words_by_script(tokenizer):
    text = "天地玄黃，宇宙洪荒" * 4  # none of these is in the vocabulary: 3 byte pieces each
    row = tokenizer.encode(text).astype(np.int64)
    starts, stops = words(row, tokenizer)
    spelt = [tokenizer.decode(row[a:b]) for a, b in zip(starts, stops, strict=True)]
    assert [word for word in spelt if word.strip()] == list(text)
    assert "straße" in [
        tokenizer.decode(row[a:b]).strip()
        for row in [tokenizer.encode("die straße da").astype(np.int64)]
        for a, b in zip(*words(row, tokenizer), strict=True)
    ]


UNSPACED = {
    "Thai": "ภาษาไทยเป็นภาษาที่มีระดับเสียงของคำแน่นอนหรือวรรณยุกต์",
    "Lao": "ພາສາລາວເປັນພາສາທາງການຂອງປະເທດລາວ",
    "Khmer": "ភាសាខ្មែរជាភាសាកំណើតរបស់ជនជាតិខ្មែរ",
    "Burmese": "မြန်မာဘာသာစကားသည်မြန်မာနိုင်ငံ၏ရုံးသုံးဘာသာစကားဖြစ်သည်",
    "Chinese": "秦川雄帝宅函谷壯皇居綺殿千尋起離宮百雉餘",
    "Japanese": "いろはにほへとちりぬるを我が世誰ぞ常ならむ",
}


@pytest.mark.parametrize("script", UNSPACED)
def test_scripts_without_spaces_have_units_of_a_letter(script):
    """No unit is longer than a piece and the marks of its last letter; no letter loses a mark."""
    text = UNSPACED[script]
    model = train_tokenizer([text] * 9, vocab_size=298 + len(set(text)), kind="bpe")
    tokenizer = Tokenizer(model)
    tokens = tokenizer.encode(text)
    starts, stops = words(tokens, tokenizer)
    assert stops[-1] == len(tokens) and len(starts) > 0.4 * len(tokens)
    units = [tokenizer.decode(tokens[a:b]) for a, b in zip(starts, stops, strict=True)]
    assert "".join(units) == text
    for unit in units:
        assert unicodedata.category(unit[0])[0] != "M" and len(unit) < 12
