"""Attributions and attention maps: what they must add up to, and the command."""

import json
import math

import numpy as np
import pytest
import torch
from rich.cells import cell_len

from nanolm.commands.explain import told
from nanolm.commands.fill import fill
from nanolm.errors import UserError
from nanolm.finetune.explain.explainer import Explainer, best_window, observed_attention
from nanolm.finetune.explain.guess import Guess
from nanolm.finetune.explain.page import Explanation
from nanolm.inference.generate import Generator
from nanolm.saved import open_saved
from tests.finetuned import checkpoint, command, finetune, questions, table
from tests.prepared import train
from tests.test_objectives_tasks import build

TASKS = ["classify", "regress", "tag", "read", "prompt"]


def explainer(task, trunk, **options):
    learner, split = build(task, trunk, **options)
    learner = learner.double().eval().requires_grad_(False)
    return best_window(learner, split.items[3:5], None)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("trunk", ["encoder", "decoder"])
def test_integrated_gradients_are_complete(task, trunk):
    """Sundararajan et al. 2017, proposition 1: they sum to F(text) - F(baseline)."""
    found = explainer(task, trunk)
    integrated = found.integrated_gradients(tolerance=1e-3)
    difference = integrated.at_text - integrated.at_baseline
    assert abs(difference) > 1e-6
    assert abs(integrated.gap) <= 1e-3 * abs(difference)
    assert integrated.at_text == pytest.approx(found.value, abs=1e-6)
    frame = set(found.task.tokenizer.roles().values())
    framed = [int(token) in frame for token in found.tokens_T]
    assert any(framed) and not integrated.values_T[torch.tensor(framed)].any()
    # More steps, less missing; all zeros is a baseline too.
    rough, fine = (found.integrated_gradients("mean", steps=n, tolerance=0.9) for n in (1, 64))
    assert abs(fine.gap) < abs(rough.gap)


@pytest.mark.parametrize("pack", [True, False])
def test_gradient_times_input_is_the_slope_along_the_embeddings(pack):
    found = explainer("classify", "encoder", pack=pack)
    h = 1e-3  # heads answer in float32
    with torch.no_grad():
        up, down = found.scores(torch.stack([found.x_TD * (1 + h), found.x_TD * (1 - h)])).tolist()
    slope = float(found.gradient_times_input().sum())
    assert slope == pytest.approx((up - down) / (2 * h), rel=1e-2)


@pytest.mark.parametrize("trunk", ["encoder", "decoder"])
def test_attention_maps_are_distributions_and_change_nothing(trunk):
    found = explainer("classify", trunk, model={"window": [None, 3], "n_kv_heads": 2})
    n = len(found.tokens_T)
    maps = found.maps_LHTT
    assert maps.shape == (2, 4, n, n)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 4, n).double())
    apart = (torch.arange(n)[:, None] - torch.arange(n)[None]).abs()
    assert not maps[1][:, apart >= 3].any() and maps[0][:, apart >= 3].any()
    ahead = torch.ones(n, n).triu(1).bool()
    assert maps[0][:, ahead].any() == (trunk == "encoder")
    learner, inputs = found.learner, found.task.inputs(found.batch(1))
    before = learner.trunk(inputs)
    with observed_attention(learner) as seen:
        assert torch.equal(learner.trunk(inputs), before)
    assert len(seen) == 2
    learner.trunk(inputs)
    assert len(seen) == 2  # the observer is gone


def test_what_is_explained_can_be_chosen_or_is_refused():
    learner, split = build("tag", "encoder")
    words = Explainer(learner.eval(), split.items[1], "2")
    assert words.question.name.endswith("at word 2")
    names = [("tag", odd, "words 1 to") for odd in ("99", "0", "1_0", "\u0661", "1.5", "1" * 5000)]
    names += [("classify", "z", "none of the labels a, b, c")]
    names += [("regress", "z", "none of the scores score"), ("read", "z", "leave --target out")]
    for task, target, sentence in names:
        learner, split = build(task, "encoder")
        with pytest.raises(UserError, match=sentence):
            Explainer(learner.eval(), split.items[1], target)
    for task, trunk in (("embed", "encoder"), ("choose", "encoder"), ("write", "decoder")):
        learner, split = build(task, trunk)
        with pytest.raises(UserError, match=f"objective={task} gives no single number"):
            Explainer(learner.eval(), split.items[0])


def test_what_is_printed_fits_80_columns_and_keeps_the_highest_probabilities():
    chances = {f"a_long_name_of_label_{i}": (i + 1) / 66 for i in range(11)}
    many = Explanation(
        pieces=["▁a\n" * 9] * 40,
        prediction={"label": "x", "probability": 1 / 3, "probabilities": chances, "spans": [[0.5]]},
        question="logit of label x",
        value=0.5,
        attributions={"integrated gradients": [0.25] * 40},
        notes=["A note of many words. " * 9, "x " * 100],
        maps_LHTT=np.zeros((1, 1, 40, 40)),
    )
    lines = told(many)
    assert all(cell_len(text) <= 80 and text.isprintable() for text in lines)
    words = " ".join(" ".join(lines).split())
    assert '"probability": 0.3333' in words and 'label_10": 0.1667' in words
    assert (
        r"▁a\n▁a" in words
        and "label_6" in words
        and "label_5" not in words
        and words.count("+0.250") == 8
    )


