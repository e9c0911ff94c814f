"""FLOPs by formula against PyTorch's counter and against counting visible keys one by one."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanolm.config.model import ModelConfig
from nanolm.data.rows import Row
from nanolm.model.trunk import Inputs
from nanolm.ops.masks import Mask
from nanolm.training.flops import forward_flops_per_token, keys_seen, train_flops_per_token

T = 24


@pytest.mark.parametrize("trunk", ["decoder", "encoder"])
@pytest.mark.parametrize("window", [None, 1, 5, 24, 100])
def test_keys_seen_is_the_mean_row_of_the_mask(trunk, window):
    model = ModelConfig(trunk=trunk, window=[None, window])
    mask = Mask(causal=trunk == "decoder", window=window)
    expected = mask.dense(T, T).sum().item() / T
    assert keys_seen(model, T, layer=1) == pytest.approx(expected)


@pytest.mark.parametrize("feed_forward", ["gelu", "swiglu"])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_forward_flops_are_what_pytorch_counts(make_learner, feed_forward, kv_heads):
    keys = {"trunk": "encoder", "n_kv_heads": kv_heads, "feed_forward": feed_forward, "d_ff": 40}
    learner = make_learner(
        {**keys, "positions": {"name": "rotary"}},
        {"name": "mlm", "transform": False},
        kernels={"attention": "reference"},  # the counter does not know the fused CPU kernel
    )
    tokens = torch.zeros(2, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        learner.heads["lm"](learner.trunk(Inputs(tokens_BT=tokens)))
    model = ModelConfig(**keys, d_model=32, n_layers=2, n_heads=4, vocab_size=512)
    assert counter.get_total_flops() == pytest.approx(2 * T * forward_flops_per_token(model, T))


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_an_encoder_decoders_flops_are_what_pytorch_counts(make_learner, kv_heads):
    keys = {"trunk": "encoder_decoder", "n_kv_heads": kv_heads, "feed_forward": "geglu_tanh"}
    learner = make_learner(
        {**keys, "d_ff": 40, "head_dim": 12, "positions": {"name": "t5"}},
        {"name": "span"},
        kernels={"attention": "reference"},
    )
    n_targets = 6
    source, written = (torch.zeros(2, n, dtype=torch.int64) for n in (T, n_targets))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        learner.heads["lm"](learner.trunk(Inputs(tokens_BT=written, source_tokens_BS=source)))
    model = ModelConfig(
        **keys, d_ff=40, head_dim=12, d_model=32, n_layers=2, n_heads=4, vocab_size=512
    )
    share = n_targets / T
    found = 2 * T * forward_flops_per_token(model, T, predicted_share=share)
    # The counter counts hidden keys too: of a causal row of n it sees n, we (n + 1) / 2.
    hidden = 4 * 2 * n_targets * (n_targets - (n_targets + 1) / 2) * 4 * 12 * model.n_layers
    assert counter.get_total_flops() == pytest.approx(found + hidden)


@pytest.mark.parametrize("trunk", ["encoder", "encoder_decoder", "two_stream"])
def test_only_what_is_predicted_goes_through_the_vocabulary(make_learner, trunk, monkeypatch):
    name = {"encoder": "mlm", "encoder_decoder": "span", "two_stream": "permutation"}[trunk]
    positions = "relative" if trunk == "two_stream" else "rotary"
    model = {"trunk": trunk, "positions": {"name": positions}}
    learner = make_learner(model, {"name": name}, row_length=T)
    objective, head, projected = learner.objective, learner.heads["lm"], []
    tokens = np.arange(objective.span) + 50
    row = Row(tokens, np.zeros(1, np.int64), corpus=0, block=0, epoch=0, row_id=0)
    draws = map(np.random.default_rng, range(3))
    batch = objective.collate([objective.example(row, rng, None) for rng in draws])
    tensors = {key: torch.from_numpy(values) for key, values in batch.items()}

    def told(hidden_ND, *more):
        projected.append(len(hidden_ND))
        return plain(hidden_ND, *more)

    plain = head.features  # what the vocabulary's rows are compared with
    monkeypatch.setattr(head, "features", told)
    learner(tensors)
    assert projected == [objective.counts(batch)[name]]
    assert 0 < projected[0] < 3 * T


def test_training_costs_three_forwards_and_the_head_its_share():
    model = ModelConfig(vocab_size=1000)
    whole, none = (forward_flops_per_token(model, T, predicted_share=share) for share in (1.0, 0.0))
    assert whole - none == 2 * model.d_model * 1000
    assert train_flops_per_token(model, T) == 3 * whole
