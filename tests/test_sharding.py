"""FSDP2: the same losses as DDP, checkpoints for any number of ranks and any strategy, refusals."""

import dataclasses
import json

import pytest
import torch

from nanolm.build import build_learner, build_objective, initialiser, resolve
from nanolm.checkpoint.checkpoints import load_weights
from nanolm.checkpoint.container import read_tensors
from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.config.load import load_config
from nanolm.distributed.sharding import require_shardable, whole
from nanolm.distributed.world import World
from nanolm.errors import UserError
from nanolm.registry import OPTIMIZERS, PEFT, RULES
from nanolm.training.engine import Engine
from tests.conftest import TINY, tiny_tokenizer
from tests.test_resume import assert_same_bits, fit
from tests.tiny_run import build_learner as tiny_learner
from tests.tiny_run import in_ranks, in_turn, tiny_config

STEADY = {"train__ema": 0.9, "train__steps": 20, "run__keep_last": 9}


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["kind"], line["loss"]) for line in lines]


def assert_same_losses(left, right, tolerance=1e-5):
    for a, b in zip(losses(left), losses(right), strict=True):
        assert a[:2] == b[:2] and a[2] == pytest.approx(b[2], abs=tolerance)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [("fsdp", 2), pytest.param("fsdp", 3, marks=SLOW), pytest.param("hsdp", 2, marks=SLOW)],
)
def test_losses_equal_ddp_and_a_kill_is_exact(tmp_path, strategy, ranks):
    """Seven rows on two or three ranks: shares, and numbers of micro-batches, are uneven."""
    options = {"distributed__strategy": strategy, **STEADY}
    if strategy == "hsdp":
        options["distributed__shard_size"] = 1
    whole, broken = (tiny_config(tmp_path / name, **options) for name in ("whole", "broken"))
    stages = [(fit, tiny_config(tmp_path / "ddp", **STEADY)), (fit, whole), (fit, broken, 13)]
    in_ranks(ranks, in_turn, *stages, kill=True)
    assert_same_losses(tmp_path / "ddp", tmp_path / "whole")
    in_ranks(ranks, fit, tiny_config(tmp_path / "broken", resume="auto", **options))
    assert_same_bits(tmp_path / "whole", tmp_path / "broken", "checkpoints/step-00000020")
    files = {p.name for p in (tmp_path / "whole/checkpoints/step-00000020").glob("model*")}
    size = 1 if strategy == "hsdp" else ranks
    assert files == {f"model-{i:05d}-of-{size:05d}.safetensors" for i in range(size)}
    learner = tiny_learner()  # what reads checkpoints of one process reads these
    load_weights(tmp_path / "whole/checkpoints/step-00000020", learner, ema=False)


@pytest.mark.parametrize(
    "changes",
    [{"optim": OPTIMIZERS.get("muon").options(lr=0.02)}, {"train__precision": "fp16"}],
    ids=["muon", "fp16"],
)
def test_muon_and_the_loss_scale_equal_ddp(tmp_path, changes):
    """Each rank keeps its rows of the whole matrix's update; an overflow on one rank is all
    ranks'. Evaluation in fp16 rounds at other places."""
    stages = []
    for strategy in ("ddp", "fsdp"):
        options = STEADY | changes | {"distributed__strategy": strategy}
        stages.append((fit, tiny_config(tmp_path / strategy, **options)))
    in_ranks(2, in_turn, *stages)
    tolerance = 1e-5 if "optim" in changes else 5e-3
    assert_same_losses(tmp_path / "ddp", tmp_path / "fsdp", tolerance)
    folder = tmp_path / "fsdp" / "checkpoints" / "step-00000020"
    scale = json.loads((folder / "trainer.json").read_text())["scaler"].get("scale", 1.0)
    assert scale == json.loads(
        (tmp_path / "ddp" / "checkpoints" / "step-00000020" / "trainer.json").read_text()
    )["scaler"].get("scale", 1.0)


def test_any_strategy_goes_on_from_any_other(tmp_path):
    in_ranks(1, fit, tiny_config(tmp_path / "whole", **STEADY))
    run = tmp_path / "moved"
    for steps, ranks, strategy in ((5, 2, "fsdp"), (10, 3, "fsdp"), (15, 2, "ddp"), (20, 1, "ddp")):
        config = tiny_config(run, resume="auto", distributed__strategy=strategy, **STEADY)
        done = in_ranks(ranks, fit_until, config, steps)
        assert all(answer == steps for answer in done), done
    assert_same_losses(tmp_path / "whole", run)


@pytest.mark.slow
def test_four_then_two_then_three_ranks_take_the_same_batches(tmp_path):
    changes = {"train__steps": 60, "train__ema": 0.9, "run__keep_last": 99}
    in_ranks(4, fit, tiny_config(tmp_path / "whole", **changes))
    for strategy in ("ddp", "fsdp"):
        run, logs = tmp_path / strategy, []
        for steps, ranks in ((20, 4), (40, 2), (60, 3)):
            config = tiny_config(run, resume="auto", distributed__strategy=strategy, **changes)
            logs += zip(*in_ranks(ranks, fit_until_with_log, config, steps))
        rows = [row for shares in logs for _, share in shares for row in share]
        assert rows == list(range(7 * 60))
        assert_same_losses(tmp_path / "whole", run, 1e-4)


def fit_until_with_log(world, config, steps):
    log = fit_until(world, config, steps, with_log=True)
    return [entry for entry in log if entry[0] < steps]


