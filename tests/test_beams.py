"""`nanolm generate --beams` on both trunks that write; the search finds what it claims to find."""

import itertools
import json

import pytest
import torch

from nanolm.build import build_learner, build_objective, resolve
from nanolm.config.load import load_config
from nanolm.errors import UserError
from nanolm.inference.beam_search import Beams, BeamSearch, write_best
from nanolm.inference.generate import Chosen, Generator
from nanolm.inference.generate_from_source import GENERATORS
from nanolm.model.trunk import Inputs
from nanolm.saved import Saved, open_saved
from tests.finetuned import command
from tests.prepared import trained_run

PROMPTS = {"span": ["def f(<mask>):", "import <mask>"], "clm": ["def f(", "import "]}


def generator_of(run, **keys):
    saved = open_saved(run)
    return GENERATORS[saved.config.model.trunk](saved, **keys)


@pytest.mark.parametrize("kind", ["clm", pytest.param("span", marks=pytest.mark.slow)])
def test_the_command_writes_what_the_search_finds(kind, tmp_path):
    run, prompts = trained_run(kind), PROMPTS[kind]
    keys = ("--beams=3", "--max_tokens=8", "--length_penalty=0.5")
    words = ("generate", str(run), "--prompt", *prompts, *keys)
    command(*words, f"--json={tmp_path / 'out.json'}")
    found = json.loads((tmp_path / "out.json").read_text())
    generator = generator_of(run)
    held = [generator.held(prompt) for prompt in prompts]
    stems, begins = zip(*held, strict=True)
    expected = write_best(generator, list(stems), BeamSearch(3, 8, 0.5), begins)
    assert found == [{"prompt": p, "text": t} for p, t in zip(prompts, expected, strict=True)]
    command(*words, f"--json={tmp_path / 'slow.json'}", "--cache=false")
    assert json.loads((tmp_path / "slow.json").read_text()) == found
    alone = command("generate", str(run), f"--prompt={prompts[0]}", *keys)
    assert alone.strip() == (prompts[0] + expected[0]).strip()


def test_beams_and_draws_exclude_each_other():
    run = str(trained_run("clm"))
    for words in (("--count=2",), ("--stop=[x]",)):
        with pytest.raises(UserError, match="beams find one text") as caught:
            command("generate", run, "--prompt=def", "--beams=2", *words)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="beams"):
        command("generate", run, "--prompt=def", "--beams=0")


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_a_text_counts_by_what_one_pass_over_it_says(tokenizer, tmp_path, use_cache):
    """Of a decoder, whose prompts are unequally long: a beam that continues another one goes on
    from what stands there, in the cache and without one."""
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_length": 64, "init_std": 0.3}
    config = load_config([], base={"model": shape, "data": {"row_length": 64}})
    config = resolve(config, tokenizer)
    learner = build_learner(config, build_objective(config, tokenizer)).eval()
    generator = Generator(Saved(tmp_path, config, tokenizer, learner), use_cache=use_cache)
    count, penalty = 7, 0.7
    prompts = [[40, 50, 60, 70, 80], [90], [100, 110, 120]]
    found = BeamSearch(4, count, penalty)(generator, prompts)
    for prompt, texts in zip(prompts, found, strict=True):
        assert len({tuple(text) for _, text in texts}) == 4
        for score, text in texts:
            written = text if len(text) == count else [*text, tokenizer.eos]
            ids = torch.tensor([[*prompt, *written]])
            logits_TV = learner.heads["lm"](learner.trunk(Inputs(tokens_BT=ids)))[0]
            logits_TV = logits_TV.masked_fill(generator.forbidden_V, -torch.inf).log_softmax(-1)
            of_each = logits_TV[len(prompt) - 1 : -1].gather(1, torch.tensor(written)[:, None])
            expected = float(of_each.sum()) / len(written) ** penalty
            assert score == pytest.approx(expected, rel=1e-5)


