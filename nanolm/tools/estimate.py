"""What a training run will need, by arithmetic: memory by part, speed, time, checkpoint size.

Per GPU, with P parameters divided over s ranks (s = 1 under ddp), a bytes per activation (4 in
fp32, 2 in bf16 and fp16), n tokens in a micro-batch:

    weights      4 P / s              gradients   4 P / s
    optimizer    4 k P / s            k = 2 for AdamW, 1 for Muon's matrices and SGD's momentum
    gathered     two blocks and the outermost group, in the arithmetic's type (fsdp, hsdp)
    activations  n L (4 x 2 D  +  a (2 D + (H + 2 G) K + H K + F))       L layers, plus norm details
                 of two streams also L H (a + 1) for each pair of a query and a key,
                 and L H a for each of a query and a distance; and what keys and values are
                 made of, L a D a token and L (a (D + 2 G K) + 4 D) a token of memory
    logits       one chunk of rows by V, in float32, twice, and the head's own gradient

The activations are those of the built-in kernels: what autograd keeps for the backward pass,
counted once where two functions keep the same tensor. Full activation checkpointing leaves a
block's input, selective leaves products and attention. Allocator slack, CUDA's context and NCCL's
buffers are not in it; a tenth of the memory is left free for them.

`largest` is the limit of each strategy, since there is no tensor parallelism. A config's model
grows in width and depth together, its shape kept: s times the heads, the width and the blocks, the
same width of a head. The largest one that fits is found by bisection, for one row per GPU and full
recomputation: what is left to turn before weights would have to be divided within a matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypedDict, Unpack

from nanolm.config.model import ModelConfig
from nanolm.config.schema import Config
from nanolm.errors import UserError
from nanolm.learner import Learner
from nanolm.training.accelerators import ACCELERATORS
from nanolm.training.flops import train_flops_per_token

STATE = {"adamw": 2.0, "sgd": 1.0, "rmsprop": 2.0, "adafactor": 0.01}
"""float32 numbers of optimizer state per parameter."""

CHUNK = 1024
"""Rows of logits that exist at a time."""


class Reads(TypedDict, total=False):
    """What an objective makes a model read, where it is not every token of a row once: targets to a
    token, tokens of memory before a segment, segments of a row."""

    predicted_share: float
    memory: int
    recurrence: int


def reads_of(objective: Any) -> Reads:
    """Those of an objective; each is an optional attribute of it."""
    return Reads(
        predicted_share=getattr(objective, "predicted_share", 1.0),
        memory=getattr(objective, "memory", 0),
        recurrence=getattr(objective, "recurrence", 1),
    )


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: in all, trained, and of each block (with its matrices' alone)."""

    total: int
    trained: int
    blocks: tuple[int, ...]
    matrices: tuple[int, ...]
    stacks: int = 1

    @classmethod
    def of(cls, learner: Learner) -> Sizes:
        """Those of a learner, which may be on the meta device."""
        blocks = [list(block.parameters()) for block in learner.trunk.blocks]
        return cls(
            total=sum(p.numel() for p in learner.parameters()),
            trained=sum(p.numel() for p in learner.parameters() if p.requires_grad),
            blocks=tuple(sum(p.numel() for p in block) for block in blocks),
            matrices=tuple(sum(p.numel() for p in block if p.ndim == 2) for block in blocks),
            stacks=len(learner.trunk.stacks),
        )

    def deeper(self, n_layers: int) -> Sizes:
        """Those of the same learner with so many blocks in each stack, all trained; more repeat a
        stack's last one."""
        blocks, matrices = (self.repeat(sizes, n_layers) for sizes in (self.blocks, self.matrices))
        total = self.total + sum(blocks) - sum(self.blocks)
        return Sizes(total, total, blocks, matrices, self.stacks)

    def repeat(self, sizes: tuple[int, ...], n_layers: int) -> tuple[int, ...]:
        """The blocks' sizes, each stack's cut or filled up with its last to so many."""
        known = len(sizes) // self.stacks
        stacks = (sizes[start : start + known] for start in range(0, len(sizes), known))
        longer = ((*stack[:n_layers], *stack[-1:] * (n_layers - known)) for stack in stacks)
        return tuple(size for stack in longer for size in stack)


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes per GPU by part, and what follows for time and disk."""

    parameters: int
    flops_per_token: float
    memory: dict[str, float]
    available: float
    tokens_per_second: float
    days: float
    checkpoint: float

    @property
    def total(self) -> float:
        """Bytes per GPU in all."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a tenth of the device's memory stays free."""
        return self.total <= 0.9 * self.available


