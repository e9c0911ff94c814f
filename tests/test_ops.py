"""Every fast path against its reference, forward and gradient; and how kernels are chosen."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F

from nanolm.errors import UserError
from nanolm.ops import contract as ops
from nanolm.ops.bias import AlibiBias, BucketBias, DenseBias
from nanolm.ops.contract import AUTO, AttentionSpec, CrossEntropySpec, Kernels, candidates, choose
from nanolm.ops.masks import Mask
from nanolm.registry import SIZED
from nanolm.tools.kernel_check.survey import typical

B, T, H, K = 2, 7, 4, 8
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, -1, -1]])
ORDER = torch.tensor([[3, 1, 0, 2, 6, 5, 4], [0, 1, 2, 3, 4, 5, 6]])
MASKS = {
    "none": Mask(),
    "causal": Mask(causal=True),
    "window": Mask(window=3),
    "causal window": Mask(causal=True, window=2),
    "lengths": Mask(key_lengths=torch.tensor([7, 3])),
    "nothing visible": Mask(key_lengths=torch.tensor([7, 0])),
    "documents": Mask(causal=True, documents=DOCUMENTS),
    "prefix": Mask(causal=True, prefix_lengths=torch.tensor([4, 1])),
    "order": Mask(order=ORDER),
    "strict order": Mask(order=ORDER, strict=True),  # its first query sees nothing
}
BIASES = {
    "no bias": lambda dtype: None,
    "alibi": lambda dtype: AlibiBias(torch.tensor([0.5, 0.25, 0.1, 0.05], dtype=dtype)),
    "bucket": lambda dtype: BucketBias(leaf(8, H, dtype=dtype), True, 16),
    "dense": lambda dtype: DenseBias(leaf(B, H, T, T, dtype=dtype)),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def leaf(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


TORCH_ONLY = ("nanolm.ops.reference", "nanolm.ops.pytorch", "nanolm.ops.chunked_cross_entropy")


def kernels_of(op):
    """The kernels of an op that run on any device."""
    return {
        name: kernel
        for name, kernel in ops.candidates(op).items()
        if type(kernel).__module__ in TORCH_ONLY
    }


def learned(bias):
    return [
        value
        for value in (vars(bias).values() if bias else ())
        if isinstance(value, torch.Tensor) and value.requires_grad
    ]


def attend(name, mask, bias, groups, dtype, queries=T):
    q = leaf(B, queries, H, K, dtype=dtype, seed=1)
    k, v = (leaf(B, T, groups, K, dtype=dtype, seed=seed) for seed in (2, 3))
    out = kernels_of("attention")[name].run(q, k, v, mask, bias=bias, scale=0.3)
    upstream = leaf(*out.shape, dtype=dtype, seed=4).detach()
    return [out, *torch.autograd.grad(out, [q, k, v, *learned(bias)], upstream)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("mask", "bias"), itertools.product(MASKS, BIASES))
def test_sdpa_is_the_reference_for_every_mask_and_bias(mask, bias, dtype):
    for groups in (H, 2, 1):
        ours = attend("sdpa", MASKS[mask], BIASES[bias](dtype), groups, dtype)
        expected = attend("reference", MASKS[mask], BIASES[bias](dtype), groups, dtype)
        for got, want in zip(ours, expected, strict=True):
            torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_reference_attention_is_the_formula():
    q, k, v = (leaf(1, 5, 1, K, dtype=torch.float64, seed=seed) for seed in (1, 2, 3))
    mask = Mask(causal=True)
    run = kernels_of("attention")["reference"].run
    out, lse = run(q, k, v, mask, scale=0.5, softcap=2.0, return_lse=True)
    for t in range(5):
        scores = torch.stack(
            [2 * torch.tanh(q[0, t, 0] @ k[0, s, 0] * 0.5 / 2) for s in range(t + 1)]
        )
        expected = torch.softmax(scores, 0) @ v[0, : t + 1, 0]
        torch.testing.assert_close(out[0, t, 0], expected)
        torch.testing.assert_close(lse[0, 0, t], torch.logsumexp(scores, 0))


@pytest.mark.parametrize("name", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", BIASES)
def test_a_query_that_sees_nothing_gives_zero_and_no_gradient(name, dtype, bias):
    mask = MASKS["nothing visible"]
    out, q_grad, k_grad, v_grad, *bias_grad = attend(name, mask, BIASES[bias](dtype), 2, dtype)
    for tensor in (out, q_grad, k_grad, v_grad):
        assert tensor[1].abs().max() == 0  # row 1 of the batch has no visible key at all
        assert tensor[0].isfinite().all() and tensor[0].abs().max() > 0
    assert all(tensor.isfinite().all() for tensor in bias_grad)


@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_one_query_at_the_end_of_a_cache(name):
    mask = Mask(causal=True)
    whole = attend(name, mask, None, 2, torch.float64)[0]
    q = leaf(B, T, H, K, dtype=torch.float64, seed=1)[:, -1:]
    k, v = (leaf(B, T, 2, K, dtype=torch.float64, seed=seed) for seed in (2, 3))
    last = kernels_of("attention")[name].run(q, k, v, mask, scale=0.3)
    torch.testing.assert_close(last, whole[:, -1:])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_nothing_leaks_from_a_key_that_may_not_be_seen(name, mask):
    allowed = MASKS[mask].dense(T, T).expand(B, 1, T, T)[:, 0]
    q = leaf(B, T, H, K, seed=1)
    k, v = leaf(B, T, H, K, seed=2), leaf(B, T, H, K, seed=3)
    out = kernels_of("attention")[name].run(q, k, v, MASKS[mask], scale=0.3)
    for b, t in itertools.product(range(B), range(T)):
        upstream = torch.zeros_like(out)
        upstream[b, t] = 1
        gradients = torch.autograd.grad(out, [k, v], upstream, retain_graph=True)
        for gradient in gradients:
            seen = gradient.abs().sum(dim=(2, 3)) > 0
            assert not seen[1 - b].any()
            assert not (seen[b] & ~allowed[b, t]).any()
    assert torch.equal(gradients[1].abs().sum(dim=(2, 3))[b] > 0, allowed[b, t])


OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "all": {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.01},
}
N, D, V = 11, 6, 17


def cross_entropy_case(dtype, bias, ignored=3):
    hidden, weight = leaf(N, D, dtype=dtype, seed=5), leaf(V, D, dtype=dtype, seed=6)
    bias = leaf(V, dtype=dtype, seed=7) if bias else None
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(8))
    targets[torch.randperm(N, generator=torch.Generator().manual_seed(9))[:ignored]] = -100
    return hidden, weight, bias, targets


@pytest.fixture(params=["reference", "chunked", "torch"])
def cross_entropy(request, monkeypatch):
    monkeypatch.setattr(type(kernels_of("linear_cross_entropy")["chunked"]), "chunk", 4)
    kernel = kernels_of("linear_cross_entropy")[request.param]
    if reason := kernel.why_not(CrossEntropySpec(width=D, vocab_size=V)):
        pytest.skip(reason)  # torch's own function begins with torch 2.13
    return kernel


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_cross_entropy_is_torchs(cross_entropy, options, bias, dtype):
    options = OPTIONS[options]
    spec = CrossEntropySpec(
        width=D,
        vocab_size=V,
        softcap=options.get("softcap"),
        z_loss="z_loss" in options,
        label_smoothing="label_smoothing" in options,
    )
    if cross_entropy.why_not(spec):
        return  # refused when the model is built
    hidden, weight, bias, targets = cross_entropy_case(dtype, bias)
    out = cross_entropy.run(hidden, weight, bias, targets, **options)
    logits = F.linear(hidden, weight, bias)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    expected = F.cross_entropy(
        logits, targets, reduction="sum", label_smoothing=options.get("label_smoothing", 0.0)
    )
    kept = targets != -100
    lse = torch.where(kept, logits.logsumexp(-1), 0.0)
    expected = expected + options.get("z_loss", 0.0) * lse.square().sum()
    wanted = [hidden, weight] + ([] if bias is None else [bias])
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(out.loss, expected, **close)
    ours = torch.autograd.grad(0.5 * out.loss, wanted)
    for got, want in zip(ours, torch.autograd.grad(0.5 * expected, wanted), strict=True):
        torch.testing.assert_close(got, want, **close)
    plain = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(out.nll, plain, check_dtype=False, **close)
    torch.testing.assert_close(out.lse, lse, check_dtype=False, **close)
    assert torch.equal(out.correct, (logits.argmax(-1) == targets).float())


@pytest.mark.parametrize("options", ["plain", "all"])
def test_chunked_cross_entropy_gradcheck(options, monkeypatch):
    kernel = kernels_of("linear_cross_entropy")["chunked"]
    monkeypatch.setattr(type(kernel), "chunk", 4)
    *inputs, targets = cross_entropy_case(torch.float64, True)
    torch.autograd.gradcheck(
        lambda h, w, b: kernel.run(h, w, b, targets, **OPTIONS[options]).loss, inputs
    )


def test_cross_entropy_without_targets_is_zero_with_zero_gradient(cross_entropy):
    hidden, weight, bias, targets = cross_entropy_case(torch.float32, True, ignored=N)
    for rows in (N, 0):
        out = cross_entropy.run(hidden[:rows], weight, bias, targets[:rows])
        assert out.loss == 0 and out.nll.sum() == out.correct.sum() == 0
        for gradient in torch.autograd.grad(out.loss, [hidden, weight, bias], allow_unused=True):
            assert gradient is None or gradient.abs().max() == 0


def test_chunked_weight_gradient_under_autocast_is_summed_in_float32():
    """400 equal tokens: a bfloat16 sum would stop growing at 256."""
    hidden, weight = torch.ones(400, 1, requires_grad=True), torch.zeros(2, 1, requires_grad=True)
    kernel = kernels_of("linear_cross_entropy")["chunked"]
    with torch.autocast("cpu", torch.bfloat16):
        out = kernel.run(hidden, weight, None, torch.zeros(400, dtype=torch.int64))
    assert out.loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(out.loss, weight)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, torch.tensor([[-200.0], [200.0]]))


def test_chunked_takes_no_gradient_when_none_is_wanted(monkeypatch):
    hidden, weight, _, targets = cross_entropy_case(torch.float32, False)
    kernel = kernels_of("linear_cross_entropy")["chunked"]
    monkeypatch.setattr(torch, "exp", lambda *_: pytest.fail("the gradient was computed"))
    with torch.no_grad():
        assert not kernel.run(hidden, weight, None, targets).loss.requires_grad


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_residual", [False, True])
def test_torch_norm_is_the_reference(kind, dtype, with_residual):
    results = []
    for kernel in (kernels_of("norm")["torch"], kernels_of("norm")["reference"]):
        x, weight = leaf(3, 5, D, dtype=dtype, seed=1), leaf(D, dtype=dtype, seed=2)
        bias = leaf(D, dtype=dtype, seed=3) if kind == "layernorm" else None
        residual = leaf(3, 5, D, dtype=dtype, seed=4) if with_residual else None
        inputs = [item for item in (x, weight, bias, residual) if item is not None]
        y, total = kernel.run(x, weight, bias, kind=kind, eps=1e-3, residual=residual)
        gradients = torch.autograd.grad((y * leaf(3, 5, D, dtype=dtype, seed=5)).sum(), inputs)
        results.append([y, total, *gradients])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_rotary_turns_pairs_and_keeps_the_rest():
    x = leaf(1, 2, 1, 6, dtype=torch.float64)
    angle = torch.tensor([[[0.3, 0.7], [1.1, 2.0]]], dtype=torch.float64)
    y = kernels_of("rotary")["reference"].run(x, angle.cos(), angle.sin())
    for t, i in itertools.product(range(2), range(2)):
        pair = torch.complex(x[0, t, 0, i], x[0, t, 0, i + 2])
        turned = pair * torch.exp(1j * angle[0, t, i])
        torch.testing.assert_close(y[0, t, 0, i], turned.real)
        torch.testing.assert_close(y[0, t, 0, i + 2], turned.imag)
    assert torch.equal(y[..., 4:], x[..., 4:])


def test_a_kernel_that_cannot_serve_is_refused_with_its_reason():
    capped = AttentionSpec(n_heads=4, n_kv_heads=4, head_dim=8, softcap=30.0)
    with pytest.raises(UserError, match=r"kernels.attention=sdpa .*soft-cap"):
        choose("attention", capped, "sdpa")
    choice = choose("attention", capped, "auto")
    assert choice.kernel.name == "reference" and "soft-cap" in choice.refused["sdpa"]
    with pytest.raises(UserError, match=r"unknown attention kernel 'flash9'.*sdpa"):
        choose("attention", capped, "flash9")


def test_kernels_remember_one_choice_per_kind_of_layer():
    kernels = Kernels({"attention": "reference"})
    details = {"n_heads": 4, "n_kv_heads": 4, "head_dim": 8}
    first = kernels.choose("attention", AttentionSpec, **details)
    assert first is kernels.choose("attention", AttentionSpec, **details)
    assert first.name == "reference" and len(kernels.choices) == 1
    kernels.choose("attention", AttentionSpec, window=8, **details)
    assert len(kernels.choices) == 2


@pytest.mark.parametrize("op", [op for op, names in AUTO.items() if "triton" in names])
def test_a_gpu_that_is_too_old_for_triton_is_refused_in_words(monkeypatch, op):
    spec = typical(op, "cuda")
    kernel = candidates(op)["triton"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    assert re.search(r"Tesla T4 .*8\.0 .*7\.5", kernel.why_not(spec))
    assert choose(op, spec).kernel.name != "triton"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    assert kernel.why_not(spec) is None
    assert (choose(op, spec).kernel.name == "triton") == (op not in SIZED)


def test_an_older_torch_without_the_loss_is_told_so_when_the_model_is_built(monkeypatch):
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    kernel = candidates("linear_cross_entropy")["torch"]
    assert "torch 2.13 has" in kernel.why_not(CrossEntropySpec(width=8, vocab_size=9))
    with pytest.raises(UserError, match="no linear_cross_entropy"):
        choose("linear_cross_entropy", CrossEntropySpec(width=8, vocab_size=9), "torch")


def test_sdpa_compiles_for_lengths_that_change():
    """Under torch.compile the number of queries becomes symbolic at the second length."""
    run = kernels_of("attention")["sdpa"].run

    def attend(q):
        return run(q, q, q, Mask(causal=True), scale=0.3)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for length in (7, 9, 12, 1):
        q = leaf(B, length, H, K, seed=length)
        torch.testing.assert_close(compiled(q), attend(q))
