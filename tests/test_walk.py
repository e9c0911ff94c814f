"""`nanolm walk`: what it tells is what the run's own step computed, and where it points is the
function that did it."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nanolm import cli, pretrain
from nanolm.build import build_tokenizer
from nanolm.distributed.world import World
from nanolm.errors import UserError
from nanolm.saved import read_config
from nanolm.tools.replay import replay, trainer_before
from nanolm.tools.walk import recording
from nanolm.tools.walk.place import ROOT, place_of
from nanolm.tools.walk.questions import Question
from nanolm.tools.walk.run import walk
from nanolm.tools.walk.stops import LETTERS
from nanolm.training.batch import MicroBatch
from tests.doors import entered
from tests.prepared import prepared_corpus, train

STEPS, AFTER = 5, 4  # checkpoints after steps 3 and 5, so step 4 is the next of the former
NAMES = ["text", "pieces", "ids", None, "x", "q, k, v", "scores", "hidden", "logits", "loss"]
NAMES += ["gradient", "step"]
KINDS = {
    "clm": ("--objective.name=clm", "--train.micro_batch=4"),
    "mlm": ("--objective.name=mlm", "--model.trunk=encoder"),
    "clm-grouped-window": (
        "--model.n_kv_heads=2",
        "--model.window=[5]",
        "--model.positions.name=alibi",
        "--model.attention_softcap=5.0",
        "--model.logit_softcap=9.0",
        "--data.document_mask=true",
    ),
    "mlm-documents": (
        "--objective.name=mlm",
        "--model.trunk=encoder",
        "--model.positions.name=t5",
        "--data.document_mask=true",
        "--train.micro_batch=3",
    ),
    "prefix": ("--objective.name=prefix",),
}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    runs = {}

    def run(kind):
        if kind not in runs:
            runs[kind] = tmp_path_factory.mktemp("walk") / "run"
            words = (f"--train.steps={STEPS}", "--run.checkpoint_every=3", "--run.log_every=1")
            train(runs[kind], *words, "--schedule.warmup=0", *KINDS[kind])
        return runs[kind]

    return run


def walked(folder, **words):
    return walk(folder, read_config(folder), World(), **words)


def by_name(taken):
    return {stop.name: stop for stop in taken.stops}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_the_run(run_of, kind):
    folder = run_of(kind)
    taken = walked(folder)
    assert taken.step == AFTER and taken.notes[0] == f"from {folder}/checkpoints/step-00000003"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (line,) = [r for r in lines if r["step"] == AFTER and r["kind"] == "train"]
    told = by_name(taken)
    assert told["loss"].figures["loss"] == line["loss"]
    assert told["gradient"].figures["grad_norm"] == line["grad_norm"]
    assert told["step"].figures["lr"] == line["lr"] and told["step"].figures["moved"] > 0
    assert f"{line['loss']:.6f}" in told["loss"].says
    assert told["loss"].figures["ln_V"] == pytest.approx(np.log(512))
    names = [stop.name for stop in taken.stops]
    assert [n for n in names if n not in ("shifted", "masked")] == [n for n in NAMES if n]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shown_reproduces_what_the_run_computed(run_of, kind):
    """The scores, times the values, give the kernel's answer; the logits give the loss; and both
    belong to the first row of the first micro-batch, by a forward pass of their own."""
    folder = run_of(kind)
    taken = walked(folder, layer=1, head=2)
    seen, said = taken.recording.attention, taken.recording.prediction
    assert seen.difference < 1e-6 and seen.out_K.abs().max() > 1e-3
    assert float(seen.weights_S.sum()) == pytest.approx(1, abs=1e-6)
    assert torch.allclose(seen.weights_S, seen.hidden_S.softmax(-1), atol=1e-6)
    visible = seen.hidden_S != -torch.inf
    assert torch.equal(seen.hidden_S[visible], seen.scores_S[visible])
    assert said.nll_again == pytest.approx(said.nll, abs=1e-5)
    trainer, _ = trainer_before(AFTER, read_config(folder), folder, World(), folder / "scratch")
    learner, batch = trainer.engine.learner, replay(trainer, AFTER)[0]
    question = by_name(taken)[taken.stops[3].name].figures
    with torch.no_grad():
        hidden_BTD = learner.trunk(learner.objective.inputs(batch.tensors))
        logits_NV = learner.objective.logits(hidden_BTD, learner.heads, batch.tensors)
        logits_NV = logits_NV[next(iter(learner.objective.weights))]
    targets_N = learner.objective.targets(batch.tensors)
    position, tensors = question["position"], batch.tensors
    if "masked_index" in tensors:
        number = int((tensors["masked_index"] < position).sum())
    else:  # a prefix predicts nothing
        number = int((tensors["targets"][0, :position] != -100).sum())
    loss_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
    assert float(loss_N[number]) == pytest.approx(said.nll, abs=1e-5)
    assert int(targets_N[number]) == question["target"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_row_is_that_of_the_stream(run_of, kind):
    folder = run_of(kind)
    taken = walked(folder)
    config = read_config(folder)
    stream = pretrain.plan(config, build_tokenizer(config)).stream
    row = stream.row((AFTER - 1) * config.train.global_batch)
    told, change = by_name(taken), taken.stops[3]
    ids, reads = told["ids"].figures["ids"], change.figures["reads"]
    assert told["text"].figures["row"] == row.row_id
    if change.name == "shifted":
        assert ids == row.tokens.tolist() and reads == ids[:-1]
        assert change.figures["target"] == ids[change.figures["position"] + 1]
    else:
        assert ids[1:-1] == row.tokens.tolist() and reads != ids and len(reads) == len(ids)
        assert change.figures["target"] == ids[change.figures["position"]]


@pytest.mark.parametrize("kind", KINDS)
def test_each_place_is_a_def_that_the_walk_went_through(run_of, kind):
    folder, taken = run_of(kind), []
    config = read_config(folder)
    gone_through = entered(lambda: taken.append(walk(folder, config, World())))
    places = [place for stop in taken[0].stops for place in stop.places]
    assert all(stop.places for stop in taken[0].stops) and len(places) >= 15
    for place in places:
        line = (ROOT / place.path).read_text(encoding="utf-8").splitlines()[place.line - 1]
        assert re.match(rf"\s*def {place.name.rpartition('.')[2]}\(", line), place
        assert place.name in gone_through[place.path], f"{place} was never called"


def test_a_place_is_found_below_decorators_and_through_partials():
    import functools

    def twice(function):
        @functools.wraps(function)
        def called():
            return function()

        return called

    @twice
    @twice
    def inner():
        pass

    expected = inner.__wrapped__.__wrapped__.__code__
    for function in (inner, functools.partial(inner)):
        place = place_of(function)
        assert place.path == "tests/test_walk.py" and place.name.endswith("inner")
        assert place.line == expected.co_firstlineno + 2
    with pytest.raises(TypeError, match="no Python code"):
        place_of(len)


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("kind", ["clm", "mlm"])
def test_the_command_prints_80_columns_and_a_page_that_needs_nothing(
    run_of, kind, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    folder = run_of(kind)
    capsys.readouterr()  # of the training, if this test is the first that needs the run
    before, page, figures = digests(folder), tmp_path / "walk.html", tmp_path / "walk.json"
    cli.run(["walk", str(folder), f"--html={page}", f"--json={figures}"])
    assert digests(folder) == before
    out, html = capsys.readouterr().out, page.read_text(encoding="utf-8")
    assert max(map(len, out.splitlines())) <= 80
    told = json.loads(figures.read_text())
    taken = walked(folder)
    for stop in taken.stops:
        assert f"<h2>{stop.name}</h2>" in html and stop.name in out
        # No words twice in a row: a sentence that was put together of two halves that overlap.
        assert not re.search(r"\b([a-z]+(?: [a-z]+)+) \1\b", stop.says), stop.says
        for place in stop.places:
            assert str(place) in html and str(place) in out
        assert told[stop.name]["places"] == [str(place) for place in stop.places]
    for letter in set(re.findall(r"\b[A-Z]\b", " ".join(re.findall(r"= \[([^\]]*)", out)))):
        assert f" {letter} " in LETTERS, f"{letter} is explained nowhere"
    assert LETTERS in " ".join(out.split()) and LETTERS.partition("'")[0] in html
    assert not re.search(r"(src|href)=|https?:|@import|<script", html)
    assert "<mask>" not in html and ("&lt;mask&gt;" in html) == (kind == "mlm")


def test_the_model_is_left_as_it_was(run_of, monkeypatch):
    seen = []
    take = recording.record

    def watched(trainer, *rest):
        blocks, head = trainer.engine.learner.trunk.blocks, trainer.engine.learner.heads["lm"]
        before = [block.attention.attend for block in blocks]
        found = take(trainer, *rest)
        seen.append([block.attention.attend for block in blocks] == before)
        seen.append("cross_entropy" not in vars(head))
        seen.append(not blocks[0]._forward_pre_hooks)
        seen.append(not trainer.engine.learner.trunk._forward_hooks)
        return found

    monkeypatch.setattr("nanolm.tools.walk.run.record", watched)
    walked(run_of("clm"))
    assert seen == [True] * 4


def test_a_row_of_one_token_is_recorded_too(run_of):
    """Its only query is attended to by the kernel that also serves a cache."""
    folder = run_of("clm")
    trainer, _ = trainer_before(AFTER, read_config(folder), folder, World(), folder / "scratch")
    (whole, *_) = replay(trainer, AFTER)
    tensors = {name: tensor[:, :1] for name, tensor in whole.tensors.items()}
    rows = whole.row_ids
    batch = MicroBatch(tensors, {name: len(rows) for name in whole.counts}, rows)
    question = Question(position=0, number=0, target=int(tensors["targets"][0, 0]))
    found = recording.record(trainer, [batch], question, layer=1, head=3)
    assert found.attention.shapes["q"] == [len(rows), 1, 4, 8]
    assert found.attention.weights_S.tolist() == [1.0] and found.attention.difference < 1e-6
    assert found.prediction.nll_again == pytest.approx(found.prediction.nll, abs=1e-5)


def test_the_position_can_be_chosen(run_of):
    change = walked(run_of("clm"), position=0).stops[3]
    assert change.figures["position"] == 0
    seen = walked(run_of("clm"), position=0).recording.attention
    assert int((seen.hidden_S != -torch.inf).sum()) == 1 and float(seen.weights_S[0]) == 1


@pytest.mark.parametrize(
    ("kind", "words", "sentence"),
    [
        ("clm", {"position": 999}, "--position 999 of this row predicts nothing; these do: 0, 1"),
        ("mlm", {"position": 0}, "--position 0 of this row predicts nothing; these do: "),
        ("clm", {"layer": 2}, r"layer=2 must lie in \[0, 1\]"),
        ("clm", {"head": -1}, r"head=-1 must lie in \[0, 3\]"),
        ("clm", {"step": 9}, "is one of 5 steps"),
        ("clm", {"step": 0}, "first step of a run is 1"),
    ],
)
def test_what_the_run_does_not_have_is_told_in_a_sentence(run_of, kind, words, sentence):
    with pytest.raises(UserError, match=sentence):
        walked(run_of(kind), **words)


def test_other_objectives_are_refused_by_name(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name, kind in (("span", "model: {trunk: encoder_decoder}\n"), ("classify", "")):
        text = f"{kind}objective: {{name: {name}}}\ndata: {{path: {prepared_corpus()}}}\n"
        (folder / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=f"trains objective={name}, and `nanolm walk` follows"):
            cli.run(["walk", str(folder)])
