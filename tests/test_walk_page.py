"""What `nanolm walk` writes down: the page and the terminal show the stops as they are, and the
tables and sentences of a stop say what its figures say."""

import html
import re

import pytest
import torch
from rich.console import Console

from nanolm.data.tokenizer import Tokenizer
from nanolm.distributed.world import World
from nanolm.saved import read_config
from nanolm.tools.replay import replay, trainer_before
from nanolm.tools.walk.page import page
from nanolm.tools.walk.place import Place
from nanolm.tools.walk.run import walk
from nanolm.tools.walk.stop import Column, Stop, printable, spaced
from nanolm.tools.walk.stops import AROUND, CHOICES, HIDDEN_KEYS, KEYS
from nanolm.tools.walk.terminal import show
from tests.prepared import train

STOPS = [
    Stop(name="none <b>", says="a & b", places=(Place("a.py", 3, "f"), Place("b.py", 4, "<g>"))),
    Stop(
        name="some",
        says="two\nlines",
        places=(Place("c.py", 5, "h"),),
        columns=(Column(title="n&o"), Column(title="word", number=False), Column(title="p")),
        rows=(("1", "<mask>", "0.5"), ("2", '"&"', "0.25"), ("3", "▁", "0.125")),
    ),
]


def texts(pattern, text):
    return [html.unescape(found) for found in re.findall(pattern, text, re.DOTALL)]


def test_the_page_shows_stops_in_order_and_every_cell_in_its_column():
    written = page("a <title>", STOPS)
    assert texts("<h1>(.*?)</h1>", written) == texts("<title>(.*?)</title>", written)
    assert texts("<h1>(.*?)</h1>", written) == ["a <title>"]
    assert all(tag not in written for tag in ("<mask>", "<b>", "<g>", "h1><title"))
    assert texts("<h2>(.*?)</h2>", written) == [stop.name for stop in STOPS]
    for stop, item in zip(STOPS, re.findall("<li>(.*?)</li>", written, re.DOTALL), strict=True):
        assert texts("</h2><p>(.*?)</p>", item) == [stop.says]
        assert texts("<code>(.*?)</code>", item) == [str(place) for place in stop.places]
        head, *body = re.findall("<tr>(.*?)</tr>", item) or [""]
        assert texts("<th[^>]*>(.*?)</th>", head) == [column.title for column in stop.columns]
        assert [texts("<td[^>]*>(.*?)</td>", row) for row in body] == [*map(list, stop.rows)]
        for row in [head, *body] if stop.rows else []:
            kinds = ['class="number"' in cell for cell in re.findall("<t[hd]([^>]*)>", row)]
            assert kinds == [column.number for column in stop.columns]


