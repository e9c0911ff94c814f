"""The operators as PyTorch sees them: opcheck, autocast, FLOPs, one graph, also by inductor."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanolm.ops.bias import BucketBias, DenseBias
from nanolm.ops.contract import KERNELS, candidates
from nanolm.ops.masks import Mask
from nanolm.tools.kernel_check.op_trials import normal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATORS = (
    "attention",
    "attention_backward",
    "attention_decode",
    "norm",
    "norm_backward",
    "rotary",
    "glu",
    "glu_backward",
    "linear_cross_entropy",
    "symmetric_product",
)


def draw(*shape, seed=0, grad=True):
    x = normal(*shape, dtype=torch.float32, seed=seed, device=DEVICE)
    return x.requires_grad_(grad)


def attention_arguments(bias, *, grad=True):
    from nanolm.kernels.attention.call import flatten

    q, k, v = (draw(1, n, h, 16, seed=n, grad=grad) for n, h in ((9, 2), (11, 1), (11, 1)))
    mask = Mask(causal=True, key_lengths=torch.tensor([10], device=DEVICE))
    return flatten(q, k, v, mask, bias, scale=0.25, softcap=None)


def heads_first(arguments):
    """The arguments, of which the first three, [B, T, H, K], become views of [B, H, T, K]: what is
    made for them does not lie as they do."""
    laid = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in arguments[:3])
    return *laid, *arguments[3:]


def arguments_of(name):
    """The operator's arguments, a few per operator where it has branches."""
    import nanolm.kernels.attention.decode
    import nanolm.kernels.attention.operator
    import nanolm.kernels.cross_entropy
    import nanolm.kernels.glu
    import nanolm.kernels.norm
    import nanolm.kernels.rotary
    import nanolm.kernels.symmetric_product  # noqa: F401

    x, weight, bias = draw(5, 24), draw(24, seed=1), draw(24, seed=2)
    if name == "attention":
        yield heads_first(attention_arguments(DenseBias(draw(1, 2, 11, 9).mT)))
        yield attention_arguments(BucketBias(draw(8, 2), False, 16))
    elif name == "attention_decode":
        yield heads_first(attention_arguments(None, grad=False))
    elif name == "attention_backward":
        flat = attention_arguments(DenseBias(draw(1, 2, 9, 11, grad=False)), grad=False)
        out, lse = torch.ops.nanolm.attention(*flat)
        yield torch.ones_like(out), None, out, lse, True, *flat
        narrow = DenseBias(draw(1, 2, 9, 11, grad=False).bfloat16())  # its gradient is narrow too
        flat = attention_arguments(narrow, grad=False)
        out, lse = torch.ops.nanolm.attention(*flat)
        yield torch.ones_like(out), None, out, lse, True, *flat
        table = BucketBias(draw(8, 2, grad=False).bfloat16(), False, 16)
        flat = attention_arguments(table, grad=False)
        out, lse = torch.ops.nanolm.attention(*flat)
        yield torch.ones_like(out), None, out, lse, True, *flat
    elif name == "norm":
        yield x, weight, bias, draw(5, 24, seed=3), True, 1e-5
        yield x, weight, None, None, False, 1e-5
    elif name == "norm_backward":
        x, weight, stats = x.detach(), weight.detach(), torch.ones(5, device=DEVICE)
        yield x, x, x, weight, stats, stats, True, True
        yield x, None, x, weight, stats[:0], stats, False, False
        yield x, x, x, weight.bfloat16(), stats, stats, True, True
    elif name == "rotary":
        angles = draw(1, 3, 6, grad=False), draw(1, 3, 6, grad=False)
        yield *heads_first([draw(2, 3, 2, 16)]), *angles, False
    elif name == "glu":
        yield x, "swiglu"
        yield x, "geglu"
    elif name == "glu_backward":
        yield x.detach(), draw(5, 12, grad=False), "swiglu"
    elif name == "linear_cross_entropy":
        targets = torch.tensor([0, 3, -100, 30, 7], device=DEVICE)
        yield x, draw(31, 24), draw(31), targets, 5.0, 0.1, 1e-2, True, True, True
        yield x.detach(), draw(31, 24, grad=False), None, targets, None, 0.0, 0.0, *[False] * 3
    else:
        yield draw(2, 5, 7).mT, "ieee"


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_registered_as_pytorch_wants_it(name):
    for arguments in arguments_of(name):
        torch.library.opcheck(getattr(torch.ops.nanolm, name).default, arguments)


