"""Writing text with a decoder: one forward pass over the prompt, then one token at a time.

    prefill   all prompt tokens at once, keys and values kept    phase "prefill"
    decode    one query per sequence against the cache           phase "decode"

Prompts of unequal length stand right-aligned; what fills them up on the left is a document of its
own, which the mask keeps apart, and positions count from each prompt's first token.

Shapes: B sequences, T tokens, S tokens in the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Generator as Coroutine
from typing import NamedTuple

import torch
from torch import Tensor

from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import require
from nanolm.inference.sampling import Sampling, draw
from nanolm.model.cache import KeyValueCache
from nanolm.model.trunk import Inputs
from nanolm.ops.masks import Mask
from nanolm.saved import Saved

Frame = Callable[[str], list[int]]
"""Token ids of a prompt as the model reads it."""


class Chosen(NamedTuple):
    """What is written next: a token for each sequence, and, where some sequences give way to copies
    of others, which of the present ones they continue. A sequence and its copy have one prompt."""

    tokens_B: Tensor
    rows_B: Tensor | None = None


Steps = Coroutine[Tensor, Chosen, None]
"""Next-token logits [B, V], for what was chosen of the ones before."""


class Generator:
    """Generates from a saved decoder; prompts and results are token ids. `frame` makes ids of a
    prompt, as a document begins unless given."""

    trunks = ("decoder",)

    def __init__(self, saved: Saved, *, use_cache: bool = True, frame: Frame | None = None) -> None:
        require(
            saved.config.model.trunk in self.trunks,
            f"{saved.folder} holds an {saved.config.model.trunk}; only a decoder writes text "
            f"(an encoder fills masks: `nanolm fill`)",
        )
        self.saved, self.model = saved, saved.config.model
        self.trunk, self.head = saved.learner.trunk, saved.learner.heads["lm"]
        self.use_cache, self.frame = use_cache, frame or self.document
        self.device = self.trunk.embedding.weight.device
        special = torch.from_numpy(saved.tokenizer.special_mask).to(self.device)
        # Padding rows of the vocabulary and special tokens are never written; eos ends a text.
        self.forbidden_V = torch.ones(self.model.n_tokens, dtype=torch.bool, device=self.device)
        self.forbidden_V[: len(special)] = special
        self.forbidden_V[saved.tokenizer.eos] = False

    def forbidden_at_first(self, begin: str) -> Tensor:
        """Tokens that a continuation does not begin with, bool [V], when it begins like this."""
        if not begin:
            return self.forbidden_V
        others_V = torch.ones_like(self.forbidden_V)
        others_V[beginning_with(self.saved.tokenizer, begin)] = False
        return self.forbidden_V | others_V

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        return self.frame(text)

    def document(self, text: str) -> list[int]:
        """Token ids of a prompt as a document begins in training: behind an end-of-document (or,
        for a published model, behind what its tokenizer puts first)."""
        ids = self.saved.tokenizer.encode(text).tolist()
        alone = self.saved.config.data.document_mask and ids
        return ids if alone else [*self.saved.tokenizer.opening, *ids]

    def held(self, prompt: str) -> tuple[str, str]:
        """(what of a prompt the model reads, what its continuation begins with instead)."""
        return hold_spaces(self.saved.tokenizer, prompt)

    def text(self, ids: list[int]) -> str:
        """The text of written ids."""
        return self.saved.tokenizer.decode(ids)

    @torch.no_grad()
    def logits(self, prompts: list[list[int]], max_tokens: int) -> Steps:
        """Coroutine: yields next-token logits [B, V]; `send` it what was chosen."""
        longest = max(map(len, prompts))
        capacity = longest + max_tokens
        require(
            capacity <= self.model.max_length,
            f"the prompt's {longest} tokens and max_tokens={max_tokens} exceed the model's "
            f"model.max_length={self.model.max_length}; shorten one of them",
        )
        ids_BT, documents_BT = self.align(prompts, longest)
        lengths_B = torch.tensor([len(p) for p in prompts], device=self.device)
        cache = self.new_cache(len(prompts), capacity) if self.use_cache else None
        new_BT = ids_BT
        while True:
            hidden_BTD = self.trunk(self.inputs(new_BT, ids_BT, documents_BT, lengths_B, cache))
            tokens_B, rows_B = yield self.head(hidden_BTD[:, -1])
            if rows_B is not None:  # documents and lengths are the prompt's, which is the same
                ids_BT = ids_BT[rows_B]
                if cache is not None:
                    cache.reorder(rows_B)
            ids_BT = torch.cat([ids_BT, tokens_B[:, None]], dim=1)
            documents_BT = torch.nn.functional.pad(documents_BT, (0, 1), value=0)
            new_BT = tokens_B[:, None] if self.use_cache else ids_BT

    def align(self, prompts: list[list[int]], longest: int) -> tuple[Tensor, Tensor]:
        """Right-aligned ids and documents [B, T]: document 0 is the text, -1 what fills it up."""
        ids_BT = torch.zeros(len(prompts), longest, dtype=torch.int64, device=self.device)
        documents_BT = torch.full_like(ids_BT, -1)
        for row, prompt in enumerate(prompts):
            ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt, device=self.device)
            documents_BT[row, longest - len(prompt) :] = 0
        return ids_BT, documents_BT

    def new_cache(self, batch: int, capacity: int) -> KeyValueCache:
        """An empty cache for this model."""
        model = self.model
        return KeyValueCache(
            model.n_layers,
            batch,
            capacity,
            model.kv_heads,
            model.head_width,
            dtype=self.trunk.embedding.weight.dtype,
            device=self.device,
        )

    def inputs(
        self,
        new_BT: Tensor,
        ids_BS: Tensor,
        documents_BS: Tensor,
        lengths_B: Tensor,
        cache: KeyValueCache | None,
    ) -> Inputs:
        """What the trunk reads for the new tokens, given all tokens so far."""
        n_new = new_BT.shape[1]
        n_filled_B1 = (documents_BS < 0).sum(dim=1, keepdim=True)
        index_S = torch.arange(ids_BS.shape[1], device=self.device)[None]
        positions_BS = (index_S - n_filled_B1).clamp(min=0)
        uneven = bool((n_filled_B1 > 0).any())
        prefix = None
        if "prefix" in self.saved.learner.objective.masks:  # a prefix-LM reads prompts both ways
            prefix = lengths_B + n_filled_B1[:, 0]
        mask = Mask(
            documents=documents_BS[:, -n_new:] if uneven else None,
            key_documents=documents_BS if uneven else None,
            prefix_lengths=prefix,
        )
        return Inputs(
            tokens_BT=new_BT, positions_BT=positions_BS[:, -n_new:], mask=mask, cache=cache
        )


def write(
    generator: Generator,
    prompts: list[str],
    *,
    max_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    stop: list[str] | None = None,
    on_text: Callable[[int, str], None] = lambda index, text: None,
    begins: Sequence[str] = (),
) -> list[str]:
    """The continuation of each prompt, up to eos, a stop string (left out) or max_tokens.

    `on_text(index, text)` is called with the whole continuation so far whenever it may have grown;
    what could become a stop string is not in it yet. `begins` are texts that the continuations
    begin with, and that are left out of them (see `hold_spaces`).
    """
    tokenizer = generator.saved.tokenizer
    ids = [generator.prompt_ids(prompt) for prompt in prompts]
    generators = [
        torch.Generator(generator.device).manual_seed(seed * 1_000_003 + index)
        for index in range(len(prompts))
    ]
    seen_BV = torch.zeros(
        len(ids), generator.model.n_tokens, dtype=torch.bool, device=generator.device
    )
    for row, prompt in enumerate(ids):
        seen_BV[row, prompt] = True
    begins = begins or [""] * len(prompts)
    forbidden_BV = torch.stack([generator.forbidden_at_first(begin) for begin in begins])
    written: list[list[int]] = [[] for _ in prompts]
    texts, done = [""] * len(prompts), [False] * len(prompts)
    steps = generator.logits(ids, max_tokens)
    logits_BV = next(steps)
    for count in range(1, max_tokens + 1):
        logits_BV = logits_BV.masked_fill(forbidden_BV, -torch.inf)
        forbidden_BV = generator.forbidden_V
        tokens_B = draw(logits_BV, seen_BV, sampling, generators)
        seen_BV.scatter_(1, tokens_B[:, None], True)
        for row, token in enumerate(tokens_B.tolist()):
            if done[row]:
                continue
            done[row] = token == tokenizer.eos
            if not done[row]:
                written[row].append(token)
            text = generator.text(written[row])[len(begins[row]) :]
            text, stopped = cut_at(text, stop or [])
            done[row] |= stopped
            final = done[row] or count == max_tokens
            texts[row] = text if final else settled(text, stop or [])
            on_text(row, texts[row])
        if all(done) or count == max_tokens:
            break
        logits_BV = steps.send(Chosen(tokens_B))
    return texts


def cut_at(text: str, stop: list[str]) -> tuple[str, bool]:
    """(text up to the first stop string, whether there was one)."""
    ends = [text.find(word) for word in stop if word and word in text]
    return (text[: min(ends)], True) if ends else (text, False)


def settled(text: str, stop: list[str]) -> str:
    """The part of a text that what follows cannot change: without half a character, which later
    bytes may complete, and without the beginning of a stop string at its end."""
    text = text.rstrip("\ufffd")
    begun = (
        len(word[:size])
        for word in stop
        for size in range(min(len(word) - 1, len(text)), 0, -1)
        if text.endswith(word[:size])
    )
    return text[: len(text) - max(begun, default=0)]


def hold_spaces(tokenizer: Tokenizer, prompt: str) -> tuple[str, str]:
    """(the prompt without the spaces at its end, those spaces).

    Pieces begin with their space, so a model never saw a text that is cut behind one: the spaces
    are held back, and the next token is drawn among those that begin with them. Spaces that no
    piece begins with stay in the prompt.
    """
    stem = prompt.rstrip(" ")
    spaces = prompt[len(stem) :]
    return (stem, spaces) if spaces and beginning_with(tokenizer, spaces) else (prompt, "")


def beginning_with(tokenizer: Tokenizer, begin: str) -> list[int]:
    """The tokens whose text begins like this."""
    ids = range(tokenizer.vocab_size)
    return [index for index in ids if tokenizer.decode([index]).startswith(begin)]
