"""Trunks: what a hidden state may depend on, how weights begin, and what a state dict holds."""

import itertools
import math

import pytest
import torch

from nanolm.config.model import ModelConfig
from nanolm.model.trunk import Inputs
from nanolm.ops.contract import Kernels
from nanolm.ops.masks import Mask
from nanolm.registry import POSITIONS, TRUNKS

B, T, V = 2, 12, 512
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [0] * 12])
ENCODINGS = ["learned", "sinusoidal", "rotary", "alibi", "t5", "none"]


def some_tokens(batch=B, length=T):
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(2))


def objective_of(trunk):
    return {"name": "clm" if trunk == "decoder" else "mlm"}


@pytest.mark.parametrize("trunk", ["decoder", "encoder"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_nothing_leaks_between_tokens_that_may_not_see_each_other(make_learner, trunk, encoding):
    """Gradients of one hidden state with respect to every embedding, for each mask."""
    for window, documents in itertools.product((None, 3), (None, DOCUMENTS)):
        keys = {"trunk": trunk, "n_layers": 1, "window": [window], "positions": {"name": encoding}}
        learner = make_learner(keys, objective_of(trunk))
        mask = Mask(documents=documents)
        allowed = mask.at(causal=trunk == "decoder", window=window).dense(T, T)
        allowed = allowed.expand(B, 1, T, T)[:, 0]
        x = learner.trunk.embedding(some_tokens()).detach().requires_grad_()
        hidden = learner.trunk(Inputs(embeddings_BTD=x, mask=mask))
        for b, t in ((0, 0), (0, 4), (0, 6), (1, 11)):
            upstream = torch.zeros_like(hidden)
            upstream[b, t] = torch.arange(32.0)  # the sum over a normed vector is constant
            (gradient,) = torch.autograd.grad(hidden, x, upstream, retain_graph=True)
            touched = gradient.abs().sum(-1) > 0
            assert not touched[1 - b].any()
            assert torch.equal(touched[b], allowed[b, t]), (window, documents is None, t)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_later_token_changes_nothing_before_it_in_a_deep_decoder(make_learner, encoding):
    learner = make_learner({"n_layers": 3, "positions": {"name": encoding}, "window": [None, 4]})
    tokens = some_tokens()
    before = learner.trunk(Inputs(tokens_BT=tokens))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % V
    after = learner.trunk(Inputs(tokens_BT=changed))
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("trunk", ["decoder", "encoder"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_packed_document_is_the_document_alone(make_learner, trunk, encoding):
    learner = make_learner({"trunk": trunk, "positions": {"name": encoding}}, objective_of(trunk))
    positions = torch.tensor([[*range(5), *range(4), *range(3)], [*range(12)]])
    packed = learner.trunk(
        Inputs(tokens_BT=some_tokens(), positions_BT=positions, mask=Mask(documents=DOCUMENTS))
    )
    for start, stop in ((0, 5), (5, 9), (9, 12)):
        alone = learner.trunk(Inputs(tokens_BT=some_tokens()[:1, start:stop]))
        torch.testing.assert_close(packed[:1, start:stop], alone, atol=1e-5, rtol=1e-5)


def test_padding_changes_no_hidden_state_of_an_encoder(make_learner):
    learner = make_learner({"trunk": "encoder"}, {"name": "mlm"})
    tokens, lengths = some_tokens(), torch.tensor([T, 5])
    hidden = learner.trunk(Inputs(tokens_BT=tokens, mask=Mask(key_lengths=lengths)))
    alone = learner.trunk(Inputs(tokens_BT=tokens[1:, :5]))
    torch.testing.assert_close(hidden[1:, :5], alone, atol=1e-5, rtol=1e-5)


def test_segments_scale_and_embedding_norm_by_hand(make_learner):
    keys = {"trunk": "encoder", "n_segments": 2, "embedding_scale": True, "embedding_norm": True}
    trunk = make_learner(keys, {"name": "mlm"}).trunk
    segments = (torch.arange(T) > 4).long().expand(B, T)
    x, _ = trunk.embed(Inputs(tokens_BT=some_tokens(), segments_BT=segments))
    raw = trunk.embedding(some_tokens()) * math.sqrt(32) + trunk.segments(segments)
    expected = trunk.embedding_norm(raw + trunk.positions.table(torch.arange(T)))
    torch.testing.assert_close(x, expected)
    x, _ = trunk.embed(Inputs(tokens_BT=some_tokens()))  # no segments given: all segment 0
    torch.testing.assert_close(x[:, :5], expected[:, :5])


def test_initial_weights_have_the_stated_deviations(make_learner):
    for position, shrink in (("pre", math.sqrt(2 * 4)), ("post", 1.0)):
        keys = {"d_model": 128, "n_layers": 4, "init_std": 0.03, "norm_position": position}
        learner = make_learner(keys)
        for name, parameter in learner.named_parameters():
            if name.endswith("bias"):
                assert parameter.abs().max() == 0
            elif "norm" in name:
                assert torch.equal(parameter, torch.ones_like(parameter))
            else:
                writes = "attention.out" in name or "feed_forward.down" in name
                expected = 0.03 / (shrink if writes else 1.0)
                assert abs(parameter.std().item() / expected - 1) < 0.05, name
                assert abs(parameter.mean().item()) < 0.05 * 0.03, name


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_mimetic_attention_starts_by_comparing(make_learner, n_kv_heads):
    keys = {"d_model": 64, "n_heads": 4, "n_kv_heads": n_kv_heads, "attention_init": "mimetic"}
    learner, normal = make_learner(keys), make_learner({**keys, "attention_init": "normal"})
    tokens = torch.nn.functional.layer_norm(torch.randn(200, 64), (64,))
    for block, other in zip(learner.trunk.blocks, normal.trunk.blocks, strict=True):
        rows = block.attention.qkv.weight.split(16)
        for head in range(4):
            query, key = rows[head], rows[4 + head * n_kv_heads // 4]
            scores = (tokens @ query.T) @ (tokens @ key.T).T / math.sqrt(16)
            alike = scores.diagonal()
            assert abs(alike.mean().item() / 4 - 1) < 0.1
            assert abs((scores.sum() - alike.sum()).item() / (200 * 199)) < 0.05
        assert not torch.equal(rows[0], rows[3])
        value, elsewhere = rows[-1], other.attention.qkv.weight.split(16)[-1]
        assert abs(value.std().item() / elsewhere.std().item() - 1) < 0.2


def test_the_whole_model_builds_on_the_meta_device():
    for trunk, encoding in itertools.product(("decoder", "encoder"), ENCODINGS):
        options = POSITIONS.get(encoding).options()
        with torch.device("meta"):
            config = ModelConfig(trunk=trunk, positions=options, vocab_size=V, window=[None, 8])
            built = TRUNKS.get(trunk).build(config, Kernels(device="meta"), frozenset())
            hidden = built(Inputs(tokens_BT=torch.zeros(B, T, dtype=torch.int64)))
        assert hidden.is_meta and hidden.shape == (B, T, config.d_model)


def test_an_unresolved_vocabulary_is_a_mistake_of_ours():
    with pytest.raises(ValueError, match="vocab_size"):
        TRUNKS.get("decoder").build(ModelConfig(), Kernels())
