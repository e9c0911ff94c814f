"""Layers and blocks against the same thing written by hand."""

import pytest
import torch
import torch.nn.functional as F

from nanolm.config.model import ModelConfig
from nanolm.model.blocks import Block, Context, Stack, StackSpec
from nanolm.model.layers import FeedForward, GatedFeedForward, MultiHeadAttention, Norm
from nanolm.model.positions import Positions
from nanolm.ops.contract import Kernels
from nanolm.ops.masks import Mask

B, T, D = 2, 6, 16


def model(**keys):
    return ModelConfig(**{"d_model": D, "n_heads": 4, "n_layers": 2} | keys)


def randomized(module):
    for i, parameter in enumerate(module.parameters()):
        generator = torch.Generator().manual_seed(i)
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator).double()
    return module.double().eval()


def context(**keys):
    return Context(
        **{"mask": Mask(), "positions": Positions(), "prepared": None, "bias": None} | keys
    )


def x_btd(seed=0, length=T):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, length, D, generator=generator, dtype=torch.float64)


def attention_by_hand(attention, x, source, allowed):
    heads, groups, width = attention.n_heads, attention.n_kv_heads, attention.head_dim
    rows = attention.qkv.weight.split([heads * width, groups * width, groups * width])
    biases = attention.qkv.bias.split([heads * width, groups * width, groups * width])
    out = []
    for h in range(heads):
        of_q = slice(h * width, (h + 1) * width)
        g = h * groups // heads
        of_kv = slice(g * width, (g + 1) * width)
        q = attention.q_norm(x @ rows[0][of_q].T + biases[0][of_q])
        k = attention.k_norm(source @ rows[1][of_kv].T + biases[1][of_kv])
        v = source @ rows[2][of_kv].T + biases[2][of_kv]
        scores = (q @ k.transpose(1, 2) / width**0.5).masked_fill(~allowed, -torch.inf)
        out.append(torch.softmax(scores, -1) @ v)
    return attention.out(torch.cat(out, -1))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_by_hand(kv_heads, qk_norm, causal):
    config = model(n_kv_heads=kv_heads, qk_norm=qk_norm, window=[None, 3])
    for layer, window in ((0, None), (1, 3), (2, None)):
        attention = randomized(
            MultiHeadAttention(
                config, layer, Kernels(), causal=causal, bias_kind=None, masks=frozenset()
            )
        )
        allowed = Mask(causal=causal, window=window).dense(T, T)[0, 0]
        out = attention(x_btd(), Mask(), Positions(), None, None)
        torch.testing.assert_close(out, attention_by_hand(attention, x_btd(), x_btd(), allowed))


def test_cross_attention_reads_the_source():
    config = model(n_kv_heads=2, window=[2])
    attention = randomized(
        MultiHeadAttention(
            config, 0, Kernels(), causal=False, bias_kind=None, masks=frozenset(), cross=True
        )
    )
    source, lengths = x_btd(1, length=9), torch.tensor([9, 4])
    mask = Mask(key_lengths=lengths)
    out = attention(x_btd(), mask, Positions(), None, None, source_BSD=source)
    allowed = mask.dense(T, 9)[:, 0]
    torch.testing.assert_close(out, attention_by_hand(attention, x_btd(), source, allowed))


def test_feed_forwards_by_hand():
    x = x_btd()
    activations = {
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "relu2": lambda y: F.relu(y) ** 2,
        "swiglu": F.silu,
        "geglu": F.gelu,
    }
    for kind, activation in activations.items():
        config = model(feed_forward=kind, d_ff=24)
        layer = randomized((GatedFeedForward if config.gated else FeedForward)(config, Kernels()))
        if config.gated:
            gate, up = layer.gate_up(x).split(24, dim=-1)
            expected = layer.down(activation(gate) * up)
        else:
            expected = layer.down(activation(layer.up(x)))
        torch.testing.assert_close(layer(x), expected)


def test_default_widths_of_the_feed_forward():
    assert model(d_model=768, n_heads=12).ff_width == 3072
    assert model(d_model=768, n_heads=12, feed_forward="swiglu").ff_width == 2048


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("cross", [False, True])
def test_blocks_add_and_norm_where_they_should(position, cross):
    config = model(norm_position=position)
    spec = StackSpec(causal=True, masks=frozenset(), cross=cross)
    block = randomized(Block(config, 1, spec, Kernels(), None))
    source = x_btd(1, length=4) if cross else None
    around = context(source_BSD=source, source_mask=Mask())
    attend = lambda x: block.attention(x, Mask(), Positions(), None, None)  # noqa: E731
    steps = [(block.attention_norm, attend), (block.feed_forward_norm, block.feed_forward)]
    if cross:
        read = lambda x: block.cross_attention(  # noqa: E731
            x, Mask(), Positions(), None, None, source_BSD=source
        )
        steps.insert(1, (block.cross_attention_norm, read))
    x = x_btd()
    for norm, layer in steps:
        x = x + layer(norm(x)) if position == "pre" else norm(x + layer(x))
    torch.testing.assert_close(block(x_btd(), around), x)


def test_norm_after_sum_is_the_norm_of_the_sum():
    norm = randomized(Norm(model(norm="layernorm"), Kernels()))
    y, total = norm.after_sum(x_btd(), x_btd(1))
    torch.testing.assert_close(total, x_btd() + x_btd(1))
    torch.testing.assert_close(y, norm(total))


def test_pre_norm_stack_ends_in_a_norm_and_post_norm_does_not():
    spec = StackSpec(causal=True, masks=frozenset())
    pre, post = (
        randomized(Stack(model(norm_position=position), spec, Kernels(), None))
        for position in ("pre", "post")
    )
    x = x_btd()
    for block in pre.blocks:
        x = block(x, context())
    torch.testing.assert_close(pre(x_btd(), context()), pre.final_norm(x))
    assert not list(post.final_norm.parameters())


def test_activation_checkpointing_changes_memory_and_nothing_else():
    config = model(dropout=0.2, attention_dropout=0.2)
    stack = randomized(Stack(config, StackSpec(causal=True, masks=frozenset()), Kernels(), None))
    gradients = []
    for recompute in ("none", "full", "selective"):
        stack.recompute = recompute
        assert all(b.feed_forward.keeps_input == (recompute == "none") for b in stack.blocks)
        stack.train()
        torch.manual_seed(3)
        out = stack(x_btd().requires_grad_(), context())
        gradients.append([out, *torch.autograd.grad(out.square().sum(), list(stack.parameters()))])
    for kept, full, selective in zip(*gradients, strict=True):
        assert torch.equal(kept, full) and torch.equal(kept, selective)


@pytest.mark.parametrize("key", ["dropout", "attention_dropout"])
def test_dropout_acts_in_training_only(key):
    stack = randomized(
        Stack(model(**{key: 0.5}), StackSpec(causal=False, masks=frozenset()), Kernels(), None)
    )
    assert torch.equal(stack(x_btd(), context()), stack(x_btd(), context()))
    stack.train()
    assert not torch.equal(stack(x_btd(), context()), stack(x_btd(), context()))
