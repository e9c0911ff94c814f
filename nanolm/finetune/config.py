"""The schema of a fine-tuning run: the run's config (config/schema.py) with other groups.

`data` names tables instead of prepared corpora, `train` counts in epochs, `eval` says which metric
decides, and `model` comes from the checkpoint that `init_from` names.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from nanolm.config.ranges import Amount, Count
from nanolm.config.schema import Config, EvalConfig, RunConfig, TrainConfig
from nanolm.errors import require, require_at_least
from nanolm.registry import Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskDataConfig:
    """The labelled examples."""

    path: str | None = None
    """A folder with train, val and test files (.jsonl, .csv, .tsv, .parquet, .json, .conll), one
    file to train on, stdlib:NAME or hf:NAME."""
    train: str | None = None
    """File to train on, instead of the folder's."""
    val: str | None = None
    """File to choose by; null: the folder's, or else carved out of train."""
    test: str | None = None
    """File that is only looked at by `nanolm evaluate`."""
    columns: dict[str, str | None] = dataclasses.field(default_factory=dict)
    """Which column of the file holds a field of the task, where it has another name:
    {text: question}; null takes an entry of a config file back. Column n of a CoNLL file is called
    column_n."""
    row_length: Count = 128
    """Longest sequence in tokens; longer texts are cut, which is counted and told."""
    pack: bool = True
    """Lay short sequences side by side in a row (documents kept apart) instead of padding them."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What to do with a row that cannot be used: stop and name it, or leave it out and count."""
    val_fraction: float = 0.1
    """Share of the train records that is carved out as val where there is none."""
    folds: Count | None = None
    """Cross-validation: cut train into so many parts by the hash of each record, hold one out as
    val and train on the others; a val split is left alone."""
    fold: Amount | None = None
    """With folds: which part is held out, from 0; null: each in turn, a run in a folder of its own
    under run.dir, and mean and standard deviation of all."""
    limit: Count | None = None
    """Train on a keyed sample of so many records (few-shot)."""
    shots: Count | None = None
    """Train on so many records of each label (few-shot)."""
    workers: Amount = 0
    """Loader processes per rank; 0 reads in the training process."""

    def __post_init__(self) -> None:
        require_at_least("data", self, row_length=4, workers=0, limit=1, shots=1)
        require_at_least("data", self, folds=2, fold=0)
        require(
            self.fold is None or (self.folds is not None and self.fold < self.folds),
            f"data.fold={self.fold} must be below data.folds={self.folds}",
        )
        fraction = self.val_fraction
        require(0 < fraction < 1, f"data.val_fraction={fraction} must lie in (0, 1)")

    @property
    def files(self) -> dict[str, str | None]:
        """The single files, by split."""
        return {"train": self.train, "val": self.val, "test": self.test}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskTrainConfig(TrainConfig):
    """How one step is taken, and how many."""

    # null is resolved (`count_steps`) before anything that knows the run's groups reads it.
    steps: Amount | None = None  # type: ignore[assignment]
    """Optimizer steps; null means train.epochs."""
    epochs: float = 3.0
    """Passes over the train split."""
    global_batch: Count = 32
    """Examples per optimizer step over all ranks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epochs > 0, f"train.epochs={self.epochs} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskEvalConfig(EvalConfig):
    """Evaluation during training, and the choice of the best checkpoint."""

    every: Amount | None = None  # type: ignore[assignment]  # resolved, as steps is
    """Steps between evaluations on val; null: once an epoch; 0: only at the end."""
    metric: str | None = None
    """Figure of val that names the best checkpoint; null means the task's own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRunConfig(RunConfig):
    """The run itself."""

    dir: str = "runs/finetune"
    """Folder of the run: config, metrics, checkpoints, evaluation, MODEL.md."""
    checkpoint_every: Amount | None = None  # type: ignore[assignment]  # resolved, as steps is
    """Steps between checkpoints; null means eval.every: only what is saved can be the best."""
    keep_last: Count = 1
    """Newest checkpoints to keep beside the best one."""
    seeds: list[int] | None = None
    """Train once from each seed, in a folder of its own under run.dir, and report mean and standard
    deviation; null: once, from run.seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        seeds = self.seeds
        require(
            seeds is None or len(set(seeds)) == len(seeds) > 0,
            f"run.seeds={seeds} must be different seeds, at least one",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Noise on the training examples of a task, drawn anew in every epoch."""

    dropout: float = 0.0
    """Share of tokens that is left out; one of a segment always stays."""
    swap: float = 0.0
    """Share of tokens that trade places with another one."""
    mask: float = 0.0
    """Share of tokens that is replaced by <mask>."""
    synonyms: str | None = None
    """A text file with a word and its synonyms on each line, separated by tabs."""
    synonym_rate: float = 0.1
    """With synonyms: the probability that a word of the table is replaced."""
    opposites: str | None = None
    """A text file of words that mean the opposite of each other, separated by tabs. One of them in
    the first text (the question) is turned, and with it the answer: two candidates or labels."""
    opposite_rate: float = 0.5
    """With opposites: the probability that an example is turned."""

    def __post_init__(self) -> None:
        for key in ("dropout", "swap", "mask", "synonym_rate", "opposite_rate"):
            value = getattr(self, key)
            require(0 <= value < 1, f"augment.{key}={value} must lie in [0, 1)")

    @property
    def moves(self) -> bool:
        """Whether tokens may change their places."""
        tables = (self.synonyms, self.opposites)
        return self.dropout > 0 or self.swap > 0 or any(table is not None for table in tables)

    @property
    def used(self) -> bool:
        """Whether anything is to be done."""
        return self.moves or self.mask > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig(Config):
    """One fine-tuning run."""

    opens_best: ClassVar[bool] = True

    init_from: str | None = None
    """Run or checkpoint to fine-tune: it gives the model's shape, its weights and the tokenizer;
    hf:FOLDER takes a published one (see `nanolm import`)."""
    weights: Literal["saved", "random"] = "saved"
    """random: the checkpoint's shape and tokenizer with fresh weights, to see what pretraining is
    worth."""
    # Tables instead of corpora; both have what the loader and the trainer read of this group.
    data: TaskDataConfig = dataclasses.field(default_factory=TaskDataConfig)  # type: ignore[assignment]
    """On what."""
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    """Noise on the training examples."""
    objective: Options = dataclasses.field(default_factory=lambda: Options(name="classify"))
    """The task and its options."""
    schedule: Options = dataclasses.field(default_factory=lambda: Options(name="linear"))
    """Learning-rate schedule: a pure function of the step."""
    train: TaskTrainConfig = dataclasses.field(default_factory=TaskTrainConfig)
    """How one step is taken."""
    eval: TaskEvalConfig = dataclasses.field(default_factory=TaskEvalConfig)
    """Evaluation in the loop."""
    run: TaskRunConfig = dataclasses.field(default_factory=TaskRunConfig)
    """The run itself."""