def kernel_of(op, name="triton"):
    candidates(op)
    return KERNELS[op].get(name).build()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_products_to_the_dtype_of_its_region(dtype):
    q, k, v = (draw(1, 9, 2, 16, seed=seed) for seed in range(3))
    mixed = q, k, v.to(torch.bfloat16)  # as rotary leaves queries and keys beside values
    decode = kernel_of("attention", "triton_decode")
    product, hidden, weight = kernel_of("symmetric_product"), draw(40, 1), draw(2, 1)
    with torch.autocast(DEVICE, dtype):
        out = kernel_of("attention").run(*mixed, Mask(), scale=0.25)
        assert out.dtype == dtype
        assert decode.run(q[:, -1:], k, v, Mask(), scale=0.25).dtype == dtype
        assert product.run(hidden).dtype == dtype
        targets = torch.zeros(40, dtype=torch.int64, device=DEVICE)
        loss = kernel_of("linear_cross_entropy").run(hidden, weight, None, targets).loss
    assert kernel_of("attention").run(q, k, v, Mask(), scale=0.25).dtype == torch.float32
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss + out.float().sum(), [hidden, weight, q])
    assert [grad.dtype for grad in grads] == [torch.float32] * 3
    # A weight's gradient is a float32 sum that is never rounded to the region's dtype.
    assert (grads[1] != grads[1].to(dtype).float()).any()


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_leaves_float64_as_it_is(grad):
    """As PyTorch's own rules do: what is checked in float64 is not rounded on its way."""
    q, hidden, weight = (draw(*shape).double() for shape in ((1, 9, 2, 16), (5, 6), (7, 6)))
    targets = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    with torch.set_grad_enabled(grad), torch.autocast(DEVICE, torch.bfloat16):
        found = [
            kernel_of("attention").run(q, q, q, Mask(), scale=0.25),
            kernel_of("attention", "triton_decode").run(q[:, :1], q, q, Mask(), scale=0.25),
            kernel_of("symmetric_product").run(hidden),
            kernel_of("linear_cross_entropy").run(hidden, weight, None, targets).loss,
        ]
    assert {x.dtype for x in found} == {torch.float64}


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: torch.stack([x, -x], dim=-1)[..., 0],
    "one number": lambda x: x.flatten()[:1].view([1] * x.ndim).expand(x.shape),
}


def problem_of(op):
    """(function of leaves to outputs that have a gradient, leaves) of an op that trains."""
    run = kernel_of("linear_cross_entropy" if op == "loss" else op).run
    if op == "attention":
        options = {"scale": 0.25, "return_lse": True}
        leaves = [draw(2, n, h, 16, seed=n) for n, h in ((9, 2), (11, 1), (11, 1))]
        return lambda *given: run(*given, Mask(causal=True), **options), leaves
    if op == "norm":
        options = {"kind": "layernorm", "eps": 1e-5}
        leaves = [draw(5, 24), draw(24, seed=1), draw(24, seed=2), draw(5, 24, seed=3)]
        return lambda *given: run(*given[:3], residual=given[3], **options), leaves
    if op == "loss":
        targets = torch.arange(40, device=DEVICE) % 31
        leaves = [draw(40, 6), draw(31, 6, seed=1), draw(31, seed=2)]
        return lambda *given: [run(*given, targets).loss], leaves
    if op == "rotary":
        angle = draw(1, 3, 6, grad=False)
        return lambda x: [run(x, angle.cos(), angle.sin())], [draw(2, 3, 2, 16)]
    options = {"kind": "swiglu"} if op == "glu" else {}
    return lambda x: [run(x, **options)], [draw(2, 7, 24)]


def outputs_of(op):
    """(outputs that have a gradient, leaves) of an op that trains."""
    run, leaves = problem_of(op)
    return list(run(*leaves)), leaves


@pytest.mark.parametrize("op", ["norm", "loss"])
def test_what_learns_alone_has_the_gradient_that_it_has_among_others(op):
    """A kernel may leave out what nobody asks for, but not with it what somebody does."""
    run, leaves = problem_of(op)

    def gradients(learning):
        given = [x.detach().requires_grad_(i in learning) for i, x in enumerate(leaves)]
        total = sum(x.square().sum() for x in run(*given))
        return torch.autograd.grad(total, [given[i] for i in learning])

    together = gradients(range(len(leaves)))
    for i, right in enumerate(together):
        (alone,) = gradients([i])
        assert torch.equal(alone, right), i


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["attention", "norm", "rotary", "glu", "symmetric_product"])
def test_gradients_arrive_in_any_layout(op, layout):
    """What stands behind an op decides how its gradient lies in memory."""
    outputs, leaves = outputs_of(op)
    given = [LAYOUTS[layout](draw(*x.shape, seed=7, grad=False)) for x in outputs]
    assert not all(x.is_contiguous() for x in given)
    found = torch.autograd.grad(outputs, leaves, given, retain_graph=True)
    right = torch.autograd.grad(outputs, leaves, [x.contiguous() for x in given])
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("op", ["attention", "norm", "rotary", "glu", "symmetric_product", "loss"])
def test_a_second_pass_through_the_same_graph_gives_the_same_gradients(op):
    """What was kept for the first is neither used up nor scaled by it."""
    outputs, leaves = outputs_of(op)
    given = [draw(*x.shape, seed=7, grad=False) for x in outputs]
    first = [x.clone() for x in torch.autograd.grad(outputs, leaves, given, retain_graph=True)]
    assert all(map(torch.equal, first, torch.autograd.grad(outputs, leaves, given)))


