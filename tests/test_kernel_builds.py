"""What the compile matrix compiles: each build is what its name says, and the presets are there."""

import pathlib

import pytest
import torch

import nanolm.kernels.attention.operator
import nanolm.kernels.norm
from nanolm.build import build_objective, build_trunk, resolve
from nanolm.config.load import load_config
from nanolm.kernels.launch import columns_of
from nanolm.ops.contract import AttentionSpec, Kernels
from nanolm.tools.kernel_check.builds import BUILDS, MASKS, WORDS, Build, launch

PRESETS = pathlib.Path(__file__).parents[1] / "configs" / "pretrain"


def test_a_word_that_an_op_does_not_know_is_refused():
    for op, words in WORDS.items():
        for word in words:
            for variant in (word[:-1], f"{word}+{word}s", f"{word}+"):
                with pytest.raises(ValueError, match=rf"{op} has no variant '.*'; it has .*{word}"):
                    Build(op, "bfloat16", 64, variant=variant)
    with pytest.raises(ValueError, match="glu has no variant 'grouped'; it has none"):
        Build("glu", "bfloat16", 64, variant="grouped")


def test_every_word_is_compiled_and_no_build_twice():
    assert len({build.name for build in BUILDS}) == len(BUILDS)
    for op, words in WORDS.items():
        assert words == {word for build in BUILDS if build.op == op for word in build.features}


def words_of(q, k, mask, *, precision="ieee", bias=None, softcap=None, dropout=0.0, **_):
    """The words that a call of attention should have in its build's name."""
    words = set(mask.kinds()) - {"causal"}
    words |= {type(bias).__name__.removesuffix("Bias").lower()} if bias is not None else set()
    return words | {
        word
        for word, present in {
            "softcap": softcap, "dropout": dropout, "grouped": q.shape[2] > k.shape[2],
            "tf32x3": precision == "tf32x3",
        }.items()
        if present
    }  # fmt: skip


@pytest.mark.parametrize("build", [b for b in BUILDS if b.op == "attention"], ids=lambda b: b.name)
def test_attention_is_called_as_the_build_is_named(build, monkeypatch):
    calls = []

    def attention(q, k, v, mask, **options):
        calls.append((q, words_of(q, k, mask, **options), mask.causal))
        bias = options.get("bias")
        learned = [x for x in vars(bias).values() if torch.is_tensor(x)] if bias else []
        return sum(x.sum() for x in (q, k, v, *learned)) * torch.ones(()), None

    monkeypatch.setattr(nanolm.kernels.attention.operator, "attention", attention)
    launch(build)
    [(q, words, causal)] = calls
    assert words == set(build.features)
    assert (causal, q.shape[-1], str(q.dtype)) == (
        build.causal,
        build.width,
        f"torch.{build.dtype}",
    )


@pytest.mark.parametrize("build", [b for b in BUILDS if b.op == "norm"], ids=lambda b: b.name)
def test_a_norm_is_called_as_the_build_is_named(build, monkeypatch):
    calls = []

    def norm(x, weight, bias, *, kind, eps, residual):
        calls.append((kind, bias is not None, residual.dtype, x.shape[-1]))
        total = x + residual
        return total * weight + (0 if bias is None else bias), total

    monkeypatch.setattr(nanolm.kernels.norm, "norm", norm)
    launch(build)
    layernorm = "layernorm" in build.features
    stream = torch.float32 if "wide_stream" in build.features else torch.bfloat16
    kind = "layernorm" if layernorm else "rmsnorm"
    assert calls == [(kind, layernorm, stream, build.width)]


def layers_of(preset, tokenizer):
    """The distinct attention layers that a preset trains."""
    config = load_config(["--config", str(PRESETS / f"{preset}.yaml"), "--data.path", "unused"])
    config = resolve(config, tokenizer)
    kernels = Kernels()
    with torch.device("meta"):
        build_trunk(config.model, kernels, build_objective(config, tokenizer).masks)
    return [spec for spec in kernels.choices if isinstance(spec, AttentionSpec)]


def has_build(spec, mask):
    """Whether a build has all that the layer has: more words take more registers, not fewer."""
    words = {word for word in (mask, spec.bias) if word}
    words |= {"window"} if spec.window else set()
    words |= {"dropout"} if spec.dropout else set()
    words |= {"softcap"} if spec.softcap else set()
    words |= {"grouped"} if spec.n_kv_heads < spec.n_heads else set()
    columns = max(64, columns_of(spec.head_dim))
    return any(
        build.op == "attention"
        and build.dtype == "bfloat16"
        and (build.causal, max(64, columns_of(build.width))) == (spec.causal, columns)
        and words <= set(build.features)
        for build in BUILDS
    )


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_what_a_preset_trains_is_compiled(preset, tokenizer):
    layers = layers_of(preset, tokenizer)
    assert layers
    for spec in layers:
        for mask in spec.masks & set(MASKS) or {""}:
            assert has_build(spec, mask), (spec, mask)
