"""`nanolm estimate CONFIG --gpus 64 --device h100`: parameters, memory, speed and days of a run.

Nothing is trained and no data is read: the model is built on the meta device, the rest is the
arithmetic of `nanolm/tools/estimate.py`. The share of the peak that is reached (MFU) is an
assumption that the user states.
"""

from __future__ import annotations

import dataclasses

from rich.table import Column, Table

from nanolm import build
from nanolm.commands.json_file import write_json
from nanolm.config.load import load_config
from nanolm.config.model import ModelConfig
from nanolm.config.ranges import Count, Share
from nanolm.config.schema import Config
from nanolm.errors import require
from nanolm.tables import show
from nanolm.tools.estimate import (
    Limit,
    Needs,
    Sizes,
    estimate,
    find_device,
    largest,
    parts_of,
    reads_of,
)
from nanolm.tools.stand_in import stand_in_tokenizer
from nanolm.training.accelerators import ACCELERATORS

POSITIONAL = ("config_file",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Memory, speed and days of a run, before it is started."""

    config_file: str = ""
    """YAML file of the run."""
    gpus: Count = 1
    """Devices in all."""
    gpus_per_node: Count = 8
    """Devices of a node: what hsdp shards over when distributed.shard_size is null."""
    device: str = "h100"
    """a100, h100, rtx4090, mi300x, …: a GPU of the table in nanolm/training/accelerators.py."""
    mfu: Share = 0.4
    """Share of the device's dense peak that training is assumed to reach."""
    vocab_size: Count = 50304
    """Vocabulary where the config leaves it to the tokenizer."""
    set: list[str] = dataclasses.field(default_factory=list)
    """Keys of the config to change: distributed.strategy=fsdp train.micro_batch=4."""
    json: str | None = None
    """Also write the figures to this file."""

    def __post_init__(self) -> None:
        require(self.config_file != "", "nanolm estimate CONFIG: name the run's YAML file")


def read(arguments: Arguments) -> Config:
    """The run's config with the changes and a vocabulary."""
    words = [f"--{word}" for word in arguments.set]
    config = load_config([f"--config={arguments.config_file}", *words])
    size = config.model.vocab_size or arguments.vocab_size
    return build.resolve(config, stand_in_tokenizer(size))


def run(arguments: Arguments) -> None:
    """Estimate and print."""
    config = read(arguments)
    objective = build.build_objective(config, stand_in_tokenizer(config.model.n_tokens))

    def sizes_of(model: ModelConfig) -> Sizes:
        changed = dataclasses.replace(config, model=model)
        return Sizes.of(build.build_learner(changed, objective, meta=True))

    needs = estimate(
        config,
        sizes_of(config.model),
        arguments.gpus,
        arguments.device,
        mfu=arguments.mfu,
        gpus_per_node=arguments.gpus_per_node,
        **reads_of(objective),
    )
    limits = largest(
        config, sizes_of, strategies(arguments), arguments.device, **reads_of(objective)
    )
    show(table_of(needs, arguments, config), limits_of(limits, arguments))
    figures = dataclasses.asdict(needs) | {"total": needs.total, "fits": needs.fits}
    figures["largest"] = [dataclasses.asdict(limit) for limit in limits]
    write_json(arguments.json, {"gpus": arguments.gpus, "device": arguments.device, **figures})


def table_of(needs: Needs, arguments: Arguments, config: Config) -> Table:
    """The estimate for people."""
    strategy = config.distributed.strategy
    where = f"{arguments.gpus} x {arguments.device}, {strategy}"
    table = Table("figure", Column(where, justify="right"))
    table.add_row("parameters", f"{needs.parameters:,}")
    table.add_row("FLOPs per token", f"{needs.flops_per_token:.4g}")
    for part, size in parts_of(needs).items():
        table.add_row(f"memory: {part}", f"{size / 2**30:,.2f} GiB")
    verdict = "fits" if needs.fits else "does not fit"
    memory = f"{needs.total / 2**30:,.1f} of {needs.available / 2**30:.0f} GiB: {verdict}"
    table.add_row("memory per GPU", memory)
    table.add_row(f"tokens/s at MFU {arguments.mfu:.0%}", f"{needs.tokens_per_second:,.0f}")
    table.add_row(f"days for {config.train.steps:,} steps", f"{needs.days:,.2f}")
    table.add_row("checkpoint", f"{needs.checkpoint / 2**30:,.2f} GiB")
    return table


def strategies(arguments: Arguments) -> list[tuple[str, int]]:
    """Each strategy with numbers of GPUs whose limits are worth knowing."""
    node = arguments.gpus_per_node
    return [("ddp", 1), ("hsdp", node), *(("fsdp", n * node) for n in (1, 8, 64))]


def limits_of(limits: list[Limit], arguments: Arguments) -> Table:
    """The largest models for people."""
    memory = ACCELERATORS[find_device(arguments.device)].gibibytes
    table = Table(
        "strategy",
        Column("parameters", justify="right"),
        Column("blocks x width", justify="right"),
        title=f"Largest model of this shape per {memory:.0f} GiB (one row per GPU, full "
        "recomputation; no tensor parallelism)",
        title_justify="left",
    )
    wide = {"ddp": "any number of GPUs", "hsdp": f"nodes of {arguments.gpus_per_node}"}
    for limit in limits:
        where = wide.get(limit.strategy, f"{limit.gpus} GPUs")
        shape = f"{limit.model.n_layers} x {limit.model.d_model:,}"
        table.add_row(f"{limit.strategy}, {where}", f"{limit.parameters / 1e9:,.2f} B", shape)
    return table
