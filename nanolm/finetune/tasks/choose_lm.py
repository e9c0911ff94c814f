"""Multiple choice by the language model: which candidate is likelier behind the question?

    score(c) = 1/n sum_i log p(c_i | question, and for a decoder c_1 … c_{i-1})

A decoder reads the candidate and predicts each of its tokens (Brown et al. 2020, section 2.4, with
their division by length); an encoder reads <mask> in the place of every one of them (Salazar et al.
2020, "Masked language model scoring", all of them masked at once). There are no new parameters:
train.steps=0 is zero-shot, and fine-tuning is that of `choose`, a softmax over the scores.

Shapes: B rows, T tokens, S sequences (one per candidate), K candidate tokens, D model width.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from nanolm.config.schema import Config
from nanolm.data.tables.files import Record
from nanolm.data.tokenizer import Tokenizer
from nanolm.data.words import UNSPACED
from nanolm.finetune.tasks.base import TaskOptions
from nanolm.finetune.tasks.choose import Choose
from nanolm.finetune.tasks.heads import group_sizes, group_sums
from nanolm.finetune.tasks.items import Item, Sequence
from nanolm.finetune.tasks.prompt import require_vocabulary, vocabulary_head
from nanolm.finetune.tasks.ragged import within
from nanolm.model.heads import HeadRequest
from nanolm.registry import OBJECTIVES


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChooseLmOptions(TaskOptions):
    """The candidate that the language model finds likelier."""

    name: str = "choose_lm"
    by_length: bool = True
    """Divide a candidate's log probability by its number of tokens."""
    transform: bool | None = None
    """Whether the vocabulary head has a transform (objective.transform of the base); null: an
    encoder's has, a decoder's has not."""


@OBJECTIVES.register("choose_lm", options=ChooseLmOptions)
class ChooseLm(Choose):
    """Which candidate is likelier."""

    options: ChooseLmOptions
    reads_source = False
    trunks = ("encoder", "decoder")  # whose vocabulary head reads a place from the place itself

    def __init__(self, options: ChooseLmOptions, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(options, config, tokenizer)
        self.longest = self.length // 2
        # An encoder reads masks in a candidate's place, which noise leaves alone; a decoder reads
        # the candidate itself.
        self.movable = self.trunk == "encoder"

    def requests(self, options: ChooseLmOptions) -> dict[str, HeadRequest]:
        """The base's own vocabulary head."""
        return {"lm": vocabulary_head(options.transform, self.trunk)}

    def require_heads(self, fresh: list[str], base: str) -> None:
        """The vocabulary head must come from the base."""
        require_vocabulary(fresh, base)

    def items(self, record: Record, index: int, *, with_gold: bool) -> list[Item]:
        """One item with a sequence per candidate; `extra` holds the candidates' token ids. The end
        of a long candidate is cut, and so much of the question's beginning that the rest fits."""
        whole = self.encode(record["question"].rstrip())
        spelled = [self.encode(joined(text)) for text in record["choices"]]
        candidates = [ids[: self.longest] for ids in spelled]
        room = self.length - 2 - max(map(len, candidates))
        question = whole[max(0, len(whole) - room) :]
        cut = len(whole) - len(question)
        cut += sum(len(ids) - len(kept) for ids, kept in zip(spelled, candidates, strict=True))
        target = self.right(record) if with_gold else None
        sequences = [self.continued(question, ids) for ids in candidates]
        return [Item(index, sequences, target, cut, candidates)]

    def continued(self, question: np.ndarray, candidate: np.ndarray) -> Sequence:
        """<cls> question <mask> … <sep> for an encoder, <eos> question candidate for a decoder.
        The second segment is the candidate's."""
        t = self.tokenizer
        if self.trunk == "encoder":
            parts: list[ArrayLike] = [[t.cls], question, np.full(len(candidate), t.mask), [t.sep]]
        else:
            parts = [[t.eos], question, candidate]
        return Sequence(np.concatenate(parts).astype(np.int64), len(question) + 1)

    def targets_of(
        self, examples: list[Item], batch: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """As `choose`, and token int64[K], its sequence `of` int64[K], and int64[K] the flat
        `place` whose state predicts it: the mask's own, or the token's before."""
        candidates = [ids for item in examples for ids in item.extra]
        sizes_S = np.array([len(ids) for ids in candidates], dtype=np.int64)
        # Counted from the sequence's end, since noise may change the question's length. The state
        # at place `last - 1` is the last mask's, and predicts what a decoder reads at `last`.
        place_K = np.repeat(batch["last"] - sizes_S, sizes_S) + within(sizes_S)
        return super().targets_of(examples, batch) | {
            "token": np.concatenate(candidates).astype(np.int64),
            "of": np.repeat(np.arange(len(candidates)), sizes_S),
            "place": place_K,
        }

    def logits(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The candidates' scores, [N, C], -inf where a question has fewer."""
        logits_KV = heads["lm"](hidden_BTD.flatten(0, 1)[batch["place"]]).float()
        nll_K = F.cross_entropy(logits_KV, batch["token"], reduction="none")
        n_sequences = len(batch["choice"])
        scores_S = group_sums(-nll_K, batch["of"], n_sequences)
        if self.options.by_length:
            scores_S = scores_S / group_sizes(batch["of"], n_sequences)
        return {"choose": self.rectangle(scores_S, batch)}


def joined(candidate: str) -> str:
    """A candidate as it continues a text: behind a space, unless its script has none."""
    text = candidate.strip()
    return text if UNSPACED.match(text) else f" {text}"
