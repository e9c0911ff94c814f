"""Rules that wrap rules: what each adds up to, nested, over micro-batches and over ranks."""

import functools

import pytest
import torch
import torch.nn.functional as F

from nanolm import cli
from nanolm.build import build_learner, build_stream
from nanolm.config.load import load_config
from nanolm.distributed.world import World
from nanolm.errors import UserError
from nanolm.objectives.clm import Clm
from nanolm.peft.base import attach
from nanolm.rules.base import Muted, Wrapped
from nanolm.saved import open_saved
from nanolm.training.batch import MicroBatch
from nanolm.training.engine import Engine, RuleEngine
from nanolm.training.gradient import Backward, build_rule
from nanolm.training.loader import Loader
from tests.test_imports import MODULES
from tests.tiny_run import bounds, in_ranks

ROWS, T, V = 5, 8, 64
MODEL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_length": 16, "vocab_size": V}
WIDE = MODEL | {"vocab_size": 512}  # a vocabulary that the tiny tokenizer fits
LONG = MODEL | {"max_length": 32}


def config_of(rule, **model):
    base = {"model": MODEL | model, "data": {"row_length": T}, "train": {"rule": rule}}
    return load_config([], base=base)


def learner_of(config, dtype=torch.float64):
    learner = build_learner(config, Clm(config.objective, config, None)).to(dtype)
    with torch.no_grad():  # far from uniform, so that gradients are not tiny
        for parameter in learner.parameters():
            parameter.mul_(1 + 4 * (parameter.ndim == 2))
    return learner


