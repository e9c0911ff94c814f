"""Augmentation: what each kind of noise does, what it leaves alone, and that it is keyed."""

import dataclasses
import types
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.errors import UserError
from nanolm.finetune.augment import Augmented, leave_out, swap
from nanolm.finetune.config import AugmentConfig
from nanolm.finetune.word_table import WordTable


@dataclasses.dataclass
class Sequence:
    tokens: np.ndarray
    second: int


@dataclasses.dataclass
class Item:
    sequences: list[Sequence]
    target: Any = 1
    extra: Any = None


class Task:
    """As much of a task as augmentation sees: <cls> A <sep> B <sep>."""

    generates, length, has_counterfactual, movable = False, 200, True, True
    options = types.SimpleNamespace(name="classify")

    def __init__(self, tokenizer, first, second=""):
        t = tokenizer
        parts = [[t.cls], t.encode(first), [t.sep]]
        begins = len(parts[1]) + 2
        if second:
            parts += [t.encode(second), [t.sep]]
        self.item = Item([Sequence(np.concatenate(parts).astype(np.int64), begins)])

    def example(self, row, rng, draw):
        return self.item

    def counterfactual_target(self, item):
        return 1 - item.target


def noisy(task, tokenizer, seed=0, **config):
    augmented = Augmented(task, AugmentConfig(**config), tokenizer)
    return augmented.example(None, np.random.default_rng((seed, 0, 3)), None).sequences[0]


FIRST, SECOND = "the parser reads all options", "a value was given twice"


def test_each_kind_of_noise_keeps_the_frame(tokenizer):
    task = Task(tokenizer, FIRST, SECOND)
    clean = task.item.sequences[0]
    before = clean.tokens.copy()
    for config in ({"dropout": 0.5}, {"swap": 0.6}, {"mask": 0.5}):
        found = noisy(task, tokenizer, **config)
        special = tokenizer.special_mask[found.tokens] & (found.tokens != tokenizer.mask)
        assert found.tokens[special].tolist() == [tokenizer.cls, tokenizer.sep, tokenizer.sep]
        assert found.tokens[found.second - 1] == tokenizer.sep
        assert found.tokens.tolist() != before.tolist()
        halves = (found.tokens[: found.second], found.tokens[found.second :])
        for half, original in zip(halves, np.split(before, [clean.second]), strict=True):
            if "dropout" in config:
                assert 2 <= len(half) < len(original)
            elif "swap" in config:
                assert sorted(half) == sorted(original)
            else:
                changed = half != original
                assert len(half) == len(original) and (half[changed] == tokenizer.mask).all()
    assert (clean.tokens == before).all(), "the record itself stays"


def test_noise_is_keyed(tokenizer):
    task, config = Task(tokenizer, FIRST), {"dropout": 0.3, "swap": 0.3, "mask": 0.2}
    same = [noisy(task, tokenizer, seed=1, **config).tokens.tolist() for _ in range(2)]
    assert same[0] == same[1] != noisy(task, tokenizer, seed=2, **config).tokens.tolist()


def test_synonyms_replace_whole_words_and_respect_the_length(tokenizer, tmp_path):
    path = tmp_path / "synonyms.tsv"
    path.write_text("parser\treader\nvalue\titem\tobject\nopt\tnever\nall options\teverything\n")
    task = Task(tokenizer, FIRST, SECOND)
    config = {"synonyms": str(path), "synonym_rate": 0.999}
    found = noisy(task, tokenizer, **config)
    first, second = (tokenizer.decode(half) for half in np.split(found.tokens, [found.second]))
    assert first == "the reader reads everything"
    assert second in ("a item was given twice", "a object was given twice")
    task.length = len(task.item.sequences[0].tokens)
    assert len(noisy(task, tokenizer, **config).tokens) <= task.length
    path.write_text("fine\tgood\nlonely\n")
    with pytest.raises(UserError, match=r"synonyms\.tsv line 2 is not a word and what may take"):
        WordTable.synonyms(str(path), tokenizer)
    with pytest.raises(UserError, match="there is no file"):
        WordTable.synonyms(str(tmp_path / "none"), tokenizer)


def test_an_opposite_turns_the_answer(tokenizer, tmp_path):
    path = tmp_path / "opposites.tsv"
    path.write_text("reads\twrites\nall\tno\nvalue\tnothing\n")
    config = AugmentConfig(opposites=str(path), opposite_rate=0.999)
    task = Task(tokenizer, "All parsers reads", "a value of all")
    candidate = Task(tokenizer, "All parsers reads", "no value").item.sequences[0]
    task.item.sequences.append(candidate)
    seen = set()
    for seed in range(20):
        found = Augmented(task, config, tokenizer).example(None, np.random.default_rng(seed), None)
        assert found.target == 0
        halves = [np.split(s.tokens, [s.second]) for s in found.sequences]
        texts = [[tokenizer.decode(half) for half in pair] for pair in halves]
        assert texts[0][0] == texts[1][0]
        assert [pair[1] for pair in texts] == ["a value of all", "no value"], "as they were"
        seen.add(texts[0][0])
    assert seen == {"No parsers reads", "All parsers writes"}, "one word, and nothing else"
    assert task.item.target == 1, "the record itself stays"

    apart = Task(tokenizer, "All parsers reads")  # the candidates in sequences of their own
    apart.item.sequences += [Task(tokenizer, text).item.sequences[0] for text in ("All", "no")]
    found = Augmented(apart, config, tokenizer).example(None, np.random.default_rng(1), None)
    texts = [tokenizer.decode(s.tokens) for s in found.sequences]
    assert texts[0] in seen and texts[1:] == ["All", "no"] and found.target == 0

    rarely = AugmentConfig(opposites=str(path), opposite_rate=0.25)
    targets = [
        Augmented(task, rarely, tokenizer).example(None, np.random.default_rng(i), None).target
        for i in range(400)
    ]
    assert 60 < targets.count(0) < 140
    task.length = max(len(s.tokens) for s in task.item.sequences) - 1
    assert Augmented(task, config, tokenizer).example(None, np.random.default_rng(0), None).target
    plain = Task(tokenizer, "the parser", "a value")
    before = plain.item.sequences[0].tokens.tolist()
    assert noisy(plain, tokenizer, opposites=str(path)).tokens.tolist() == before
    task.has_counterfactual = False
    with pytest.raises(UserError, match=r"augment\.opposites turns an answer into the other one"):
        Augmented(task, config, tokenizer)


def test_what_cannot_be_augmented_is_refused(tokenizer):
    task = Task(tokenizer, FIRST)
    task.movable = False
    with pytest.raises(UserError, match=r"would move; use augment\.mask"):
        noisy(task, tokenizer, swap=0.1)
    assert len(noisy(task, tokenizer, mask=0.3).tokens) == len(task.item.sequences[0].tokens)
    task.generates = True
    with pytest.raises(UserError, match="augment cannot go with objective=classify"):
        noisy(task, tokenizer, mask=0.1)
    with pytest.raises(UserError, match=r"augment\.swap=1\.0"):
        AugmentConfig(swap=1.0)


@settings(max_examples=50)
@given(st.integers(1, 60), st.floats(0.0, 0.99), st.integers(0, 2**31))
def test_shares(length, share, seed):
    tokens, rng = np.arange(length), np.random.default_rng(seed)
    kept = leave_out(tokens, share, rng)
    assert 1 <= len(kept) <= length and (np.diff(kept) > 0).all()
    swapped = swap(tokens, share, rng)
    assert sorted(swapped) == list(range(length))
    assert ((swapped != tokens).sum() % 2 == 0) and (swapped != tokens).sum() <= length