@pytest.mark.parametrize("region", [None, torch.bfloat16])
@pytest.mark.parametrize("op", ["attention", "norm", "rotary", "glu", "symmetric_product", "loss"])
def test_eager_calls_and_the_registered_derivative_give_the_same_bits(monkeypatch, op, region):
    """A Function is quicker to call from Python than an operator; a compiled graph wants that."""

    def outputs_and_gradients():
        with torch.autocast(DEVICE, region or torch.bfloat16, enabled=region is not None):
            outputs, leaves = outputs_of(op)
        # One output without a gradient, where there are several, and weights that differ.
        given = [draw(*x.shape, seed=7, grad=False).to(x.dtype) for x in outputs[:1]]
        return [*outputs, *torch.autograd.grad(outputs[:1], leaves, given, allow_unused=True)]

    quick = outputs_and_gradients()
    names = [f"{x.grad_fn.name()} {x.grad_fn.next_functions}" for x in quick if x.grad_fn]
    assert not any("GeneratedBackwardFor_nanolm" in name for name in names)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    registered = outputs_and_gradients()
    names = [f"{x.grad_fn.name()} {x.grad_fn.next_functions}" for x in registered if x.grad_fn]
    assert any("GeneratedBackwardFor_nanolm" in name for name in names)
    for a, b in zip(quick, registered, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b))


def test_flops_are_counted():
    list(arguments_of("glu"))  # formulas are registered when a kernel is imported, before counting
    q, k = draw(1, 9, 2, 16), draw(1, 11, 1, 16)  # each query head multiplies, whoever shares keys
    hidden, weight = draw(5, 24), draw(31, 24)
    targets = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        kernel_of("attention").run(q, k, k, Mask(), scale=0.25).sum().backward()
        with torch.no_grad():
            kernel_of("attention", "triton_decode").run(q, k, k, Mask(), scale=0.25)
            kernel_of("symmetric_product").run(hidden)
        kernel_of("linear_cross_entropy").run(hidden, weight, None, targets).loss.backward()
    one = 4 * 2 * 9 * 11 * 16
    assert counter.get_total_flops() == (
        one * (1 + 5 / 2) + one + 2 * 5 * 5 * 24 + 3 * 2 * 5 * 24 * 31
    )


@pytest.mark.parametrize("learning", [(), (0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_flops_of_the_loss_are_those_of_the_gradients_that_are_taken(learning):
    """One product for the logits, and one for the gradient of the hidden states or of the matrix;
    that of the bias is a sum."""
    list(arguments_of("linear_cross_entropy"))
    leaves = [draw(*shape, grad=False) for shape in ((5, 24), (31, 24), (31,))]
    for i in learning:
        leaves[i].requires_grad_()
    targets = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        kernel_of("linear_cross_entropy").run(*leaves, targets)
    products = 1 + len({0, 1} & set(learning))
    assert counter.get_total_flops() == products * 2 * 5 * 24 * 31


class Layer(torch.nn.Module):
    """Norm, rotation, attention, gate and loss: every operator that trains."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(16))
        self.qkv = torch.nn.Linear(16, 48)
        self.up = torch.nn.Linear(16, 32)
        self.vocabulary = torch.nn.Parameter(draw(32, 16).detach() * 0.1)
        ops = ("attention", "norm", "rotary", "glu", "linear_cross_entropy")
        self.runs = {op: kernel_of(op).run for op in ops}

    def forward(self, x_BTD, targets_BT):
        """The loss."""
        y, _ = self.runs["norm"](x_BTD, self.gain, None, kind="rmsnorm", eps=1e-5, residual=x_BTD)
        q, k, v = (z.unflatten(-1, (1, 16)) for z in self.qkv(y).chunk(3, dim=-1))
        angle = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None, :, None] * torch.ones(
            8, device=x_BTD.device
        )
        q, k = (self.runs["rotary"](z, angle.cos(), angle.sin()) for z in (q, k))
        out = self.runs["attention"](q, k, v, Mask(causal=True), scale=0.25).flatten(2)
        out = self.runs["glu"](self.up(out), kind="swiglu")
        loss = self.runs["linear_cross_entropy"]
        return loss(out.flatten(0, 1), self.vocabulary, None, targets_BT.flatten()).loss


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_layer_compiles_into_one_graph(backend):
    torch.manual_seed(0)
    layer = Layer().to(DEVICE)
    x, targets = draw(2, 7, 16), torch.arange(14, device=DEVICE).view(2, 7)
    wanted = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x, targets), wanted)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for actual, grad in zip(
        torch.autograd.grad(compiled(x, targets), wanted), expected, strict=True
    ):
        torch.testing.assert_close(actual, grad, rtol=1e-5, atol=1e-6)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.isfinite(compiled(x, targets))
