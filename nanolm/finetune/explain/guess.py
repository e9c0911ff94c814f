"""A pretrained model's guess at one token, asked as a task is asked.

    decoder   log p(token | text), of the token behind the text
    encoder   log p(token | text), of the token at the first <mask>

`Explainer` wants of a task what stands here: one framed text, what the trunk reads of it, and by
`question_of` a number. There is nothing to train.

Shapes: K copies of the text, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from nanolm.errors import require
from nanolm.finetune.explain.questions import Batch, Question, question_of
from nanolm.finetune.tasks.items import Item, Sequence
from nanolm.inference.generate import Generator
from nanolm.inference.masked import MASK, mask_ids
from nanolm.learner import Learner
from nanolm.model.trunk import Inputs
from nanolm.objectives.base import Objective
from nanolm.ops.masks import Mask
from nanolm.saved import Saved

SHOWN = 5
"""Guesses that are shown with their probabilities."""


class Guess:
    """What a pretrained model believes stands at one place of a text.

    Raises UserError for a text without such a place or without room, and for a model that is
    neither a decoder nor an encoder.
    """

    in_line = False

    def __init__(self, saved: Saved, text: str) -> None:
        self.tokenizer, self.trunk = saved.tokenizer, saved.config.model.trunk
        self.prefix = "prefix" in saved.learner.objective.masks
        require(
            self.trunk in ("decoder", "encoder"),
            f"{saved.folder} holds an {self.trunk}; explain reads the guesses of decoders and "
            f"encoders",
        )
        device = saved.learner.trunk.embedding.weight.device
        if self.trunk == "encoder":
            special = saved.tokenizer.special_mask
            self.forbidden_V = torch.from_numpy(special).to(device)
            ids, before = mask_ids(text, saved), text.split(MASK)[0]
            self.begin = " " if before.endswith(" ") else ""
            self.place, self.where = ids.index(self.tokenizer.mask), f"at the first {MASK}"
        else:
            generator = Generator(saved)
            stem, self.begin = generator.held(text)
            self.forbidden_V = generator.forbidden_at_first(self.begin)
            ids = generator.prompt_ids(stem)
            self.place, self.where = len(ids) - 1, "behind the text"
        limit = saved.config.model.max_length
        require(
            0 < len(ids) <= limit,
            f"the text has {len(ids)} tokens; the model reads 1 to {limit}",
        )
        self.tokens_T = np.array(ids, dtype=np.int64)

    def learner(self, saved: Saved) -> Learner:
        """The saved trunk and heads, asked for this guess."""
        asked = cast(Objective, self)  # of which an explainer asks `inputs` and nothing else
        return Learner(saved.learner.trunk, saved.learner.heads, asked).eval()

    @property
    def item(self) -> Item:
        """The text as an item of its own."""
        return Item(0, [Sequence(self.tokens_T, len(self.tokens_T))], None)

    def collate(self, items: list[Item]) -> dict[str, np.ndarray]:
        """The text once for each item, int64[K, T]."""
        return {"tokens": np.stack([item.sequences[0].tokens for item in items])}

    def inputs(self, batch: Batch) -> Inputs:
        """The rows, as in generation or in filling masks."""
        lengths_K = torch.full_like(batch["tokens"][:, 0], batch["tokens"].shape[1])
        mask = Mask(prefix_lengths=lengths_K) if self.prefix else Mask()
        return Inputs(tokens_BT=batch["tokens"], mask=mask)

    def log_probabilities(self, hidden_KTD: Tensor, heads: nn.ModuleDict) -> Tensor:
        """Of every token that may stand there, as generation and filling masks have it, float32
        [K, V]."""
        logits_KV = heads["lm"](hidden_KTD[:, self.place])[:, : len(self.forbidden_V)].float()
        return logits_KV.masked_fill(self.forbidden_V, -torch.inf).log_softmax(dim=-1)

    def token_of(self, text: str) -> int:
        """The first piece of a word that the user names, with the space that stands before it."""
        require(text != "", "--target is empty; name a word, or leave it out")
        token = int(self.tokenizer.encode(self.begin + text)[0])
        require(
            not self.forbidden_V[token],
            f"--target {text} begins with {self.tokenizer.piece(token)!r}, which cannot stand "
            f"{self.where}; name another word",
        )
        return token

    def prediction(self, log_p_V: Tensor) -> dict[str, Any]:
        """The most probable guesses with their probabilities."""
        values, tokens = log_p_V.exp().topk(min(SHOWN, len(log_p_V)))
        pieces = [self.tokenizer.piece(token) for token in tokens.tolist()]
        return {"guesses": dict(zip(pieces, values.tolist(), strict=True))}


@question_of.register
def _(
    task: Guess, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: Batch, target: str | None
) -> Question:
    log_p_V = task.log_probabilities(hidden_BTD, heads)[0]
    token = int(log_p_V.argmax()) if target is None else task.token_of(target)
    return Question(
        f"log probability of {task.tokenizer.piece(token)!r} {task.where}",
        lambda hidden, heads, batch: task.log_probabilities(hidden, heads)[:, token],
    )
