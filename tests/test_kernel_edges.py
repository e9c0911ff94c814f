"""Edges of the ops: targets outside the vocabulary, no keys, dropout of 1, a bias that hides."""

import contextlib

import pytest
import torch

from nanolm.errors import UserError
from nanolm.ops.bias import AlibiBias, DenseBias
from nanolm.ops.contract import KERNELS, AttentionSpec, CrossEntropySpec, candidates, choose, kernel
from nanolm.ops.masks import Mask
from nanolm.tools.kernel_check.op_trials import normal
from nanolm.tools.kernel_check.sanitizer import sanitized

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ATTENTION = ("reference", "sdpa", "triton", "triton_decode")


def kernel_of(op, name):
    candidates(op)
    return KERNELS[op].get(name).build()


def draw(*shape, seed=0, grad=True):
    x = normal(*shape, dtype=torch.float32, seed=seed, device=DEVICE)
    return x.requires_grad_(grad)


@pytest.mark.parametrize("wrong", [7, 8, 4000, -1, -99, -101, 2**40])
@pytest.mark.parametrize("name", ["reference", "chunked", "torch", "wide", "triton"])
def test_a_target_outside_the_vocabulary_is_nan_in_every_kernel(name, wrong):
    if name == "torch" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    run = kernel_of("linear_cross_entropy", name).run
    hidden, weight = draw(4, 5), draw(7, 5, seed=1)
    targets = torch.tensor([3, wrong, -100, 6], device=DEVICE)
    found = run(hidden, weight, None, targets)
    assert found.loss.isnan()
    assert found.nll.isnan().tolist() == [False, True, False, False]
    assert found.lse.isfinite().all() and found.correct[1] == 0
    right = run(hidden, weight, None, targets.where(targets != wrong, 0))
    assert right.loss.isfinite()
    kept = [0, 2, 3]
    assert torch.equal(found.nll[kept], right.nll[kept])
    grad_hidden, _ = torch.autograd.grad(found.loss, [hidden, weight])
    assert grad_hidden.isnan().any()  # and so the guards of a run see it


