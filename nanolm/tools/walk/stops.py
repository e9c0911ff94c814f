"""What is told at each stop of the walk: a sentence, perhaps a table, and the functions that did
it.

    text -> pieces -> ids -> shifted or masked -> x -> q, k, v -> scores -> hidden -> logits
    -> loss -> gradient -> step
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanolm.data.tokenizer import Tokenizer
from nanolm.ops.reference import ReferenceAttention
from nanolm.tools.walk.place import place_of
from nanolm.tools.walk.questions import Question, Reader
from nanolm.tools.walk.recording import Attention, Prediction, Recording
from nanolm.tools.walk.stop import Column, Stop, beginning, printable, shortened, shown, spaced
from nanolm.training.batch import MicroBatch
from nanolm.training.gradient import total_loss
from nanolm.training.loader import micro_batch_of
from nanolm.training.trainer import Trainer

AROUND = 5
"""Tokens of a row that are shown on each side of the position that is looked at."""
KEYS, HIDDEN_KEYS, CHOICES = 6, 2, 5
"""Rows of the tables: keys that weigh most, hidden keys, most likely tokens."""
LETTERS = (
    "One row of the run's own data on its way through one step. Names and shapes: B rows, T tokens "
    "(queries), S tokens as keys, D model width, H query heads, G key/value heads, K width of a "
    "head, V vocabulary; ▁ is a space."
)
"""What a reader must know before the first stop."""


def stops(
    trainer: Trainer,
    tokenizer: Tokenizer,
    reader: Reader,
    micro_batches: Sequence[MicroBatch],
    question: Question,
    found: Recording,
    *,
    layer: int,
    head: int,
) -> list[Stop]:
    """The whole walk, in order."""
    batch = micro_batches[0]
    raw, ids = reader.raw(batch), batch.tensors["tokens"][0].tolist()
    learner = trainer.engine.learner
    assert found.attention is not None and found.prediction is not None
    return [
        *of_text(tokenizer, raw, batch),
        of_change(tokenizer, reader, learner, batch, question),
        of_embedding(learner, found),
        *of_attention(tokenizer, learner, ids, found.attention, question, layer, head),
        of_hidden(learner, layer, found),
        of_logits(tokenizer, learner, found.prediction),
        of_loss(trainer, tokenizer, micro_batches, found),
        *of_update(trainer, found),
    ]


def of_text(tokenizer: Tokenizer, raw: list[int], batch: MicroBatch) -> list[Stop]:
    """The row as text, as pieces and as the numbers that the shards hold."""
    text = tokenizer.decode(raw, specials=True)
    pieces = [tokenizer.piece(index) for index in raw]
    row, loader = int(batch.row_ids[0]), (place_of(micro_batch_of),)
    return [
        Stop(
            name="text",
            says=f"{shortened(spaced(text), 200)}   ({len(text)} characters; row {row} of the "
            f"data, whose rows are cut every so many tokens, also within a word)",
            places=(place_of(Tokenizer.decode),),
            figures={"text": text, "row": row},
        ),
        Stop(
            name="pieces",
            says=f"{beginning(map(printable, pieces))}   ({len(pieces)} pieces)",
            places=(place_of(Tokenizer.piece),),
            figures={"pieces": pieces},
        ),
        Stop(
            name="ids",
            says=f"{beginning(map(str, raw))}   (of {tokenizer.vocab_size:,})",
            places=loader,
            figures={"ids": raw},
        ),
    ]


def of_change(
    tokenizer: Tokenizer, reader: Reader, learner: Any, batch: MicroBatch, question: Question
) -> Stop:
    """What the model reads, and what it is asked for."""
    at, ids = question.position, batch.tensors["tokens"][0].tolist()
    answers = reader.answers(batch)
    rows = tuple(
        (
            str(t),
            printable(tokenizer.piece(ids[t])),
            printable(tokenizer.piece(answers[t])) if t in answers else "",
        )
        for t in range(max(at - AROUND, 0), min(at + AROUND + 1, len(ids)))
    )
    return Stop(
        name=reader.changed,
        says=f"{len(answers)} of {len(ids)} positions are asked for a token; followed from here on "
        f"is position {at}, where {shown(tokenizer, question.target)} is right",
        places=(reader.maker(learner.objective),),
        columns=(
            Column(title="position"),
            Column(title="model reads", number=False),
            Column(title="is asked for", number=False),
        ),
        rows=rows,
        figures={"position": at, "target": question.target, "reads": ids},
    )


def of_embedding(learner: Any, found: Recording) -> Stop:
    """The vectors that the first block gets."""
    x_BTD, trunk = found.x_BTD, learner.trunk
    assert x_BTD is not None
    return Stop(
        name="x",
        says=f"{shape(x_BTD)} = [B, T, D]: a row of the embedding for each token"
        f"{vector(x_BTD[0, 0])}",
        places=(place_of(trunk.embed), place_of(trunk.positions.embed)),
        figures={"shape": list(x_BTD.shape)},
    )


def shape(x: Tensor) -> str:
    """[16, 128, 192]."""
    return str(list(x.shape))


def vector(x: Tensor) -> str:
    """The beginning of a vector."""
    return "; the first begins " + " ".join(f"{value:.3f}" for value in x[:4].tolist())


def of_attention(
    tokenizer: Tokenizer,
    learner: Any,
    ids: list[int],
    seen: Attention,
    question: Question,
    layer: int,
    head: int,
) -> list[Stop]:
    """Queries, keys and values, and what one query makes of the keys."""
    attention = learner.trunk.blocks[layer].attention
    rotate = learner.trunk.positions.rotate
    names = {"q": "[B, T, H, K]", "k": "[B, S, G, K]", "v": "[B, S, G, K]"}
    shapes = ", ".join(f"{name} {seen.shapes[name]} = {names[name]}" for name in names)
    weights = seen.weights_S.tolist()
    scores, after = seen.scores_S.tolist(), seen.hidden_S.tolist()
    kept = [s for s, score in enumerate(after) if score != -math.inf]
    hidden = [s for s, score in enumerate(after) if score == -math.inf]
    chosen = sorted(kept, key=lambda s: -weights[s])[:KEYS]
    chosen += sorted(hidden, key=lambda s: -scores[s])[:HIDDEN_KEYS]
    rows = tuple(
        (
            str(s),
            printable(tokenizer.piece(ids[s])),
            f"{scores[s]:.3f}",
            f"{after[s]:.3f}",
            f"{weights[s]:.4f}",
        )
        for s in sorted(chosen)
    )
    bias = " + bias" if learner.trunk.positions.bias_kind else ""
    drop = f"; then {seen.dropout:.0%} of the weights are dropped" if seen.dropout else ""
    return [
        Stop(
            name="q, k, v",
            says=f"layer {layer}: {shapes}",
            places=(place_of(attention.project), place_of(rotate)),
            figures={"shapes": seen.shapes},
        ),
        Stop(
            name="scores",
            says=f"layer {layer}, head {head}, the query at position {question.position}: score = "
            f"q·k × {attention.attend.keywords['scale']:.4g}{bias}; it sees {len(kept)} of "
            f"{len(after)} keys{drop}. These weights, times v, differ from the kernel's answer by "
            f"at most {seen.difference:.1e}",
            places=(place_of(attention.attend), place_of(ReferenceAttention.weights)),
            columns=(
                Column(title="key"),
                Column(title="piece", number=False),
                Column(title="score"),
                Column(title="after mask"),
                Column(title="softmax"),
            ),
            rows=rows,
            figures={
                "scores": scores,
                "masked": [None if score == -math.inf else score for score in after],
                "weights": weights,
                "difference": seen.difference,
            },
        ),
    ]


def of_hidden(learner: Any, layer: int, found: Recording) -> Stop:
    """What the trunk returns."""
    hidden_BTD, trunk = found.hidden_BTD, learner.trunk
    assert hidden_BTD is not None
    depth = sum(stack.n_layers for stack in trunk.stacks)
    return Stop(
        name="hidden",
        says=f"{shape(hidden_BTD)} = [B, T, D] after {depth} blocks, each attention "
        f"and feed-forward with its norm and residual sum",
        places=(place_of(trunk.forward), place_of(trunk.blocks[layer].compute)),
        figures={"shape": list(hidden_BTD.shape)},
    )


def of_logits(tokenizer: Tokenizer, learner: Any, said: Prediction) -> Stop:
    """The most likely tokens, and the right one's place among them."""
    share_V = torch.softmax(said.logits_V.double(), dim=-1)
    order = share_V.argsort(descending=True)
    rank = int((order == said.target).nonzero()) + 1
    best = order[:CHOICES].tolist()
    rows = tuple(
        (
            str(place),
            printable(tokenizer.piece(index)) if index < tokenizer.vocab_size else f"({index})",
            f"{said.logits_V[index]:.3f}",
            f"{share_V[index]:.4f}",
        )
        for place, index in enumerate(best, start=1)
    )
    return Stop(
        name="logits",
        says=f"{shape(said.logits_V)} = [V]: {shown(tokenizer, said.target)} is the right one, "
        f"number {rank} with p = {share_V[said.target]:.4f}",
        places=(place_of(learner.heads["lm"].forward),),
        columns=(
            Column(title="place"),
            Column(title="piece", number=False),
            Column(title="logit"),
            Column(title="p"),
        ),
        rows=rows,
        figures={"top": best, "p": float(share_V[said.target]), "rank": rank},
    )


