"""The proof of an XLNet: one stream with padding, segments and memory, and both streams.

Where a predicted place sees nothing, transformers attends evenly to what is hidden and ours reads
0; so something stays visible to every query of these rows.

Shapes: B batch, T tokens, P predicted places, M tokens of memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from nanolm.model.trunk import Inputs
from nanolm.ops.masks import Mask

if TYPE_CHECKING:
    from nanolm.hub.published import Imported

ROWS, TOKENS, MEMORY, ONE_IN = 2, 32, 11, 4


def differences_of_two_streams(imported: Imported, theirs: Any) -> list[Tensor]:
    """Where hidden states and logits differ, of the content alone and of predicted places."""
    model = imported.config.model
    generator = torch.Generator().manual_seed(0)
    length = min(TOKENS, model.max_length)
    tokens_BT, before_BM = (
        torch.randint(0, model.n_tokens, (ROWS, n), generator=generator) for n in (length, MEMORY)
    )
    places = torch.arange(length)
    segments_BT = (places >= length // 3).long().add(places == length - 1).expand(ROWS, length)
    padded = differences_with_padding(imported, theirs, tokens_BT, segments_BT)

    order_BT = torch.stack([some_order(length, generator) for _ in range(ROWS)])
    places_BP = order_BT.nonzero()[:, 1].view(ROWS, -1)
    mems = theirs.transformer(
        before_BM, use_mems=True, token_type_ids=torch.zeros_like(before_BM)
    ).mems
    hidden_BSS = (order_BT[:, :, None] <= order_BT[:, None, :]) & (order_BT > 0)[:, None, :]
    answer = theirs(
        tokens_BT,
        token_type_ids=segments_BT,
        mems=mems,
        perm_mask=hidden_BSS.float(),
        target_mapping=one_hot(places_BP, length).float(),
        output_hidden_states=True,
    )
    of_places_BP = order_BT.gather(1, places_BP) - 1
    seen_first_BM = torch.zeros_like(before_BM)
    hidden_BTD = imported.learner.trunk(
        Inputs(
            tokens_BT=tokens_BT,
            segments_BT=segments_BT,
            mask=Mask(
                order=torch.cat([order_BT, of_places_BP], dim=1),
                key_order=torch.cat([seen_first_BM, order_BT], dim=1),
            ),
            places_BP=places_BP,
            memory_tokens_BM=before_BM,
        )
    )
    content_BTD, query_BPD = hidden_BTD.split([length, places_BP.shape[1]], dim=1)
    both = [
        content_BTD - answer.hidden_states[-2],
        query_BPD - answer.hidden_states[-1],
    ]
    if not imported.fresh:
        both.append(imported.learner.heads["lm"](query_BPD) - answer.logits)
    return [*padded, *both]


def differences_with_padding(
    imported: Imported, theirs: Any, tokens_BT: Tensor, segments_BT: Tensor
) -> list[Tensor]:
    """Of the content alone, the second row half padding, where it counts."""
    length = tokens_BT.shape[1]
    lengths_B = torch.tensor([length, length // 2])
    keep_BT = torch.arange(length) < lengths_B[:, None]
    words = {"attention_mask": keep_BT.float(), "token_type_ids": segments_BT}
    hidden_BTD = imported.learner.trunk(
        Inputs(tokens_BT=tokens_BT, segments_BT=segments_BT, mask=Mask(key_lengths=lengths_B))
    )
    expected_BTD = theirs.transformer(tokens_BT, **words).last_hidden_state
    return [(hidden_BTD - expected_BTD)[keep_BT]]


def some_order(length: int, generator: torch.Generator) -> Tensor:
    """Every token's place in an order, int64 [T]: one in ONE_IN is predicted, the rest is 0."""
    count = max(length // ONE_IN, 1)
    order_T = torch.zeros(length, dtype=torch.long)
    order_T[torch.randperm(length, generator=generator)[:count]] = 1 + torch.arange(count)
    return order_T