def test_of_equal_texts_the_later_goes_and_cannot_keep_a_search_alive():
    beams = Beams(2, [[], []])
    beams.finish(-2.0, [2])
    beams.see(-9.0)
    assert not beams.done  # one finished text of two is not enough
    beams.finish(-1.0, [1])
    beams.finish(-2.0, [3])
    assert beams.finished == [(-1.0, [1]), (-2.0, [2])]
    beams.see(-1.9)
    assert not beams.done
    beams.see(-2.0)
    assert beams.done
    beams.see(-1.9)
    assert beams.done  # once for all


class Chain:
    """A generator over a table: the next token's logits depend on the last two tokens alone."""

    def __init__(self, vocabulary, eos, seed):
        generator = torch.Generator().manual_seed(seed)
        self.table = 2 * torch.randn(vocabulary, vocabulary, vocabulary, generator=generator)
        self.device = torch.device("cpu")
        self.forbidden_V = torch.zeros(vocabulary, dtype=torch.bool)
        self.saved = type("Saved", (), {"tokenizer": type("T", (), {"eos": eos})})

    def forbidden_at_first(self, begin):
        return self.forbidden_V

    def logits(self, prompts, max_tokens):
        state = torch.tensor([ids[-2:] for ids in prompts])
        while True:
            chosen: Chosen = yield self.table[state[:, 0], state[:, 1]]
            tokens, rows = chosen
            state = torch.stack([state[rows, 1], tokens.clamp(max=2)], dim=1)

    def best(self, prompt, longest, penalty, eos):
        """The best text of all, by trying every one."""
        vocabulary, found = self.table.shape[0], []
        for length in range(1, longest + 1):
            for text in itertools.product(range(vocabulary), repeat=length):
                if eos in text[:-1] or (text[-1] != eos and length < longest):
                    continue
                state, total = tuple(prompt[-2:]), 0.0
                for token in text:
                    total += float(self.table[state].log_softmax(-1)[token])
                    state = (state[1], token)
                kept = text[:-1] if text[-1] == eos else text
                found.append((total / length**penalty, list(kept)))
        return max(found)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 1.7])
@pytest.mark.parametrize("seed", range(4))
def test_beams_that_are_many_enough_find_the_best_of_all_texts(seed, penalty):
    """With as many beams as there are texts nothing is lost, so the best one is known."""
    vocabulary, eos, longest = 3, 2, 4
    chain = Chain(vocabulary, eos, seed)
    prompts = [[0, 1], [1, 0], [1, 1]]
    found = BeamSearch(2 * vocabulary**longest, longest, penalty)
    for prompt, texts in zip(prompts, search_all(found, chain, prompts), strict=True):
        score, text = chain.best(prompt, longest, penalty, eos)
        assert texts[0][1] == text
        assert texts[0][0] == pytest.approx(score, rel=1e-5)
        scores = [score for score, _ in texts]
        assert scores == sorted(scores, reverse=True)


def test_what_a_text_may_not_begin_with_may_come_later():
    chain = Chain(3, eos=2, seed=0)
    chain.table[:] = torch.tensor([5.0, 0.0, -9.0])
    chain.forbidden_at_first = lambda begin: torch.tensor([begin == " ", False, False])
    found = BeamSearch(1, 3)(chain, [[0, 1], [0, 1]], [" ", ""])
    assert [texts[0][1] for texts in found] == [[1, 0, 0], [0, 0, 0]]


def search_all(search, chain, prompts):
    """The search, with a vocabulary made wide enough for 2 K candidates by tokens that never
    come."""
    wide = torch.full((3, 3, 4 * search.beams), -1e9)
    wide[:, :, :3] = chain.table
    small, chain.table = chain.table, wide
    chain.forbidden_V = torch.arange(wide.shape[-1]) >= 3
    try:
        return search(chain, prompts)
    finally:
        chain.table = small
