"""Which head every family of transformers has for a task, and under which keys.

family                      of a sequence                        of words and spans
bert, roberta, albert       W2 tanh(W1 h_first)                  W h
distilbert                  W2 relu(W1 h_first)                  W h
modernbert                  W2 norm(gelu(W1 h)), first or mean   W2 norm(gelu(W1 h))
gpt2, llama, qwen3          W h_last, without a bias             W h; no multiple choice

Only heads that compute the same are known. How a sequence or a word is read stands in `TaskHead`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from nanolm.hub.families import FAMILIES
from nanolm.hub.keys import Rule, pair, same

KINDS = {
    "classify": "SequenceClassification",
    "regress": "SequenceClassification",
    "choose": "MultipleChoice",
    "tag": "TokenClassification",
    "read": "QuestionAnswering",
}
"""What transformers calls our tasks."""
NAMES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
    "albert": "Albert",
    "modernbert": "ModernBert",
    "gpt2": "GPT2",
    "llama": "Llama",
    "qwen3": "Qwen3",
}
"""What its classes of a family begin with."""
POOLERS = {
    "bert": "bert.pooler.dense",
    "roberta": "roberta.pooler.dense",
    "albert": "albert.pooler",
}
"""Published keys of the layer between the first token and the decision, which files may hold
although their head does not read it."""
PLAIN = ("tag", "read")
"""Tasks that read every token by itself."""
POOLED = ("classify", "regress", "choose")
"""Tasks that read one state of a sequence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskHead:
    """A family's head of one task."""

    head: str
    """Our name of it: objective.head."""
    out: str
    """Published key of the decision."""
    inner: str = ""
    """Published key of what stands before it."""
    activation: str = "tanh"
    """objective.activation, where a layer stands before it."""
    poolings: tuple[str, ...] = ()
    """Values of objective.pooling that it has, the one that it has unless told first; none of tasks
    that read every token."""
    prefix: str | None = None
    """What the trunk's keys begin with in this class, where they do not as elsewhere."""

    def rules(self, task: str) -> tuple[Rule, ...]:
        """Its keys, in both directions."""
        ours = f"heads.{task}"
        if self.head == "layer":
            return (*pair(self.inner, f"{ours}.dense"), *pair(self.out, f"{ours}.out"))
        if self.head == "transform":
            parts = (pair(f"{self.inner}.{x}", f"{ours}.transform.{x}") for x in ("dense", "norm"))
            return (*(rule for part in parts for rule in part), *pair(self.out, f"{ours}.out"))
        return (pair if task in PLAIN else same)(self.out, f"{ours}.out")

    def why_not(self, options: Any, pooling: str | None) -> str | None:
        """What of a fine-tuned head it does not compute, and the options that it does; None if it
        computes it. `pooling` is how our head reads a sequence; None where it reads tokens."""
        if pooling is not None and pooling not in self.poolings:
            return (
                f"decides by its tokens' {pooling} (objective.pooling), and transformers by the "
                f"{WORDS[self.poolings[0]]} token; fine-tune with --objective.pooling "
                f"{self.poolings[0]}"
            )
        if options.head != self.head:
            return (
                f"has objective.head={options.head}, and transformers computes {self.head} there; "
                f"fine-tune with --objective.head {self.head}"
            )
        if self.head == "layer" and options.activation != self.activation:
            return (
                f"has objective.activation={options.activation}, and transformers computes "
                f"{self.activation} there; fine-tune with --objective.activation {self.activation}"
            )
        means = getattr(options, "mean", None) or []
        if self.head == "linear" and any(means):
            zeros = "[" + ",".join("0" for _ in means) + "]"
            return (
                f"has scores whose mean is {means} (objective.mean), and the head of transformers "
                f"has no bias to hold it; fine-tune with --objective.mean {zeros}"
            )
        return None


WORDS = {"cls": "first", "last": "last"}
FIRST, LAST, EITHER = ("cls",), ("last",), ("cls", "mean")


def each(tasks: Iterable[str], **facts: Any) -> dict[str, TaskHead]:
    """The same head of several tasks."""
    return dict.fromkeys(tasks, TaskHead(**facts))


def layered(inner: str, out: str = "classifier", activation: str = "tanh") -> dict[str, TaskHead]:
    """Heads of BERT and its kin."""
    facts = {"head": "layer", "inner": inner, "activation": activation, "poolings": FIRST}
    return each(POOLED, out=out, **facts) | words()


def words(tag: str = "classifier", prefix: str | None = None) -> dict[str, TaskHead]:
    """Heads of one layer on every token."""
    facts: dict[str, Any] = {"head": "linear"}
    return each(("tag",), out=tag, **facts) | each(
        ("read",), out="qa_outputs", prefix=prefix, **facts
    )


def decoder(tag: str, prefix: str | None = None) -> dict[str, TaskHead]:
    """Heads of decoders."""
    found = each(("classify", "regress"), head="linear", out="score", poolings=LAST)
    return found | words(tag, prefix)


ROBERTA = each(
    ("classify", "regress"),
    **{"head": "layer", "inner": "classifier.dense", "out": "classifier.out_proj"},
    poolings=FIRST,
)
TRANSFORMED: dict[str, Any] = {"head": "transform", "inner": "head", "out": "classifier"}
TASK_HEADS: dict[str, dict[str, TaskHead]] = {
    "bert": layered(POOLERS["bert"]),
    "roberta": layered(POOLERS["roberta"]) | ROBERTA,
    "distilbert": layered("pre_classifier", activation="relu"),
    "albert": layered(POOLERS["albert"]),
    "modernbert": each(POOLED, **TRANSFORMED, poolings=EITHER) | each(PLAIN, **TRANSFORMED),
    "gpt2": decoder("classifier"),
    "llama": decoder("score", prefix="transformer."),
    "qwen3": decoder("score", prefix="transformer."),
}
"""family -> our task -> its head."""


def having(task: str) -> list[str]:
    """The families that have a head of a task, in the order in which they are tried."""
    return [name for name in FAMILIES if task in TASK_HEADS.get(name, {})]
