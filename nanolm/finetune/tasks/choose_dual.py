"""Multiple choice by nearness: question and candidates are read apart, and the nearest wins.

    score(c) = cos(h(question), h(candidate)) / tau        (the bi-encoder of Humeau et al. 2020)

`choose` reads every candidate together with its question, so its trunk must find out by itself how
the two belong together; here they meet in a product. A question is read once, whatever the number
of candidates.

Shapes: B rows, T tokens, S sequences (a question and its candidates), N questions, A candidates,
D width of the vectors.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor, nn

from nanolm.data.tables.files import Record
from nanolm.errors import require
from nanolm.finetune.tasks.choose import Choose
from nanolm.finetune.tasks.embed import VectorOptions, vector_head
from nanolm.finetune.tasks.items import Item
from nanolm.model.heads import HeadRequest
from nanolm.registry import OBJECTIVES


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChooseDualOptions(VectorOptions):
    """The candidate that lies nearest to the question."""

    name: str = "choose_dual"
    temperature: float = 0.1
    """Divides the cosine similarities."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"objective.temperature={self.temperature} must be positive")


@OBJECTIVES.register("choose_dual", options=ChooseDualOptions)
class ChooseDual(Choose):
    """Which candidate lies nearest."""

    options: ChooseDualOptions

    def requests(self, options: ChooseDualOptions) -> dict[str, HeadRequest]:
        """The head that `embed` has."""
        return {"choose": vector_head(options, self.trunk)}

    def items(self, record: Record, index: int, *, with_gold: bool) -> list[Item]:
        """One item: the question, and behind it its candidates."""
        texts = [record["question"], *record["choices"]]
        framed = [self.frame(self.encode(text)) for text in texts]
        target = self.right(record) if with_gold else None
        return [Item(index, [s for s, _ in framed], target, sum(cut for _, cut in framed))]

    def n_candidates(self, item: Item) -> int:
        """All sequences but the question."""
        return len(item.sequences) - 1

    def targets_of(
        self, examples: list[Item], batch: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """As `choose`, and which sequences are what: question int64[N], candidate int64[A]."""
        sizes = np.array([len(item.sequences) for item in examples])
        question = np.cumsum(sizes) - sizes
        candidate = np.setdiff1d(np.arange(sizes.sum()), question)
        found = super().targets_of(examples, batch)
        return found | {"question": question, "candidate": candidate}

    def logits(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The candidates' scores, [N, C], -inf where a question has fewer."""
        vectors_SD = heads["choose"](hidden_BTD, self.layout(batch))
        questions_AD = vectors_SD[batch["question"]][batch["item"]]
        cosines_A = (vectors_SD[batch["candidate"]] * questions_AD).sum(dim=-1)
        scores_A = cosines_A / self.options.temperature
        return {"choose": self.rectangle(scores_A, batch)}
