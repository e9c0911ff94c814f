"""Fine-tuned models as ONNX graphs: what a task's head reads of the hidden states, as tensors.

classify, choose    logits [B, C], a row's; choose: one of each choice, [B, 1]
regress             scores [B, C], in their own units
tag                 logits [B, T, C], read at a word's first piece
read                start and end scores [B, T, 2]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from nanolm.errors import require
from nanolm.finetune.published import answers
from nanolm.finetune.tasks.heads import PooledLogits, Pooling
from nanolm.finetune.tasks.regress import RegressOptions
from nanolm.hub.heads import PLAIN
from nanolm.inference.export_onnx import Note, Read, onnx_folder
from nanolm.saved import Saved


def task_onnx(saved: Saved, note: Note = print) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(files, figures of the proof) of a fine-tuned model.

    Raises UserError for a task whose answers are no tensor of a row, and as `onnx_folder` does.
    """
    task = saved.config.objective.name
    require(
        task in READS,
        f"{saved.folder} was fine-tuned (objective.name={task}), and --format onnx writes "
        f"{', '.join(READS)}; export it with --format nanolm",
    )
    return onnx_folder(saved, note, READS[task](saved, task), compared)


def compared(
    saved: Saved, hidden_BTD: Tensor, keep_BT: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Answers of our head, which reads packed rows, beside those of the graph."""
    ours = answers(saved, hidden_BTD, keep_BT)
    theirs = logits[keep_BT] if saved.config.objective.name in PLAIN else logits
    return ours, theirs


def of_rows(saved: Saved, task: str) -> Read:
    """One answer for each row."""
    pooling = cast(PooledLogits, saved.learner.heads[task]).pooling

    def read(heads: nn.ModuleDict, hidden_BTD: Tensor, keep_BT: Tensor) -> Tensor:
        head = cast(PooledLogits, heads[task])
        return head.decide(POOLS[pooling](hidden_BTD, keep_BT))

    return read


def of_scores(saved: Saved, task: str) -> Read:
    """One answer for each row, in the scores' own units."""
    options, read = cast(RegressOptions, saved.config.objective), of_rows(saved, task)
    mean_C, std_C = torch.tensor(options.mean), torch.tensor(options.std)
    return lambda heads, hidden_BTD, keep_BT: read(heads, hidden_BTD, keep_BT) * std_C + mean_C


def of_tokens(saved: Saved, task: str) -> Read:
    """One answer for each token."""

    def read(heads: nn.ModuleDict, hidden_BTD: Tensor, keep_BT: Tensor) -> Tensor:
        rows, length, _ = hidden_BTD.shape
        index_N = torch.arange(rows * length)
        return heads[task](hidden_BTD, index_N).unflatten(0, (rows, length))

    return read


def first(hidden_BTD: Tensor, keep_BT: Tensor) -> Tensor:
    """Each row's first hidden state."""
    return hidden_BTD[:, 0]


def last(hidden_BTD: Tensor, keep_BT: Tensor) -> Tensor:
    """Each row's last hidden state that counts."""
    place_B11 = (keep_BT.sum(1) - 1)[:, None, None]
    return hidden_BTD.gather(1, place_B11.expand(-1, 1, hidden_BTD.shape[2]))[:, 0]


def mean(hidden_BTD: Tensor, keep_BT: Tensor) -> Tensor:
    """The mean of each row's hidden states that count."""
    keep_BT1 = keep_BT[..., None].to(hidden_BTD.dtype)
    return (hidden_BTD * keep_BT1).sum(1) / keep_BT1.sum(1)


POOLS: dict[Pooling, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": first,
    "last": last,
    "mean": mean,
}
READS: dict[str, Callable[[Saved, str], Read]] = {
    **dict.fromkeys(("classify", "choose"), of_rows),
    "regress": of_scores,
    **dict.fromkeys(PLAIN, of_tokens),
}
"""How the graph of each task reads its head."""
