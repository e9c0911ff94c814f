"""Prompt-tuning: P learned vectors stand before the embedded text (Lester et al. 2021).

    trunk([prompt; E(tokens)])[P:]

They have positions of their own (the text begins at P) and are seen by every token. The trunk takes
embeddings in place of tokens, so two hooks around it do the whole work. Where many texts lie in one
row by length (`Mask.length_groups`), each of them gets the vectors in front and belongs, with them,
to the group of texts that are P tokens longer.

Shapes: B batch, T tokens, P prompt length, D model width; N texts of a class, L their length.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nanolm.errors import require
from nanolm.learner import Adapter, Learner
from nanolm.model.trunk import Inputs, Trunk
from nanolm.ops.masks import LengthGroups, Mask
from nanolm.peft.base import PeftOptions
from nanolm.registry import PEFT


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions(PeftOptions):
    """Learned vectors before the text."""

    name: str = "prompt"
    length: int = 16
    """Number P of vectors."""
    init: Literal["vocabulary", "random"] = "vocabulary"
    """Start at the embeddings of random tokens (section 3.2), or at small random numbers."""

    def __post_init__(self) -> None:
        require(self.length >= 1, f"peft.length={self.length} must be at least 1")


class Prompt(nn.Module):
    """The vectors [P, D], and the two hooks that put them before the text and take them off."""

    def __init__(self, trunk: Trunk, options: PromptOptions) -> None:
        super().__init__()
        vocabulary, width = trunk.embedding.weight.shape
        if options.init == "vocabulary":
            tokens_P = torch.randint(0, vocabulary, (options.length,))
            vectors_PD = trunk.embedding.weight.detach().cpu()[tokens_P].clone()
        else:
            vectors_PD = 0.02 * torch.randn(options.length, width)
        self.vectors_PD = nn.Parameter(vectors_PD)
        self.added = False
        self.length_groups: LengthGroups | None = None
        self.places: Tensor | None = None  # with length_groups: see `places_by_length_group`

    def before(self, trunk: Trunk, arguments: tuple[Inputs, ...]) -> tuple[Inputs]:
        """The trunk's inputs with the prompt in front, or, behind a cache that has it, moved on."""
        (inputs,) = arguments
        length, self.length_groups = len(self.vectors_PD), inputs.mask.length_groups
        self.added = inputs.cache is None or inputs.cache.length == 0
        positions_BT = inputs.positions_BT
        if not self.added:
            moved = None if positions_BT is None else positions_BT + length
            mask = self.lengthened(inputs.mask, queries=False)
            return (dataclasses.replace(inputs, positions_BT=moved, mask=mask),)
        x_BTD = inputs.embeddings_BTD
        if x_BTD is None:
            x_BTD = trunk.embedding(inputs.tokens_BT) * trunk.scale
        n_tokens = x_BTD.shape[1] if self.length_groups is None else self.length_groups[-1][1]
        require(
            length + n_tokens <= trunk.max_length,
            f"peft=prompt puts {length} vectors before rows of {n_tokens} tokens, and "
            f"model.max_length={trunk.max_length} holds fewer; shorten data.row_length or "
            f"peft.length",
        )
        if self.length_groups is not None:
            return (self.before_each(inputs, x_BTD, self.length_groups),)
        if inputs.cache is not None:
            inputs.cache.grow(length)
        if positions_BT is not None:
            own_BP = torch.arange(length, device=x_BTD.device).expand(len(positions_BT), -1)
            positions_BT = torch.cat([own_BP, positions_BT + length], dim=1)
        segments_BT = inputs.segments_BT
        if segments_BT is not None:
            segments_BT = nn.functional.pad(segments_BT, (length, 0))
        prompt_BPD = self.vectors_PD.to(x_BTD.dtype).expand(len(x_BTD), -1, -1)
        return (
            dataclasses.replace(
                inputs,
                tokens_BT=None,
                embeddings_BTD=torch.cat([prompt_BPD, x_BTD], dim=1),
                positions_BT=positions_BT,
                segments_BT=segments_BT,
                mask=self.lengthened(inputs.mask, queries=True),
            ),
        )

    def before_each(self, inputs: Inputs, x_1TD: Tensor, length_groups: LengthGroups) -> Inputs:
        """The inputs of one row of texts by length, with the prompt in front of every text."""
        length, device = len(self.vectors_PD), x_1TD.device
        # Here and in `after` nobody waits: rows of texts by length exist on a CPU only.
        self.places, first = (
            found.to(device) for found in places_by_length_group(length_groups, length)
        )
        all_TD = torch.cat([self.vectors_PD.to(x_1TD.dtype), x_1TD[0]])
        counted_P = torch.arange(length, device=device)
        positions_BT, documents_BT = inputs.positions_BT, inputs.mask.documents
        assert positions_BT is not None and documents_BT is not None  # rows of several texts
        positions_T = positions_BT[0] + length
        segments_BT = inputs.segments_BT
        if segments_BT is not None:
            segments_BT = nn.functional.pad(segments_BT, (length, 0))[:, self.places]
        mask = dataclasses.replace(
            inputs.mask,
            documents=documents_BT[:, first],
            length_groups=tuple((number, own + length) for number, own in length_groups),
        )
        return dataclasses.replace(
            inputs,
            tokens_BT=None,
            embeddings_BTD=all_TD[None, self.places],
            positions_BT=torch.cat([counted_P, positions_T])[None, self.places],
            segments_BT=segments_BT,
            mask=mask,
        )

    def lengthened(self, mask: Mask, *, queries: bool) -> Mask:
        """The mask with P more keys, and P more queries, of document 0."""
        length = len(self.vectors_PD)

        def more(value: Tensor | None) -> Tensor | None:
            return None if value is None else value + length

        def padded(value: Tensor | None) -> Tensor | None:
            return None if value is None else nn.functional.pad(value, (length, 0))

        return dataclasses.replace(
            mask,
            key_lengths=more(mask.key_lengths),
            prefix_lengths=more(mask.prefix_lengths),
            documents=padded(mask.documents) if queries else mask.documents,
            key_documents=padded(mask.key_documents),
        )

    def after(self, trunk: Trunk, arguments: Any, hidden_BTD: Tensor) -> Tensor:
        """The hidden states of the text alone."""
        length = len(self.vectors_PD)
        if self.places is not None and self.length_groups is not None:
            return hidden_BTD[:, self.places >= length]
        return hidden_BTD[:, length:] if self.added else hidden_BTD


