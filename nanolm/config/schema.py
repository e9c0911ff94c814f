"""The whole schema of a run: what (model), on what (data), how (objective, optim, schedule, train),
with what (kernels, distributed), and the run itself. Plain frozen dataclasses; a field's docstring
is its `--help`. Nothing here builds anything: names resolve in `build.py`.

Some fields are *choices*: a registered name decides which options dataclass stands there
(`objective`, `optim`, `schedule`, `peft`, `model.positions`, `train.rule`; see `choices.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, Literal

from nanolm.config.model import ModelConfig
from nanolm.config.ranges import Amount, Count, Within
from nanolm.errors import require, require_at_least, require_whole_path
from nanolm.registry import Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """One prepared corpus in the mixture."""

    path: str
    """Folder that `nanolm prepare` wrote, or s3://bucket/prefix."""
    weight: float = 1.0
    """Its share of the training rows, relative to the other corpora."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Blocks of corpora in S3-compatible storage that this node keeps on its own disk."""

    dir: str = "~/.cache/nanolm/blocks"
    """Folder on this node's disk; all ranks and loader workers of the node share it."""
    gigabytes: float = 100.0
    """Most that it may hold, in 10^9 bytes; what was not read for longest makes room."""
    read_ahead: Amount = 8
    """Micro-batches whose blocks are fetched before they are needed."""
    retry_seconds: float = 300.0
    """How long a read that fails (5xx, time-out, truncated body) is tried again."""

    def __post_init__(self) -> None:
        require_at_least("data.cache", self, read_ahead=0, retry_seconds=0, gigabytes=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What it is trained on."""

    corpora: list[CorpusConfig] = dataclasses.field(default_factory=list)
    """Prepared corpora with their mixture weights."""
    path: str | None = None
    """Shorthand for a single corpus: the folder that `nanolm prepare` wrote, or
    s3://bucket/prefix."""
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    """Where blocks of corpora in S3-compatible storage are kept."""
    row_length: Count = 256
    """Tokens per training row, T."""
    rows: Literal["sentences"] | None = None
    """sentences: a row ends with the last whole sentence that fits, and is padded behind it (for
    data of `nanolm prepare --sentences true`); null: every row has all of its row_length tokens."""
    document_mask: bool = False
    """Documents packed in one row do not see each other, and positions restart in each."""
    workers: Amount = 0
    """Loader processes per rank; 0 reads in the training process."""

    def __post_init__(self) -> None:
        require_at_least("data", self, row_length=2, workers=0)
        require(
            self.path is None or not self.corpora,
            "data.path and data.corpora are both set; keep one of them",
        )
        for corpus in self.corpora:
            require(corpus.weight > 0, f"data.corpora: the weight of {corpus.path} must be > 0")

    @property
    def mixture(self) -> list[tuple[str, float]]:
        """(folder, weight) of each corpus; raises UserError when there is none."""
        if self.path is not None:
            return [(self.path, 1.0)]
        require(len(self.corpora) > 0, "no data: set data.path to a folder that prepare wrote")
        return [(corpus.path, corpus.weight) for corpus in self.corpora]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How one step is taken."""

    steps: Amount = 1000
    """Optimizer steps."""
    global_batch: Count = 16
    """Rows per optimizer step over all ranks: *the* batch size, whatever the number of ranks."""
    micro_batch: Count | None = None
    """Rows per forward pass on one rank, at most; null means the rank's whole share."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward: fp32, bf16 autocast, or fp16 autocast with loss
    scaling; weights and optimizer stay fp32."""
    clip: float | None = 1.0
    """Largest global gradient norm; null for no clipping."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, used for evaluation; null for
    none."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """What of a block is computed again in the backward pass instead of kept: nothing, all of it
    (full), or all but the results of matrix products and attention (selective)."""
    compile: bool = False
    """torch.compile the trunk's blocks."""
    nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """What to do on a non-finite loss or gradient, or a spike, agreed over ranks: stop; skip the
    step; or rewind to the last good checkpoint and skip the step's rows on the way back."""
    spike: float | None = None
    """A loss above this many times the median of the last 64 is treated like a non-finite one;
    null for no limit."""
    rewind_steps: Count = 1
    """With nonfinite=rewind: skip the rows of so many steps, the bad one the last of them."""
    max_skips: Amount = 10
    """With nonfinite=skip or rewind: stop after this many bad steps without a good one between."""
    rule: Options = dataclasses.field(default_factory=lambda: Options(name="plain"))
    """Gradient rule: how one optimizer step gets its gradient."""

    def __post_init__(self) -> None:
        require_at_least("train", self, steps=0, global_batch=1, micro_batch=1, max_skips=0)
        require_at_least("train", self, rewind_steps=1, spike=1)
        require(self.clip is None or self.clip > 0, f"train.clip={self.clip} must be > 0 or null")
        require(self.ema is None or 0 < self.ema < 1, f"train.ema={self.ema} must lie in (0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Which weights are trained, when, and how fast."""

    what: Literal["all", "heads", "last", "named"] = "all"
    """all; heads: the trunk stays as it is; last: heads, final norm and the last n_layers blocks;
    named: heads and the weights that patterns name."""
    n_layers: Amount = 2
    """With what=last: blocks that are trained."""
    patterns: list[str] = dataclasses.field(default_factory=list)
    """With what=named: shell patterns of parameter names, such as '*.attention.*'."""
    layer_decay: float = 1.0
    """Layer-wise decay: each level below the heads learns at this share of the rate above it."""
    unfreeze_every: Count | None = None
    """Gradual unfreezing: train the heads first and one more block from the top every so many
    steps; null trains everything from the start."""

    def __post_init__(self) -> None:
        require_at_least("tune", self, n_layers=0, unfreeze_every=1)
        decay = self.layer_decay
        require(0 < decay <= 1, f"tune.layer_decay={decay} must lie in (0, 1]")
        require(
            (self.what == "named") == bool(self.patterns),
            "tune.patterns goes with tune.what=named, and needs at least one pattern there",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during training."""

    every: Amount = 250
    """Steps between evaluations on the validation split; 0 for none but the last."""
    batches: Count | None = None
    """Batches of the validation split to use; null for all of it."""
    batch: Count | None = None
    """Rows per evaluation batch; null means train.global_batch."""
    patience: Count | None = None
    """Stop after so many evaluations in a row without a new best; null trains to the end."""

    def __post_init__(self) -> None:
        require_at_least("eval", self, every=0, batches=1, batch=1, patience=1)
        require(
            self.patience is None or self.every != 0,
            f"eval.patience={self.patience} counts evaluations, and eval.every=0 makes only the "
            f"last one; set eval.every",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Which implementation computes each op: `auto`, or a registered kernel's name."""

    attention: str = "auto"
    """softmax(q k^T) v. triton multiplies float32 exactly (ieee), triton_tf32x3 as three TF32
    products; fastest takes what `timings` knows of this device."""
    linear: str = "auto"
    """x W^T + b."""
    linear_cross_entropy: str = "auto"
    """The vocabulary projection with its loss."""
    norm: str = "auto"
    """LayerNorm or RMSNorm."""
    rotary: str = "auto"
    """Rotation of queries and keys by their position."""
    glu: str = "auto"
    """The gate of SwiGLU and GEGLU."""
    symmetric_product: str = "auto"
    """Muon's x x^T, in bfloat16 (float32 on a CPU without bfloat16 products). auto multiplies as
    reference does, on CUDA with triton those sizes at which `timings` shows it to be faster."""
    timings: str | None = None
    """File that `nanolm kernels bench --save FILE` wrote on this machine: what attention=fastest
    and symmetric_product=auto take from, and what attention=auto compares itself with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How ranks work together."""

    strategy: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """ddp: every rank holds the whole model; fsdp: weights, gradients and optimizer state are
    divided over all ranks; hsdp: divided over shard_size ranks and replicated over such groups."""
    shard_size: Count | None = None
    """Ranks that share one copy of the model under hsdp; null means the ranks of a node."""
    reshard_after_forward: bool = True
    """Under fsdp and hsdp, drop a block's gathered weights between forward and backward (less
    memory) or keep them (less communication)."""
    cpu_offload: bool = False
    """Under fsdp and hsdp, keep weights and optimizer state in host memory; needs CUDA."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """What carries gradients between ranks: auto takes nccl on GPUs and gloo on CPUs. gloo also
    carries GPU tensors, through host memory: for ranks that share a GPU, or where nccl fails."""
    timeout: Annotated[float, Within(1, 1e9)] = 600.0
    """Seconds after which a collective that a peer never joins is an error."""
    hang_timeout: Annotated[float, Within(0, 1e9)] | None = None
    """Seconds without any progress after which the rank that hangs is named, with step, phase and
    Python stack, and the job ends for restart; null means 0.8 timeout, 0 never."""
    compare_weights_every: Amount = 0
    """Steps between comparisons of the ranks' weights by hash, against silent corruption; 0 for
    none."""

    def __post_init__(self) -> None:
        require_at_least("distributed", self, timeout=1)
        require_at_least("distributed", self, hang_timeout=0, compare_weights_every=0)
        # Less than a second ends every run as one that hangs, before its first step.
        require(
            not 0 < (self.hang_timeout or 0) < 1,
            f"distributed.hang_timeout={self.hang_timeout} must be at least 1, or 0 for never",
        )
        require_at_least("distributed", self, shard_size=1)
        sharded = self.strategy != "ddp"
        require(
            not (sharded and self.compare_weights_every),
            f"distributed.compare_weights_every compares whole copies of the weights, and "
            f"{self.strategy} keeps none; set it to 0",
        )
        require(
            sharded or not self.cpu_offload,
            "distributed.cpu_offload needs distributed.strategy fsdp or hsdp",
        )

    @property
    def hang_seconds(self) -> float:
        """Seconds without progress that count as a hang; 0 for never."""
        return 0.8 * self.timeout if self.hang_timeout is None else self.hang_timeout


@dataclasses.dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases: offline unless the user is logged in; never blocks or fails a run."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online when logged in, else offline files under the run's folder."""
    project: str = "nanolm"
    """Project name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run itself: where it writes, how often, from which seed."""

    dir: str = "runs/run"
    """Folder of the run: config, metrics, checkpoints, summary."""
    seed: Annotated[int, Within(0)] = 0
    """Seed of weights, data order, masks and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is any."""
    threads: Count | None = None
    """Intra-op CPU threads per rank; null leaves torch's choice."""
    log_every: Count = 10
    """Steps between metric lines."""
    checkpoint_every: Amount = 500
    """Steps between checkpoints; 0 for none but the last."""
    checkpoint_async: bool = False
    """Copy a checkpoint to host memory and write it while training goes on; one at a time. Needs
    room in memory for what a rank writes."""
    shared: bool = True
    """All nodes see one run.dir; false: each node keeps what its ranks hold in a run.dir of its
    own."""
    keep_last: Count = 2
    """Newest checkpoints to keep."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""
    tensorboard: bool = False
    """Also write TensorBoard event files."""
    wandb: WandbConfig = dataclasses.field(default_factory=WandbConfig)
    """Weights & Biases."""

    def __post_init__(self) -> None:
        require_at_least("run", self, seed=0, threads=1, log_every=1)
        require_at_least("run", self, checkpoint_every=0, keep_last=1)
        require_whole_path("run.dir", self.dir)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One training run."""

    opens_best: ClassVar[bool] = False
    """Whether who uses the model wants the checkpoint that did best, and not the newest."""

    plugins: list[str] = dataclasses.field(default_factory=list)
    """Modules imported first; their decorators register names and options."""
    resume: str = "never"
    """never | auto (continue run.dir when it holds a checkpoint) | a checkpoint's folder."""
    init_from: str | None = None
    """Checkpoint whose trunk (and matching heads) are the initial weights of a fresh run;
    hf:FOLDER takes a published one (see `nanolm import`)."""
    init_layers: list[int] | None = None
    """Layers of init_from, counted from 0, that the layers of a smaller model start from, one for
    each; null: all, in their order."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """What is trained."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """On what."""
    objective: Options = dataclasses.field(default_factory=lambda: Options(name="clm"))
    """The training objective and its options."""
    optim: Options = dataclasses.field(default_factory=lambda: Options(name="adamw"))
    """The optimizer and its options."""
    schedule: Options = dataclasses.field(default_factory=lambda: Options(name="cosine"))
    """Learning-rate schedule: a pure function of the step."""
    peft: Options = dataclasses.field(default_factory=lambda: Options(name="none"))
    """Parameter-efficient fine-tuning of the weights in init_from: only an adapter is trained."""
    tune: TuneConfig = dataclasses.field(default_factory=TuneConfig)
    """Which weights are trained, when, and how fast."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """How one step is taken."""
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    """Evaluation in the loop."""
    kernels: KernelsConfig = dataclasses.field(default_factory=KernelsConfig)
    """Implementations of the ops."""
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    """Ranks."""
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    """The run itself."""
