"""Activation checkpointing: what is computed again in the backward pass, and what is not.

Work is counted, never timed: operators as they run below autograd, launches of a Triton kernel.
"""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nanolm.ops.cpu_bf16
import nanolm.ops.cpu_by_length
from nanolm.build import build_learner, build_objective, resolve
from nanolm.config.load import load_config
from nanolm.distributed.world import World
from nanolm.kernels.attention.call import Call
from nanolm.training.batch import MicroBatch
from nanolm.training.engine import Engine
from tests.conftest import TINY, tiny_tokenizer
from tests.test_objectives_tasks import build, tensors

N = 2  # layers
LLAMA = {
    "positions": {"name": "rotary"}, "norm": "rmsnorm", "feed_forward": "swiglu", "bias": False,
    "n_kv_heads": 2, "n_layers": N, "dropout": 0.1, "attention_dropout": 0.1,
}  # fmt: skip
SMALL = LLAMA | {"d_model": 16, "n_heads": 1, "n_kv_heads": 1, "d_ff": 16}
TRITON = dict.fromkeys(("attention", "norm", "rotary", "glu"), "triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there Triton's interpreter
PRODUCTS = {"aten.mm.default", "aten.addmm.default", "aten.bmm.default"}


class Ran(TorchDispatchMode):
    """Counts the operators that run; what a checkpoint hands out of its store does not run."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[str(operator)] += 1
        return operator(*args, **(kwargs or {}))

    def fused(self):
        """Of attention as one operator, forward."""
        return {
            name: count
            for name, count in self.counts.items()
            if "attention" in name and "backward" not in name
        }

    def dear(self):
        """Of matrix products and attention."""
        return self.fused() | {name: self.counts[name] for name in PRODUCTS}


def engine(recompute, model=LLAMA, kernels=None, precision="fp32", device="cpu"):
    base = {
        "model": TINY | model,
        "data": {"row_length": 8},
        "kernels": kernels or {},
        "train": {"activation_checkpointing": recompute, "precision": precision},
    }
    config = resolve(load_config([], base=base), tiny_tokenizer())
    learner = build_learner(config, build_objective(config, tiny_tokenizer()), device).train()
    return Engine(learner, World(device=torch.device(device)), config)


def rows():
    tokens = torch.randint(512, (2, 8), generator=torch.Generator().manual_seed(2))
    return MicroBatch({"tokens": tokens, "targets": tokens.roll(-1, 1)}, {}, None)


def step(engine, batch):
    """(gradients, what ran)."""
    engine.learner.zero_grad()
    torch.manual_seed(7)
    with Ran() as ran:
        terms = engine(batch)
        sum(terms[name].sum for name in engine.learner.objective.weights).backward()
    return [p.grad for p in engine.learner.parameters()], ran


@pytest.mark.slow
def test_selective_keeps_what_triton_attention_computed():
    batch = rows()
    found = {
        recompute: step(engine(recompute, SMALL, TRITON, device=DEVICE), batch)
        for recompute in ("none", "full", "selective")
    }
    (gradients, plain), (of_full, full), (of_selective, selective) = found.values()
    attention, backward = "nanolm.attention.default", "nanolm.attention_backward.default"
    assert plain.counts[attention] == plain.counts[backward] == N
    assert full.counts[attention] == 2 * N
    assert selective.counts[attention] == selective.counts[backward] == N
    assert selective.dear() == plain.dear() != full.dear()
    for name in ("norm", "rotary", "glu"):  # large and cheap
        name = f"nanolm.{name}.default"
        assert selective.counts[name] == full.counts[name] > plain.counts[name] > 0
    for kept, one, other in zip(gradients, of_full, of_selective, strict=True):
        assert torch.equal(kept, one) and torch.equal(kept, other)


ATTENTION = {
    "sdpa": ({"kernels": {"attention": "sdpa"}}, True),
    "biased": ({"model": LLAMA | {"bias": True}}, True),
    "masked": ({"model": LLAMA | {"window": [5]}, "kernels": {"attention": "sdpa"}}, True),
    "alibi": ({"model": LLAMA | {"positions": {"name": "alibi"}}}, True),
    "wide": ({"precision": "bf16"}, True),
    "reference": ({"kernels": {"attention": "reference"}}, False),
    "softcap": ({"model": LLAMA | {"attention_softcap": 5.0}}, False),
    "dropped": ({"model": LLAMA}, False),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_selective_runs_no_dear_operator_twice(name, monkeypatch):
    """Whatever the kernel of attention is. Where it is one operator (`fused`), that one is kept;
    elsewhere its products are, and the softmax between them is computed again."""
    for module in (nanolm.ops.cpu_bf16, nanolm.ops.cpu_by_length):
        monkeypatch.setattr(module, "multiplies_bf16", lambda: name != "wide")
    settings, fused = ATTENTION[name]
    model = settings.get("model", LLAMA) | ({"attention_dropout": 0.0} if name != "dropped" else {})
    batch, found = rows(), {}
    for recompute in ("none", "full", "selective"):
        found[recompute] = step(engine(recompute, **settings | {"model": model}), batch)
    (gradients, plain), (_, full), (of_selective, selective) = found.values()
    assert sum(plain.fused().values()) == (N if fused else 0)
    assert selective.dear() == plain.dear()
    assert sum(full.dear().values()) > sum(plain.dear().values())
    assert all(map(torch.equal, gradients, of_selective))


def test_selective_keeps_attention_length_by_length():
    ran = {}
    for recompute in ("none", "full", "selective"):
        learner, split = build("classify", "encoder", model={"n_layers": N})
        assert learner.objective.in_line
        learner.trunk.stack.recompute = recompute
        batch, arrays = tensors(learner.objective, split.items)
        with Ran() as counted:
            learner.train()(batch)["classify"].sum.backward()
        ran[recompute] = counted
    assert sum(ran["none"].fused().values()) == N * len(arrays["length_groups"])
    assert ran["selective"].dear() == ran["none"].dear() != ran["full"].dear()


def test_evaluation_computes_nothing_twice():
    """Also where it takes gradients, as an explanation does."""
    ran = []
    for recompute in ("none", "full"):
        quiet = engine(recompute)
        quiet.learner.eval()
        ran.append(step(quiet, rows())[1].counts)
    assert ran[0] == ran[1]


@pytest.mark.slow
def test_a_compiled_block_keeps_the_same(monkeypatch):
    """The compiler sees the checkpoint from inside the block: products are kept as well, and where
    there is dropout, the numbers drawn again are the same."""
    launched, start = collections.Counter(), Call.start

    def counted(call, kernel, *arguments, **options):
        launched[kernel.fn.__name__] += 1
        return start(call, kernel, *arguments, **options)

    monkeypatch.setattr(Call, "start", counted)
    kernels = {"attention": "triton"}
    (expected, _), found = step(engine("none", SMALL, kernels, device=DEVICE), rows()), {}
    for recompute in ("none", "full", "selective"):
        torch._dynamo.reset()
        compiled = engine(recompute, SMALL, kernels, device=DEVICE)
        for block in compiled.learner.trunk.blocks:
            block.compile(backend="aot_eager")
        for _ in range(2):  # the first step compiles, which calls operators too
            launched.clear()
            compiled.learner.zero_grad()
            torch.manual_seed(7)
            with torch.autograd.profiler.profile() as profile:
                compiled(rows())["clm"].sum.backward()
            gradients = [p.grad for p in compiled.learner.parameters()]
            assert all(map(torch.equal, gradients, expected))
        assert launched["attention_query_kernel"] == N
        products = sum(event.count for event in profile.key_averages() if event.key == "aten::mm")
        found[recompute] = (launched["attention_forward_kernel"], products)
    torch._dynamo.reset()
    assert found["none"] == found["selective"] and found["none"][0] == N
    assert found["full"][0] == 2 * N and found["full"][1] > found["none"][1]