def batch_of(rows):
    """Rows with a different number of targets each."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, V, (ROWS, T + 1), generator=generator)[list(rows)]
    targets = tokens[:, 1:].clone()
    for index, row in enumerate(rows):
        targets[index, : row + 1] = -100
    tensors = {"tokens": tokens[:, :-1], "targets": targets}
    return MicroBatch(tensors, {"clm": int((targets >= 0).sum())}, torch.tensor(list(rows)).numpy())


def gradient(world, rule, micro_batch, model=None, train=False, peft=None):
    """{name: gradient}, and what was logged, of one step of the rule."""
    config = config_of(rule, **(model or {}))
    learner = learner_of(config).train(train)
    if peft is not None:
        attach(learner, load_config([], base={"peft": {"name": peft}}).peft)
    engine = Engine(learner, world, config)
    mine = list(range(ROWS))[slice(*bounds(ROWS, world))]
    batches = [batch_of(mine[i : i + micro_batch]) for i in range(0, len(mine), micro_batch)]
    counts = dict(zip(["clm"], world.all_sum([sum(b.counts["clm"] for b in batches)]), strict=True))
    engine.warm_up_ddp(batches[0], {"clm": 1.0})
    torch.manual_seed(0)
    backward = Backward({"clm": 1.0}, counts)
    build_rule(config.train.rule)(engine, batches, backward)
    sums = world.all_sum([float(backward.sums["clm"]), float(backward.seen["clm"])])
    found = {n: p.grad.tolist() for n, p in learner.named_parameters() if p.grad is not None}
    return found, sums[0] / sums[1], sorted(backward.sums)


RULES = {
    "fgm": {"name": "fgm", "epsilon": 0.5},
    "pgd": {"name": "pgd", "epsilon": 0.5, "step_size": 0.3, "ascents": 3},
    "freelb": {"name": "freelb", "epsilon": 0.5, "step_size": 0.3, "ascents": 3, "start": 0.0},
    "rdrop": {"name": "rdrop", "alpha": 2.0},
    "nested": {
        "name": "fgm",
        "epsilon": 0.5,
        "inner": {"name": "rdrop", "inner": {"name": "pgd", "step_size": 0.2, "ascents": 2}},
    },
}


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


def agree(answers, expected):
    whole, loss, logged = expected
    for found, found_loss, found_logged in answers:
        assert found_logged == logged and found.keys() == whole.keys()
        assert found_loss == pytest.approx(loss, abs=1e-12)
        for key, values in whole.items():
            torch.testing.assert_close(exact(found[key]), exact(values), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", RULES)
def test_micro_batches_change_nothing(name):
    agree([gradient(World(), RULES[name], 2)], gradient(World(), RULES[name], ROWS))


ADAPTERS = ("lora", "dora", "adalora", "adapter", "prefix", "prompt", "ia3", "bitfit")


def several(world, rules, micro_batch):
    plain = {"name": "plain"}
    return [
        *(gradient(world, rule, micro_batch, model=WIDE) for rule in rules),
        *(gradient(world, plain, micro_batch, model=LONG, peft=name) for name in ADAPTERS),
    ]


def test_ranks_change_nothing(teacher):
    """Two ranks, uneven counts: the gradient of one; DDP finds no unused weight of an adapter."""
    rules = [RULES["nested"], RULES["freelb"], *two_of_the_rules(teacher)]
    whole = several(World(), rules, ROWS)
    for answers in in_ranks(2, several, rules, 1):
        for answer, expected in zip(answers, whole, strict=True):
            agree([answer], expected)


def loss_at(learner, delta=None):
    """Mean loss of all rows with a perturbation of the embeddings, written out."""
    tensors = batch_of(range(ROWS)).tensors
    embedding = learner.trunk.embedding
    hook = embedding.register_forward_hook(lambda m, i, out: out if delta is None else out + delta)
    term = learner(tensors)["clm"]
    hook.remove()
    return term.sum / term.count


def unit(x_BTD):
    return x_BTD / x_BTD.flatten(1).norm(dim=1)[:, None, None]


def written_out(name):
    """The gradient of FGM, PGD and FreeLB as their papers' algorithms say, one whole batch."""
    learner = learner_of(config_of({"name": "plain"}))
    delta = torch.zeros(ROWS, T, 16, dtype=torch.float64, requires_grad=True)
    slope = lambda d: torch.autograd.grad(loss_at(learner, d), d)[0]  # noqa: E731
    ball = lambda d: unit(d) * d.flatten(1).norm(dim=1).clamp(max=0.5)[:, None, None]  # noqa: E731
    if name == "fgm":
        delta = (0.5 * unit(slope(delta))).detach()
        total = loss_at(learner) + loss_at(learner, delta)
    elif name == "pgd":
        for _ in range(3):
            delta = ball(delta + 0.3 * unit(slope(delta))).detach().requires_grad_()
        total = loss_at(learner) + loss_at(learner, delta.detach())
    else:
        total = 0.0
        for _ in range(3):
            total = total + loss_at(learner, delta.detach()) / 3
            delta = ball(delta + 0.3 * unit(slope(delta))).detach().requires_grad_()
    total.backward()
    return {n: p.grad for n, p in learner.named_parameters()}


@pytest.mark.parametrize("name", ["fgm", "pgd", "freelb"])
def test_adversarial_rules_are_the_papers_algorithms(name):
    found, *_ = gradient(World(), RULES[name], ROWS)
    plain, *_ = gradient(World(), {"name": "plain"}, ROWS)
    for key, expected in written_out(name).items():
        torch.testing.assert_close(exact(found[key]), expected, rtol=0, atol=1e-10)
    assert found != plain


def test_documents_of_a_packed_row_are_perturbed_apart():
    from nanolm.rules.adversarial import Perturbation

    gradient_BTD = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0, 0, 1, 1, 1, -1], [2, 3, 3, 3, 3, 3]])
    batch = MicroBatch({"documents": documents}, {}, None)
    lengths = Perturbation(batch).lengths(gradient_BTD)
    assert lengths.shape == (2, 6, 1)
    torch.testing.assert_close(lengths[0, 2, 0], gradient_BTD[0, 2:5].norm())
    torch.testing.assert_close(lengths[1, 5, 0], gradient_BTD[1, 1:].norm())