@pytest.mark.parametrize("name", ["reference", "chunked", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_16_bit_logits_are_taken_in_float32(name, dtype):
    """Smoothing adds all logits of a row up: here 3,000 of about 30, which float16 cannot hold."""
    hidden, noise = (
        draw(*shape, seed=seed, grad=False) for seed, shape in enumerate([(2, 8), (3000, 8)])
    )
    hidden, weight = (1 + hidden / 8).to(dtype), (3.75 + noise / 8).to(dtype)
    targets, options = torch.tensor([3, 2999], device=DEVICE), {"label_smoothing": 0.1}
    found = kernel_of("linear_cross_entropy", name).run(hidden, weight, None, targets, **options)
    exact = kernel_of("linear_cross_entropy", "reference").run(
        hidden.double(), weight.double(), None, targets, **options
    )
    logits = hidden.double() @ weight.double().T
    assert logits.sum(dim=1).min() > torch.finfo(torch.float16).max
    # Each logit is rounded to 16 bits, by half of eps; their mean, by less.
    rounding = float(logits.max()) * torch.finfo(dtype).eps
    assert abs(float(found.loss) - float(exact.loss)) <= 2 * rounding


def test_options_of_the_loss_do_not_hide_a_wrong_target():
    options = {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.01}
    targets = torch.tensor([3, 7, -100], device=DEVICE)
    for name, found in candidates("linear_cross_entropy").items():
        spec = CrossEntropySpec(
            width=5, vocab_size=7, softcap=3.0, z_loss=True, label_smoothing=True, device=DEVICE
        )
        if found.why_not(spec) is None:
            hidden = draw(3, 5)
            loss = found.run(hidden, draw(7, 5, seed=1), None, targets, **options).loss
            (grad,) = torch.autograd.grad(loss, hidden)
            assert loss.isnan() and grad[1].isnan().all() and grad[[0, 2]].isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_does_not_depend_on_its_chunks(monkeypatch, dtype):
    from nanolm.kernels import cross_entropy

    hidden, weight = draw(11, 5).detach().to(dtype), draw(7, 5, seed=1)
    targets = torch.arange(11, device=DEVICE) % 7
    run, results = kernel_of("linear_cross_entropy", "triton").run, []
    for logits, tokens in ((2**26, 128), (7 * 4, 4)):  # one chunk; two whole ones and a part
        monkeypatch.setattr(cross_entropy, "LOGITS", logits)
        monkeypatch.setattr(cross_entropy, "TOKENS", tokens)
        leaf = hidden.clone().requires_grad_()
        loss = run(leaf, weight, None, targets).loss
        results.append([loss, *torch.autograd.grad(loss, [leaf, weight])])
    assert cross_entropy.chunk_of(7) == 4
    assert results[0][2].dtype == torch.float32
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=1e-5)


def test_gradients_of_16_bit_parameters_are_summed_over_chunks_in_float32(monkeypatch):
    """Sixty chunks of one token: rounded after each of them, a sum would be off by far more than by
    the one rounding at its end."""
    from nanolm.kernels import cross_entropy

    monkeypatch.setattr(cross_entropy, "LOGITS", 1)
    monkeypatch.setattr(cross_entropy, "TOKENS", 1)
    hidden, weight, bias = draw(60, 5), draw(7, 5, seed=1), draw(7, seed=2)
    targets = torch.arange(60, device=DEVICE) % 7
    weight, bias = (x.detach().bfloat16().requires_grad_() for x in (weight, bias))

    def gradients(name, *leaves):
        loss = kernel_of("linear_cross_entropy", name).run(*leaves, targets).loss
        return torch.autograd.grad(loss, leaves[1:])

    exact = gradients("reference", *(x.double() for x in (hidden, weight, bias)))
    for found, right in zip(gradients("triton", hidden, weight, bias), exact, strict=True):
        half = torch.finfo(found.dtype).eps / 2
        torch.testing.assert_close(found.double(), right, rtol=half, atol=1e-5)


def test_chunks_of_the_loss_are_whole_tiles_of_its_products():
    from nanolm.kernels import cross_entropy

    for n_columns in (7, 512, 30_522, 50_304, 128_256, 262_144, 10**7):
        chunk = cross_entropy.chunk_of(n_columns)
        assert chunk % 128 == 0
        assert chunk == 128 or 2**26 - 128 * n_columns < chunk * n_columns <= 2**26


@pytest.mark.parametrize("name", ["reference", "chunked", "triton"])
def test_the_best_logit_is_the_first_of_the_largest_in_whatever_block(monkeypatch, name):
    """Forty columns in blocks of 16: largest ones in the first, the second and the last block, and
    two that are equal in different ones."""
    if name == "triton":
        from nanolm.kernels import cross_entropy

        monkeypatch.setattr(cross_entropy, "BLOCK", 16)
    logits = torch.zeros(8, 40, device=DEVICE)
    for row, columns in enumerate([(3,), (20,), (39,), (5, 20), (5, 20), (17, 36), (0, 15), ()]):
        logits[row, list(columns)] = 2.0
    targets = torch.tensor([3, 20, 39, 5, 20, 17, 15, 0], device=DEVICE)
    run = kernel_of("linear_cross_entropy", name).run
    found = run(torch.eye(8, device=DEVICE), logits.t().contiguous(), None, targets)
    assert found.correct.tolist() == (logits.argmax(dim=1) == targets).tolist()


@pytest.mark.parametrize("name", ATTENTION)
def test_without_any_key_attention_is_zero(name):
    q, k = draw(2, 3, 2, 16), draw(2, 0, 2, 16)
    out = kernel_of("attention", name).run(q, k, k, Mask(), scale=0.25)
    assert out.shape == q.shape and (out == 0).all()


@pytest.mark.parametrize("name", ["reference", "sdpa", "triton"])
def test_dropout_of_one_drops_everything(name):
    q, k, v = (draw(1, 19, 2, 16, seed=seed) for seed in range(3))
    out = kernel_of("attention", name).run(q, k, v, Mask(causal=True), scale=0.25, dropout=1.0)
    assert (out == 0).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), [q, k, v]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", ["lowest", "-inf"])
