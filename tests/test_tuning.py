"""What is trained, when and how fast; with ranks, and across a resume."""

import pytest
import torch

from nanolm.config.schema import TuneConfig
from nanolm.distributed.world import World
from nanolm.errors import UserError
from nanolm.training.tuning import depths, freeze, scale_by_depth
from tests.tiny_run import batch_of, bounds, build_learner, build_trainer, in_ranks, tiny_config


def trained(learner):
    return {name for name, p in learner.named_parameters() if p.requires_grad}


def test_depths(make_learner):
    learner = make_learner({"trunk": "encoder", "tied": False}, {"name": "mlm"})
    depth = depths(name for name, _ in learner.named_parameters())
    assert depth["trunk.embedding.weight"] == depth["trunk.positions.table.weight"] == 0
    assert depth["trunk.stack.blocks.1.feed_forward.up.bias"] == 2
    assert depth["trunk.stack.final_norm.weight"] == depth["heads.lm.weight"] == 3


def test_a_decoder_stands_above_the_encoder_that_it_reads(make_learner):
    t5 = {"trunk": "encoder_decoder", "positions": {"name": "t5"}, "tied": False}
    depth = depths(name for name, _ in make_learner(t5, {"name": "span"}).named_parameters())
    places = ("encoder_stack.blocks.0", "encoder_stack.blocks.1", "encoder_stack.final_norm")
    places += ("stack.blocks.0", "stack.blocks.1", "stack.final_norm", "embedding")
    found = [
        {d for name, d in depth.items() if name.startswith(f"trunk.{place}.")} for place in places
    ]
    assert found == [{1}, {2}, {2}, {3}, {4}, {5}, {0}]


@pytest.mark.parametrize(
    ("tune", "chosen"),
    [
        (TuneConfig(), lambda n: True),
        (TuneConfig(what="heads"), lambda n: n.startswith("heads.")),
        (
            TuneConfig(what="last", n_layers=1),
            lambda n: n.startswith(("heads.", "trunk.stack.final_norm", "trunk.stack.blocks.1.")),
        ),
        (
            TuneConfig(what="named", patterns=["*.attention.qkv.*", "*embedding*"]),
            lambda n: n.startswith("heads.") or ".qkv." in n or "embedding" in n,
        ),
    ],
)
def test_what_is_frozen(make_learner, tune, chosen):
    learner = make_learner({"trunk": "encoder"}, {"name": "mlm"})
    names = trained(learner)
    freeze(learner, tune)
    assert trained(learner) == {name for name in names if chosen(name)}


def test_refusals(make_learner):
    with pytest.raises(UserError, match="leaves nothing to train"):
        freeze(make_learner(), TuneConfig(what="heads"))  # its only head is the embedding
    with pytest.raises(UserError, match=r"tune\.patterns: \*nose\* matches no parameter"):
        freeze(make_learner(), TuneConfig(what="named", patterns=["*nose*"]))
    for wrong in ({"what": "named"}, {"patterns": ["*"]}, {"layer_decay": 0.0}, {"n_layers": -1}):
        with pytest.raises(UserError, match=r"^tune\."):
            TuneConfig(**wrong)


def test_learning_rates_by_depth(make_learner):
    learner = make_learner({"trunk": "encoder"}, {"name": "mlm"})
    named = dict(learner.named_parameters())
    half = [name for name in named if "norm" in name]
    optimizer = torch.optim.SGD(
        [
            {"params": [named[n] for n in part], "names": part, "lr": 1.0, "peak_lr": peak}
            for part, peak in ((half, 0.5), ([n for n in named if n not in half], 1.0))
        ]
    )
    scale_by_depth([optimizer], learner, 0.5)
    seen = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameter is named[name]
            seen[name] = group["peak_lr"] / (0.5 if name in half else 1.0)
    assert seen == {name: 0.5 ** (3 - d) for name, d in depths(named).items()}
    assert optimizer.param_groups[0]["peak_lr"] == 1.0


def run(world, folder, tune, stop=4, resume="never"):
    """Weights after `stop` steps of the tiny run, and which of them moved in each step."""
    config = tiny_config(
        folder, tune=tune, resume=resume, train__steps=4, train__global_batch=5,
        train__micro_batch=1,
    )  # fmt: skip
    trainer = build_trainer(config, world, learner=build_learner(dtype=torch.float64))
    learner, moved = trainer.engine.learner, []
    mine = list(range(5))[slice(*bounds(5, world))]
    while trainer.state.done < stop:
        before = {n: p.detach().clone() for n, p in learner.named_parameters()}
        trainer.step([batch_of([row]) for row in mine])
        moved.append(sorted(n for n, p in learner.named_parameters() if (p != before[n]).any()))
    trainer.snapshot.save()
    return {n: p.tolist() for n, p in learner.named_parameters()}, moved


LAST = TuneConfig(what="last", n_layers=1, layer_decay=0.5)
GRADUAL = TuneConfig(unfreeze_every=1)


@pytest.mark.parametrize("tune", [LAST, GRADUAL], ids=["last", "gradual"])
def test_two_ranks_take_the_same_steps(tmp_path, tune):
    weights, moved = run(World(), tmp_path / "1", tune)
    heads = {"heads.lm.bias", "heads.row.bias", "heads.row.weight"}
    blocks = [{n for n in weights if f"blocks.{i}." in n} for i in range(2)]
    levels = [heads, blocks[1], blocks[0], {"trunk.embedding.weight"}]
    if tune is LAST:
        assert all(set(names) <= heads | blocks[1] for names in moved) and len(moved[1]) > 3
    else:
        for step, names in enumerate(moved):
            assert set(names) == set().union(*levels[: step + 1])
    for found, found_moved in in_ranks(2, run, tmp_path / "2", tune):
        assert found_moved == moved
        for name, values in weights.items():
            ours, expected = torch.tensor(found[name]), torch.tensor(values)
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_gradual_unfreezing_resumes_exactly(tmp_path):
    weights, _ = run(World(), tmp_path / "once", GRADUAL)
    run(World(), tmp_path / "twice", GRADUAL, stop=2)
    again, moved = run(World(), tmp_path / "twice", GRADUAL, resume="auto")
    assert again == weights and len(moved) == 2
