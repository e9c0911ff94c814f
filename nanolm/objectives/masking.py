"""Which tokens of a row are masked, and what stands there instead. Pure functions of a generator.

BERT's recipe (Devlin et al. 2019, section 3.1) with exact counts: of a row's n maskable tokens (no
specials, no padding) exactly max(1, round(p n)) are selected; of these 80 % become <mask>, 10 % a
random token, 10 % stay. Selection is by token, by whole word, or by spans of words whose lengths
are geometric (Joshi et al. 2020, section 3.1, who draw one of the three fates for a whole span;
here every token draws its own); words are never split, so the last two select at most that many
tokens. A row whose every word is longer than that (one long number, a short title) has its tokens
selected singly: no row goes untrained.

Shapes: T tokens of one row, n maskable tokens, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from nanolm.data.tokenizer import Tokenizer


def budget(n_maskable: int, rate: float) -> int:
    """How many tokens of n maskable ones to select: max(1, round(rate n)), 0 of 0."""
    # An exact number, not a coin for each token: rows then cost and teach the same, and no short
    # row goes without a target.
    return min(n_maskable, max(1, round(rate * n_maskable)))


def select_tokens(
    tokens_T: np.ndarray, tokenizer: Tokenizer, rate: float, rng: np.random.Generator
) -> np.ndarray:
    """Sorted int64 indices of single tokens, drawn without replacement."""
    maskable = np.flatnonzero(~tokenizer.special_mask[tokens_T])
    chosen = rng.permutation(len(maskable))[: budget(len(maskable), rate)]
    return np.sort(maskable[chosen])


def words(tokens_T: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(starts, stops): int64 bounds of the words among the maskable tokens, in order.

    Token i continues the word of token i - 1 when SentencePiece put no word boundary between them:
    it does not begin with the space marker, and letters or digits meet where they touch.
    """
    special = tokenizer.special_mask[tokens_T]
    continues = np.zeros(len(tokens_T) + 1, dtype=bool)
    continues[1:-1] = tokenizer.joins_right[tokens_T[:-1]] & tokenizer.joins_left[tokens_T[1:]]
    continues[1:-1] &= ~special[:-1] & ~special[1:]
    starts = np.flatnonzero(~continues[:-1] & ~special)
    stops = np.flatnonzero(~continues[1:] & ~special) + 1
    return starts, stops


def select_words(
    tokens_T: np.ndarray, tokenizer: Tokenizer, rate: float, rng: np.random.Generator
) -> np.ndarray:
    """Sorted indices of whole words, in random order, as many as fit into the budget."""
    starts, stops = words(tokens_T, tokenizer)
    left = budget(int((stops - starts).sum()), rate)
    chosen = []
    for word in rng.permutation(len(starts)):
        size = stops[word] - starts[word]
        # A word that is too long for what is left is passed over and not cut: half of a word gives
        # the other half away.
        if size <= left:
            chosen.append(np.arange(starts[word], stops[word]))
            left -= size
        if left == 0:
            break
    return (
        np.sort(np.concatenate(chosen)) if chosen else select_tokens(tokens_T, tokenizer, rate, rng)
    )


def select_spans(
    tokens_T: np.ndarray,
    tokenizer: Tokenizer,
    rate: float,
    rng: np.random.Generator,
    *,
    stop_probability: float = 0.2,
    longest: int = 10,
) -> np.ndarray:
    """Sorted indices of spans of consecutive words, lengths ~ Geometric(0.2) cut at 10 words.

    Each word is tried once as the start of a span, in random order; a span ends early at a special
    token, at a word that is already selected, or where the budget ends.
    """
    starts, stops = words(tokens_T, tokenizer)
    left = budget(int((stops - starts).sum()), rate)
    taken = np.zeros(len(tokens_T), dtype=bool)
    # Geometric: short spans are most frequent. A draw above 10 counts as 10, which gives a mean of
    # 4.5 words; SpanBERT's 3.8 is the mean when such a draw is repeated. What a span meets (a taken
    # word, the end of the budget) makes it shorter still.
    lengths = np.minimum(rng.geometric(stop_probability, size=len(starts)), longest)
    for first, length in zip(rng.permutation(len(starts)), lengths, strict=True):
        for word in range(first, min(first + length, len(starts))):
            apart = word > first and starts[word] != stops[word - 1]
            size = stops[word] - starts[word]
            if apart or taken[starts[word]] or size > left:
                break
            taken[starts[word] : stops[word]] = True
            left -= size
        if left == 0:
            break
    return np.flatnonzero(taken) if taken.any() else select_tokens(tokens_T, tokenizer, rate, rng)


def corrupt(
    tokens_T: np.ndarray,
    selected: np.ndarray,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    *,
    mask_share: float = 0.8,
    random_share: float = 0.1,
) -> np.ndarray:
    """A copy of the row with 80 % of the selected tokens masked, 10 % random, 10 % as they were.

    Random tokens are drawn from the ordinary pieces of the vocabulary, never from the specials.
    """
    ordinary = np.flatnonzero(~tokenizer.special_mask)
    # Not all become <mask>: that token never occurs in a downstream text, and a model that saw it
    # at each target could leave the states of real tokens unused. A random token keeps it from
    # trusting what it reads; a token that stays, from always changing it.
    fate = rng.random(len(selected))
    # Drawn for all selected tokens, used for one in ten: the generator then takes the same number
    # of draws whatever the fates are.
    random_tokens = ordinary[rng.integers(0, len(ordinary), size=len(selected))]
    kept = tokens_T[selected]
    corrupted = tokens_T.copy()
    corrupted[selected] = np.where(
        fate < mask_share,
        tokenizer.mask,
        np.where(fate < mask_share + random_share, random_tokens, kept),
    )
    return corrupted


SELECTORS = {"token": select_tokens, "word": select_words, "span": select_spans}
