"""Writing: the cache changes nothing, sampling does what its paper says, stops are honoured."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanolm.cli import main
from nanolm.errors import UserError
from nanolm.inference import sampling
from nanolm.inference.generate import (
    Chosen,
    Generator,
    beginning_with,
    cut_at,
    hold_spaces,
    settled,
    write,
)
from nanolm.inference.sampling import Sampling, draw
from nanolm.saved import open_saved
from tests import finetuned
from tests.prepared import trained_run

PROMPTS = ["def parse(", "class Action:\n    def", "x"]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", params=["clm", pytest.param("prefix", marks=pytest.mark.slow)])
def saved(request):
    return open_saved(trained_run(request.param))


def steps(generator, tokens, count):
    logits = generator.logits(tokens, count + 1)
    seen = [next(logits)]
    for _ in range(count):
        seen.append(logits.send(Chosen(seen[-1].argmax(dim=-1))))
    return torch.stack(seen)


def test_cached_and_uncached_logits_agree(saved):
    cached, uncached = Generator(saved), Generator(saved, use_cache=False)
    prompts = [cached.prompt_ids(text) for text in PROMPTS]
    torch.testing.assert_close(
        steps(cached, prompts, 12), steps(uncached, prompts, 12), atol=1e-5, rtol=0
    )


def test_greedy_text_is_the_same_alone_in_a_batch_and_without_cache(saved):
    batch = write(Generator(saved), PROMPTS, max_tokens=16, sampling=GREEDY)
    bare = write(Generator(saved, use_cache=False), PROMPTS, max_tokens=16, sampling=GREEDY)
    alone = [write(Generator(saved), [p], max_tokens=16, sampling=GREEDY)[0] for p in PROMPTS]
    assert batch == bare == alone


def test_a_seed_gives_the_same_text_and_another_seed_another(saved):
    def text(seed):
        generator = Generator(saved)
        return write(generator, ["def "], max_tokens=24, sampling=Sampling(), seed=seed)

    assert text(1) == text(1) != text(2)


def test_stop_strings_end_the_text_and_are_left_out(saved):
    free = write(Generator(saved), ["def "], max_tokens=24, sampling=GREEDY)[0]
    stop = free[len(free) // 2 : len(free) // 2 + 2]
    cut = write(Generator(saved), ["def "], max_tokens=24, sampling=GREEDY, stop=[stop])[0]
    assert cut == free[: free.index(stop)]
    assert cut_at("abcd", ["d", "bc"]) == ("a", True)
    assert cut_at("abcd", ["x", ""]) == ("abcd", False)


def test_text_grows_and_its_last_form_is_what_is_returned(saved):
    seen = []
    texts = write(
        Generator(saved),
        ["def "],
        max_tokens=12,
        sampling=GREEDY,
        on_text=lambda index, text: seen.append(text),
    )
    assert seen[-1] == texts[0]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))


@given(st.text("ab", max_size=9), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_is_shown_never_turns_out_to_be_a_stop_string(text, stop):
    final = cut_at(text, stop)[0]
    for end in range(len(text) + 1):
        shown, stopped = cut_at(text[:end], stop)
        if not stopped:
            shown = settled(shown, stop)
        assert final.startswith(shown)
    assert settled("ab\ufffd", []) == "ab"


LETTERS = "aé秦😀"  # of one to four bytes


@given(
    st.text(LETTERS, max_size=7),
    st.lists(st.text(LETTERS, min_size=1, max_size=3), max_size=3),
    st.binary(max_size=2),
)
def test_no_half_of_a_character_is_shown_between_pieces_of_one_byte(text, stop, torn):
    """Pieces may be single bytes; what is shown only grows, and never loses what was shown."""
    written = text.encode() + torn
    final, _ = cut_at(written.decode(errors="replace"), stop)
    before = ""
    for end in range(len(written) + 1):
        shown, stopped = cut_at(written[:end].decode(errors="replace"), stop)
        shown = shown if stopped else settled(shown, stop)
        assert final.startswith(shown) and shown.startswith(before)
        before = shown
        if stopped:
            assert shown == final
            break


@pytest.mark.parametrize("prompt", ["def ", "x =  ", "", " ", "if a:\n    ", "word"])
def test_spaces_at_the_end_of_a_prompt_are_held_back(saved, prompt):
    tokenizer = saved.tokenizer
    stem, spaces = hold_spaces(tokenizer, prompt)
    assert stem + spaces == prompt and not (spaces and stem.endswith(" "))
    words = {"max_tokens": 8, "sampling": GREEDY}
    (text,) = write(Generator(saved), [stem], begins=[spaces], **words)
    (free,) = write(Generator(saved), [stem], **words)
    if spaces in ("", " ") and free.startswith(spaces):
        assert spaces + text == free
    assert not spaces or beginning_with(tokenizer, spaces)
    assert hold_spaces(tokenizer, "a" + " " * 300) == ("a" + " " * 300, "")


def test_specials_are_never_written(saved):
    generator = Generator(saved)
    special = torch.from_numpy(saved.tokenizer.special_mask)
    forbidden = generator.forbidden_V[: len(special)]
    assert not forbidden[saved.tokenizer.eos]
    special[saved.tokenizer.eos] = False
    assert torch.equal(forbidden, special)
    assert generator.forbidden_V[len(special) :].all()


def test_too_long_a_prompt_is_refused(saved):
    with pytest.raises(UserError, match="max_length"):
        write(Generator(saved), ["x" * 500], max_tokens=50, sampling=GREEDY)


def test_an_encoder_does_not_write():
    with pytest.raises(UserError, match="nanolm fill"):
        Generator(open_saved(trained_run("mlm")))


logits = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=20).map(
    lambda values: torch.tensor([values])
)


@given(logits, st.integers(1, 20))
def test_top_k_keeps_the_k_largest(x, k):
    kept = sampling.keep_top_k(x, k).isfinite()[0]
    k = min(k, x.shape[1])
    assert kept.sum() >= k
    assert x[0][kept].min() >= x[0].topk(k).values[-1]


@given(logits, st.floats(0.05, 1.0))
def test_top_p_keeps_the_smallest_nucleus(x, p):
    kept = sampling.keep_top_p(x, p).isfinite()[0]
    probability = x.softmax(dim=-1)[0]
    assert kept.any()
    # It reaches p, and without its least likely member it would not.
    assert probability[kept].sum() >= min(p, 1.0) - 1e-5
    assert probability[kept].sum() - probability[kept].min() < p + 1e-5


@given(logits, st.floats(0.05, 1.0))
def test_min_p_keeps_what_is_likely_enough(x, p):
    kept = sampling.keep_min_p(x, p).isfinite()[0]
    probability = x.softmax(dim=-1)[0]
    assert torch.equal(kept, probability >= p * probability.max())


def test_repetition_penalty_lowers_only_what_was_seen():
    x, seen = torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[True, True, False]])
    assert sampling.penalise_repetition(x, seen, 2.0).tolist() == [[1.0, -4.0, 1.0]]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": value} for value in (-1, 1e-38, 1e-320)),
        *({"repetition_penalty": value} for value in (0, -1, 1e-38, 1e38)),
        *({"top_k": 0}, {"top_p": 0}, {"min_p": 2}),
    ],
)
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-3, 1.0, 1e6, 1e38])
@pytest.mark.parametrize("penalty", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(
    "top", [{}, {"top_k": 1}, {"top_k": 10**12}, {"top_p": 1e-40, "min_p": 1.0}]
)
def test_every_number_in_range_draws_a_token(temperature, penalty, top):
    sampling = Sampling(temperature=temperature, repetition_penalty=penalty, **top)
    logits = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)) * 30
    logits[:, 3] = -torch.inf
    seen = torch.arange(16)[None] % 2 == torch.tensor([[0], [1]])
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 2**32 - 1)]
    tokens = draw(logits, seen, sampling, generators)
    assert tokens.shape == (2,) and not (tokens == 3).any()


@pytest.mark.parametrize(
    ("word", "key"),
    [
        *((f"--count={n}", "count") for n in (0, -1)),
        *((f"--max_tokens={n}", "max_tokens") for n in (0, -5)),
        *((f"--seed={n}", "seed") for n in (-1, 2**32, 10**30)),
        *(
            (f"--device={name}", "device: expected one of auto, cpu, cuda")
            for name in ("gpu", "cuda:99", "cuda:x", "meta", "")
        ),
        ("--prompt=a\udcff", "no Unicode text"),
    ],
)
def test_odd_numbers_and_names_are_one_sentence(word, key, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["generate", str(trained_run("clm")), "--max_tokens=2", word])
    told = capsys.readouterr().err
    assert caught.value.code == 2 and told.count("\n") == 1 and key in told


def test_command_writes_texts_and_json(tmp_path, capsys):
    out = tmp_path / "texts.json"
    run = str(trained_run("clm"))
    main(["generate", run, "--prompt=def ", "--count=2", "--max_tokens=8", f"--json={out}"])
    assert "sample 2" in capsys.readouterr().out
    texts = json.loads(out.read_text())
    assert [text["prompt"] for text in texts] == ["def ", "def "]
    main(["generate", run, "--prompt=def ", "--max_tokens=8", "--temperature=0"])
    streamed = capsys.readouterr().out
    words = {"max_tokens": 8, "sampling": GREEDY, "begins": [" "]}
    greedy = write(Generator(open_saved(run)), ["def"], **words)[0]
    assert streamed == f"def {greedy}\n"


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_a_fine_tuned_run_is_no_language_model(tmp_path, capsys, objective):
    records = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(8)]
    for name in ("train", "val"):
        finetuned.table(tmp_path / "data", name, records)
    run = tmp_path / "run"
    words = ("--objective.name=classify", "--train.epochs=1", "--schedule.warmup=0")
    finetuned.finetune(finetuned.checkpoint(objective), tmp_path / "data", run, *words)
    for command in (["generate", str(run)], ["fill", str(run), "a <mask>"]):
        with pytest.raises(SystemExit) as caught:
            main(command)
        told = capsys.readouterr().err
        assert caught.value.code == 2 and told.count("\n") == 1
        assert "objective.name=classify" in told and "nanolm predict" in told
