"""Writing text with an encoder-decoder: the source is encoded once, targets come token by token.

    encode    all sources at once, their padding hidden
    decode    from a pad on, one query per sequence against two caches: what it has written, and the
              source's keys and values, which are projected at the first token and never again

A source may have gaps, written `<mask>`: each is the next of the sentinels that stand for a cut-out
stretch in pretraining, and the text that is written names each sentinel before what it stands for.

Shapes: B sequences, S source tokens, T target tokens, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch

from nanolm.errors import require
from nanolm.inference.generate import Frame, Generator, Steps
from nanolm.model.trunk import EncoderDecoder, Inputs
from nanolm.objectives.span import Span
from nanolm.ops.masks import Mask
from nanolm.saved import Saved

GAP = "<mask>"


class SourceGenerator(Generator):
    """Generates from a saved encoder-decoder; prompts are sources, results token ids."""

    trunks = ("encoder_decoder",)

    def __init__(self, saved: Saved, *, use_cache: bool = True, frame: Frame | None = None) -> None:
        super().__init__(saved, use_cache=use_cache, frame=frame)
        self.sentinels = cast(Span, saved.learner.objective).sentinels.tolist()
        self.forbidden_V[self.sentinels] = False

    def document(self, text: str) -> list[int]:
        """Token ids of a source with its gaps and its end; raises UserError for too many gaps."""
        tokenizer, parts = self.saved.tokenizer, text.split(GAP)
        require(
            len(parts) - 1 <= len(self.sentinels),
            f"the prompt has {len(parts) - 1} gaps, and the tokenizer {len(self.sentinels)} pieces "
            f"to mark them; leave some {GAP} out",
        )
        ids = tokenizer.encode(parts[0]).tolist()
        for sentinel, part in zip(self.sentinels, parts[1:]):
            ids += [sentinel, *tokenizer.encode(part).tolist()]
        return [*ids, tokenizer.eos]

    def held(self, prompt: str) -> tuple[str, str]:
        """All of a source is read, and what is written begins anew."""
        return prompt, ""

    def text(self, ids: list[int]) -> str:
        """The text of written ids, sentinels by name."""
        return self.saved.tokenizer.decode(ids, specials=True)

    @torch.no_grad()
    def logits(self, prompts: list[list[int]], max_tokens: int) -> Steps:
        """Coroutine: yields next-token logits [B, V]; `send` it what was chosen."""
        longest, most = max(map(len, prompts)), self.model.max_length
        require(
            max(longest, max_tokens) <= most,
            f"the prompt's {longest} tokens or max_tokens={max_tokens} exceed the model's "
            f"model.max_length={most}; shorten what is longer",
        )
        pad = self.saved.tokenizer.pad
        source_BS = torch.full((len(prompts), longest), pad, device=self.device)
        for row, prompt in enumerate(prompts):
            source_BS[row, : len(prompt)] = torch.tensor(prompt, device=self.device)
        lengths_B = torch.tensor([len(p) for p in prompts], device=self.device)
        mask = Mask(key_lengths=lengths_B)
        source_BSD = cast(EncoderDecoder, self.trunk).encode(
            Inputs(source_tokens_BS=source_BS, source_mask=mask)
        )
        cache = self.new_cache(len(prompts), max_tokens) if self.use_cache else None
        written_BT = new_BT = torch.full((len(prompts), 1), pad, device=self.device)
        while True:
            hidden_BTD = self.trunk(
                Inputs(tokens_BT=new_BT, source_BSD=source_BSD, source_mask=mask, cache=cache)
            )
            tokens_B, rows_B = yield self.head(hidden_BTD[:, -1])
            if rows_B is not None:
                written_BT = written_BT[rows_B]
                if cache is not None:
                    cache.reorder(rows_B)
            written_BT = torch.cat([written_BT, tokens_B[:, None]], dim=1)
            new_BT = tokens_B[:, None] if self.use_cache else written_BT


GENERATORS = {trunk: kind for kind in (Generator, SourceGenerator) for trunk in kind.trunks}
"""What writes, by the trunk that it writes with."""
