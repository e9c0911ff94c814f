"""Training in bfloat16 with the device's kernels against the same training in float32.

    python -m nanolm.tools.first_contact.sixteen_bits [--device cpu] [--json FILE]

A decoder and a post-norm encoder take 20 steps on rows of several whole tiles. How far bfloat16 may
be from float32 nobody can say beforehand, so it is measured: the same steps under autocast with the
definitions in PyTorch (`reference`), from several initial weights. The device's kernels may be
off by twice what the worst of these is off by, at every step.

Compared are two losses of each target: the one that is trained on, and the float32 cross-entropy of
the same hidden states. The first is rounded where logits are, and hides what is smaller: a residual
stream of 16 bits, say, which the second shows before the first update.

Shapes: T tokens, N targets, D model width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanolm.build import build_learner, build_objective, resolve
from nanolm.config.load import load_config
from nanolm.distributed.devices import device_type
from nanolm.learner import Learner
from nanolm.model.trunk import Inputs
from nanolm.objectives.base import Objective
from nanolm.terminal import say
from nanolm.tools.first_contact.measurement import Figures, enter
from nanolm.tools.kernel_check.attention_cases import ALONE, BF16, Case
from nanolm.tools.kernel_check.main_loops import whole_tiles
from nanolm.tools.stand_in import ROLES, stand_in_tokenizer

STEPS, VOCABULARY = 20, 256
PLAIN_RUNS, MARGIN = 4, 2.0
"""Runs with the definitions, and how many times as far as the worst of them is allowed."""
LR, EPS = 1e-3, 1e-3
"""Adam makes a whole step of a gradient that is nearly 0, to the side on which rounding left it;
this eps keeps such steps small, and runs comparable."""
OPS = ("attention", "linear_cross_entropy", "norm", "rotary", "glu")
DEFINITIONS = dict.fromkeys(OPS, "reference")
HEADS = {"cuda": 64, "cpu": 16}
"""Width of a head."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "decoder": (
        "clm",
        {
            "trunk": "decoder", "n_kv_heads": 1, "norm": "rmsnorm", "feed_forward": "swiglu",
            "bias": False, "positions": {"name": "rotary"},
        },
    ),
    "post-norm encoder": (
        "mlm",
        {
            "trunk": "encoder", "norm": "layernorm", "norm_position": "post",
            "feed_forward": "geglu", "positions": {"name": "learned"},
        },
    ),
}  # fmt: skip
"""Name -> objective and model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where, and for how long."""

    device: str = "cuda"
    """Device type."""
    steps: int = STEPS
    """Optimizer steps of each run."""
    json: str | None = None
    """Also write a line of JSON for each model to this file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runs of a comparison have in common."""

    model: str
    """Of MODELS."""
    device: str
    steps: int = STEPS

    @property
    def width(self) -> int:
        """D: two heads."""
        return 2 * HEADS[self.device]

    @property
    def length(self) -> int:
        """T: several whole tiles of the device's attention, and some tokens more."""
        case = Case(**ALONE, width=HEADS[self.device], dtype=BF16)
        return whole_tiles(case, self.device).n_queries

    def learner(self, kernels: dict[str, str], precision: str, seed: int) -> Learner:
        """The model with the initial weights of a seed."""
        objective, model = MODELS[self.model]
        sizes: dict[str, Any] = {
            "d_model": self.width,
            "d_ff": 2 * self.width,
            "n_layers": 2,
            "n_heads": 2,
        }
        # Weights are larger than usual. With smaller ones all scores are nearly equal, and a wrong
        # maximum or sum of the softmax shows in no loss; with still larger ones the branches are
        # so far off themselves that they hide what rounds the stream.
        sizes |= {"init_std": self.width**-0.5 / 3}
        base = {
            "model": sizes | {"max_length": self.length, "vocab_size": VOCABULARY} | model,
            "objective": {"name": objective},
            "data": {"row_length": self.length},
            "kernels": kernels,
            "train": {"precision": precision},
            "run": {"seed": seed},
        }
        tokenizer = stand_in_tokenizer(VOCABULARY)
        config = resolve(load_config([], base=base), tokenizer)
        return build_learner(config, build_objective(config, tokenizer), self.device).train()

    def batch(self, seed: int) -> dict[str, Tensor]:
        """One row of random tokens; of MLM's every third is hidden."""
        generator = torch.Generator().manual_seed(seed)
        shape = (1, self.length + 1)
        row = torch.randint(len(ROLES), VOCABULARY, shape, generator=generator).to(self.device)
        tokens, following = row[:, :-1], row[:, 1:]
        if MODELS[self.model][0] == "clm":
            return {"tokens": tokens, "targets": following}
        hidden = torch.arange(2, self.length, 3, device=self.device)
        return {
            "tokens": tokens.index_fill(1, hidden, ROLES["mask"]),
            "masked_index": hidden,
            "masked_targets": tokens[0, hidden],
        }


