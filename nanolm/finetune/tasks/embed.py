"""Embeddings: a query lies near what answers it and far from everything else.

    loss = - sum_n log softmax_a(q_n . d_a / tau)[own positive of n]

over the positives and negatives of the whole global batch, gathered over ranks with gradient
(InfoNCE: van den Oord et al. 2018; in-batch negatives: Karpukhin et al. 2020, section 3.2). Query
and documents are read apart by the same trunk (Reimers & Gurevych 2019), so documents can be
embedded once.

Shapes: B rows, T tokens, S sequences, N queries, A documents of all ranks, D model width.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanolm.config.schema import Config
from nanolm.data.tables.files import Record, Table
from nanolm.data.tokenizer import Tokenizer
from nanolm.distributed.gather import gather_with_gradient
from nanolm.errors import require
from nanolm.finetune.tasks import metrics
from nanolm.finetune.tasks.base import Task, TaskOptions
from nanolm.finetune.tasks.heads import Pooling, pooling_of
from nanolm.finetune.tasks.items import Item, text_problem, texts_problem
from nanolm.finetune.tasks.metrics import Metric, Report, higher
from nanolm.model.heads import HeadRequest
from nanolm.objectives.base import Term, length_of
from nanolm.registry import OBJECTIVES

TIE = 1e-6
"""Cosines that are no further apart are equal: float32 gives one text that much in two batches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorOptions(TaskOptions):
    """Options of tasks that compare the vectors of texts read apart."""

    pooling: Pooling = "auto"
    """auto: mean for an encoder, last for a decoder and for two streams; or cls, mean, last."""
    width: int | None = None
    """Width of the vectors; null means model.d_model, without a projection."""