def fit_until(world, config, steps, with_log=False):
    """Trains and leaves as a preempted run does, after `steps` steps."""
    from tests.tiny_run import build_trainer

    log = []
    trainer = build_trainer(config, world, log=log)
    take_step = trainer.step

    def step(micro_batches):
        if trainer.state.done + 1 == steps < config.train.steps:
            trainer.preemption.signal = "SIGTERM"
        return take_step(micro_batches)

    trainer.step = step
    trainer.fit()
    return log if with_log else trainer.state.done


def real_config(**distributed):
    config = load_config(
        ["--model.positions.name=alibi", "--train.activation_checkpointing=full"],
        base={"model": TINY, "data": {"row_length": 16}, "distributed": distributed},
    )
    return resolve(config, tiny_tokenizer())


def meta_and_real(world):
    """A model born on the meta device has the weights of one that was not, and its gradients."""
    config = real_config(strategy="fsdp")
    objective = build_objective(config, tiny_tokenizer())
    born = build_learner(config, objective, meta=True)
    assert all(p.is_meta for p in born.parameters())
    engine = Engine(born, world, config, initialise=initialiser(config))
    plain = build_learner(config, objective)
    assert born.heads["lm"].weight is born.trunk.embedding.weight
    expected = learner_tensors(plain)
    for name, tensor in learner_tensors(born).items():
        assert torch.equal(whole(tensor), expected[name]), name
    tokens = torch.arange(48).view(3, 16) % 512
    batch = {"tokens": tokens, "targets": tokens}
    born.train()
    for number in range(2):  # gradients stay here in the first pass and cross ranks in the second
        with engine.synchronised(number == 1):
            engine.module(batch)["clm"].sum.backward()
    (2 * world.size * plain(batch)["clm"].sum).backward()
    for (name, left), right in zip(born.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(left.grad), right.grad, msg=name, rtol=1e-4, atol=1e-3)
    return "same"


def test_meta_device_and_recomputation(tmp_path):
    assert in_ranks(2, meta_and_real) == ["same", "same"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"optim": OPTIMIZERS.get("adafactor").options()}, "Adafactor"),
        ({"peft": PEFT.get("adalora").options()}, "it scores rows and columns"),
        (
            {
                "optim": OPTIMIZERS.get("muon").options(),
                "distributed__strategy": "fsdp",
                "distributed__cpu_offload": True,
            },
            "gathers whole matrices",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(tmp_path, changes, word):
    config = tiny_config(tmp_path, **{"distributed__strategy": "fsdp"} | changes)
    with pytest.raises(UserError, match=word):
        require_shardable(config)
    with pytest.raises(UserError, match="keeps none"):
        dataclasses.replace(config.distributed, compare_weights_every=3)
    Engine(tiny_learner(), World(), config)  # a world of one has nothing to shard


ALONE = {
    "optim": (OPTIMIZERS, {"adafactor"}),
    "peft": (PEFT, {"adalora"}),
    "train__rule": (RULES, set(RULES.names()) - {"plain"}),
}
"""What a run may name -> (its registry, names that divided weights refuse)."""


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
@pytest.mark.parametrize("key", ALONE)
def test_names_that_are_refused_are_these_and_no_others(tmp_path, key, strategy):
    registry, refused = ALONE[key]
    assert refused < set(registry.names())
    told = key.replace("__", ".")
    for name in registry.names():
        changes = {key: registry.get(name).options(), "distributed__strategy": strategy}
        config = tiny_config(tmp_path, **changes)
        if name not in refused:
            require_shardable(config)
            continue
        sentence = rf"^{told}={name} with {strategy}: .*set distributed\.strategy to ddp"
        with pytest.raises(UserError, match=sentence):
            require_shardable(config)


def test_offloading_is_refused_to_the_optimizer_that_gathers_and_to_no_other(tmp_path):
    for name in set(OPTIMIZERS.names()) - {"adafactor"}:
        changes = {"optim": OPTIMIZERS.get(name).options(), "distributed__strategy": "fsdp"}
        config = tiny_config(tmp_path, **changes, distributed__cpu_offload=True)
        if name != "muon":
            require_shardable(config)
            continue
        with pytest.raises(UserError, match=r"^optim=muon with distributed\.cpu_offload: Muon"):
            require_shardable(config)


def test_a_missing_part_is_told(tmp_path):
    in_ranks(2, fit, tiny_config(tmp_path, distributed__strategy="fsdp", train__steps=5))
    folder = tmp_path / "checkpoints" / "step-00000005"
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="lacks some files of model"):
        read_tensors(folder, "model")


def test_activation_checkpointing_and_compile_change_no_loss(tmp_path):
    """Both are switches of the real learner; the loss after three steps of each is the plain one's
    (compiled blocks round differently)."""
    from tests.prepared import train

    words = ("--train.steps=3", "--schedule.warmup=0", "--run.log_every=1", "--optim.lr=1e-2")
    train(tmp_path / "plain", *words)
    train(tmp_path / "full", *words, "--train.activation_checkpointing=full")
    train(tmp_path / "selective", *words, "--train.activation_checkpointing=selective")
    assert losses(tmp_path / "plain") == losses(tmp_path / "full") == losses(tmp_path / "selective")


@pytest.mark.slow
def test_compiled_blocks_train_and_resume_under_ddp_and_fsdp(tmp_path):
    for strategy in ("ddp", "fsdp"):
        changes = {**STEADY, "distributed__strategy": strategy}
        in_ranks(2, fit, tiny_config(tmp_path / strategy, **changes))
        compiled = tiny_config(tmp_path / f"{strategy}c", train__compile=True, **changes)
        in_ranks(2, fit, compiled)
        assert_same_losses(tmp_path / strategy, tmp_path / f"{strategy}c", 1e-4)
