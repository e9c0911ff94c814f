"""Segments of a row that hand on their hidden states: as `transformers` reuses them, batch by
batch; what is read, and what gets no gradient."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanolm.build import build_learner, build_objective, build_stream
from nanolm.cli import main
from nanolm.config.load import load_config
from nanolm.errors import UserError
from nanolm.inference.xlnet_names import from_transformers
from nanolm.model.trunk import Inputs
from nanolm.objectives.base import IGNORED
from nanolm.saved import open_saved
from nanolm.tools.estimate import Sizes, activation_bytes, largest, of_streams
from nanolm.training.flops import memory_flops, train_flops_per_token
from nanolm.training.loader import eval_batches
from tests.prepared import train
from tests.test_estimate import kept_bytes
from tests.test_permutation_lm import MODEL, config_of, examples_of, same_runs, tensors_of
from tests.test_permutation_lm import WORDS as RUN
from tests.test_xlnet import (
    BEFORE,
    SEGMENTS,
    SHAPE,
    B,
    P,
    T,
    V,
    close,
    drawn,
    model_config,
    peer,
    some_order,
    their_words,
    two_streams,
)

TEXTS = [drawn(1, V, B, T, seed=10 + n) for n in range(3)]
REUSED = T - 2


def chain(orders, n_memory, **keys):
    """Inputs of one row of three segments."""
    parts = []
    for tokens, (places, order) in zip(TEXTS, orders, strict=True):
        inputs = two_streams(places, order, n_memory, segments_BT=SEGMENTS.expand(B, T))
        parts.append(dataclasses.replace(inputs, tokens_BT=tokens, n_reused=REUSED))
    first, *following = parts
    return dataclasses.replace(first, following=tuple(following), **keys)


ORDERS = [some_order(seed) for seed in (4, 5, 6)]


@pytest.mark.parametrize("n_memory", [5, REUSED, REUSED + 6, 2 * REUSED + 3])
@torch.no_grad()
def test_memory_is_reused_as_transformers_reuses_it(make_learner, n_memory):
    """`reuse_len` and `mem_len` there, which are the paper's: a memory that is longer than a
    segment keeps its newest part of what came before."""
    theirs = peer()
    ours = make_learner(SHAPE, {"name": "permutation"}, row_length=T)
    ours.load_state_dict(from_transformers(model_config(), theirs.state_dict()))
    before = drawn(1, V, B, n_memory, seed=3)
    found = ours.trunk(chain(ORDERS, n_memory, memory_tokens_BM=before)).unflatten(1, (3, T + P))

    theirs.config.mem_len = theirs.transformer.mem_len = n_memory
    theirs.transformer.reuse_len = None
    mems = theirs.transformer(before, token_type_ids=torch.zeros_like(before), use_mems=True).mems
    theirs.transformer.reuse_len = REUSED
    for n, (places, order) in enumerate(ORDERS):
        words = {"token_type_ids": SEGMENTS.expand(B, T), "use_mems": True}
        answer = theirs(TEXTS[n], mems=mems, **words, **their_words(places, order))
        close(ours.heads["lm"](found[:, n, T:]), answer.logits)
        mems = answer.mems


def test_what_is_reused_gets_no_gradient(make_learner):
    ours = make_learner(SHAPE | {"init_std": 0.3}, {"name": "permutation"}, row_length=T)
    embedded = [ours.trunk.embedding(tokens).detach().requires_grad_() for tokens in TEXTS]
    inputs = chain(ORDERS, 9, memory_tokens_BM=BEFORE)
    first, second, third = (
        dataclasses.replace(part, tokens_BT=None, embeddings_BTD=x_BTD, following=())
        for part, x_BTD in zip((inputs, *inputs.following), embedded, strict=True)
    )
    hidden = ours.trunk(dataclasses.replace(first, following=(second, third)))
    (hidden.unflatten(1, (3, T + P))[:, 1] ** 3).sum().backward()
    of_first, of_second, of_third = (x_BTD.grad for x_BTD in embedded)
    assert (of_second != 0).any(dim=-1).all()
    for none in (of_first, of_third):
        assert none is None or (none == 0).all()


@torch.no_grad()
def test_a_segment_reads_the_newest_tokens_of_the_text_before_it(make_learner):
    """Of one block, where a token reaches no further by way of others: the last M of the text, and
    neither <sep> nor <cls>."""
    ours = make_learner(
        SHAPE | {"init_std": 0.3, "n_layers": 1}, {"name": "permutation"}, row_length=T
    )
    inputs = chain(ORDERS, 9, memory_tokens_BM=BEFORE)
    second = inputs.following[0]
    before = ours.trunk(dataclasses.replace(inputs, following=(second,)))
    for place in range(T):
        tokens = TEXTS[0].clone()
        tokens[:, place] = (tokens[:, place] + 1) % V
        after = ours.trunk(dataclasses.replace(inputs, tokens_BT=tokens, following=(second,)))
        same = torch.equal(after[:, T + P :], before[:, T + P :])
        assert same != (REUSED - 9 <= place < REUSED), place


@pytest.mark.parametrize("position", ["post", "pre"])
@torch.no_grad()
def test_no_segment_changes_one_before_it(make_learner, position):
    keys = {"norm_position": position, "init_std": 0.3}
    ours = make_learner(SHAPE | keys, {"name": "permutation"}, row_length=T)
    inputs = chain(ORDERS, 9, memory_tokens_BM=BEFORE)
    second, third = inputs.following
    before = ours.trunk(inputs)
    assert torch.equal(ours.trunk(dataclasses.replace(inputs, following=())), before[:, : T + P])
    assert torch.equal(
        ours.trunk(dataclasses.replace(inputs, following=(second,))), before[:, : 2 * (T + P)]
    )
    other = dataclasses.replace(third, tokens_BT=(third.tokens_BT + 1) % V)
    after = ours.trunk(dataclasses.replace(inputs, following=(second, other)))
    assert torch.equal(after[:, : 2 * (T + P)], before[:, : 2 * (T + P)])
    assert not torch.equal(after, before)


def test_a_row_is_its_segments_one_after_another(tokenizer):
    """Those of a row that stand in it whole, in part and not at all, as rows of their own are."""
    config = config_of(tokenizer, row_length=96, memory=7, recurrence=3)
    objective = build_objective(config, tokenizer)
    alone = build_objective(config_of(tokenizer, row_length=32, memory=7), tokenizer)
    assert (objective.stride, objective.span, objective.n_places) == (90, 97, 5)
    assert objective.predicted_share == alone.predicted_share
    sizes = (97, 50, 20)
    batch = objective.collate(examples_of(objective, sizes))
    parts = {
        name: np.stack(np.split(batch[name], 3, axis=1), axis=1)
        for name in ("tokens", "places", "targets", "order", "key_order", "segments")
    }
    text = np.arange(7, 97) % 400 + 50
    for row, size in enumerate(sizes):
        for n in range(3):
            own = text[30 * n : min(30 * n + 30, size - 7)]
            tokens = parts["tokens"][row, n]
            assert tokens[: len(own)].tolist() == own.tolist()
            ends = [tokenizer.sep, tokenizer.cls]
            assert tokens[len(own) : len(own) + 2].tolist() == ends
            k = alone.options.n_predicted(len(own))
            places = parts["places"][row, n, :k]
            assert (places < len(own)).all() and (np.diff(places) > 0).all()
            assert parts["targets"][row, n].tolist() == [*tokens[places], *[IGNORED] * (5 - k)]
            order = parts["order"][row, n]
            assert sorted(order[places]) == list(range(1, k + 1))
            assert order[32 : 32 + k].tolist() == (order[places] - 1).tolist()
            keys = parts["key_order"][row, n]
            assert (keys[:7] == 0).all()
            assert keys[7 : 7 + len(own) + 2].tolist() == order[: len(own) + 2].tolist()
    assert objective.counts(batch)["permutation"] == 15 + (5 + 2) + 2
    assert len({tuple(order) for order in parts["order"][0]}) == 3  # each is drawn by itself
    first = objective.segment(text[:30], np.random.default_rng(0))
    for name, values in alone.collate_segments([first]).items():
        assert parts[name][0, 0].tolist() == values[0].tolist(), name


@torch.no_grad()
def test_terms_are_those_of_segments_whose_memory_is_given(tokenizer):
    """Of the whole row, with its padding, against one pass a segment."""
    config = config_of(tokenizer, row_length=96, memory=40, recurrence=3, model={"init_std": 0.3})
    objective = build_objective(config, tokenizer)
    learner = build_learner(config, objective).eval()
    single = config_of(tokenizer, row_length=32, memory=40)
    of_one = build_objective(single, tokenizer)
    batch = tensors_of(objective, (130, 110, 70))
    terms = learner(batch)
    memory, sums, count = learner.trunk.remember(batch["memory"]), 0.0, 0
    for n in range(3):
        part = {name: t.chunk(3, dim=1)[n] for name, t in batch.items() if name != "memory"}
        inputs = of_one.segment_inputs(part)
        x, context = learner.trunk.prepare(inputs, memory)
        hidden, kept = learner.trunk.stack.forward_and_keep(x, context, 30)
        logits = learner.heads["lm"](hidden[:, 32:])
        targets = part["targets"].flatten()
        sums += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
        count += (targets != IGNORED).sum()
        memory = [
            torch.cat([old, new], dim=1)[:, -40:] for old, new in zip(memory, kept, strict=True)
        ]
    assert terms["permutation"].count == count == 15 + (5 * 2 + 1) + 5
    torch.testing.assert_close(terms["permutation"].sum, sums, atol=1e-4, rtol=1e-6)
    logits = objective.logits(learner.trunk(objective.inputs(batch)), learner.heads, batch)
    expected = torch.nn.functional.cross_entropy(
        logits["permutation"], objective.targets(batch), reduction="sum"
    )
    torch.testing.assert_close(terms["permutation"].sum, expected, atol=1e-4, rtol=1e-5)


def test_an_evaluation_reads_every_token_once_behind_its_memory(tokenizer, corpus):
    data = {"path": str(corpus)}
    config = config_of(tokenizer, row_length=96, memory=11, recurrence=3, data=data)
    objective = build_objective(config, tokenizer)
    batches = list(eval_batches(build_stream(config, objective, "val"), objective, 64))
    memory = torch.cat([batch.tensors["memory"] for batch in batches])
    tokens = torch.cat([batch.tensors["tokens"] for batch in batches])
    assert len(tokens) > 20
    assert torch.equal(memory[1:], tokens[:-1, 94 - 11 : 94])
    single = config_of(tokenizer, row_length=32, memory=11, data=data)
    of_one = build_objective(single, tokenizer)
    rows = list(eval_batches(build_stream(single, of_one, "val"), of_one, 64))
    segments = torch.cat([batch.tensors["tokens"] for batch in rows])
    read = tokens.view(-1, 32)[: len(segments)]
    assert torch.equal(read, segments)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"recurrence": 3}, r"data\.row_length=32 cannot be cut in objective\.recurrence=3"),
        ({"recurrence": 0}, r"recurrence=0 must be at least 1"),
        ({"recurrence": 2, "memory": 0}, r"objective\.memory=0 leaves none"),
        ({"recurrence": 16}, r"data\.row_length=32 leaves no room .* at least 48"),
    ],
)
def test_what_cannot_be_handed_on_is_refused(tokenizer, keys, message):
    with pytest.raises(UserError, match=message):
        build_objective(config_of(tokenizer, **{"memory": 7, **keys}), tokenizer)


def test_flops_are_what_pytorch_counts(make_learner):
    model = {**MODEL, "d_ff": 40}
    options = {"name": "permutation", "memory": 7, "recurrence": 3}
    reference = {"attention": "reference"}  # the counter does not know the fused CPU kernel
    learner = make_learner(model, options, row_length=96, kernels=reference)
    objective, rows = learner.requires_grad_(False).objective, 2
    batch = tensors_of(objective, [objective.span] * rows)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = learner.trunk(objective.inputs(batch))
        learner.heads["lm"](objective.of_places(hidden))
    shape = load_config([], base={"model": model}).model
    share = objective.predicted_share
    remembered = memory_flops(shape, 7)
    trained = 96 * train_flops_per_token(shape, 96, predicted_share=share, memory=7, recurrence=3)
    forward = (trained - remembered) / 3 + remembered
    # Of distances, for all rows: once a segment in each block, once for the memory in all but one.
    projected = 3 * shape.n_layers * (7 + 2 * 32 - 1) + (shape.n_layers - 1) * (2 * 7 - 1)
    once = 2 * projected * shape.d_model * shape.d_model
    assert counter.get_total_flops() == pytest.approx(rows * forward + once)


@pytest.mark.parametrize("memory", [16, 64])
def test_activations_are_those_that_autograd_keeps(tokenizer, memory):
    model = {"d_model": 96, "n_layers": 4}
    config = config_of(tokenizer, row_length=96, memory=memory, recurrence=2, model=model)
    objective = build_objective(config, tokenizer)
    learner = build_learner(config, objective)
    batch = tensors_of(objective, [objective.span] * 8)
    head = 4 * 512 * 96 + 4 * 8 * 2 * objective.n_places * 96
    read = of_streams(8 * 96, objective.predicted_share, 48, memory)
    expected = activation_bytes(config.model, "fp32", "none", *read) + head
    assert kept_bytes(learner, batch) == pytest.approx(expected, rel=0.06)


def test_the_estimate_reckons_with_segments(tmp_path, capsys):
    preset, needs_file = "configs/pretrain/xlnet_base.yaml", tmp_path / "needs.json"
    keys = ["model.max_length=2048", "data.row_length=2048", "train.micro_batch=2"]
    keys += ["objective.recurrence=4"]
    main(["estimate", preset, f"--set=[{','.join(keys)}]", f"--json={needs_file}"])
    needs = json.loads(needs_file.read_text())
    model = load_config([f"--config={preset}", *(f"--{key}" for key in keys)]).model
    share = 85 / 512
    expected = train_flops_per_token(model, 2048, predicted_share=share, memory=384, recurrence=4)
    assert needs["flops_per_token"] == pytest.approx(expected)
    read = of_streams(2 * 2048, share, 512, 384)
    assert needs["memory"]["activations"] == activation_bytes(model, "bf16", "none", *read)


def test_the_largest_model_is_that_of_what_the_objective_reads():
    """Sixteen passes over 512 tokens keep fewer pairs than one over 8,192."""
    preset = "configs/pretrain/xlnet_base.yaml"
    config = load_config(
        [f"--config={preset}", "--model.max_length=8192", "--data.row_length=8192"]
    )

    def sizes_of(model):
        return Sizes(10**8, 10**8, (10**7,) * model.n_layers, (10**7,) * model.n_layers)

    def limit(**reads):
        (found,) = largest(config, sizes_of, [("ddp", 1)], "h100", **reads)
        return found.model.n_layers

    assert limit(recurrence=16) > limit(recurrence=1)
    assert limit(memory=0) > limit(memory=8192)


RECURRENT = [*RUN, "--data.row_length=64", "--objective.recurrence=2", "--objective.memory=40"]


@pytest.mark.parametrize("recomputed", ["none", "full"])
def test_a_resumed_run_ends_bit_equal(tmp_path, recomputed, capsys):
    words = [*RECURRENT, f"--train.activation_checkpointing={recomputed}"]
    train(tmp_path / "whole", *words, "--train.steps=6")
    model = open_saved(tmp_path / "whole").config.model
    flops = train_flops_per_token(model, 64, predicted_share=10 / 64, memory=40, recurrence=2)
    assert f"model FLOPs per token {flops:.4g} " in capsys.readouterr().out
    train(tmp_path / "halves", *words, "--train.steps=3")
    train(tmp_path / "halves", *words, "--train.steps=6", "--resume=auto")
    same_runs(tmp_path / "whole", tmp_path / "halves")


def test_one_segment_without_following_is_what_it_was(make_learner):
    """An Inputs that names nothing to be reused is read as before."""
    ours = make_learner(SHAPE, {"name": "permutation"}, row_length=T)
    assert Inputs().following == () and Inputs().n_reused == 0
    places, order = some_order()
    with torch.no_grad():
        inputs = two_streams(places, order)
        assert torch.equal(
            ours.trunk(inputs), ours.trunk(dataclasses.replace(inputs, n_reused=REUSED))
        )