def vector_head(options: VectorOptions, trunk: str) -> HeadRequest:
    """The head that turns a sequence into a unit vector."""
    pooling = pooling_of(options.pooling, trunk)
    return HeadRequest("embedding", {"pooling": pooling, "width": options.width})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedOptions(VectorOptions):
    """A vector for every text."""

    name: str = "embed"
    temperature: float = 0.05
    """Divides the cosine similarities."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"objective.temperature={self.temperature} must be positive")


@OBJECTIVES.register("embed", options=EmbedOptions)
class Embed(Task):
    """Which document belongs to a query, by the nearness of their vectors."""

    options: EmbedOptions
    fields = ("query",)
    gold = ("positive",)
    metric = "mrr"
    term = "embed"
    scope = "global_batch"

    def __init__(self, options: EmbedOptions, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(options, config, tokenizer)
        self.heads = {"embed": vector_head(options, self.trunk)}

    @classmethod
    def metrics(cls, options: EmbedOptions) -> tuple[Metric, ...]:
        """The loss, and how the own positive ranks."""
        return super().metrics(options) + higher("accuracy") + metrics.RANKING

    def check(self, record: Record, *, with_gold: bool) -> str | None:
        """Query, positive and negatives must be texts."""
        problem = text_problem(record, ("query", "positive") if with_gold else ("query",))
        negatives = record.get("negatives") or []
        if problem or not with_gold:
            return problem
        if not isinstance(negatives, (list, tuple)):
            return f"negatives is {negatives!r}, not a list of texts"
        return texts_problem("negatives", negatives)

    def items(self, record: Record, index: int, *, with_gold: bool) -> list[Item]:
        """One item: the query, its positive, its own negatives."""
        texts = [record["query"]]
        if with_gold:
            texts += [record["positive"], *(record.get("negatives") or [])]
        framed = [self.frame(self.encode(text)) for text in texts]
        target = record["positive"] if with_gold else None
        cut = sum(lost for _, lost in framed)
        return [Item(index, [s for s, _ in framed], target, cut, record["query"])]

    def messages_about(self, table: Table, items: list[Item]) -> list[str]:
        """Positives that are different texts and the same tokens, as those that begin alike and are
        cut: nothing can tell them apart."""
        texts: dict[int, set[str]] = {}
        read = [content_of(item.sequences[1].tokens) for item in items]
        for content, item in zip(read, items, strict=True):
            texts.setdefault(content, set()).add(item.target)
        alike = sum(len(texts[content]) > 1 for content in read)
        return [
            f"{alike:,} of {len(items):,} positives are read like another one that is a different "
            f"text, so nothing tells them apart; a greater data.row_length cuts less"
        ] * bool(alike)

    def targets_of(
        self, examples: list[Item], batch: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """query int64[N] and labels int64[N]: the sequences that are queries, and those that are
        their positives; document int64: all that are no queries, with content int64 [., 1], equal
        where they are read alike; pairs int64[N, 2]: the content of a query and of its positive."""
        sizes = [len(item.sequences) for item in examples]
        query = np.cumsum([0, *sizes[:-1]])
        if examples[0].target is None:
            return {"query": query}
        others = np.setdiff1d(np.arange(sum(sizes)), query)
        sequences = [sequence for item in examples for sequence in item.sequences]
        content_S = np.array([content_of(s.tokens) for s in sequences], dtype=np.int64)
        return {
            "query": query,
            "document": others,
            "content": content_S[others, None],
            "pairs": np.stack([content_S[query], content_S[query + 1]], axis=1),
            "labels": np.searchsorted(others, query + 1),
        }

    def counts(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """Queries."""
        return {"embed": len(batch["query"])}

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Term]:
        """InfoNCE over the documents of all ranks; accuracy: the own positive is nearest. Another
        document that is the own positive again is no negative, and neither is the positive of
        another record with the same query.

        Without gradients (evaluation) only this batch's documents compete: `report` gives the loss
        over the whole split.
        """
        vectors_SD = heads["embed"](hidden_BTD, self.layout(batch))
        queries_ND, mine = vectors_SD[batch["query"]], vectors_SD[batch["document"]]
        documents_AD, first = competing(mine, stand_in="stand_in" in batch)
        logits_NA = queries_ND @ documents_AD.T / self.options.temperature
        labels_N = batch["labels"] + first
        content_A1, _ = competing(batch["content"], stand_in="stand_in" in batch)
        pairs_Q2, _ = competing(batch["pairs"], stand_in="stand_in" in batch)
        asked_NQ = batch["pairs"][:, :1] == pairs_Q2[:, 0]
        answers_QA = pairs_Q2[:, 1:] == content_A1.T
        right_NA = asked_NQ.float() @ answers_QA.float() > 0
        logits_NA = logits_NA.masked_fill(right_NA.scatter(1, labels_N[:, None], False), -torch.inf)
        count = length_of(labels_N)
        right = (logits_NA.argmax(dim=-1) == labels_N).float().sum()
        loss = F.cross_entropy(logits_NA, labels_N, reduction="sum")
        return {"embed": Term(loss, count), "accuracy": Term(right, count)}

    def answers(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> list[Any]:
        """[query vector] of each item, and behind it the positive's when there is one."""
        vectors_SD = heads["embed"](hidden_BTD, self.layout(batch))
        columns = [vectors_SD[batch["query"]].tolist()]
        if "labels" in batch:
            columns.append(vectors_SD[batch["document"]][batch["labels"]].tolist())
        return [list(row) for row in zip(*columns, strict=True)]

    def predictions(
        self, table: Table, items: list[Item], answers: list[Any]
    ) -> list[dict[str, Any]]:
        """The embedding; with gold instead the positive's rank (from 1) among all positives of the
        split, equal texts counted once and other positives of the same query not at all, its
        similarity, and the InfoNCE loss."""
        if items[0].target is None:
            return [{"embedding": vectors[0]} for vectors in answers]
        texts = [item.target for item in items]
        kept = {text: i for i, text in reversed(list(enumerate(texts)))}
        own_N = np.searchsorted(np.sort(list(kept.values())), [kept[text] for text in texts])
        vectors = np.array(answers, dtype=np.float32)
        documents_AD = vectors[np.sort(list(kept.values())), 1]
        similarity_NA = vectors[:, 0] @ documents_AD.T
        mine_N = similarity_NA[np.arange(len(texts)), own_N]
        for i, others in enumerate(also_right([item.extra for item in items], own_N.tolist())):
            similarity_NA[i, others] = -np.inf
        # Its own document is among those that are as near. One more that is as near is a tie, and a
        # tie is no hit: a model that tells nothing apart finds nothing.
        ranks_N = (similarity_NA >= mine_N[:, None] - TIE).sum(axis=1)
        logits_NA = similarity_NA.astype(np.float64) / self.options.temperature
        top_N = logits_NA.max(axis=1)
        total_N = top_N + np.log(np.exp(logits_NA - top_N[:, None]).sum(axis=1))
        losses_N = total_N - mine_N / self.options.temperature
        rows = zip(ranks_N.tolist(), mine_N.tolist(), losses_N.tolist(), strict=True)
        return [{"rank": r, "similarity": s, "loss": loss} for r, s, loss in rows]

    def report(self, table: Table, predictions: list[dict[str, Any]]) -> Report:
        """MRR and recall@k over the split's own documents."""
        ranks = [prediction["rank"] for prediction in predictions]
        loss = float(np.mean([prediction["loss"] for prediction in predictions]))
        right = float(np.mean([rank == 1 for rank in ranks]))
        figures = {"loss": loss, "embed": loss, "accuracy": right}
        return Report(figures | metrics.ranking(ranks))


def also_right(queries: list[str | None], own: list[int]) -> list[list[int]]:
    """For each query the positives of others that ask the same, but its own; none of an unknown
    one (None)."""
    found: dict[str, set[int]] = {}
    for query, positive in zip(queries, own, strict=True):
        if query is not None:
            found.setdefault(query, set()).add(positive)
    return [
        [] if query is None else sorted(found[query] - {positive})
        for query, positive in zip(queries, own, strict=True)
    ]


def content_of(tokens: np.ndarray) -> int:
    """A number that sequences share when their tokens are the same."""
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def competing(mine_ND: Tensor, *, stand_in: bool) -> tuple[Tensor, int]:
    """(documents that compete [A, D], where this rank's begin). Collective, but for evaluation.

    Those of a `stand_in` (`multi.py`) count for nothing: no other rank sees them.
    """
    if not torch.is_grad_enabled():
        return mine_ND, 0
    if not stand_in:
        return gather_with_gradient(mine_ND)
    others_AD, _ = gather_with_gradient(mine_ND[:0])
    return torch.cat([others_AD, mine_ND]), len(others_AD)
