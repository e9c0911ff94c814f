"""The host never waits for the device inside a step's passes, forward and backward.

Every objective, gradient rule and PEFT method runs here on torch's meta device, with the kernels
that a GPU gets: shapes and devices are real, numbers are not, and no GPU is needed.
"""

import dataclasses

import numpy as np
import pytest
import torch

from nanolm.build import build_learner, build_objective, resolve
from nanolm.config.load import load_config
from nanolm.data.rows import Row
from nanolm.data.tables.files import Table
from nanolm.distributed.world import World
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.splits import make_split
from nanolm.finetune.tasks.multi import PartItem
from nanolm.objectives.base import Term
from nanolm.peft.base import attach
from nanolm.registry import OBJECTIVES, PEFT, RULES
from nanolm.rules import distilbert, distill
from nanolm.training.batch import MicroBatch
from nanolm.training.engine import Engine
from nanolm.training.gradient import Backward, build_rule
from tests.conftest import TINY, tiny_tokenizer
from tests.host_waits import DEVICE, HostWaitsError, no_waits
from tests.test_objectives_tasks import CASES, EXTRA, OWN, RECORDS

X = torch.empty(3, 4, device=DEVICE)
NUMBERS = torch.zeros(3, dtype=torch.int64, device=DEVICE)
WAITS = {
    "tensor": lambda: torch.tensor(3, device=DEVICE),
    "new_tensor": lambda: X.new_tensor([1.0, 2.0]),
    "as_tensor": lambda: torch.as_tensor(3, device=DEVICE),
    "as_tensor_of_tensor": lambda: torch.as_tensor(torch.zeros(()), device=DEVICE),
    "item": lambda: X.sum().item(),
    "int": lambda: int(NUMBERS.max()),
    "bool": lambda: bool(X.sum() > 0),
    "tolist": lambda: X.tolist(),
    "cpu": lambda: X.cpu(),
    "to_host": lambda: X.to("cpu"),
    "to_device": lambda: torch.zeros(3).to(DEVICE),
    "copy": lambda: X.copy_(torch.zeros(3, 4)),
    "nonzero": lambda: X.nonzero(),
    "mask": lambda: X[X > 0],
    "masked_select": lambda: X.masked_select(X > 0),
    "put_mask": lambda: X.index_put((X > 0,), X.sum()),
    "list": lambda: X[:, [0, 1]],
    "array": lambda: X[np.array([0, 1])],
    "unique": lambda: torch.unique(NUMBERS),
    "bincount": lambda: torch.bincount(NUMBERS, minlength=3),
    "repeat_interleave": lambda: X.repeat_interleave(NUMBERS, dim=0),
    "equal": lambda: torch.equal(X, X),
}
GOES_ON = {
    "full": lambda: torch.full((), 3, device=DEVICE),
    "to_device": lambda: torch.zeros(3).to(DEVICE, non_blocking=True),
    "copy": lambda: X.copy_(torch.zeros(3, 4), non_blocking=True),
    "host_scalar": lambda: X + torch.tensor(3),
    "host_alone": lambda: torch.tensor([3]).nonzero().tolist(),
    "index": lambda: X[NUMBERS, NUMBERS],
    "slice": lambda: X[:, 1:].masked_fill(X[:, 1:] > 0, 0.0),
    "where": lambda: torch.where(X > 0, 0.0, X),
    "cast": lambda: X.to(torch.bfloat16).float(),
    "random": lambda: torch.randint(2**62, (1,), device=DEVICE),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_seen(name):
    with pytest.raises(HostWaitsError), no_waits():
        WAITS[name]()


@pytest.mark.parametrize("name", GOES_ON)
def test_what_goes_on_by_itself_is_none(name):
    with no_waits():
        GOES_ON[name]()


def step(config, learner, arrays, rule=None):
    """The passes of one step over two micro-batches, as the update takes them."""
    objective, counts = learner.objective, learner.objective.counts(arrays)
    tensors = {name: torch.from_numpy(np.asarray(values)) for name, values in arrays.items()}
    batch = MicroBatch(tensors, counts, np.arange(2)).to(DEVICE, pin=False)
    engine = Engine(learner.train(), World(device=DEVICE), config)
    backward = Backward(objective.weights, counts)
    with no_waits():
        build_rule(rule or config.train.rule)(engine, [batch, batch], backward)
    trained = [p for p in learner.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.device == DEVICE for p in trained)
    assert set(backward.sums) == set(backward.seen) >= set(objective.weights)


def pretraining(objective, model=None, rule=None, documents=False, recompute="none"):
    """(config, learner, arrays of a batch) of a pretraining objective."""
    base = {
        "model": TINY | {"dropout": 0.1, "attention_dropout": 0.1} | (model or {}),
        "objective": {"name": objective},
        "data": {"row_length": 32, "document_mask": documents},
        "train": {"rule": rule or {"name": "plain"}, "activation_checkpointing": recompute},
    }
    config = resolve(load_config([], base=base), tiny_tokenizer())
    built = build_objective(config, tiny_tokenizer())
    rng = np.random.default_rng(0)
    starts = np.array([0, 9])
    rows = [Row(rng.integers(10, 500, built.span), starts, 0, 0, 0, i) for i in range(4)]
    examples = [built.example(row, rng, lambda number: rows[number]) for row in rows]
    learner = build_learner(config, built, "cuda", meta=True)
    return config, learner.to(DEVICE), built.collate(examples)


def finetuning(task, trunk, pack=True, peft=None, **options):
    """(config, learner, arrays of a batch) of a task."""
    config = task_config(task, trunk, pack, EXTRA.get(task, {}) | options, peft)
    table = Table("records", RECORDS[task], list(range(1, 13)))
    resolved = OBJECTIVES.get(task).build.resolve(config.objective, table)
    config = dataclasses.replace(config, objective=resolved)
    built = build_objective(config, tiny_tokenizer())
    items = make_split("train", table, built, config.data).items
    return config, task_learner(config, built), built.collate(items)


def task_config(task, trunk, pack, options, peft=None):
    # One layer: a second one of the same kind waits where the first does.
    small = {"trunk": trunk, "n_layers": 1, "n_segments": 2, "dropout": 0.1}
    small |= {"positions": {"name": "rotary"}}
    base = {
        "model": TINY | small | OWN.get(trunk, {}),
        "objective": {"name": task, **options},
        "data": {"row_length": 32, "pack": pack},
        "peft": peft or {"name": "none"},
    }
    return resolve(load_config([], schema=TaskConfig, base=base), tiny_tokenizer())


def task_learner(config, objective):
    return build_learner(config, objective, "cuda", meta=True).to(DEVICE)


@pytest.mark.parametrize("count", [3, torch.tensor(3), torch.full((), 3, device=DEVICE)])
def test_a_count_of_a_plug_in_may_lie_on_the_host(count):
    weight = torch.ones(4, device=DEVICE, requires_grad=True)
    batch = MicroBatch({}, {"own": 3}, np.arange(2))
    backward = Backward({"own": 1.0}, {"own": 3})
    with no_waits():
        for _ in range(2):
            backward({"own": Term(weight.sum(), count)}, batch)
    assert backward.seen["own"].device == DEVICE and backward.seen["own"].dtype == torch.float64


ENCODER = {"trunk": "encoder", "positions": {"name": "rotary"}}
LLAMA = {
    "positions": {"name": "rotary"}, "norm": "rmsnorm", "feed_forward": "swiglu", "n_kv_heads": 2,
    "qk_norm": True, "window": [None, 9],
}  # fmt: skip
PRETRAINING = {
    "clm": ("clm", {}),
    "clm llama": ("clm", {"model": LLAMA, "documents": True}),
    "clm alibi": ("clm", {"model": {"positions": {"name": "alibi"}}}),
    "clm t5": ("clm", {"model": {"positions": {"name": "t5"}}}),
    "clm sinusoidal": ("clm", {"model": {"positions": {"name": "sinusoidal"}}}),
    "clm full": ("clm", {"model": LLAMA, "recompute": "full"}),
    "clm selective": ("clm", {"model": LLAMA, "recompute": "selective"}),
    "prefix": ("prefix", {}),
    "mlm": ("mlm", {"model": ENCODER}),
    "mlm documents": ("mlm", {"model": ENCODER, "documents": True}),
    "mlm_pair": ("mlm_pair", {"model": ENCODER | {"n_segments": 2}}),
    "span": ("span", {"model": {"trunk": "encoder_decoder", "positions": {"name": "t5"}}}),
    "permutation": ("permutation", {"model": {"trunk": "two_stream"} | OWN["two_stream"]}),
}


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining(name):
    objective, settings = PRETRAINING[name]
    step(*pretraining(objective, **settings))


@pytest.mark.parametrize(
    ("task", "trunk", "pack"),
    [
        # Rows of one sequence are made by tasks alike for all trunks: an encoder's in `make test`.
        case if case[2] or case[1] == "encoder" else pytest.param(*case, marks=pytest.mark.slow)
        for case in ((*task_and_trunk, pack) for task_and_trunk in CASES for pack in (True, False))
    ],
)
def test_finetuning(task, trunk, pack):
    step(*finetuning(task, trunk, pack))


@pytest.mark.parametrize(
    "options",
    [
        {"class_weights": "balanced", "label_smoothing": 0.1},
        {"class_weights": [1.0, 2.0, 3.0]},
        {"pooling": "cls"},
    ],
)
def test_options_of_classify(options):
    step(*finetuning("classify", "encoder", **options))


def test_several_labels(monkeypatch):
    several = [{"text": r["text"], "label": [r["label"], "a"]} for r in RECORDS["classify"]]
    monkeypatch.setitem(RECORDS, "classify", several)
    step(*finetuning("classify", "encoder", multi_label=True))


def test_several_tasks_with_a_stand_in():
    names = ("classify", "tag", "choose")
    tables = {name: Table("records", RECORDS[name], list(range(1, 13))) for name in names}
    parts = {}
    for name in names:
        own = task_config(name, "encoder", True, EXTRA.get(name, {})).objective
        resolved = OBJECTIVES.get(name).build.resolve(own, tables[name])
        parts[name] = {"objective": dataclasses.asdict(resolved)}
    config = task_config("multi", "encoder", True, {"tasks": parts})
    multi = build_objective(config, tiny_tokenizer())
    items = [
        PartItem(item.record, item.sequences, item.target, item.cut, item.extra, part=name)
        for name, part in multi.parts.items()
        for item in make_split("train", tables[name], part, config.data).items[:4]
    ]
    multi.stand_in(items)
    arrays = multi.collate([item for item in items if item.part != "tag"])
    assert "tag/stand_in" in arrays
    step(config, task_learner(config, multi), arrays)


RULE_CASES = {
    "fgm": {"name": "fgm"},
    "pgd": {"name": "pgd", "ascents": 2},
    "freelb": {"name": "freelb", "ascents": 2},
    "rdrop": {"name": "rdrop"},
    "distill": {"name": "distill", "teacher": "given below"},
    "nested": {"name": "fgm", "inner": {"name": "rdrop"}},
}


@pytest.mark.parametrize("name", RULE_CASES)
def test_rules(name, monkeypatch):
    config, learner, arrays = finetuning("classify", "decoder")
    teacher = task_learner(config, learner.objective)
    monkeypatch.setattr(distill, "open_teacher", lambda path, engine: teacher)
    rule = load_config([], base={"train": {"rule": RULE_CASES[name]}}).train.rule
    step(config, learner, arrays, rule)


@pytest.mark.parametrize("name", ["fgm", "pgd", "freelb"])
def test_adversaries_of_packed_documents(name):
    step(*pretraining("clm", rule=RULE_CASES[name], documents=True))


def test_distillation_in_pretraining(monkeypatch):
    rule = {"name": "distilbert", "teacher": "given below"}
    _, teacher, _ = pretraining("mlm", model=ENCODER)
    monkeypatch.setattr(distilbert, "open_teacher", lambda path, engine: teacher)
    step(*pretraining("mlm", model=ENCODER, rule=rule))


PEFT_CASES = {name: {"name": name} for name in PEFT.names() if name != "none"}
PEFT_CASES["prompt"] = {"name": "prompt", "init": "random", "length": 4}


@pytest.mark.parametrize("name", PEFT_CASES)
def test_peft(name, monkeypatch):
    monkeypatch.setattr("nanolm.peft.base.base_hash", lambda learner: "")  # there are no weights
    config, learner, arrays = finetuning("classify", "encoder", pack=False, peft=PEFT_CASES[name])
    attach(learner, config.peft, heads=["classify"])
    step(config, learner, arrays)


def test_everything_built_in_is_walked_over():
    def built_in(registry):
        return {n for n in registry.names() if registry.get(n).build.__module__[:7] == "nanolm."}

    objectives = {objective for objective, _ in PRETRAINING.values()}
    assert built_in(OBJECTIVES) == objectives | {task for task, _ in CASES} | {"multi"}
    # Replay's passes are those of a pretraining objective beside the task's own.
    assert built_in(RULES) == {*RULE_CASES, "plain", "replay", "distilbert"} - {"nested"}
    assert built_in(PEFT) == {*PEFT_CASES, "none"}