def test_the_command_writes_a_page_and_a_picture(tmp_path):
    table(tmp_path / "data", "train", questions(120))
    table(tmp_path / "data", "val", questions(30, 1000))
    run = tmp_path / "run"
    # One evaluation: of several with all labels right the earliest is the best, hardly trained.
    words = ("--train.steps=30", "--eval.every=30", "--optim.lr=3e-3", "--train.precision=bf16")
    finetune(checkpoint("mlm"), tmp_path / "data", run, *words)
    out, figures = tmp_path / "why", tmp_path / "why.json"
    line = "please open a file and return"
    printed = command(
        "explain", str(run), line, f"--out={out}", "--formats=[html, png]", f"--json={figures}"
    )
    words = " ".join(printed.split())
    assert "logit of label file" in words and "attributions miss" in words
    assert all(cell_len(text) <= 80 for text in printed.splitlines() if not text.startswith("/"))
    page = (tmp_path / "why.html").read_text()
    assert page.count("data:image/png;base64,") == 8 and "http" not in page
    assert (tmp_path / "why.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(figures.read_text())
    values = found["attributions"]["integrated gradients"]
    assert len(values) == len(found["tokens"]) == len(found["attributions"]["gradient × input"])
    strongest = found["tokens"][max(range(len(values)), key=values.__getitem__)]
    assert strongest.strip("▁") and found["prediction"]["label"] == "file"
    with pytest.raises(UserError, match="none of the labels error, file, list"):
        command("explain", str(run), line, "--target=poem")
    with pytest.raises(UserError, match="--text has no <mask>"):
        command("explain", str(checkpoint("mlm")), line)
    with pytest.raises(UserError, match="text is empty"):
        command("explain", str(run), '{"text": " "}')


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        ("mlm", "def open(<mask>, name): return"),
        ("clm", "def open(self, name):"),
        ("clm", ""),  # a row of one token
        ("prefix", "def open(self, name): "),
    ],
)
def test_a_pretrained_model_is_asked_for_one_token(objective, text, tmp_path):
    """The number is the log probability that `fill` and `generate` have; attributions add up."""
    run = checkpoint(objective)
    figures = tmp_path / "why.json"
    words = ("--steps=64", f"--json={figures}", f"--out={tmp_path / 'why'}")
    printed = command("explain", str(run), text, *words)
    found = json.loads(figures.read_text())
    saved = open_saved(run)
    if objective == "mlm":
        best = fill(saved, text, top=1)[0][0]
        piece, probability = saved.tokenizer.piece(best["token"]), best["probability"]
    else:
        generator = Generator(saved)
        stem, begin = generator.held(text)
        logits_V = next(generator.logits([generator.prompt_ids(stem)], 1))[0]
        p_V = logits_V.masked_fill(generator.forbidden_at_first(begin), -torch.inf).softmax(dim=-1)
        piece, probability = saved.tokenizer.piece(int(p_V.argmax())), float(p_V.max())
    where = "at the first <mask>" if objective == "mlm" else "behind the text"
    assert found["explained"] == f"log probability of {piece!r} {where}"
    assert found["value"] == pytest.approx(math.log(probability), abs=1e-4)
    assert next(iter(found["prediction"]["guesses"].items())) == (
        piece,
        pytest.approx(probability, abs=1e-5),
    )
    assert "attributions miss" in printed and (tmp_path / "why.html").is_file()
    guess = Guess(saved, text)
    learner = guess.learner(saved).double().requires_grad_(False)
    explainer = Explainer(learner, guess.item, "return")
    integrated = explainer.integrated_gradients(tolerance=1e-3)
    assert abs(integrated.gap) <= 1e-3 * abs(integrated.at_text - integrated.at_baseline)
    first = saved.tokenizer.piece(int(saved.tokenizer.encode(f"{guess.begin}return")[0]))
    assert explainer.question.name == f"log probability of {first!r} {where}"


def test_what_a_pretrained_model_cannot_be_asked_is_refused(tmp_path):
    folder = tmp_path / "span"
    words = ("--objective.name=span", "--model.trunk=encoder_decoder", "--train.steps=1")
    train(folder, *words, "--model.positions.name=rotary", "--schedule.warmup=0")
    encoder, decoder = str(checkpoint("mlm")), str(checkpoint("clm"))
    refused = [
        (encoder, "no mask", (), "--text has no <mask>"),
        (encoder, "a <mask>", ("--task=x",), "leave --task out"),
        (encoder, "a <mask>", ("--target=",), "--target is empty"),
        (decoder, "word " * 500, (), "tokens; the model reads 1 to"),
        (str(folder), "a <mask>", (), "holds an encoder_decoder; explain reads"),
    ]
    for run, text, words, sentence in refused:
        with pytest.raises(UserError, match=sentence):
            command("explain", run, text, *words)
