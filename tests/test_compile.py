"""train.compile: blocks that compute the same share one graph, and no block is left uncompiled.

The backend here counts and runs a graph as it was traced, so results are those of eager to the bit.
"""

import pytest
import torch
from torch import nn

from nanolm.build import build_learner, build_objective, initialiser, resolve
from nanolm.config.load import load_config
from nanolm.distributed.sharding import whole
from nanolm.distributed.world import World
from nanolm.peft.base import attach
from nanolm.training.batch import MicroBatch
from nanolm.training.engine import Engine
from tests.conftest import TINY, tiny_tokenizer
from tests.tiny_run import in_ranks

N = 12  # layers: more than the eight graphs of one piece of code that torch allows by itself
ROTARY = {"positions": {"name": "rotary"}}
ENCODER = {"trunk": "encoder"}
MODELS = {
    "gpt2": {"feed_forward": "gelu_tanh"},
    "llama": ROTARY | {"norm": "rmsnorm", "feed_forward": "swiglu", "n_kv_heads": 2, "bias": False},
    "bert": ENCODER | {"norm_position": "post", "embedding_norm": True},
    "modernbert": ENCODER
    | {
        "feed_forward": "geglu",
        "norm_bias": False,
        "embedding_norm": True,
        "positions": {"name": "rotary", "base": [160000.0, 10000.0, 10000.0]},
        "window": [None, 9, 9],
        "bias": False,
    },
    "alibi": {"positions": {"name": "alibi"}},
    "t5": {"positions": {"name": "t5"}},
    "sinusoidal": {"positions": {"name": "sinusoidal"}},
    "none": {"positions": {"name": "none"}},
}
KINDS = {"modernbert": 3}
"""Of blocks: the first has no norm before its attention, the others see all tokens or a window."""


class Graphs:
    """A backend that counts graphs and how often one of them runs."""

    def __init__(self):
        self.compiled = self.run = 0

    def __call__(self, graph, inputs):
        self.compiled += 1

        def counted(*arguments):
            self.run += 1
            return graph.forward(*arguments)

        return counted


@pytest.fixture
def graphs(monkeypatch):
    """What blocks are compiled by, from nothing, with torch's own limit."""
    backend, by_default = Graphs(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda block: by_default(block, backend=backend))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield backend
    torch._dynamo.reset()


def engine(model, *, compiled=True, recompute="none", peft=None, dropout=0.1):
    """An engine of N layers in training mode, with the same weights every time."""
    objective = {"name": "mlm" if model.get("trunk") == "encoder" else "clm"}
    train = {"compile": compiled, "activation_checkpointing": recompute}
    base = {
        "model": TINY | model | {"n_layers": N, "dropout": dropout, "attention_dropout": dropout},
        "objective": objective,
        "data": {"row_length": 32},
        "train": train,
        "peft": {"name": peft or "none"},
    }
    config = resolve(load_config([], base=base), tiny_tokenizer())
    learner = build_learner(config, build_objective(config, tiny_tokenizer())).train()
    if peft:
        attach(learner, config.peft)
    return Engine(learner, World(), config)


def batch(engine, rows=3, length=32):
    generator = torch.Generator().manual_seed(rows * length)
    tokens = torch.randint(512, (rows, length), generator=generator)
    index = torch.tensor([1, 4, 5])
    clm = {"tokens": tokens, "targets": tokens.roll(-1, 1)}
    mlm = {"tokens": tokens, "masked_index": index, "masked_targets": tokens.flatten()[index]}
    return MicroBatch(mlm if "mlm" in engine.learner.objective.weights else clm, {}, None)


def step(engine, **shape):
    """(loss, gradients by name) of one batch."""
    engine.learner.zero_grad()
    torch.manual_seed(5)
    terms = engine(batch(engine, **shape))
    (name,) = engine.learner.objective.weights
    terms[name].sum.backward()
    return terms[name].sum.detach(), {
        name: p.grad for name, p in engine.learner.named_parameters() if p.grad is not None
    }


