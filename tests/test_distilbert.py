"""Distillation in pretraining: the loss by hand, over micro-batches and ranks, resumed, from layers
of the teacher."""

import dataclasses
import functools
import json
import pathlib
import tempfile

import pytest
import torch
import torch.nn.functional as F

from nanolm.build import build_learner, build_objective, build_stream, build_tokenizer, resolve
from nanolm.checkpoint.checkpoints import locate
from nanolm.checkpoint.container import read_tensors
from nanolm.checkpoint.fewer_layers import load_layers
from nanolm.config.load import load_config
from nanolm.distributed.world import World
from nanolm.errors import UserError
from nanolm.hub.importing import base_of
from nanolm.rules.distilbert import COSINE, SOFT, tokens_of
from nanolm.saved import open_saved
from nanolm.training.batch import MicroBatch
from nanolm.training.engine import Engine
from nanolm.training.gradient import Backward, build_rule
from nanolm.training.loader import Loader
from tests.prepared import SMALL, prepared_corpus, train
from tests.published import write_published
from tests.tiny_run import bounds, in_ranks

ROWS = 6
MLM = ("--objective.name=mlm", "--model.trunk=encoder", "--train.precision=fp32")
WEIGHTS = {"temperature": 3.0, "soft_weight": 1.5, "task_weight": 0.7, "cosine_weight": 0.4}


