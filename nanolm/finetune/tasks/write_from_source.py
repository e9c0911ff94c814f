"""Writing with an encoder-decoder: the prompt is the source, and the decoder writes the answer.

    source   the prompt's tokens <eos>          read both ways, once
    targets  the answer's tokens <eos>          written behind a pad, as in pretraining

    loss = - sum over answer tokens log p(y_t | source, y_<t)

Text-to-text: translation, summaries and also classes whose names are written (Raffel et al. 2020,
section 2.4). Of a dialogue every turn of the assistant is an answer, and its source is what was
said before it.

Shapes: B rows, S source tokens, T target tokens, D model width.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from nanolm.config.schema import Config
from nanolm.data.tables.files import Record
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import require
from nanolm.finetune.tasks.items import Item, Sequence
from nanolm.finetune.tasks.write import Write, WriteOptions
from nanolm.model.trunk import Inputs
from nanolm.objectives.base import IGNORED, Term, token_terms
from nanolm.objectives.mlm import padded
from nanolm.objectives.span import shifted_right
from nanolm.ops.masks import Mask
from nanolm.registry import OBJECTIVES


@OBJECTIVES.register_variant("write", "encoder_decoder")
class WriteFromSource(Write):
    """What to write after a source."""

    trunks = ("encoder_decoder",)
    sentinels = np.empty(0, dtype=np.int64)
    """A source has no gaps."""

    def __init__(self, options: WriteOptions, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(options, config, tokenizer)
        most = config.model.max_length
        require(
            options.max_new_tokens <= most,
            f"objective.max_new_tokens={options.max_new_tokens} exceeds the base's "
            f"model.max_length={most}; lower it",
        )
        # Sources stand one a row: a target would not know which of several sources is its own.
        self.packed, self.masks = False, frozenset({"lengths"})

    def prompt_tokens(self, text: str) -> np.ndarray:
        """The source: a prompt and its end. Too long, a dialogue loses its beginning, every other
        prompt its end, since what is to be done is said first."""
        room, ids = self.length - 1, self.encode(text)
        ids = ids[-room:] if self.options.chat else ids[:room]
        return np.append(ids, self.tokenizer.eos).astype(np.int64)

    def pairs(self, record: Record) -> list[tuple[str, str]]:
        """(source, answer) of every answer of the record."""
        found, before = [], ""
        for text, learned in self.pieces(record):
            if learned:
                found.append((before, text))
            before += text
        return found

    def items(self, record: Record, index: int, *, with_gold: bool) -> list[Item]:
        """An item for each answer; `target` int64[T] is the answer with its end."""
        if not with_gold:
            tokens = self.prompt_tokens(self.prompt(record))
            return [Item(index, [Sequence(tokens, len(tokens))], None)]
        made = []
        for prompt, answer in self.pairs(record):
            source, ids = self.prompt_tokens(prompt), self.encode(answer)
            kept = ids[: self.length - 1]
            cut = len(self.encode(prompt)) + 1 - len(source) + len(ids) - len(kept)
            target = np.append(kept, self.tokenizer.eos).astype(np.int64)
            made.append(Item(index, [Sequence(source, len(source))], target, cut))
        return made

    def collate(self, examples: list[Item]) -> dict[str, np.ndarray]:
        """source [B, S] and lengths [B]; with gold also tokens and labels [B, T]: the decoder reads
        the answer one place later, behind a pad."""
        sources = [item.sequences[0].tokens for item in examples]
        lengths_B = np.array([len(ids) for ids in sources], dtype=np.int64)
        pad = self.tokenizer.pad
        batch = {"source": padded(sources, int(lengths_B.max()), pad), "lengths": lengths_B}
        if examples[0].target is None:
            return batch
        targets = [item.target for item in examples]
        labels_BT = padded(targets, max(map(len, targets)), IGNORED)
        return batch | {"tokens": shifted_right(labels_BT, pad), "labels": labels_BT}

    def counts(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """Answer tokens."""
        return {"write": int((batch["labels"] != IGNORED).sum())}

    def inputs(self, batch: dict[str, Tensor]) -> Inputs:
        """The answer so far, and the source with its padding hidden."""
        return Inputs(
            tokens_BT=batch["tokens"],
            source_tokens_BS=batch["source"],
            source_mask=Mask(key_lengths=batch["lengths"]),
        )

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Term]:
        """The loss of the answers, with nll (hence perplexity) and accuracy."""
        hidden_ND, labels_N = hidden_BTD.flatten(0, 1), batch["labels"].flatten()
        return token_terms("write", heads["lm"], hidden_ND, labels_N, self.options)

    def logits(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Logits [N, V] of the answer tokens, for rules that compare probabilities."""
        return {"write": heads["lm"](hidden_BTD[batch["labels"] != IGNORED])}

    def targets_per_token(self, items: list[Item]) -> float:
        """Target tokens to one of a source."""
        targets = sum(len(item.target) for item in items)
        return targets / sum(len(item.sequences[0].tokens) for item in items)