def of_loss(
    trainer: Trainer, tokenizer: Tokenizer, micro_batches: Sequence[MicroBatch], found: Recording
) -> Stop:
    """The loss of this token and of the step, beside that of guessing blindly."""
    said, result = found.prediction, found.result
    assert said is not None and result is not None
    names = list(trainer.weights)
    counts = {name: sum(b.counts.get(name, 0) for b in micro_batches) for name in names}
    told = " and ".join(f"{counts[name]:,} targets of {name}" for name in names)
    blind = math.log(tokenizer.vocab_size)
    return Stop(
        name="loss",
        says=f"this token {said.nll:.4f} nats; the step {result.loss:.6f}, over {told}; guessing "
        f"blindly ln V = ln {tokenizer.vocab_size:,} = {blind:.4f}",
        places=(place_of(learner_loss(trainer)), place_of(total_loss)),
        figures={"token": said.nll, "loss": result.loss, "ln_V": blind, "counts": counts},
    )


def learner_loss(trainer: Trainer) -> Callable[..., Any]:
    """The objective's loss, which makes the (sum, count) terms."""
    return trainer.engine.learner.objective.loss


def of_update(trainer: Trainer, found: Recording) -> list[Stop]:
    """The gradient's norm, and how far it moved the weights."""
    result, clip = found.result, trainer.update.clip
    assert result is not None
    clipped = clip is not None and result.grad_norm > clip
    by = f"clipped to {clip:g}, " if clipped else ""
    moved = (
        f"{by}learning rate {result.lr:.3e}: the weights move by {found.moved:.2e} of their norm"
    )
    kinds = " and ".join(type(optimizer).__name__ for optimizer in trainer.update.optimizers)
    return [
        Stop(
            name="gradient",
            says=f"norm {result.grad_norm:.4f} over all weights",
            places=(place_of(trainer.update.gradient),),
            figures={"grad_norm": result.grad_norm},
        ),
        Stop(
            name="step",
            says=f"{kinds}, {moved}" if result.applied else "refused: no weight moves",
            places=(place_of(trainer.update.apply), place_of(trainer.step)),
            figures={"lr": result.lr, "applied": result.applied, "moved": found.moved},
        ),
    ]
