"""Beam search: the most probable whole text among those that K beams find (Graves 2012).

Each prompt has K running texts. At each step all their continuations by one token are compared by
the sum of their log probabilities, and the best 2K are looked at: those of the first K that end are
finished and count by

    score = log p(text | prompt) / |text|^penalty        |text| in tokens, its end included

(Wu et al. 2016, section 7, has another form of the same correction), and the best K that do not end
run on. A prompt is done when the best running text, at the length that it has now, is no better
than the worst of K finished ones; or after max_tokens, when what runs is finished as it stands.

Shapes: P prompts, K beams, B = P K sequences, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from nanolm.inference.generate import Chosen, Generator


@dataclasses.dataclass
class Beams:
    """The texts of one prompt, as token ids without an end."""

    size: int
    running: list[list[int]]
    finished: list[tuple[float, list[int]]] = dataclasses.field(default_factory=list)
    """(score, text), best first, at most `size`."""
    done: bool = False

    def finish(self, score: float, text: list[int]) -> None:
        """One more finished text; the worst goes when there are too many, of equals the later."""
        self.finished = sorted([*self.finished, (score, text)], key=lambda text: -text[0])
        del self.finished[self.size :]

    def see(self, score: float) -> None:
        """Done, once for all, if a text of this score would not be among the finished ones."""
        full = len(self.finished) == self.size
        self.done |= full and self.finished[-1][0] >= score


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """What is searched for, and how far."""

    beams: int
    max_tokens: int
    length_penalty: float = 1.0

    def __call__(
        self, generator: Generator, prompts: list[list[int]], begins: Sequence[str] = ()
    ) -> list[list[tuple[float, list[int]]]]:
        """For each prompt its finished texts, best first: (score, token ids without the end).
        `begins` are what the texts begin with (see `hold_spaces`)."""
        eos, device, size = generator.saved.tokenizer.eos, generator.device, self.beams
        found = [Beams(size, [[]] * size) for _ in prompts]
        # At first the beams of a prompt are alike, so that only one of them can be continued.
        score_PK = torch.full((len(prompts), size), -torch.inf, device=device)
        score_PK[:, 0] = 0.0
        first_row_P1 = torch.arange(len(prompts), device=device)[:, None] * size
        steps = generator.logits([ids for ids in prompts for _ in range(size)], self.max_tokens)
        logits_BV = next(steps)
        begins = begins or [""] * len(prompts)
        forbidden_PV = torch.stack([generator.forbidden_at_first(begin) for begin in begins])
        for length in range(1, self.max_tokens + 1):
            total_PKV = continued(logits_BV, forbidden_PV, score_PK)
            forbidden_PV = generator.forbidden_V[None]
            score_PC, beam_PC, token_PC = best(total_PKV, 2 * size)  # C = 2 K candidates
            rows = zip(found, score_PC.tolist(), beam_PC.tolist(), token_PC.tolist(), strict=True)
            kept = [self.advance(beams, length, eos, *candidates) for beams, *candidates in rows]
            if all(beams.done for beams in found):
                break
            kept_PK = torch.tensor(kept, device=device)
            score_PK, beam_PK, token_PK = (
                each.gather(1, kept_PK) for each in (score_PC, beam_PC, token_PC)
            )
            rows_B = (first_row_P1 + beam_PK).flatten()
            logits_BV = steps.send(Chosen(token_PK.flatten(), rows_B))
        return [beams.finished for beams in found]

    def advance(
        self,
        beams: Beams,
        length: int,
        eos: int,
        scores: list[float],
        sources: list[int],
        tokens: list[int],
    ) -> list[int]:
        """One prompt's step: what ends is finished, and the best that do not end run on; the
        places of these among the candidates, which come best first."""
        scale, last = length**self.length_penalty, length == self.max_tokens
        kept: list[int] = []
        running: list[list[int]] = []
        for place, (score, source, token) in enumerate(zip(scores, sources, tokens, strict=True)):
            ends, before = token == eos, beams.running[source]
            if (ends or last) and place < beams.size and not beams.done:
                beams.finish(score / scale, before if ends else [*before, token])
            if not ends and len(kept) < beams.size:
                kept.append(place)
                running.append([*before, token])
        beams.running = running
        beams.done |= last
        beams.see(scores[kept[0]] / scale)
        return kept


def write_best(
    generator: Generator, prompts: list[str], search: BeamSearch, begins: Sequence[str] = ()
) -> list[str]:
    """The best continuation of each prompt, up to eos or max_tokens; see `generate.write`."""
    found = search(generator, [generator.prompt_ids(prompt) for prompt in prompts], begins)
    texts = [generator.text(finished[0][1]) for finished in found]
    return [text[len(b) :] for text, b in zip(texts, begins or [""] * len(texts), strict=True)]


def continued(logits_BV: Tensor, forbidden_PV: Tensor, score_PK: Tensor) -> Tensor:
    """Log probability of every beam's text with every token behind it, [P, K, V]; forbidden tokens,
    [P, V] or [1, V], have none."""
    logits_PKV = logits_BV.float().view(*score_PK.shape, -1)
    logits_PKV = logits_PKV.masked_fill(forbidden_PV[:, None], -torch.inf)
    return score_PK[..., None] + logits_PKV.log_softmax(dim=-1)


def best(total_PKV: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, beams, tokens) of the `count` best continuations of each prompt, best first."""
    n_tokens = total_PKV.shape[-1]
    score_PC, place_PC = total_PKV.flatten(1).topk(count, dim=1)
    return score_PC, place_PC // n_tokens, place_PC % n_tokens