def test_rdrop_is_the_mean_loss_and_the_divergence_of_two_passes():
    model = {"dropout": 0.3}
    found, loss, logged = gradient(World(), RULES["rdrop"], ROWS, model=model, train=True)
    assert logged == ["accuracy", "clm", "clm_rdrop", "nll"]
    learner = learner_of(config_of({"name": "plain"}, **model)).train()
    batch = batch_of(range(ROWS))
    keep = batch.tensors["targets"] >= 0
    torch.manual_seed(0)
    losses, logs = [], []
    for _ in range(2):
        hidden = learner.trunk(learner.objective.inputs(batch.tensors))
        logits = learner.heads["lm"](hidden[keep])
        losses.append(F.cross_entropy(logits, batch.tensors["targets"][keep]))
        logs.append(logits.log_softmax(-1))
    kl = functools.partial(F.kl_div, reduction="batchmean", log_target=True)
    total = sum(losses) / 2 + 2.0 * (kl(logs[0], logs[1]) + kl(logs[1], logs[0])) / 2
    total.backward()
    assert loss == pytest.approx(float(sum(losses).detach()) / 2)
    for name, parameter in learner.named_parameters():
        # The divergence is computed in float32.
        torch.testing.assert_close(exact(found[name]), parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory):
    """Two steps of pretraining: a run to learn from, and to remember."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    keys = {f"model.{key}": value for key, value in WIDE.items()}
    keys |= {
        "data.path": corpus, "data.row_length": T, "train.steps": 2, "train.global_batch": 4,
        "run.dir": run, "run.device": "cpu", "run.wandb.mode": "disabled", "eval.batches": 1,
    }  # fmt: skip
    cli.main(["train", *(f"--{key}={value}" for key, value in keys.items())])
    return str(run)


def two_of_the_rules(teacher):
    return [
        {"name": "distill", "teacher": teacher, "weight": 0.3, "inner": {"name": "rdrop"}},
        {"name": "replay", "base": teacher, "rows": 3, "weight": 0.7, "inner": {"name": "fgm"}},
    ]


def test_replay_inside_a_rule_that_compares_probabilities_is_refused(teacher):
    """In a sentence that names the order in which they go together, which then works."""
    inner = {"name": "replay", "base": teacher, "rows": 3}
    for outer in ({"name": "rdrop"}, {"name": "distill", "teacher": teacher}):
        with pytest.raises(UserError, match=r"let it wrap that rule: train.rule.name=replay"):
            gradient(World(), outer | {"inner": inner}, 2, model=WIDE)
        gradient(World(), inner | {"inner": outer}, 2, model=WIDE)


def test_an_engine_of_a_rule_has_all_that_a_rule_may_ask_of_one():
    config = config_of({"name": "plain"})
    engine = Engine(learner_of(config), World(), config)
    asked = [name for name in vars(RuleEngine) if not name.startswith("_")]
    assert {"learner", "world", "progress", "local", "move", "precision"} <= set(asked)
    for shown in (Wrapped(engine), Muted(Wrapped(engine))):
        for name in asked:
            assert callable(getattr(engine, name)) == callable(getattr(shown, name))
            if not callable(getattr(engine, name)):
                assert getattr(shown, name) is getattr(engine, name)
        moved, plain = shown.move(batch_of([0, 1])), engine.move(batch_of([0, 1]))
        assert all(torch.equal(moved[name], plain[name]) for name in plain)
        for ask in ("__call__", "local"):
            own, others = (getattr(e, ask)(batch_of([0, 1]))["clm"] for e in (engine, shown))
            assert torch.equal(own.sum, others.sum)
        with pytest.raises(AttributeError):
            _ = shown.warm_up_ddp


def test_nothing_stands_in_for_what_it_does_not_name():
    """A proxy that hands every name on is typed as what it is not; each is a class or Protocol."""
    for name, path in MODULES.items():
        assert "def __getattr__" not in path.read_text(encoding="utf-8"), name


def test_distillation_is_the_weighed_loss_and_divergence(teacher):
    rule = {"name": "distill", "teacher": teacher, "temperature": 3.0, "weight": 0.3}
    found, _, logged = gradient(World(), rule, 2, model=WIDE)
    assert logged == ["accuracy", "clm", "clm_distill", "nll"]
    learner, batch = learner_of(config_of({"name": "plain"}, **WIDE)), batch_of(range(ROWS))
    taught = open_saved(teacher, phase="train").learner.double()
    keep = batch.tensors["targets"] >= 0
    logits, wisdom = (
        one.heads["lm"](one.trunk(learner.objective.inputs(batch.tensors))[keep])
        for one in (learner, taught)
    )
    entropy = F.cross_entropy(logits, batch.tensors["targets"][keep])
    p, q = (wisdom / 3).softmax(-1).detach(), (logits / 3).log_softmax(-1)
    total = 0.7 * entropy + 0.3 * 9 * (p * (p.log() - q)).sum(-1).mean()
    total.backward()
    for name, parameter in learner.named_parameters():
        torch.testing.assert_close(exact(found[name]), parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("outer", ["distill", "rdrop"])
def test_nested_rules_that_compare_probabilities_learn_from_the_teacher(teacher, outer):
    """Without dropout both passes of R-Drop are one, and what is left is the distillation."""
    taught = {"name": "distill", "teacher": teacher, "weight": 0.3}
    inner = {"distill": taught | {"inner": {"name": "rdrop"}}}
    rule = inner.get(outer, {"name": "rdrop", "inner": taught})
    found, loss, _ = gradient(World(), rule, 2, model=WIDE)
    alone, expected, _ = gradient(World(), taught, 2, model=WIDE)
    assert loss == pytest.approx(expected) and found.keys() == alone.keys()
    for name, values in alone.items():
        torch.testing.assert_close(exact(found[name]), exact(values), rtol=1e-4, atol=1e-6)


def test_replay_adds_the_loss_of_the_steps_own_rows(teacher):
    rule = {"name": "replay", "base": teacher, "rows": 3, "weight": 0.7}
    found, loss, logged = gradient(World(), rule, ROWS, model=WIDE)
    assert logged == ["accuracy", "clm", "nll", "replay_accuracy", "replay_clm", "replay_nll"]
    saved = open_saved(teacher, phase="train")
    objective = saved.learner.objective
    stream = build_stream(saved.config, objective, "train")
    rows = next(iter(Loader(stream, objective, global_batch=3, micro_batch=3)))[0]
    learner, batch = learner_of(config_of({"name": "plain"}, **WIDE)), batch_of(range(ROWS))
    task, kept = (learner(b.tensors)["clm"] for b in (batch, rows))
    assert loss == pytest.approx(float(task.sum.detach() / task.count))
    (task.sum / task.count + 0.7 * kept.sum / kept.count).backward()
    for name, parameter in learner.named_parameters():
        torch.testing.assert_close(exact(found[name]), parameter.grad, rtol=0, atol=1e-10)


def test_what_cannot_be_wrapped_is_refused():
    inner = {"name": "fgm", "inner": {"name": "fgm", "inner": {"name": "fgm"}}}
    with pytest.raises(UserError, match="nests three rules at most"):
        config_of({"name": "fgm", "inner": inner})
    with pytest.raises(UserError, match="needs a teacher"):
        build_rule(config_of({"name": "distill"}).train.rule)
    with pytest.raises(UserError, match=r"needs train\.rule\.base"):
        build_rule(config_of({"name": "replay"}).train.rule)
    with pytest.raises(UserError, match=r"train\.rule\.epsilon=0"):
        config_of({"name": "fgm", "epsilon": 0})
