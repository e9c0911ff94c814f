"""`nanolm explain RUN TEXT`: which tokens made a model say what it says, and where its heads look.

For a fine-tuned model the text is a line as `nanolm predict` reads it: the task's fields separated
by tabs, or a JSON object. A pretrained decoder is asked for the token behind the text, an encoder
for the one at its first <mask>. Everything comes from the saved folder alone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import textwrap
from typing import Annotated, Any, Literal

import torch

from nanolm.commands.json_file import write_json
from nanolm.config.ranges import Count, Within
from nanolm.data.tables.files import Table
from nanolm.distributed.world import World
from nanolm.errors import UserError
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.explain.explainer import Baseline, Explainer, best_window
from nanolm.finetune.explain.guess import Guess
from nanolm.finetune.explain.page import Explanation, draw, write_page
from nanolm.finetune.predict import Predictor, record_of_line
from nanolm.finetune.several import part_of
from nanolm.finetune.splits import TYPED, make_split
from nanolm.saved import Saved, open_saved
from nanolm.terminal import say, table_width

POSITIONAL = ("run", "text")
WRITERS = {"html": write_page, "png": draw}
MOST = 5
"""Probabilities of a prediction that are printed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Explain one prediction of a fine-tuned model, or one guess of a pretrained one."""

    run: str
    """Folder of a run (of a fine-tuning run the best checkpoint is used) or of a checkpoint."""
    text: str
    """The text: of a fine-tuned model fields separated by tabs, or a JSON object; of an encoder a
    text with <mask>; of a decoder one that it would go on with."""
    task: str | None = None
    """Which task of a run of several."""
    target: str | None = None
    """What to explain: a label, a score's column, a word's number from 1 (tag), or of a pretrained
    model a word, of which the first piece counts; null: what the model predicts."""
    baseline: Baseline = "auto"
    """Where integrated gradients begin: mask, mean (of all embeddings) or zero; auto: mask for an
    encoder, mean for a decoder."""
    steps: Count = 32
    """Steps of integrated gradients; doubled until attributions add up to `tolerance`."""
    most_steps: Count = 1024
    """Steps at which doubling ends."""
    tolerance: Annotated[float, Within(above=0, below=1)] = 0.01
    """How much of the difference between text and baseline the attributions may miss."""
    formats: list[Literal["html", "png"]] = dataclasses.field(default_factory=lambda: ["html"])
    """What to write: html, png."""
    out: str = "explanation"
    """Files to write, without the suffix."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Plug-ins that the checkpoint was trained with."""
    json: str | None = None
    """Also write the figures to this file."""


def explain(saved: Saved, arguments: Arguments) -> Explanation:
    """The explanation of one text."""
    if not isinstance(saved.config, TaskConfig):
        return explain_guess(saved, arguments)
    predictor = Predictor(saved, World(), batch=1)
    task = predictor.task
    record = record_of_line(arguments.text, "the text", task)
    table = Table("the text", [record], [1])
    split = make_split("input", table, task, predictor.data, with_gold=False, remedies=TYPED)
    learner = saved.learner.requires_grad_(False)
    explainer = best_window(learner, split.items, arguments.target)
    notes = list(split.messages)
    if len(split.items) > 1:
        notes.append(f"The text is read in {len(split.items)} windows; this is the best one.")
    return explained(explainer, predictor(table)[0], notes, arguments)


def explain_guess(saved: Saved, arguments: Arguments) -> Explanation:
    """The explanation of what a pretrained model believes to stand at one place."""
    guess = Guess(saved, arguments.text)
    learner = guess.learner(saved).requires_grad_(False)
    explainer = Explainer(learner, guess.item, arguments.target)
    with torch.no_grad():
        hidden_BTD = learner.trunk(guess.inputs(explainer.batch(1)))
        prediction = guess.prediction(guess.log_probabilities(hidden_BTD, learner.heads)[0])
    return explained(explainer, prediction, [], arguments)


def explained(
    explainer: Explainer, prediction: dict[str, Any], notes: list[str], arguments: Arguments
) -> Explanation:
    """Both attributions and the attention maps of an explainer's text."""
    integrated = explainer.integrated_gradients(
        arguments.baseline,
        steps=arguments.steps,
        most_steps=arguments.most_steps,
        tolerance=arguments.tolerance,
    )
    notes = [
        f"Integrated gradients in {integrated.steps} steps: {integrated.at_text:.4f} for the text, "
        f"{integrated.at_baseline:.4f} for the baseline; the attributions miss "
        f"{abs(integrated.gap):.2g} of the difference.",
        *notes,
    ]
    return Explanation(
        pieces=pieces_of(explainer),
        prediction=prediction,
        question=explainer.question.name,
        value=explainer.value,
        attributions={
            "gradient × input": explainer.gradient_times_input().tolist(),
            "integrated gradients": integrated.values_T.tolist(),
        },
        notes=notes,
        maps_LHTT=explainer.maps_LHTT.float().cpu().numpy(),
    )


def pieces_of(explainer: Explainer) -> list[str]:
    """The tokens as the tokenizer writes them."""
    return [explainer.task.tokenizer.piece(int(token)) for token in explainer.tokens_T]


def run(arguments: Arguments) -> None:
    """Explain, write the files, say the strongest tokens."""
    saved = open_saved(arguments.run, phase="train", plugins=arguments.plugins)
    saved = part_of(saved, arguments.task)
    explanation = explain(saved, arguments)
    for line in told(explanation):
        print(line)
    for name in arguments.formats:
        path = pathlib.Path(f"{arguments.out.removesuffix(f'.{name}')}.{name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            notes = WRITERS[name](explanation, path)
        except OSError as error:
            raise UserError(f"cannot write --out {path}: {error.strerror}") from None
        say("\n".join([*notes, str(path)]))
    write_json(arguments.json, explanation.figures())


def told(explanation: Explanation) -> list[str]:
    """The prediction, and the tokens that did most, in lines for the terminal."""
    values: dict[str, Any] = explanation.attributions
    strongest = values["integrated gradients"]
    order = sorted(range(len(strongest)), key=lambda place: -abs(strongest[place]))[:8]
    parts = [f"{visible(explanation.pieces[place])} {strongest[place]:+.3f}" for place in order]
    sentences = [
        json.dumps(shortened(explanation.prediction), ensure_ascii=False),
        f"{explanation.question} = {explanation.value:.4f}: {', '.join(parts)}",
        *explanation.notes,
    ]
    wrap = functools.partial(textwrap.wrap, width=table_width(), subsequent_indent="    ")
    return [line for sentence in sentences for line in wrap(sentence, break_on_hyphens=False)]


def visible(piece: str) -> str:
    """A token as it can stand in a line: what cannot be seen is written as Python would."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in piece)


def shortened(value: Any) -> Any:
    """A prediction for the terminal: numbers of four digits, of many probabilities the highest.

    The file of --json has all of it.
    """
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [shortened(part) for part in value]
    if not isinstance(value, dict):
        return value
    items = list(value.items())
    if len(items) > MOST and all(isinstance(part, float) for part in value.values()):
        items = sorted(items, key=lambda item: -item[1])[:MOST]
    return {key: shortened(part) for key, part in items}
