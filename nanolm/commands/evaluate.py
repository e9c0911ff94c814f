"""`nanolm evaluate`: what a checkpoint achieves on a prepared split, off line.

Loss, perplexity, bits per byte beside a unigram model's, and accuracy, by the same code as in the
training loop; one process or torchrun's many give the same figures.
"""

from __future__ import annotations

import dataclasses

from nanolm.commands.figures import write_json
from nanolm.commands.train import build_evaluator
from nanolm.config import CorpusConfig, DistributedConfig
from nanolm.distributed import close, launch
from nanolm.engine import Engine
from nanolm.saved import open_saved

POSITIONAL = "run"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Evaluate a checkpoint on a prepared split."""

    run: str
    """Folder of a run or of a checkpoint."""
    split: str = "val"
    """Split of the prepared data: train, val or test."""
    data: str | None = None
    """Folder that `nanolm prepare` wrote; null means the data the run was trained on."""
    batches: int | None = None
    """Batches to use; null for the whole split."""
    batch: int | None = None
    """Rows per batch; null means the run's global batch."""
    ema: bool = True
    """Use the averaged weights when the checkpoint has any."""
    device: str = "auto"
    """auto, cpu or cuda."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Plug-ins that the checkpoint was trained with."""
    json: str | None = None
    """Also write the figures to this file."""


def run(arguments: Arguments) -> dict[str, float]:
    """Evaluates and prints; raises UserError for a split or tokenizer that does not fit."""
    world = launch(DistributedConfig(), arguments.device)
    saved = open_saved(
        arguments.run, device=str(world.device), plugins=arguments.plugins, ema=arguments.ema
    )
    config = saved.config
    if arguments.data is not None:
        corpora = [CorpusConfig(path=arguments.data)]
        data = dataclasses.replace(config.data, path=None, corpora=corpora)
        config = dataclasses.replace(config, data=data)
    evaluation = dataclasses.replace(config.eval, batches=arguments.batches, batch=arguments.batch)
    train = dataclasses.replace(config.train, compile=False)
    config = dataclasses.replace(config, eval=evaluation, train=train)
    objective = saved.learner.objective
    evaluator = build_evaluator(config, objective, saved.tokenizer, world, arguments.split)
    figures = evaluator(Engine(saved.learner, world, config, trains=False)) or {}
    close(world)
    report = {"checkpoint": str(saved.folder), "split": arguments.split, **figures}
    if world.is_main:
        width = max(map(len, report))
        for key, value in report.items():
            shown = f"{value:.6f}" if isinstance(value, float) else value
            print(f"{key:<{width}}  {shown}")
        write_json(arguments.json, report)
    return report
