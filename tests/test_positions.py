"""Position encodings against their formulas, and the options that cannot be."""

import math

import pytest
import torch

from nanolm.config.model import ModelConfig
from nanolm.errors import UserError
from nanolm.model.blocks import Context, Stack, StackSpec
from nanolm.model.positions import Positions
from nanolm.ops.bias import AlibiBias, BucketBias
from nanolm.ops.contract import Kernels
from nanolm.ops.masks import Mask
from nanolm.registry import POSITIONS

POSITIONS_BT = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 5, 6, 7]])
SMALL = {"d_model": 8, "n_heads": 2, "max_length": 16}


def build(name, model=None, **options):
    entry = POSITIONS.get(name)
    return entry.build(entry.options(**options), ModelConfig(**SMALL | (model or {})), Kernels())


def test_learned_adds_its_row():
    learned = build("learned")
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(
        learned.embed(x, POSITIONS_BT), x + learned.table.weight[POSITIONS_BT]
    )
    assert learned.table.weight.shape == (16, 8)


def test_sinusoidal_is_the_formula():
    table = build("sinusoidal", base=100.0).embed(torch.zeros(2, 5, 8), POSITIONS_BT)
    for b, t, i in ((0, 2, 0), (1, 4, 1), (1, 0, 3)):
        angle = POSITIONS_BT[b, t].item() / 100.0 ** (2 * i / 8)
        assert math.isclose(table[b, t, 2 * i], math.sin(angle), abs_tol=1e-6)
        assert math.isclose(table[b, t, 2 * i + 1], math.cos(angle), abs_tol=1e-6)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotary_products_depend_on_the_distance_only(fraction):
    rotary = build("rotary", {"head_dim": 8}, fraction=fraction)
    q, k = torch.randn(1, 1, 2, 8).double(), torch.randn(1, 1, 1, 8).double()

    def product(t, s):
        at = rotary.of_layer(rotary.prepare(torch.tensor([[t, s]])), 0)
        pair = torch.cat([q[:, :, :1], k], dim=1)
        turned, _ = rotary.rotate(pair, pair, at, layer=0)
        return (turned[0, 0, 0] @ turned[0, 1, 0]).item()

    assert math.isclose(product(9, 4), product(7, 2), rel_tol=1e-5)
    assert math.isclose(product(5, 5), (q[0, 0, 0] @ k[0, 0, 0]).item(), rel_tol=1e-6)
    assert not math.isclose(product(9, 4), product(9, 5), rel_tol=1e-3)
    if fraction == 0.5:  # the second half of the head is left alone
        at = rotary.of_layer(rotary.prepare(torch.tensor([[3]])), 0)
        turned, _ = rotary.rotate(q, k, at, layer=0)
        assert torch.equal(turned[..., 4:], q[..., 4:])


def test_rotary_bases_alternate_with_the_layers():
    rotary = build("rotary", base=[100.0, 10.0])
    prepared = rotary.prepare(POSITIONS_BT)
    assert set(prepared) == {100.0, 10.0}
    tables = [rotary.of_layer(prepared, layer) for layer in range(3)]
    assert tables[0] is tables[2] is prepared[100.0] and tables[1] is prepared[10.0]
    q = torch.randn(2, 5, 2, 4)
    turned = [rotary.rotate(q, q, tables[layer], layer)[0] for layer in range(3)]
    assert torch.equal(turned[0], turned[2]) and not torch.equal(turned[0], turned[1])


