"""Replay: rows of pretraining in every step, against forgetting (Robins 1995; Sun et al. 2020).

    L = L_task + w L_pretraining(rows of the corpus)

The pretraining objective, its rows and its head come from the checkpoint that is named. The head
stays as it was (where it is tied, it is this model's embedding): what is kept in mind is the trunk.
Rows are a pure function of the step, so ranks and resumes change nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from nanolm.checkpoint.facts import facts_of, require_same_facts
from nanolm.data.stream import RowStream
from nanolm.data.tokenizer import MODEL_FILE
from nanolm.errors import UserError, require
from nanolm.learner import Learner
from nanolm.model.trunk import Inputs
from nanolm.objectives.base import Objective, Term
from nanolm.registry import RULES
from nanolm.rules.base import Muted, WrapperOptions
from nanolm.training.batch import MicroBatch
from nanolm.training.engine import RuleEngine
from nanolm.training.gradient import Backward, GradientRule, build_rule
from nanolm.training.loader import Loader


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayOptions(WrapperOptions):
    """Rows of pretraining beside those of the task."""

    name: str = "replay"
    base: str | None = None
    """Pretraining run or checkpoint: its objective, head and tokenizer."""
    data: str | None = None
    """Prepared corpus to replay; null means the one that the base was trained on."""
    rows: int = 8
    """Rows of each step, over all ranks; at least one for each rank."""
    weight: float = 1.0
    """Weight w of the pretraining loss."""

    def __post_init__(self) -> None:
        require(self.rows >= 1, f"train.rule.rows={self.rows} must be at least 1")
        require(self.weight >= 0, f"train.rule.weight={self.weight} must not be negative")


class Replayed:
    """A pretraining objective with a head of its own; its terms are called `replay_<term>`."""

    def __init__(self, objective: Objective, heads: nn.ModuleDict) -> None:
        self.objective, self.heads = objective, heads
        self.weights = {f"replay_{name}": weight for name, weight in objective.weights.items()}

    def inputs(self, batch: dict[str, Tensor]) -> Inputs:
        """What the trunk reads."""
        return self.objective.inputs(batch)

    def logits(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Refused: a rule that compares class probabilities would compare those of the replayed
        rows, too."""
        raise UserError(
            "train.rule=replay stands inside a rule that compares class probabilities; let it wrap "
            "that rule: train.rule.name=replay, and the other one as its inner rule"
        )

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Term]:
        """The objective's terms, through the head of the base instead of the learner's."""
        terms = self.objective.loss(hidden_BTD, self.heads, batch)
        return {f"replay_{name}": term for name, term in terms.items()}


class Source:
    """The corpus, the objective and the head of a pretraining checkpoint."""

    def __init__(self, options: ReplayOptions, base: str, engine: RuleEngine) -> None:
        from nanolm.build import build_stream  # noqa: PLC0415  (it imports this module)
        from nanolm.saved import open_saved  # noqa: PLC0415

        world = engine.world
        require(
            options.rows >= world.size,
            f"train.rule.rows={options.rows} is less than one row for each of {world.size} ranks",
        )
        saved = open_saved(base, phase="train", device=str(world.device))
        config = saved.config
        if options.data is not None:
            data = dataclasses.replace(config.data, path=options.data, corpora=[])
            config = dataclasses.replace(config, data=data)
        self.stream: RowStream = build_stream(config, saved.learner.objective, "train")
        tokenizer = getattr(engine.learner.objective, "tokenizer", saved.tokenizer)
        require(
            tokenizer.hash == saved.tokenizer.hash,
            f"train.rule.base={options.base} has another tokenizer than this run; replay the run "
            f"that init_from names",
        )
        facts = facts_of(self.stream)
        if options.data is not None:  # another corpus is what the user wants, in the same tokens
            del facts["data_hash"]
        require_same_facts(
            saved.folder,
            facts,
            f"name in train.rule.data a corpus that was prepared with --tokenizer "
            f"{saved.folder}/{MODEL_FILE}",
        )
        self.objective = Replayed(saved.learner.objective, borrowed_heads(saved.learner, engine))
        self.options, self.world = options, world
        self.next_step = -1
        self.batches: Iterator[list[MicroBatch]] = iter(())

    def rows(self, step: int) -> list[MicroBatch]:
        """This rank's rows of a step."""
        if step != self.next_step:  # the first step, or one after a resume or a rewind
            self.batches, self.next_step = self.open(step), step
        self.next_step += 1
        return next(self.batches)

    def open(self, step: int) -> Iterator[list[MicroBatch]]:
        """Rows from a step on."""
        world, rows = self.world, self.options.rows
        return iter(
            Loader(
                self.stream,
                self.objective.objective,
                global_batch=rows,
                micro_batch=rows,
                rank=world.rank,
                world=world.size,
                start_step=step,
                device=world.device,
                pin=world.device.type == "cuda",
            )
        )


def borrowed_heads(base: Learner, engine: RuleEngine) -> nn.ModuleDict:
    """The base's heads, frozen; where one is tied to the base's embedding, tied to the learner's.

    Raises UserError when the two trunks are of different widths or vocabularies.
    """
    theirs, ours = base.trunk.embedding.weight, engine.learner.trunk.embedding.weight
    require(
        theirs.shape == ours.shape,
        f"train.rule.base has {theirs.shape[0]} tokens of width {theirs.shape[1]}, and this model "
        f"{ours.shape[0]} of width {ours.shape[1]}; replay the run that init_from names",
    )
    heads = base.heads.to(ours.dtype).requires_grad_(False)
    for module in heads.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter is theirs:
                setattr(module, name, ours)
    return heads


@RULES.register("replay", options=ReplayOptions)
def replay(options: ReplayOptions) -> GradientRule:
    """Passes over the replayed rows, then the inner rule, in whose last pass ranks meet."""
    base = options.base
    if base is None:
        raise UserError(
            "train.rule=replay needs train.rule.base: the pretraining run whose rows are replayed"
        )
    inner = build_rule(options.inner)
    sources: list[Source] = []

    def rule(learner: RuleEngine, micro_batches: Sequence[MicroBatch], backward: Backward) -> None:
        if not sources:
            sources.append(Source(options, base, learner))
        source = sources[0]
        batches = source.rows(backward.step)
        names = list(source.objective.objective.weights)
        mine = [sum(batch.counts.get(name, 0) for batch in batches) for name in names]
        counts = dict(zip(names, learner.world.all_sum(mine), strict=True))
        replayed = Backward(
            {name: options.weight * w for name, w in source.objective.weights.items()},
            {f"replay_{name}": count for name, count in counts.items()},
            backward.scale,
            backward.step,
        )
        replayed.sums, replayed.seen = backward.sums, backward.seen
        quiet = Muted(learner)
        for batch in batches:
            with quiet.synchronised(when=False):
                replayed(quiet(batch, source.objective), batch)
        inner(learner, micro_batches, backward)

    return rule