@pytest.mark.parametrize("name", ATTENTION)
def test_a_bias_that_hides_a_whole_row_is_zero_in_every_kernel(name, hidden, dtype):
    q, k, v = (
        draw(1, 5, 2, 16, seed=seed).detach().to(dtype).requires_grad_() for seed in range(3)
    )
    values = torch.zeros(1, 1, 5, 5, dtype=dtype, device=DEVICE)
    values[..., 2, :] = torch.finfo(dtype).min if hidden == "lowest" else -torch.inf
    values[..., 3, 1:] = values[0, 0, 2, 0]
    out = kernel_of("attention", name).run(q, k, v, Mask(), bias=DenseBias(values), scale=0.25)
    assert (out[0, 2] == 0).all() and torch.equal(out[0, 3], v[0, 0])
    if out.requires_grad:
        grads = torch.autograd.grad(out.float().sum(), [q, k, v])
        assert all(grad.isfinite().all() for grad in grads) and (grads[0][0, 2] == 0).all()


@pytest.mark.parametrize("common", [-5000.0, 5000.0])
@pytest.mark.parametrize("name", ATTENTION)
def test_what_all_scores_of_a_query_have_in_common_changes_nothing(name, common):
    """A row's largest score is subtracted, however low or high it is."""
    q, k, v = (draw(1, 5, 2, 16, seed=seed, grad=False) for seed in range(3))
    run = kernel_of("attention", name).run
    found, right = (
        run(q, k, v, Mask(causal=True), bias=DenseBias(values), scale=0.25)
        for values in (torch.full((5, 5), common, device=DEVICE), torch.zeros(5, 5, device=DEVICE))
    )
    torch.testing.assert_close(found, right, rtol=0, atol=5e-3)  # float32 rounds 5000 by 2e-4


@pytest.mark.parametrize("shape", [(7,), (2, 5, 1), (2, 1, 1, 1), (1, 2, 5, 7)], ids=str)
def test_a_dense_bias_of_any_shape_and_layout_has_its_gradient(shape):
    """It may broadcast over every axis, its last axis need not be the nearest in memory, and it may
    learn alone."""
    q, k, v = (draw(2, n, 2, 16, seed=seed, grad=False) for seed, n in enumerate((5, 7, 7)))
    values = draw(*shape[::-1], grad=False).permute(*reversed(range(len(shape)))).requires_grad_()

    def gradient(name):
        run = kernel_of("attention", name).run
        with sanitized() if DEVICE == "cpu" else contextlib.nullcontext():
            out = run(q, k, v, Mask(causal=True), bias=DenseBias(values), scale=0.25)
            return torch.autograd.grad(out.square().sum(), values)[0]

    torch.testing.assert_close(gradient("triton"), gradient("reference"), rtol=1e-4, atol=1e-5)


def test_slopes_that_learn_are_refused_when_the_model_is_built():
    spec = AttentionSpec(n_heads=2, n_kv_heads=2, head_dim=16, bias="learned_alibi", device=DEVICE)
    assert "these learn" in kernel_of("attention", "triton").why_not(spec)
    assert choose("attention", spec).kernel.name in ("sdpa", "reference")
    q, slopes = draw(1, 5, 2, 16), draw(2)
    with pytest.raises(ValueError, match="bias_kind = 'learned_alibi'"):
        kernel_of("attention", "triton").run(q, q, q, Mask(), bias=AlibiBias(slopes), scale=0.25)


