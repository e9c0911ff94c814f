"""The training steps that `nanolm bench train` stands beside: transformers' GPT-2 and BERT, and the
loop that people write themselves.

Every peer gets what its users would give it: scaled_dot_product_attention, fused AdamW, autocast in
bf16 (in fp16 with a gradient scaler), gradients set to None, clipping at 1.0, and `torch.compile`
where that is faster (the benchmark tries both). Batches are handed over ready made and on the
device: their data phase costs nothing. No step waits to read its loss.

Shapes: B batch, T tokens, D model width, H heads, K head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanolm.tools.bench.clock import Clock
from nanolm.tools.bench.shape import Shape
from nanolm.training.engine import AUTOCAST

CPU = torch.device("cpu")
IGNORED = -100


class PlainBlock(nn.Module):
    """A pre-norm block as it stands in many repositories."""

    def __init__(self, shape: Shape, causal: bool) -> None:
        super().__init__()
        width = shape.d_model
        self.n_heads, self.causal = shape.n_heads, causal
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v = (
            part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm_1(x_BTD)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x_BTD = x_BTD + self.out(attended.transpose(1, 2).flatten(2))
        return x_BTD + self.down(F.gelu(self.up(self.norm_2(x_BTD))))


class PlainTrunk(nn.Module):
    """Token and position embeddings, blocks, final norm."""

    def __init__(self, shape: Shape, causal: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab_size, shape.d_model)
        self.positions = nn.Embedding(shape.row_length, shape.d_model)
        self.blocks = nn.ModuleList(PlainBlock(shape, causal) for _ in range(shape.n_layers))
        self.norm = nn.LayerNorm(shape.d_model)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]."""
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.tokens(tokens_BT) + self.positions(positions_T)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.norm(x_BTD)


class PlainModel(nn.Module):
    """Trunk, tied vocabulary projection, cross entropy over all positions."""

    def __init__(self, shape: Shape, causal: bool) -> None:
        super().__init__()
        self.trunk = PlainTrunk(shape, causal)
        nn.init.normal_(self.trunk.tokens.weight, std=0.02)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean loss over the targets that are not -100."""
        logits_BTV = F.linear(self.trunk(tokens_BT), self.trunk.tokens.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED)


class FromTransformers(nn.Module):
    """A model of transformers with its own loss."""

    def __init__(self, model: nn.Module, trunk: nn.Module, shifts: bool) -> None:
        super().__init__()
        self.model, self.shifts = model, shifts
        self._trunk = [trunk]  # in a list: the parameters are the model's already

    @property
    def trunk(self) -> nn.Module:
        """The part that returns hidden states."""
        return self._trunk[0]

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The model's loss; a causal model shifts the labels itself."""
        labels_BT = tokens_BT if self.shifts else targets_BT
        return self.model(input_ids=tokens_BT, labels=labels_BT).loss


SDPA: dict[str, Any] = {"attn_implementation": "sdpa"}
"""What every config of transformers takes, though its classes do not name it."""


def transformers_gpt2(shape: Shape) -> nn.Module:
    """GPT2LMHeadModel at the shape, without dropout and cache."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415

    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.row_length,
        n_embd=shape.d_model,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu",  # exact, like every contestant: tanh costs three times as much
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        **SDPA,
    )
    model = GPT2LMHeadModel(config)
    return FromTransformers(model, model.transformer, shifts=True)


def bert_config(shape: Shape, **more: Any) -> Any:
    """transformers' BertConfig at the shape, without dropout; `more` are further keys of it."""
    from transformers import BertConfig  # noqa: PLC0415

    return BertConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        intermediate_size=4 * shape.d_model,
        max_position_embeddings=shape.row_length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SDPA,
        **more,
    )


def transformers_bert(shape: Shape) -> nn.Module:
    """BertForMaskedLM at the shape, without dropout; rows are full, so it gets no padding mask."""
    from transformers import BertForMaskedLM  # noqa: PLC0415

    model = BertForMaskedLM(bert_config(shape))
    return FromTransformers(model, model.bert, shifts=False)


MODELS: dict[str, Callable[[Shape], nn.Module]] = {
    "transformers-gpt2": transformers_gpt2,
    "transformers-bert": transformers_bert,
    "plain-gpt": lambda shape: PlainModel(shape, causal=True),
    "plain-bert": lambda shape: PlainModel(shape, causal=False),
}
"""Peer -> its model, which maps (tokens, targets) to a mean loss and has a `trunk`."""


class PeerStep:
    """The loop as people write it, one step a call."""

    def __init__(
        self, settings: dict[str, Any], shape: Shape, precision: str, device: torch.device = CPU
    ) -> None:
        torch.manual_seed(0)
        self.model = MODELS[settings["model"]](shape).to(device).train()
        self.device, self.dtype = device, AUTOCAST.get(precision)
        parameters = list(self.model.parameters())
        self.n_parameters = sum(parameter.numel() for parameter in parameters)
        self.kernels: dict[str, str] = {}  # nothing is chosen
        self.optimizer = torch.optim.AdamW(
            parameters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.compiled = settings.get("compile", False)
        self.batches = [
            (tokens.to(device), targets.to(device))
            for tokens, targets in peer_batches(shape, settings["objective"])
        ]

    def __call__(self, clock: Clock) -> dict[str, Tensor]:
        """One optimizer step on the next batch; its loss, which nothing waits for."""
        tokens, targets = self.batches[clock.step % len(self.batches)]
        clock.mark("data")
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            loss = self.model(tokens, targets)
        clock.mark("loss")
        self.scaler.scale(loss).backward()
        clock.mark("backward")
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        clock.mark("optimizer")
        return {"loss": loss.detach()}

    def prepare(self, clock: Clock) -> None:
        """Compiles, or else sets the mark between forward and loss, which a graph would swallow."""
        if self.compiled:
            self.model.compile()
        else:
            cast(nn.Module, self.model.trunk).register_forward_hook(
                lambda *_: clock.mark("forward")
            )


def peer_batches(shape: Shape, objective: str, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """(tokens, targets) [B, T] int64 of random ids; targets are the next token, or for MLM -100
    but at 15 % of each row's positions."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        size = (shape.batch, shape.row_length + 1)
        tokens = torch.randint(8, shape.vocab_size, size, generator=generator)
        if objective == "clm":
            batches.append((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
            continue
        tokens = tokens[:, 1:].contiguous()
        order = torch.rand(tokens.shape, generator=generator).argsort(dim=1)
        targets = torch.where(order < shape.n_masked, tokens, IGNORED)
        batches.append((tokens, targets))
    return batches