def test_the_terminal_shows_them_too():
    console = Console(width=80)
    with console.capture() as captured:
        show(console, "a <title>", STOPS)
    out = captured.get()
    places = [out.index(text) for stop in STOPS for text in (stop.name, *map(str, stop.places))]
    assert places == sorted(places)
    lines = [
        next(line for line in out.splitlines() if re.search(r"\s+".join(map(re.escape, row)), line))
        for row in STOPS[1].rows
    ]
    ends = [line.index(row[2]) + len(row[2]) for line, row in zip(lines, STOPS[1].rows)]
    assert len(set(ends)) == 1  # numbers end below each other


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{kind: a run of five steps with a checkpoint after the third}."""
    folder = tmp_path_factory.mktemp("walks")
    words = ("--train.steps=5", "--run.checkpoint_every=3", "--schedule.warmup=0")
    clm = ("--train.micro_batch=4", "--model.window=[9]", "--model.n_kv_heads=2")
    train(folder / "clm", *words, *clm)
    train(folder / "mlm", *words, "--objective.name=mlm", "--model.trunk=encoder")
    return folder


@pytest.mark.parametrize("kind", ["clm", "mlm"])
def test_tables_and_sentences_say_what_the_figures_say(runs, kind):
    folder, config = runs / kind, read_config(runs / kind)
    taken = walk(folder, config, World(), layer=1, head=1)
    told = {stop.name: stop for stop in taken.stops}
    tokenizer = Tokenizer.load(next(folder.glob("checkpoints/step-*")))
    piece = lambda index: printable(tokenizer.piece(index))  # noqa: E731

    change, ids = taken.stops[3], told["ids"].figures["ids"]
    reads, at = change.figures["reads"], change.figures["position"]
    assert [int(row[0]) for row in change.rows] == list(range(at - AROUND, at + AROUND + 1))
    for place, read, asked in change.rows:
        t = int(place)
        assert read == piece(reads[t])
        if kind == "clm":
            assert asked == piece(ids[t + 1])
        else:  # a masked token may be left as it is
            assert asked in ("", piece(ids[t])) and (asked or reads[t] == ids[t])
    assert change.rows[AROUND][2] == piece(change.figures["target"]) in change.says

    scores = told["scores"].figures
    shown = [int(row[0]) for row in told["scores"].rows]
    seen = [s for s, score in enumerate(scores["masked"]) if score is not None]
    largest = sorted(seen, key=lambda s: -scores["weights"][s])[:KEYS]
    unseen = sorted(set(range(len(reads))) - set(seen), key=lambda s: -scores["scores"][s])
    assert shown == sorted(largest + unseen[:HIDDEN_KEYS])
    assert f"it sees {len(seen)} of {len(reads)} keys" in told["scores"].says
    for s, word, score, after, weight in told["scores"].rows:
        masked = scores["masked"][int(s)]
        assert word == piece(reads[int(s)]) and score == f"{scores['scores'][int(s)]:.3f}"
        assert after == ("-inf" if masked is None else f"{masked:.3f}")
        assert weight == f"{scores['weights'][int(s)]:.4f}"

    logits_V, logits = taken.recording.prediction.logits_V, told["logits"]
    share_V, target = logits_V.double().softmax(-1), change.figures["target"]
    assert logits.figures["rank"] == 1 + int((logits_V > logits_V[target]).sum())
    assert logits.figures["p"] == pytest.approx(float(share_V[target]))
    said = f"number {logits.figures['rank']} with p = {logits.figures['p']:.4f}"
    assert said in logits.says and len(logits.rows) == CHOICES
    for place, index in enumerate(logits_V.topk(CHOICES).indices.tolist()):
        words = (piece(index), f"{logits_V[index]:.3f}", f"{share_V[index]:.4f}")
        assert logits.rows[place] == (str(place + 1), *words)


@pytest.mark.parametrize("kind", ["clm", "mlm"])
def test_vectors_counts_and_the_move_are_those_of_the_step_itself(runs, kind, tmp_path):
    folder, config = runs / kind, read_config(runs / kind)
    taken = walk(folder, config, World())
    told, seen = {stop.name: stop for stop in taken.stops}, taken.recording
    trainer, _ = trainer_before(taken.step, config, folder, World(), tmp_path)
    batches, learner = replay(trainer, taken.step), trainer.engine.learner
    inputs = learner.objective.inputs(batches[0].tensors)
    with torch.no_grad():
        torch.testing.assert_close(seen.x_BTD, learner.trunk.embed(inputs)[0])
        torch.testing.assert_close(seen.hidden_BTD, learner.trunk(inputs))
    first = " ".join(f"{value:.3f}" for value in seen.x_BTD[0, 0, :4].tolist())
    assert told["x"].says.endswith(f"the first begins {first}")
    assert f"after {config.model.n_layers} blocks" in told["hidden"].says
    (count,) = told["loss"].figures["counts"].values()
    assert count == sum(sum(batch.counts.values()) for batch in batches)
    assert (
        len(batches) == (2 if kind == "clm" else 1)
        and f"over {count:,} targets" in told["loss"].says
    )
    before = torch.cat([p.detach().flatten().clone() for p in learner.parameters()])
    trainer.step(batches)
    after = torch.cat([p.detach().flatten() for p in learner.parameters()])
    moved = float((after - before).norm() / before.norm())
    assert told["step"].figures["moved"] == pytest.approx(moved, rel=1e-4)


def test_the_indentation_of_a_row_is_seen_wherever_the_line_is_broken():
    assert spaced("a b  c\n    d\t e ") == "a b▁▁c\\n▁▁▁▁d\\t e "
    assert not re.search(r"\s{2,}", spaced("if x:\n        return  {'a':   1}"))