def places_by_length_group(length_groups: LengthGroups, length: int) -> tuple[Tensor, Tensor]:
    """(places, first) int64 [T'] of the row in which P vectors stand before every text.

    Each place of the new row takes number `places` of [vectors; tokens of the old row]; `first` is
    the old row's token itself, or for a vector the first token of the text behind it.
    """
    places, first, start = [], [], 0
    for number, own in length_groups:
        tokens_NL = torch.arange(start, start + number * own).view(number, own)
        counted_NP = torch.arange(length).expand(number, -1)
        places.append(torch.cat([counted_NP, tokens_NL + length], dim=1).flatten())
        fronts_NP = tokens_NL[:, :1].expand(-1, length)
        first.append(torch.cat([fronts_NP, tokens_NL], dim=1).flatten())
        start += number * own
    return torch.cat(places), torch.cat(first)


@PEFT.register("prompt", options=PromptOptions)
def prompt(options: PromptOptions, learner: Learner, adapter: Adapter) -> None:
    """A Prompt around the trunk."""
    trunk, coupled = learner.trunk, {"documents", "order"} & learner.objective.masks
    require(
        not coupled or getattr(learner.objective, "in_line", False),
        f"peft=prompt stands before one text a row, and these rows are masked by "
        f"{' and '.join(sorted(coupled))}; set data.pack or data.document_mask to false, or use "
        f"peft=prefix",
    )
    module = Prompt(trunk, options)
    adapter.add(trunk, "prompt", module)
    for handle in (
        trunk.register_forward_pre_hook(module.before),
        trunk.register_forward_hook(module.after),
    ):
        adapter.undo.append(handle.remove)
