"""XLNet against `transformers`: the same weights give the same numbers to 1e-5; what may not be
seen changes nothing."""

import numpy as np
import pytest
import torch
from transformers import XLNetConfig, XLNetLMHeadModel

from nanolm.config.load import load_config
from nanolm.errors import UserError
from nanolm.inference.xlnet_names import from_transformers, to_transformers
from nanolm.model.trunk import Inputs
from nanolm.ops.masks import Mask
from nanolm.peft.base import attach
from nanolm.saved import open_saved
from tests.prepared import train
from tests.test_objectives_tasks import build, tensors
from tests.test_peft import METHODS, options_of, shaken

B, T, M, P, V = 3, 21, 9, 6, 512
SHAPE = {
    "trunk": "two_stream",
    "n_layers": 3,
    "d_model": 32,
    "n_heads": 4,
    "d_ff": 48,
    "norm_position": "post",
    "norm_eps": 1e-12,
    "n_segments": 3,
    "positions": {"name": "relative"},
    "vocab_size": V,
}


def peer():
    """XLNetLMHeadModel of SHAPE with random weights, none of which is 0."""
    config = XLNetConfig(
        vocab_size=V, d_model=32, n_layer=3, n_head=4, d_inner=48, ff_activation="gelu", dropout=0.0
    )
    model = XLNetLMHeadModel(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (parameter.data == 1) + 0.2 * noise
    return model.eval()


def model_config(**keys):
    return load_config([], base={"model": SHAPE | keys}).model


@pytest.fixture(scope="module")
def pair(make_learner):
    """(ours, theirs) with the same weights."""
    theirs = peer()
    ours = make_learner(SHAPE, {"name": "permutation"}, row_length=T)
    ours.load_state_dict(from_transformers(model_config(), theirs.state_dict()))
    return ours, theirs


def drawn(low, high, *shape, seed=2):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


TOKENS, BEFORE = drawn(1, V, B, T), drawn(1, V, B, M, seed=3)
SEGMENTS = (torch.arange(T) >= 8).long() + (torch.arange(T) >= 17)


def some_order(seed=4):
    """(places [B, P], order [B, T]): P tokens of a row are predicted, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.stack([torch.randperm(T, generator=generator)[:P] for _ in range(B)])
    places = places.sort(dim=1).values
    ranks = torch.stack([1 + torch.randperm(P, generator=generator) for _ in range(B)])
    return places, torch.zeros(B, T, dtype=torch.long).scatter(1, places, ranks)


def two_streams(places, order, n_memory=0, **keys):
    """Our inputs; padding is told by orders too, so none is needed here."""
    queries = torch.cat([order, order.gather(1, places) - 1], dim=1)
    keys_first = torch.cat([torch.zeros(B, n_memory, dtype=torch.long), order], dim=1)
    return Inputs(
        tokens_BT=TOKENS,
        mask=Mask(order=queries, key_order=keys_first),
        places_BP=places,
        **keys,
    )


def their_words(places, order):
    """The same as perm_mask and target_mapping. `transformers` hides a token from itself too where
    perm_mask says so, and shows it to its content stream again."""
    hidden = (order[:, :, None] <= order[:, None, :]) & (order > 0)[:, None, :]
    mapping = torch.nn.functional.one_hot(places, T).float()
    return {"perm_mask": hidden.float(), "target_mapping": mapping}


def their_memory(theirs):
    """mems [M, B, D] of the tokens before, block by block."""
    return theirs.transformer(BEFORE, use_mems=True, token_type_ids=torch.zeros_like(BEFORE)).mems


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("segments", [None, SEGMENTS.expand(B, T)], ids=["one text", "segments"])
@pytest.mark.parametrize("memory", [False, True], ids=["alone", "memory"])
@torch.no_grad()
def test_one_stream_with_and_without_memory_and_segments(pair, segments, memory):
    ours, theirs = pair
    mems = their_memory(theirs) if memory else None
    expected = theirs(TOKENS, token_type_ids=segments, mems=mems)
    found = ours.trunk(
        Inputs(
            tokens_BT=TOKENS,
            segments_BT=segments,
            memory_tokens_BM=BEFORE if memory else None,
        )
    )
    close(ours.heads["lm"](found), expected.logits)
    if memory:
        alone = theirs(TOKENS, token_type_ids=segments).logits
        assert (alone - expected.logits).abs().max() > 0.1  # the memory is read


@pytest.mark.parametrize("segments", [None, SEGMENTS.expand(B, T)], ids=["one text", "segments"])
@pytest.mark.parametrize("memory", [False, True], ids=["alone", "memory"])
@torch.no_grad()
def test_two_streams_with_and_without_memory_and_segments(pair, segments, memory):
    ours, theirs = pair
    places, order = some_order()
    expected = theirs(
        TOKENS,
        token_type_ids=segments,
        mems=their_memory(theirs) if memory else None,
        **their_words(places, order),
    )
    before = {"memory_tokens_BM": BEFORE, "n_memory": M} if memory else {}
    found = ours.trunk(two_streams(places, order, segments_BT=segments, **before))
    assert found.shape == (B, T + P, 32)
    close(ours.heads["lm"](found[:, T:]), expected.logits)


@torch.no_grad()
def test_padding_and_memory_as_each_block_reads_it(pair):
    ours, theirs = pair
    lengths = torch.tensor([T, 13, 4])
    shown = (torch.arange(T) < lengths[:, None]).float()
    expected = theirs(TOKENS, attention_mask=shown).logits
    found = ours.trunk(Inputs(tokens_BT=TOKENS, mask=Mask(key_lengths=lengths)))
    close(ours.heads["lm"](found)[shown.bool()], expected[shown.bool()])
    for mine, other in zip(ours.trunk.remember(BEFORE), their_memory(theirs), strict=True):
        close(mine, other.transpose(0, 1))


def test_names_map_there_and_back(pair):
    ours, theirs = pair
    named = to_transformers(model_config(), ours.state_dict())
    assert set(named) == {name for name, _ in theirs.named_parameters()}
    for name, parameter in theirs.named_parameters():
        assert torch.equal(named[name], parameter), name
    back = from_transformers(model_config(), named)
    assert set(back) == set(ours.state_dict())
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("position", ["post", "pre"])
@torch.no_grad()
def test_a_token_that_comes_later_in_the_order_changes_nothing(make_learner, position):
    keys = {"norm_position": position, "init_std": 0.3}
    ours = make_learner(SHAPE | keys, {"name": "permutation"}, row_length=T)
    places, order = some_order()
    before = ours.trunk(two_streams(places, order))
    for rank in range(1, P + 1):
        changed = TOKENS.clone()
        at = order == rank
        changed[at] = (changed[at] + 1) % V
        inputs = two_streams(places, order)
        after = ours.trunk(Inputs(**(vars(inputs) | {"tokens_BT": changed})))
        same = (before == after).all(dim=-1)
        content, query = same[:, :T], same[:, T:]
        assert torch.equal(content, order < rank)  # it sees itself
        assert torch.equal(query, order.gather(1, places) <= rank)  # its own query does not


@torch.no_grad()
def test_a_query_that_sees_nothing_reads_nothing(make_learner):
    ours = make_learner(SHAPE, {"name": "permutation"}, row_length=T)
    places = torch.arange(T).expand(B, T)
    order = 1 + torch.arange(T).flip(0).expand(B, T)  # all are predicted, the last one first
    inputs = two_streams(places, order)
    block = ours.trunk.stack.blocks[0]
    read = []
    block.attention.out.register_forward_hook(lambda module, given, out: read.append(given[0]))
    found = ours.trunk(inputs)
    assert (read[0][:, -1] == 0).all() and (read[0][:, :-1] != 0).any(dim=-1).all()
    assert found.isfinite().all()


def test_memory_gets_no_gradient_but_changes_what_is_read(make_learner):
    ours = make_learner(SHAPE | {"init_std": 0.3}, {"name": "permutation"}, row_length=T)
    places, order = some_order()
    with torch.no_grad():
        memory = ours.trunk.remember(BEFORE)
    losses = []
    for before in ({"memory_tokens_BM": BEFORE}, {"memory": memory}):
        ours.zero_grad()
        hidden = ours.trunk(two_streams(places, order, M, **before))
        (hidden[:, T:] ** 3).sum().backward()
        losses.append([hidden.detach(), *[p.grad for p in ours.trunk.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    assert all(grad.abs().sum() > 0 for grad in losses[0][1:])


def test_trunk_and_positions_belong_together(make_learner):
    with pytest.raises(UserError, match=r"set model\.positions to relative"):
        make_learner(SHAPE | {"positions": {"name": "rotary"}}, {"name": "permutation"})
    with pytest.raises(UserError, match=r"model\.window"):
        make_learner(SHAPE | {"window": [5]}, {"name": "permutation"})
    with pytest.raises(UserError, match=r"model\.trunk=two_stream, but model\.trunk=encoder"):
        make_learner(SHAPE | {"trunk": "encoder"}, {"name": "mlm"})


@pytest.mark.parametrize(
    ("texts", "roles", "segments"),
    [(1, "aa s c", "000 2"), (2, "aa s bbb s c", "000 1111 2")],
)
def test_a_task_frames_its_texts_as_pretraining_did(tokenizer, texts, roles, segments):
    learner, _ = build("classify", "two_stream", model={"n_segments": 3})
    task = learner.objective
    sequence, _ = task.frame(np.array([60, 61]), np.array([70, 71, 72]) if texts == 2 else None)
    names = {tokenizer.sep: "s", tokenizer.cls: "c"}
    read = "".join(names.get(t, "a" if t < 70 else "b") for t in sequence.tokens.tolist())
    assert read == roles.replace(" ", "")
    told = sequence.segments(tokenizer.special_mask)
    assert "".join(map(str, told.tolist())) == segments.replace(" ", "")
    assert learner.heads["classify"].pooling == "last"
    with pytest.raises(UserError, match="its <cls> stands last"):
        build("classify", "two_stream", pooling="cls")


def test_a_run_goes_on_to_a_task(tmp_path):
    """Every weight of the pretrained trunk reaches the task; the vector of places waits unused."""
    words = ["--model.trunk=two_stream", "--model.positions.name=relative", "--train.steps=2"]
    words += ["--objective.name=permutation", "--model.n_segments=3", "--schedule.name=constant"]
    train(tmp_path / "base", *words)
    base = open_saved(tmp_path / "base").learner.trunk.state_dict()
    learner, _ = build("classify", "two_stream", model={"n_segments": 3})
    assert set(learner.trunk.state_dict()) == set(base)
    unused = [name for name, p in learner.named_parameters() if not p.requires_grad]
    assert unused == ["trunk.query.weight"]


ADAPTED = [(name, pack) for name in METHODS for pack in (False, True)]
ADAPTED.remove(("prompt", True))  # refused: a prompt stands before one text a row


@pytest.mark.parametrize(("name", "pack"), ADAPTED)
def test_every_adapter_is_read(name, pack):
    """What replaces a layer must be asked, also where a stream could read its weight alone."""
    model = {"n_segments": 3, "init_std": 0.3}
    learner, split = build("classify", "two_stream", model=model, pack=pack)
    batch, _ = tensors(learner.objective, split.items)
    attach(learner, options_of(name))
    term = learner(batch)["classify"]
    term.sum.backward()
    for weight, parameter in learner.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, weight
    assert torch.equal(learner(batch)["classify"].sum, term.sum)
    assert (shaken(learner)(batch)["classify"].sum - term.sum).abs() > 1e-3