@pytest.mark.parametrize(
    ("shapes", "options", "words"),
    [
        ([(1, 3, 4, 16), (1, 3, 3, 16), (1, 3, 3, 16)], {}, "3 key heads do not divide 4 query"),
        ([(2, 3, 2, 16), (1, 3, 2, 16), (1, 3, 2, 16)], {}, "do not fit keys"),
        ([(1, 3, 2, 16), (1, 3, 2, 8), (1, 3, 2, 8)], {}, "do not fit keys"),
        ([(1, 3, 2, 16), (1, 3, 2, 16), (1, 4, 2, 16)], {}, "and values .* differ"),
        ([(1, 3, 2, 16)] * 3, {"precision": "tf32"}, "precision='tf32' of float32 products"),
        ([(1, 3, 2, 16)] * 3, {"dtype": torch.float64}, "values torch.float64: they must have one"),
    ],
)
def test_inputs_that_do_not_fit_together_are_refused(shapes, options, words):
    from nanolm.kernels.attention.operator import attention

    q, k, v = (draw(*shape) for shape in shapes)
    v = v.to(options.pop("dtype", torch.float32))
    with pytest.raises(ValueError, match=words):
        attention(q, k, v, Mask(), scale=0.25, **options)


@pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
def test_a_batch_without_rows_queries_or_keys_has_gradients_of_zero(sizes):
    n_rows, n_queries, n_keys = sizes
    q, k, v = (draw(n_rows, n, 2, 16) for n in (n_queries, n_keys, n_keys))
    bias = draw(1, 2, n_queries, n_keys)
    out = kernel_of("attention", "triton").run(q, k, v, Mask(), bias=DenseBias(bias), scale=0.25)
    assert out.shape == q.shape and (out == 0).all()
    grads = torch.autograd.grad(out.sum(), [q, k, v, bias])
    for x, grad in zip([q, k, v, bias], grads, strict=True):
        assert grad.shape == x.shape and (grad == 0).all()


def registered(op, **attributes):
    kernel(op)(type("Plugin", (), attributes))


def serve(self, spec):
    return None


@pytest.mark.parametrize(
    ("op", "attributes", "words"),
    [
        ("atention", {}, "there is no op 'atention'; did you mean attention"),
        ("convolution", {}, "there is no op 'convolution'; choose from attention, linear"),
        ("norm", {"why_not": serve, "run": serve}, "Plugin has no `name`"),
        ("norm", {"name": 3, "why_not": serve, "run": serve}, "Plugin has no `name`"),
        ("norm", {"name": "mine", "run": serve}, "'mine' has no method why_not"),
        ("norm", {"name": "mine", "why_not": serve}, "'mine' has no method run"),
        ("norm", {"name": "torch", "why_not": serve, "run": serve}, "'torch' is taken, by Torch"),
        ("norm", {"name": "auto", "why_not": serve, "run": serve}, "'auto' is what `kernels:`"),
        (
            "norm",
            {"name": "mine", "why_not": serve, "run": serve, "__init__": lambda self, x: None},
            "cannot be made without arguments",
        ),
    ],
)
def test_a_kernel_that_cannot_be_registered_is_one_sentence(op, attributes, words):
    candidates("norm")
    with pytest.raises(UserError) as told:
        registered(op, **attributes)
    assert words in str(told.value) and "\n" not in str(told.value)
    assert "mine" not in KERNELS["norm"].names()


@pytest.mark.parametrize("name", ["reference", "sdpa", "triton"])
def test_attention_and_its_gradients_repeat_bit_for_bit(name):
    """On CUDA sdpa's backward pass does so under torch's own flag alone, which is set here for it:
    docs/kernels_attention.md says what is lost without."""
    q, k, v = (draw(2, 20, 2, 16, seed=seed) for seed in range(3))

    def once():
        out = kernel_of("attention", name).run(q, k, v, Mask(causal=True), scale=0.25)
        return out, *torch.autograd.grad(out.square().sum(), [q, k, v])

    torch.use_deterministic_algorithms(name == "sdpa")
    try:
        assert all(map(torch.equal, once(), once()))
    finally:
        torch.use_deterministic_algorithms(False)
