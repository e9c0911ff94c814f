"""Optimizers: who decays, Muon against torch's own, state that survives by name."""

import math

import pytest
import torch

from nanolm.checkpoint.named_tensors import load_optimizers, optimizer_tensors
from nanolm.registry import OPTIMIZERS
from nanolm.training import optim
from tests.tiny_run import batch_of, build_learner

BUILT_IN = ["adamw", "muon", "sgd", "rmsprop", "adafactor"]


def take_step(learner, optimizers, row=0):
    terms = learner(batch_of([row, row + 1]).tensors)
    sum(terms[name].sum for name in learner.objective.weights).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_parameter_once_decay_on_matrices_only_and_state_by_name(name):
    options = OPTIMIZERS.get(name).options()
    learner, other = build_learner(), build_learner()
    optimizers = optim.build_optimizers(learner, options)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    names = [n for group in groups for n in group["names"]]
    assert sorted(names) == sorted(n for n, _ in learner.named_parameters())
    for group in groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])
    take_step(learner, optimizers)
    take_step(learner, optimizers)
    saved = {k: v.clone() for k, v in optimizer_tensors(optimizers).items()}
    if name not in ("sgd", "rmsprop"):
        assert "trunk.blocks.0.1.weight" in {key.rpartition("/")[0] for key in saved}
    other.load_state_dict(learner.state_dict())
    continued = optim.build_optimizers(other, options)
    load_optimizers(continued, saved, "it")
    take_step(learner, optimizers, 5)
    take_step(other, continued, 5)
    for left, right in zip(learner.parameters(), other.parameters()):
        assert torch.equal(left, right)


def test_muon_takes_the_blocks_matrices_and_agrees_with_torch(monkeypatch):
    monkeypatch.setattr(optim, "multiplies_bf16", lambda: True)  # torch's own takes bfloat16
    learner, oracle = build_learner(), build_learner()
    muon, adamw = optim.build_optimizers(learner, optim.MuonOptions())
    assert isinstance(muon, optim.Muon)
    names = muon.param_groups[0]["names"]
    assert names == [f"trunk.blocks.{i}.{j}.weight" for i in (0, 1) for j in (1, 3)]
    assert "trunk.embedding.weight" in adamw.param_groups[0]["names"]
    matrices = dict(oracle.named_parameters())
    torchs = torch.optim.Muon([matrices[n] for n in names], lr=0.02, weight_decay=0.1)
    for row in range(4):
        for model, optimizers in ((learner, [muon]), (oracle, [torchs])):
            take_step(model, optimizers, row)
            model.zero_grad()
    for name in names:
        torch.testing.assert_close(learner.get_parameter(name), matrices[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(4, 16), (16, 4), (8, 8)])
def test_newton_schulz_brings_singular_values_near_one(shape, dtype):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = optim.orthogonalise(matrix, 5, lambda x: x @ x.mT, dtype)
    assert found.dtype == dtype
    values = torch.linalg.svdvals(found.float())
    assert values.min() > 0.6 and values.max() < 1.3


def test_small_singular_values_end_where_the_docstring_says():
    def ends(value):
        matrix = torch.tensor([value, math.sqrt(1 - value**2)], dtype=torch.float64).diag()
        return optim.orthogonalise(matrix, 5, lambda x: x @ x.mT, torch.float64)[0, 0].item()

    found = [ends(i / 2000) for i in range(3, 2000)]
    assert min(found) > 0.675 and max(found) < 1.21
    assert round(ends(0.001), 2) == 0.47 and round(ends(0.0001), 2) == 0.05 and ends(0.0) == 0


@pytest.mark.parametrize("native", [True, False])
def test_the_iteration_is_in_float32_where_a_cpu_cannot_multiply_bf16(monkeypatch, native):
    monkeypatch.setattr(optim, "multiplies_bf16", lambda: native)
    muon, _ = optim.build_optimizers(build_learner(), optim.MuonOptions())
    assert muon.dtype == (torch.bfloat16 if native else torch.float32)
    assert optim.iteration_dtype("cuda") == torch.bfloat16


def test_muon_multiplies_with_the_kernel_that_the_config_names(make_learner):
    weights = {}
    for name in ("auto", "reference", "triton"):
        learner = make_learner(kernels={"symmetric_product": name})
        muon, _ = optim.build_optimizers(learner, optim.MuonOptions())
        chosen = learner.trunk.kernels.chosen("symmetric_product")
        assert {kernel.name for kernel in chosen} == {"reference" if name == "auto" else name}
        n_columns, n_rows = max(muon.products)  # taller than wide, of one of the model's sizes
        matrix = torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(0))
        weights[name] = muon.orthogonal_part(matrix, 5)
    plain = optim.orthogonalise(matrix, 5, lambda x: x @ x.mT, optim.iteration_dtype("cpu"))
    assert torch.equal(weights["auto"], plain.float())
    assert torch.equal(weights["auto"], weights["reference"])
    assert (weights["triton"] - weights["auto"]).abs().max() < 0.02  # bfloat16, summed otherwise
