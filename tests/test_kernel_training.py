"""Training with the reference, the CPU path and the interpreted Triton kernels is the same."""

import numpy as np
import pytest
import torch

from nanolm.data.rows import Row
from nanolm.registry import KERNELS

OPS = ("attention", "linear_cross_entropy", "norm", "rotary", "glu")
GPT = {
    "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "norm": "rmsnorm", "feed_forward": "swiglu",
    "bias": False, "positions": {"name": "rotary"}, "d_ff": 32,
}  # fmt: skip
BERT = {
    "trunk": "encoder", "n_layers": 1, "n_heads": 2, "norm": "layernorm",
    "norm_position": "post", "feed_forward": "geglu", "positions": {"name": "t5"}, "d_ff": 32,
}  # fmt: skip
T5 = {
    "trunk": "encoder_decoder", "n_layers": 1, "n_heads": 2, "norm": "rmsnorm", "bias": False,
    "feed_forward": "geglu_tanh", "positions": {"name": "t5"}, "attention_scale": 1.0,
    "logit_scale": True, "weight_init": "t5", "d_ff": 32,
}  # fmt: skip
XLNET = {
    "trunk": "two_stream", "n_layers": 1, "n_heads": 2, "norm_position": "post", "n_segments": 3,
    "positions": {"name": "relative"}, "d_ff": 32,
}  # fmt: skip


def rows_of(objective, tokens):
    """A batch of an objective that makes it of single rows, one of them short."""
    rows = [
        Row(ids, np.zeros(1, np.int64), corpus=0, block=0, epoch=0, row_id=number)
        for number, ids in enumerate((tokens[0].numpy(), tokens[1, :-3].numpy()))
    ]
    examples = [objective.example(row, np.random.default_rng(row.row_id), None) for row in rows]
    return {name: torch.from_numpy(x) for name, x in objective.collate(examples).items()}


def losses(make_learner, model, objective, kernel, steps):
    requested = {op: kernel for op in OPS if kernel != "auto"}
    device = "cuda" if torch.cuda.is_available() and kernel == "triton" else "cpu"
    learner = make_learner(model, objective, row_length=9, kernels=requested, device=device).train()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    values = []
    tokens = torch.randint(512, (2, 9), generator=generator)
    for _ in range(steps):
        batch = {"tokens": tokens, "targets": tokens.roll(-1, 1)}
        if objective["name"] == "mlm":
            index = torch.tensor([1, 4, 5, 10, 12])
            batch = {
                "tokens": tokens.index_put((index // 9, index % 9), torch.tensor(3)),
                "masked_index": index,
                "masked_targets": tokens.flatten()[index],
                "lengths": torch.tensor([9, 6]),
            }
        if objective["name"] in ("span", "permutation"):
            batch = rows_of(learner.objective, tokens[:, : learner.objective.span])
        batch = {name: x.to(device) for name, x in batch.items()}
        terms = learner(batch)
        name = next(iter(learner.objective.weights))
        loss = terms[name].sum / terms[name].count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return torch.tensor(values)


@pytest.mark.parametrize("steps", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("model", "objective"),
    [
        (GPT, {"name": "clm"}),
        (BERT, {"name": "mlm"}),
        (T5, {"name": "span"}),
        (XLNET, {"name": "permutation", "memory": 2}),
    ],
    ids=["gpt", "bert", "t5", "xlnet"],
)
def test_steps_have_the_same_losses(make_learner, model, objective, steps):
    expected = losses(make_learner, model, objective, "reference", steps)
    assert expected[-1] < expected[0]
    for kernel in ("auto", "triton"):
        actual = losses(make_learner, model, objective, kernel, steps)
        assert (actual - expected).abs().max() < 1e-4, kernel


def test_triton_is_a_built_in_of_every_op():
    assert all("nanolm.kernels.candidates" in KERNELS[op].opens for op in OPS)
