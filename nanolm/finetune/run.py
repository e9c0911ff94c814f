"""Fine-tuning: `torchrun -m nanolm.finetune --config …`, the same as `nanolm finetune`.

The run is told in `run.py`, as for pretraining: trainer, loader, checkpoints and resume are the
same. What differs is where rows come from (a labelled table), what reads the hidden states (a
task's fresh head) and how a validation figure chooses the best checkpoint: `finetune/prepare.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, cast

from nanolm.checkpoint.checkpoints import locate
from nanolm.config import strict_yaml
from nanolm.config.load import Words, load_config, read_files, split_words
from nanolm.data.tokenizer import Tokenizer
from nanolm.distributed.world import World
from nanolm.files import RESUME
from nanolm.finetune.augment import Augmented
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.evaluation import TaskEvaluator
from nanolm.finetune.model_card import write_card
from nanolm.finetune.prepare import (
    build_evaluator,
    build_throughput,
    check_scope,
    describe,
    open_stream,
    prepare,
    start_weights,
    tokens_per_step,
)
from nanolm.finetune.repeats import is_repeated, run_repeats
from nanolm.finetune.several import MultiEvaluator
from nanolm.finetune.splits import Split
from nanolm.finetune.tasks.base import Task, as_objective
from nanolm.hub.importing import base_of
from nanolm.learner import Learner
from nanolm.peft.base import trainable_counts
from nanolm.run import Note, Plan, carry_out
from nanolm.training.loader import RowObjective
from nanolm.training.throughput import Throughput
from nanolm.training.trainer import Trainer

GroupsOf = Callable[[str], dict[str, Any]]
DEFAULT_TASK = TaskConfig().objective.name
OF_THE_HEAD = ("head", "activation", "pooling", "frame")
"""Options that say what a head of a task is made of, and what it reads."""


def main(argv: list[str]) -> None:
    """Reads the command line and fine-tunes, once or for every seed and fold."""
    config = load_task_config(argv)
    if is_repeated(config):
        run_repeats(config, run_finetune)
    else:
        run_finetune(config)


def base_groups(path: str) -> dict[str, Any]:
    """The saved groups `model` and `objective` of a run or checkpoint."""
    saved = strict_yaml.read_mapping(locate(path, best=True) / "config.yaml")
    return {key: saved[key] for key in ("model", "objective")}


def load_task_config(argv: list[str], groups_of: GroupsOf = base_groups) -> TaskConfig:
    """The run's config; what it does not say of the model, and of a head that the checkpoint in
    `init_from` has for the same task, is taken from there."""
    words = split_words(argv)
    files = read_files(dict(words), {})
    named: list[Any] = words.get("init_from") or [files.get("init_from")]
    start = base_of(None if named[0] == "null" else named[0])
    base: dict[str, Any] = {}
    if start is not None:
        groups = groups_of(start)
        base = {"model": groups["model"]}
        argv = [*argv, *same_head(groups["objective"], words, files.get("objective"))]
    config: TaskConfig = load_config(argv, schema=TaskConfig, prog="nanolm finetune", base=base)
    return dataclasses.replace(config, init_from=base_of(config.init_from))


def same_head(trained: Mapping[str, Any], words: Words, in_files: Any) -> list[str]:
    """The options that a checkpoint's head was trained with, as words of a command line, where it
    was trained for the task at hand and neither command line nor files say them: another head would
    start fresh, and in another frame its weights mean nothing."""
    told = in_files if isinstance(in_files, dict) else {}
    named = told.get("name", DEFAULT_TASK)
    task = (words.get("objective.name") or [named])[0]
    if trained["name"] != task:
        return []
    said = {key for key in OF_THE_HEAD if f"objective.{key}" in words}
    said |= told.keys() if named == task else set()
    kept = {key: trained[key] for key in OF_THE_HEAD if key in trained and key not in said}
    return [f"--objective.{key}={value}" for key, value in kept.items() if isinstance(value, str)]


def run_finetune(config: TaskConfig) -> dict[str, Any]:
    """Fine-tunes as the config says; returns the summary, empty when a signal ended the run.

    Raises UserError for anything the user can mend, before anything is trained.
    """
    return carry_out(plan(config))


def plan(config: TaskConfig) -> FineTuning:
    """The run that the config describes, its tables read and checked."""
    ready = prepare(config)
    made = FineTuning(
        config=ready.config,
        objective=as_objective(ready.task),
        task=ready.task,
        stream=open_stream(ready.config, ready.task, ready.train),
        tokenizer=ready.tokenizer,
        facts=ready.facts,
        base=ready.base,
        train=ready.train,
        val=ready.val,
    )
    _ = made.examples  # refuses noise that the task cannot bear, before the run has a folder
    return made


@dataclasses.dataclass(kw_only=True)
class FineTuning(Plan):
    """Trains a task on the records of `train`, from the weights of the checkpoint `base`, and
    chooses the best checkpoint by a figure of `val`."""

    config: TaskConfig
    task: Task
    base: pathlib.Path
    train: Split
    val: Split

    @functools.cached_property
    def examples(self) -> RowObjective:
        """The task, with noise where the config asks for some."""
        if not self.config.augment.used:
            return self.task
        return Augmented(self.task, self.config.augment, cast(Tokenizer, self.tokenizer))

    @property
    def tokens_per_step(self) -> int:
        """Real tokens, on average: padding is no throughput."""
        return tokens_per_step(self.config, self.train)

    def check(self, world: World) -> None:
        """A loss that compares rows needs them together on each rank; augmentation must leave the
        task's targets where they are, which making it finds out."""
        check_scope(self.config, self.task, world)
        _ = self.examples

    def start_weights(self, learner: Learner, checkpoint: pathlib.Path | None) -> list[str]:
        """Trunk and matching heads from the base, and the adapter of config.peft."""
        told = start_weights(self.config, self.base, learner, checkpoint)
        return [*told, *describe(self.train, self.val, learner)]

    def evaluator(self, world: World) -> TaskEvaluator | MultiEvaluator:
        """The task's metrics on the val split."""
        return build_evaluator(self.config, self.val, world)

    def throughput(self, world: World, note: Note) -> Throughput:
        """Counts real tokens."""
        return build_throughput(self.config, self.task, self.train, world)

    @property
    def metric(self) -> str:
        """eval.metric, which `prepare` has resolved."""
        return cast(str, self.config.eval.metric)

    @property
    def higher_is_better(self) -> bool:
        """The direction of eval.metric, as the task declares it."""
        return dict(self.task.metrics(self.config.objective))[self.metric]

    def selection_score(self, figures: Mapping[str, float]) -> float:
        """eval.metric, turned round where more is better."""
        value = figures[self.metric]
        return -value if self.higher_is_better else value

    def summarise(self, trainer: Trainer, figures: Mapping[str, float]) -> dict[str, Any]:
        """What was trained on, and the best and the last of the val split."""
        best, selection_score = trainer.snapshot.checkpoints.best(), trainer.state.best
        score = (
            -selection_score
            if self.higher_is_better and selection_score is not None
            else selection_score
        )
        return {
            "trained_params": trainable_counts(trainer.engine.learner)[0],
            "train_records": len(self.train.table),
            "val_records": len(self.val.table),
            "metric": self.config.eval.metric,
            "higher_is_better": self.higher_is_better,
            "best_val": score,
            "best_step": best and int(best.name.removeprefix("step-")),
            "val": figures,
        }

    def finish(self, summary: Mapping[str, Any], note: Note) -> None:
        """The model card, and one last line."""
        run = pathlib.Path(self.config.run.dir)
        write_card(run, self.config, summary, RESUME)
        best = summary["best_val"]
        if best is not None:
            note(f"best val {summary['metric']} {best:.4f} at step {summary['best_step']}; {run}")