def agree(found, expected):
    loss, gradients = found
    assert torch.equal(loss, expected[0]) and gradients.keys() == expected[1].keys()
    assert all(torch.equal(gradients[name], expected[1][name]) for name in gradients)


@pytest.mark.parametrize("name", MODELS)
def test_twelve_layers_are_one_graph_for_each_kind_of_block(graphs, name):
    expected = step(engine(MODELS[name], compiled=False))
    assert graphs.compiled == 0
    compiled = engine(MODELS[name])
    for passes in (1, 2):
        agree(step(compiled), expected)
        assert (graphs.compiled, graphs.run) == (KINDS.get(name, 1), N * passes)


@pytest.mark.parametrize(
    ("name", "recompute"),
    [  # either way on one kind of block, and kinds that alternate
        *[("llama", "full"), ("llama", "selective"), ("modernbert", "selective")],
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("gpt2", "full"), ("gpt2", "selective"), ("modernbert", "full")]
        ],
    ],
)
def test_checkpointed_blocks_share_their_graphs_too(graphs, name, recompute):
    # Without dropout: a graph that is run as it was traced does not draw the same numbers again.
    expected = step(engine(MODELS[name], compiled=False, dropout=0.0))
    compiled = engine(MODELS[name], recompute=recompute, dropout=0.0)
    for passes in (1, 2):
        agree(step(compiled), expected)
        assert (graphs.compiled, graphs.run) == (KINDS.get(name, 1), N * passes)


@pytest.mark.parametrize(
    "name",
    [
        *("lora", "prefix"),
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("dora", "ia3", "adapter", "adalora", "bitfit")
        ),
    ],
)
def test_adapted_blocks_share_their_graphs_too(graphs, name):
    model = MODELS["gpt2"] | ROTARY
    expected = step(engine(model, compiled=False, peft=name))
    agree(step(engine(model, peft=name)), expected)
    # What enters the first block has no gradient: its graph differs from all others'.
    assert (graphs.compiled, graphs.run) == (2, N)


@pytest.mark.slow
def test_no_block_is_given_up_where_batches_differ(graphs):
    """Training and evaluation, and another number of rows in either: all kinds of block, each with
    all of that, are more graphs than torch allows by itself."""
    compiled = engine(MODELS["modernbert"], dropout=0.0)

    def passes():
        for rows in (3, 2):
            for trains in (True, False):
                compiled.learner.train(trains)
                before = graphs.run
                with torch.set_grad_enabled(trains):
                    compiled(batch(compiled, rows))
                assert graphs.run == before + N, (rows, trains)

    passes()
    known = graphs.compiled
    assert known > 8
    passes()
    assert graphs.compiled == known


def sharded_gradients(world):
    """A compiled, sharded learner with checkpointed blocks has the gradients of a plain one."""
    by_default, tokens = nn.Module.compile, torch.arange(48).view(3, 16) % 512
    nn.Module.compile = lambda block: by_default(block, backend="aot_eager")
    for recompute in ("full", "selective"):
        base = {
            "model": TINY | MODELS["llama"],
            "data": {"row_length": 16},
            "distributed": {"strategy": "fsdp"},
            "train": {"compile": True, "activation_checkpointing": recompute},
        }
        config = resolve(load_config([], base=base), tiny_tokenizer())
        objective = build_objective(config, tiny_tokenizer())
        born, plain = build_learner(config, objective, meta=True), build_learner(config, objective)
        engine = Engine(born.train(), world, config, initialise=initialiser(config))
        batch = {"tokens": tokens, "targets": tokens}
        for number in range(2):  # ranks meet in the second pass
            with engine.synchronised(number == 1):
                engine.module(batch)["clm"].sum.backward()
        (2 * world.size * plain(batch)["clm"].sum).backward()
        for (name, left), right in zip(born.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(whole(left.grad), right.grad, msg=name, rtol=1e-4, atol=1e-3)
    return "same"


@pytest.mark.slow
def test_compiled_checkpointed_blocks_of_two_ranks():
    assert in_ranks(2, sharded_gradients) == ["same", "same"]