def find_device(name: str) -> str:
    """The entry of the table that a name means, whatever its case; raises UserError otherwise."""

    def plain(word: str) -> str:
        return word.lower().replace(" ", "").replace("-", "")

    for part in ACCELERATORS:
        if plain(part) == plain(name):
            return part
    raise UserError(f"device={name} is not known; choose from {', '.join(ACCELERATORS)}")


def activation_bytes(
    model: ModelConfig,
    precision: str,
    recompute: str,
    tokens: float,
    targets: float = 0.0,
    pairs: float = 0.0,
    distances: float = 0.0,
    sources: tuple[float, float] = (0.0, 0.0),
) -> float:
    """Bytes that the blocks keep of `tokens` tokens for the backward pass; an encoder-decoder's of
    so many of its sources and `targets` of its decoder, whose cross-attention keeps of a target
    what attention does and of a source its keys and values. Of two streams `tokens` are those of
    both, whose blocks also keep something of every pair of a query and a key, or a distance, and
    `sources` those of the content and of memories, whose keys and values are made apart."""
    width, item = model.d_model, 4 if precision == "fp32" else 2
    queries, keys = model.n_heads * model.head_width, model.kv_heads * model.head_width
    rotated = queries + keys if model.positions.name == "rotary" else 0
    biased = 0  # queries once more for distances, and for segments
    if model.positions.name == "relative":
        biased = queries * (2 if model.n_segments else 1)
    norm = 2 if model.norm == "rmsnorm" else 1  # torch's RMSNorm keeps the normalised values too
    attention = item * (width + queries + 2 * keys + rotated + biased + queries)
    attention += 4 * model.n_heads
    ff = item * (width + (4 if model.gated else 1) * model.ff_width)
    residual = 4 * 2 * width * norm + 4 * (2 if norm == 1 else 1) * 2
    dropped = 2 * width if model.dropout else 0  # masks, a byte each
    block = {
        "none": attention + ff + residual + dropped,
        "selective": item * (3 * queries + 2 * keys + width + (2 if model.gated else 1))
        + item * model.ff_width
        + 4 * width,
        "full": 4 * width,
    }[recompute]
    working = attention + ff + residual if recompute != "none" else 0  # the block being redone
    embedded = (4 * norm + item) * width
    kept = tokens * (model.n_layers * block + working + embedded)
    related = model.n_heads * (pairs * (item + 1) + distances * item)
    kept += related * (1 if recompute == "full" else model.n_layers)
    content, remembered = sources
    apart = content * item * width + remembered * item * (width + 2 * keys)
    kept += apart * (1 if recompute == "full" else model.n_layers)
    kept += remembered * 4 * width * model.n_layers
    crossed = item * 2 * keys * model.n_layers if recompute != "full" else 0  # a source's keys
    more = attention if recompute != "full" else 0
    per_target = model.n_layers * (block + more) + working + embedded
    return kept + (tokens * crossed + targets * per_target if targets else 0)