@dataclasses.dataclass(frozen=True)
class EachTarget:
    """Asks a learner for the loss of each target, as its head computes it and in float32."""

    objective: Objective

    def inputs(self, batch: dict[str, Tensor]) -> Inputs:
        """What the trunk reads."""
        return self.objective.inputs(batch)

    def loss(self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]) -> Any:
        """(the mean loss, both losses of each target [2, N])."""
        hidden_ND, targets_N = hidden_BTD.flatten(0, 1), batch.get("masked_targets")
        if targets_N is None:
            targets_N = batch["targets"].flatten()
        else:
            hidden_ND = hidden_ND[batch["masked_index"]]
        head: Any = heads["lm"]
        out = head.cross_entropy(hidden_ND, targets_N, label_smoothing=0.0, z_loss=0.0)
        with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
            exact_N = F.cross_entropy(head(hidden_ND.float()), targets_N, reduction="none")
        return out.loss / len(targets_N), torch.stack([out.nll.detach(), exact_N])


def losses(setting: Setting, kernels: dict[str, str], precision: str, seed: int) -> Tensor:
    """float64 [steps, 2, N]: both losses of each target before each update."""
    learner = setting.learner(kernels, precision, seed)
    batch, asked = setting.batch(seed), EachTarget(learner.objective)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=LR, eps=EPS)
    found = []
    for _ in range(setting.steps):
        with torch.autocast(setting.device, BF16, enabled=precision == "bf16"):
            loss, each = learner(batch, asked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(each.double())
    return torch.stack(found)


def off_by(found: Tensor, exact: Tensor) -> Tensor:
    """[steps, 2]: the root of the mean square over targets by which losses are off."""
    return (found - exact).square().mean(-1).sqrt()


def compare(setting: Setting, kernels: dict[str, str]) -> dict[str, Any]:
    """How far kernels are from float32 after each step, as shares of what is allowed."""
    exact = [losses(setting, DEFINITIONS, "fp32", seed) for seed in range(PLAIN_RUNS)]
    plain = [
        off_by(losses(setting, DEFINITIONS, "bf16", seed), right)
        for seed, right in enumerate(exact)
    ]
    allowed = MARGIN * torch.stack(plain).amax(0)
    found = off_by(losses(setting, kernels, "bf16", 0), exact[0])
    shares = found / allowed
    step = int(shares.amax(1).argmax())
    first, last = (float(exact[0][at, 0].mean()) for at in (0, -1))
    right = bool((shares < 1).all()) and (last < first or setting.steps == 1)  # false for NaN
    words = (
        f"{setting.model}, {setting.steps} steps in bf16 from {first:.3f} to {last:.3f}: losses "
    )
    words += f"off by at most {float(shares.max()):.2f} of what is allowed (step {step + 1}), "
    words += f"{MARGIN:g} times what plain bf16 is off by"
    figures = {"off_by": found.tolist(), "allowed": allowed.tolist(), "length": setting.length}
    return {"ok": right, "words": words, "model": setting.model} | figures


def run(arguments: Arguments) -> int:
    """Trains, prints and writes; 1 when losses differ by more than bfloat16 explains."""
    figures, good = Figures(arguments.json), True
    device = device_type(arguments.device)
    for model in MODELS:
        row = compare(Setting(model=model, device=device, steps=arguments.steps), {})
        figures.add(row)
        say(f"{'ok  ' if row['ok'] else 'FAIL'} {row['words']}")
        good &= row["ok"]
    return int(not good)


if __name__ == "__main__":
    enter(Arguments, run, "sixteen_bits")