@functools.cache
def teacher() -> str:
    """A run of three steps with four layers."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="nanolm-teacher-")) / "run"
    words = ("--model.n_layers=4", "--train.steps=3", "--schedule.warmup=0", "--optim.lr=0.02")
    train(folder, *MLM, *words, "--model.dropout=0.1")
    return str(folder)


def config_of(rule, *words):
    argv = [*SMALL, *MLM, f"--data.path={prepared_corpus()}", "--model.dropout=0", *words]
    config = load_config(argv)
    train_config = dataclasses.replace(
        config.train, rule=load_config([], base={"train": {"rule": rule}}).train.rule
    )
    config = dataclasses.replace(config, train=train_config)
    return resolve(config, build_tokenizer(config))


def learner_of(config):
    learner = build_learner(config, build_objective(config, build_tokenizer(config)))
    with torch.no_grad():  # far from uniform, so that gradients are not tiny
        for parameter in learner.parameters():
            parameter.mul_(1 + 4 * (parameter.ndim == 2))
    return learner.eval()


def batches(config, objective, rows):
    """Micro-batches of the chosen rows, one a row."""
    stream = build_stream(config, objective, "train")
    loader = Loader(stream, objective, global_batch=ROWS, micro_batch=1)
    for row, batch in zip(range(ROWS), next(iter(loader)), strict=True):
        if "documents" in batch.tensors:  # a boundary in every row; few have one by themselves
            batch.tensors["documents"][:, 16:] += 1
        if row in rows:
            yield batch


def step(world, rule, scale=1.0, learner=None, words=()):
    """({name: gradient}, {term: mean}) of one step of the rule."""
    config = config_of(rule, *words)
    learner = learner or learner_of(config)
    engine = Engine(learner, world, config)
    mine = range(ROWS)[slice(*bounds(ROWS, world))]
    micro_batches = list(batches(config, learner.objective, mine))
    (count,) = world.all_sum([sum(batch.counts["mlm"] for batch in micro_batches)])
    engine.warm_up_ddp(micro_batches[0], {"mlm": 1.0})
    backward = Backward({"mlm": scale}, {"mlm": count})
    build_rule(config.train.rule)(engine, micro_batches, backward)
    names = ["mlm", SOFT, COSINE]
    sums = world.all_sum([float(backward.sums[name]) for name in names])
    seen = world.all_sum([float(backward.seen[name]) for name in names])
    means = dict(zip(names, [s / n for s, n in zip(sums, seen, strict=True)], strict=True))
    return {n: p.grad.tolist() for n, p in learner.named_parameters()}, means


def rule_of(**keys):
    return {"name": "distilbert", "teacher": teacher(), **WEIGHTS, **keys}


def assert_same(found, expected, rtol=1e-4, atol=1e-6):
    for name, gradient in expected.items():
        torch.testing.assert_close(
            torch.tensor(found[name]), torch.as_tensor(gradient), rtol=rtol, atol=atol
        )


@pytest.mark.parametrize("documents", [False, True])
def test_the_loss_and_its_gradient_are_those_of_the_paper_by_hand(documents):
    """The teacher sees of a row what the student does, documents apart if need be."""
    words = (f"--data.document_mask={str(documents).lower()}",)
    found, means = step(World(), rule_of(), words=words)
    config = config_of(rule_of(), *words)
    learner, taught = learner_of(config), open_saved(teacher(), phase="train").learner
    entropies, divergences, angles = [], [], []
    for batch in batches(config, learner.objective, range(ROWS)):
        tensors = batch.tensors
        inputs = learner.objective.inputs(tensors)
        assert (inputs.mask.documents is not None) == documents
        student, master = (one.trunk(inputs)[0] for one in (learner, taught))
        logits, wisdom = learner.heads["lm"](student), taught.heads["lm"](master).detach()
        entropies.append(
            F.cross_entropy(
                logits[tensors["masked_index"]], tensors["masked_targets"], reduction="none"
            )
        )
        p, q = (wisdom / 3).softmax(-1), (logits / 3).softmax(-1)
        divergences.append(9 * (p * (p / q).log()).sum(-1))
        master = master.detach()
        angles.append(1 - (student * master).sum(-1) / (student.norm(dim=-1) * master.norm(dim=-1)))
    mlm, soft, cosine = (torch.cat(each).mean() for each in (entropies, divergences, angles))
    assert means["mlm"] == pytest.approx(float(mlm.detach()), rel=1e-5)
    assert means[SOFT] == pytest.approx(float(soft.detach()), rel=1e-4)
    assert means[COSINE] == pytest.approx(float(cosine.detach()), rel=1e-5)
    assert len(torch.cat(divergences)) == ROWS * 32 and soft > 0.01 and cosine > 0.01
    (1.5 * soft + 0.7 * mlm + 0.4 * cosine).backward()
    assert_same(found, {n: p.grad for n, p in learner.named_parameters()})


def test_a_student_with_the_teachers_weights_has_nothing_to_learn_from_it():
    student = open_saved(teacher(), phase="train").learner
    found, means = step(World(), rule_of(task_weight=0.0), learner=student)
    assert means["mlm"] > 1
    assert means[SOFT] == 0 and means[COSINE] == pytest.approx(0, abs=1e-6)
    largest = max(float(torch.tensor(gradient).abs().max()) for gradient in found.values())
    assert largest < 1e-5


def test_a_rule_around_it_weighs_all_three_terms():
    whole, half = (step(World(), rule_of(), scale)[0] for scale in (1.0, 0.5))
    assert_same(half, {name: 0.5 * torch.tensor(gradient) for name, gradient in whole.items()})


@pytest.mark.slow
def test_ranks_change_nothing():
    one, means = step(World(), rule_of())
    for found, other in in_ranks(2, step, rule_of()):
        assert_same(found, one)
        assert other == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("outer", ["rdrop", "distilbert"])
def test_it_nests_with_rules_that_ask_for_logits(outer):
    if outer == "rdrop":
        rule = {"name": "rdrop", "inner": rule_of()}
    else:
        rule = rule_of(inner={"name": "rdrop"})
    found, means = step(World(), rule)
    plain, alone = step(World(), rule_of())
    assert means == pytest.approx(alone, rel=1e-5)  # without dropout both passes are one
    assert_same(found, plain, rtol=1e-3, atol=1e-5)


def words_of(run, *words):
    rule = [f"--train.rule.{key}={value}" for key, value in rule_of().items()]
    return [*MLM, *rule, "--model.dropout=0.1", "--schedule.warmup=0", f"--run.dir={run}", *words]


def test_a_resumed_run_is_the_undisturbed_one_and_saves_no_teacher(tmp_path):
    start = [f"--init_from={teacher()}", "--init_layers=[0,3]", "--train.steps=4"]
    train(tmp_path / "whole", *words_of(tmp_path / "whole", *start))
    broken = words_of(tmp_path / "broken", *start, "--run.checkpoint_every=2")
    train(tmp_path / "broken", *broken)
    last = locate(tmp_path / "broken")
    assert last.name == "step-00000004"
    for path in sorted(last.iterdir()):
        path.unlink()
    last.rmdir()
    train(tmp_path / "broken", *broken, "--resume=auto")
    whole, again = (read_tensors(locate(tmp_path / n), "model") for n in ("whole", "broken"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    blocks = {name.split(".")[3] for name in whole if ".blocks." in name}
    assert blocks == {"0", "1"}
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    assert any({SOFT, COSINE} <= set(line) for line in logged if line["kind"] == "train")


def test_layers_of_the_teacher_are_the_start(tmp_path, capsys):
    start = [f"--init_from={teacher()}", "--init_layers=[3,1]", "--train.steps=0"]
    train(tmp_path / "run", *MLM, *start)
    found, source = (read_tensors(locate(p), "model") for p in (tmp_path / "run", teacher()))
    for name, tensor in found.items():
        theirs = name.replace("blocks.0.", "blocks.x.").replace("blocks.1.", "blocks.1.")
        assert torch.equal(tensor, source[theirs.replace("blocks.x.", "blocks.3.")]), name
    assert "weights from" in capsys.readouterr().out


def test_a_published_teacher_with_segments(tmp_path, monkeypatch, capsys):
    """BERT teaches a model without segments, whose vectors are left out, and told."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_published(tmp_path / "bert", "bert")
    hf = f"hf:{tmp_path / 'bert'}"
    folder = base_of(hf)
    saved = open_saved(folder)
    base = {"model": dataclasses.asdict(saved.config.model), "objective": {"name": "mlm"}}
    base["model"] |= {"n_layers": 1, "n_segments": 0}
    base |= {"data": {"row_length": 16}, "train": {"rule": rule_of(teacher=hf)}}
    config = resolve(load_config([], base=base), saved.tokenizer)
    learner = build_learner(config, build_objective(config, saved.tokenizer))
    fresh, left_out = load_layers(folder, learner, [1])
    assert fresh == [] and left_out == ["trunk.segments.weight"]
    engine = Engine(learner, World(), config)
    tokens = torch.randint(5, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    index = torch.tensor([3, 20])
    tensors = {"tokens": tokens, "masked_index": index, "masked_targets": tokens.flatten()[index]}
    batch = MicroBatch(tensors, {"mlm": 2}, torch.arange(2).numpy())
    backward = Backward({"mlm": 1.0}, {"mlm": 2})
    build_rule(config.train.rule)(engine, [batch], backward)
    assert float(backward.seen[SOFT]) == 32 and float(backward.sums[SOFT]) > 0


REFUSED = [
    (["--init_layers=[0,1,2]"], "init_layers names 3 layers and the model has 2"),
    (["--init_layers=[0,4]"], r"names layer 4, and .* has those from 0 to 3"),
    (["--init_layers=[0,-1]"], r"names layer -1, and"),
    (["--init_layers=[0,3]", "--peft.name=lora"], "leave init_layers out"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED)
def test_layers_that_are_not_there_are_refused(words, told, tmp_path):
    with pytest.raises(UserError, match=told):
        train(tmp_path / "run", *MLM, f"--init_from={teacher()}", "--train.steps=1", *words)


def test_a_start_without_a_base_is_refused(tmp_path):
    with pytest.raises(UserError, match="init_layers names layers of init_from, which is not set"):
        train(tmp_path / "run", *MLM, "--init_layers=[0,1]", "--train.steps=1")


UNTAUGHT = [
    ({"teacher": None}, [], "needs a teacher"),
    ({}, ["--model.d_model=16"], "is 32 wide and this model 16.*cosine_weight=0"),
    ({}, ["--model.vocab_size=640"], r"vocabulary of 512 and .* set model.vocab_size=512"),
    ({}, ["--objective.name=clm", "--model.trunk=decoder"], "for masked words alone"),
    ({}, ["--objective.name=mlm_pair", "--model.n_segments=2"], "has no head pair"),
]


@pytest.mark.parametrize(("keys", "words", "told"), UNTAUGHT)
def test_a_teacher_that_does_not_fit_is_refused(keys, words, told, tmp_path):
    rule = {key: value for key, value in rule_of(**keys).items() if value is not None}
    options = [f"--train.rule.{key}={value}" for key, value in rule.items()]
    with pytest.raises(UserError, match=told):
        train(tmp_path / "run", *MLM, *options, "--train.steps=1", *words)


def test_rows_that_are_not_full_are_refused():
    short = {"tokens": torch.ones(2, 4, dtype=torch.int64), "lengths": torch.tensor([4, 2])}
    full = MicroBatch({"tokens": short["tokens"]}, {}, torch.arange(2).numpy())
    assert tokens_of([full, full.blank()]) == 8
    with pytest.raises(UserError, match="means over all tokens of full rows"):
        tokens_of([full, MicroBatch(short, {}, torch.arange(2).numpy())])


def test_another_width_is_taught_without_the_angle(tmp_path):
    options = [f"--train.rule.{key}={value}" for key, value in rule_of(cosine_weight=0.0).items()]
    summary = train(tmp_path / "run", *MLM, *options, "--train.steps=1", "--model.d_model=16")
    assert summary["steps"] == 1