def estimate(
    config: Config,
    sizes: Sizes,
    gpus: int,
    device: str,
    *,
    mfu: float = 0.4,
    gpus_per_node: int = 8,
    predicted_share: float = 1.0,
    memory: int = 0,
    recurrence: int = 1,
) -> Needs:
    """What each of `gpus` devices needs for this run of a model of these sizes."""
    name = find_device(device)
    model, train = config.model, config.train
    parameters = sizes.total
    share = {"ddp": 1, "fsdp": gpus, "hsdp": config.distributed.shard_size or gpus_per_node}
    divided = min(share[config.distributed.strategy], gpus)
    rows = min(train.micro_batch or train.global_batch, -(-train.global_batch // gpus))
    length = config.data.row_length
    tokens = rows * length
    needed = {
        "weights": 4.0 * parameters / divided,
        "gradients": 4.0 * parameters / divided,
        "optimizer": 4.0 * optimizer_numbers(config, sizes) / divided,
        "moving average": 4.0 * parameters / divided if train.ema else 0.0,
        "gathered weights": gathered_bytes(config, sizes) if divided > 1 else 0.0,
        "activations": activation_bytes(
            model,
            train.precision,
            train.activation_checkpointing,
            *READ.get(model.trunk, of_rows)(tokens, predicted_share, length // recurrence, memory),
        ),
        "logits": model.n_tokens * (8.0 * min(CHUNK, tokens) + 4.0 * model.embedded_width),
    }
    flops = train_flops_per_token(
        model, length, predicted_share=predicted_share, memory=memory, recurrence=recurrence
    )
    speed = gpus * ACCELERATORS[name].peak(train.precision) * mfu / flops
    total = train.steps * train.global_batch * length
    saved = 4.0 * (parameters * (2 if train.ema else 1) + optimizer_numbers(config, sizes))
    available = ACCELERATORS[name].gibibytes * 2**30
    return Needs(parameters, flops, needed, available, speed, total / speed / 86400, saved)


def of_rows(tokens: float, share: float, length: int, memory: int) -> tuple[Any, ...]:
    """What a stack reads of so many tokens of rows: (tokens,)."""
    return (tokens,)


def of_sources(tokens: float, share: float, length: int, memory: int) -> tuple[Any, ...]:
    """What an encoder-decoder reads of so many tokens of sources: (tokens, targets)."""
    return tokens, tokens * share


def of_streams(tokens: float, share: float, length: int, memory: int) -> tuple[Any, ...]:
    """What two streams read of so many tokens of segments: (tokens, none, pairs, distances,
    (content, memory))."""
    queries, sources = tokens * (1 + share), (tokens, tokens / length * memory)
    return queries, 0.0, queries * (length + memory), queries * (2 * length + memory - 1), sources


READ = {"encoder_decoder": of_sources, "two_stream": of_streams}
"""What `activation_bytes` is to know of a trunk that is not one stack of one stream."""


def optimizer_numbers(config: Config, sizes: Sizes) -> float:
    """Numbers that the optimizer keeps; raises UserError for one that a plug-in brought."""
    if config.optim.name == "muon":
        matrices = sum(sizes.matrices)
        return matrices + 2.0 * (sizes.trained - matrices)
    if config.optim.name not in STATE:
        raise UserError(f"optim={config.optim.name}: it is not known how much state it keeps")
    return STATE[config.optim.name] * sizes.trained


def gathered_bytes(config: Config, sizes: Sizes) -> float:
    """Whole weights that exist at a time under fsdp: two blocks and the outermost group."""
    item = 4 if config.train.precision == "fp32" else 2
    return item * (sizes.total - sum(sizes.blocks) + 2 * max(sizes.blocks))


def parts_of(needs: Needs) -> Mapping[str, float]:
    """The parts that are not empty, largest first."""
    return {k: v for k, v in sorted(needs.memory.items(), key=lambda kv: -kv[1]) if v}


SizesOf = Callable[[ModelConfig], Sizes]
"""Sizes of a model of two blocks."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """The largest model of one strategy."""

    strategy: str
    gpus: int
    parameters: int
    model: ModelConfig


def scaled(model: ModelConfig, groups: int) -> ModelConfig:
    """The model with so many groups of query heads (one key/value head each), all else alike."""
    scale = Fraction(groups, model.kv_heads)
    heads = groups * (model.n_heads // model.kv_heads)
    return dataclasses.replace(
        model,
        n_heads=heads,
        n_kv_heads=model.n_kv_heads and groups,
        d_model=int(model.d_model * scale),
        d_ff=model.d_ff and int(model.d_ff * scale),
        embedding_width=model.embedding_width and max(1, int(model.embedding_width * scale)),
        n_layers=max(1, round(model.n_layers * scale)),
    )


def largest(
    config: Config,
    sizes_of: SizesOf,
    strategies: Sequence[tuple[str, int]],
    device: str,
    **reads: Unpack[Reads],
) -> list[Limit]:
    """The limit of each (strategy, number of GPUs); `sizes_of` is asked a few dozen times."""
    known: dict[int, tuple[ModelConfig, Sizes]] = {}

    def at(groups: int) -> tuple[ModelConfig, Sizes]:
        if groups not in known:
            model = scaled(config.model, groups)
            small = sizes_of(dataclasses.replace(model, n_layers=2))
            # One block that runs often has no more weights in a deeper model.
            known[groups] = model, small if model.share_layers else small.deeper(model.n_layers)
        return known[groups]

    def fits(groups: int, strategy: str, gpus: int) -> bool:
        model, sizes = at(groups)
        return estimate(lean(config, model, strategy, gpus), sizes, gpus, device, **reads).fits

    found = []
    for strategy, gpus in strategies:
        low, high = 0, 1
        while fits(high, strategy, gpus):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle, strategy, gpus) else (low, middle)
        if low:
            model, sizes = at(low)
            found.append(Limit(strategy, gpus, sizes.total, model))
    return found


def lean(config: Config, model: ModelConfig, strategy: Any, gpus: int) -> Config:
    """The config with this model, one row per GPU and full recomputation."""
    train = dataclasses.replace(
        config.train, global_batch=gpus, micro_batch=1, activation_checkpointing="full"
    )
    distributed = dataclasses.replace(
        config.distributed, strategy=strategy, compare_weights_every=0, cpu_offload=False
    )
    return dataclasses.replace(config, model=model, train=train, distributed=distributed)