def test_scaled_rotations_are_the_formulas():
    """Llama 3.1's by the pairs' wavelengths, as its paper's code has it."""
    factor, length, low, high = 8.0, 32, 1.0, 4.0
    plain = [100.0 ** (-2 * i / 16) for i in range(8)]
    words = {"base": [100.0], "factor": factor}

    def speeds(scaling, **more):
        rotary = build("rotary", {"head_dim": 16}, scaling=scaling, **words, **more)
        cos, sin = rotary.of_layer(rotary.prepare(torch.tensor([[1]])), 0)
        return torch.atan2(sin, cos)[0, 0].tolist()

    assert speeds("linear") == pytest.approx([speed / factor for speed in plain])
    expected = []
    for speed in plain:
        wavelength = 2 * math.pi / speed
        if wavelength < length / high:
            expected.append(speed)
        elif wavelength > length / low:
            expected.append(speed / factor)
        else:
            kept = (length / wavelength - low) / (high - low)
            expected.append((1 - kept) * speed / factor + kept * speed)
    assert expected[0] == plain[0] and expected[-1] == plain[-1] / factor
    assert sum(plain[i] / factor < expected[i] < plain[i] for i in range(8)) == 2
    options = {"original_length": length, "low_frequency": low, "high_frequency": high}
    assert speeds("llama3", **options) == pytest.approx(expected)


class Noted(Positions):
    """An encoding from before `of_layer`: it finds out by itself what each block needs."""

    def prepare(self, positions_BT):
        self.seen = []
        return {"positions": positions_BT}

    def rotate(self, q_BTHK, k_BTGK, prepared, layer):
        self.seen.append((prepared, layer))
        return q_BTHK * (layer + 1), k_BTGK


def test_rotate_gets_what_prepare_returned_and_its_layer_unless_of_layer_says_otherwise():
    config = ModelConfig(**SMALL, n_layers=3)
    stack = Stack(config, StackSpec(causal=True, masks=frozenset()), Kernels(), None)
    noted = Noted()
    prepared = noted.prepare(POSITIONS_BT)
    context = Context(mask=Mask(), positions=noted, prepared=prepared, bias=None)
    stack(torch.randn(2, 5, 8), context)
    assert [layer for _, layer in noted.seen] == [0, 1, 2]
    assert all(given is prepared for given, _ in noted.seen)


def test_alibi_and_t5_give_a_bias_and_leave_everything_else_alone():
    x, q = torch.randn(2, 5, 8), torch.randn(2, 5, 2, 4)
    for name, kind in (("alibi", AlibiBias), ("t5", BucketBias)):
        encoding = build(name)
        assert isinstance(encoding.bias(), kind) and encoding.bias_kind == kind.kind
        assert encoding.embed(x, POSITIONS_BT) is x
        assert encoding.rotate(q, q, None, 0) == (q, q)
    assert build("t5", {"trunk": "encoder"}).bias().bidirectional
    assert not build("t5").bias().bidirectional
    assert "slopes_H" not in build("alibi").state_dict()


def test_none_is_the_identity():
    none, x = build("none"), torch.randn(2, 5, 8)
    assert none.embed(x, POSITIONS_BT) is x and none.bias() is None and not list(none.parameters())


@pytest.mark.parametrize(
    ("name", "model", "options", "key"),
    [
        ("sinusoidal", {"d_model": 9, "n_heads": 3}, {}, "model.d_model"),
        ("rotary", {"head_dim": 5}, {}, "model.head_dim"),
        ("rotary", {}, {"base": []}, "model.positions.base"),
        ("rotary", {}, {"fraction": 0.0}, "model.positions.fraction"),
        ("rotary", {}, {"scaling": "linear", "factor": 0.5}, "model.positions.factor"),
        ("rotary", {}, {"scaling": "linear", "factor": math.nan}, "model.positions.factor"),
        ("rotary", {}, {"factor": 2.0}, "model.positions.scaling"),
        ("rotary", {}, {"low_frequency": 4.0}, "model.positions.low_frequency"),
        ("t5", {}, {"n_buckets": 6}, "model.positions.n_buckets"),
        ("t5", {}, {"max_distance": 10}, "model.positions.max_distance"),
    ],
)
def test_impossible_options_are_refused_by_key(name, model, options, key):
    with pytest.raises(UserError, match=key):
        build(name, model, **options)
