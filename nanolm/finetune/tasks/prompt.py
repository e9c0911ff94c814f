"""Classification as a cloze: which of a few words stands at <mask>? No new parameters.

    z_n[label] = logit of the label's word at the mask of "text. It was <mask>."

An encoder fills the mask (Schick & Schütze 2021, PET), a decoder writes the next token, so its
template must end with the mask (Brown et al. 2020). With train.steps=0 it is zero-shot.

Shapes: B rows, T tokens, S sequences (one per item), C labels, D model width.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor, nn

from nanolm.config.schema import Config
from nanolm.data.tables.files import Record, Table
from nanolm.data.tables.labels import ordered
from nanolm.data.tokenizer import SPACE, Tokenizer
from nanolm.errors import UserError, require
from nanolm.finetune.tasks.classify import Classify, ClassifyOptions
from nanolm.finetune.tasks.items import Item, Sequence
from nanolm.finetune.tasks.template import filled
from nanolm.model.heads import HeadRequest
from nanolm.registry import OBJECTIVES

MASK = "<mask>"
KEY = "objective.template"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions(ClassifyOptions):
    """A label by the word that the model puts at <mask>."""

    name: str = "prompt"
    template: str = "{text} It was <mask>."
    """The cloze; {text} and {text_pair} are the record's, cut when they are too long."""
    words: dict[str, str] = dataclasses.field(default_factory=dict)
    """The word of each label: {pos: good, neg: bad}. Its first piece counts."""
    transform: bool | None = None
    """Whether the vocabulary head has a transform (objective.transform of the base); null: an
    encoder's has, a decoder's has not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.template.count(MASK) == 1 and "{text}" in self.template,
            f"objective.template must hold {{text}} and one {MASK}: {self.template!r}",
        )
        for label in self.words:
            require(
                isinstance(label, str),
                f"objective.words: YAML reads a label as {label!r}; write it in quotes",
            )
        require(not self.multi_label, "objective=prompt puts one word: multi_label cannot be true")
        require(
            not self.mark_shared,
            "objective=prompt writes both texts into one: mark_shared cannot be true",
        )


@OBJECTIVES.register("prompt", options=PromptOptions)
class Prompt(Classify):
    """Which label's word fits."""

    options: PromptOptions
    reads_source = False
    trunks = ("encoder", "decoder")  # whose vocabulary head reads a place from the place itself
    movable = False

    def __init__(self, options: PromptOptions, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(options, config, tokenizer)
        encoder = self.trunk == "encoder"
        require(
            encoder or options.template.endswith(MASK),
            f"a decoder writes what follows: objective.template must end with {MASK}",
        )
        self.heads = {"lm": vocabulary_head(options.transform, self.trunk)}
        self.before, self.after = options.template.split(MASK)
        self.word_ids = self.verbalizer()

    @classmethod
    def resolve(cls, options: PromptOptions, table: Table) -> PromptOptions:
        """The labels are those that have a word."""
        if not options.words:
            raise UserError(
                "objective=prompt needs a word per label: objective.words={pos: good, …}"
            )
        return super().resolve(dataclasses.replace(options, labels=ordered(options.words)), table)

    def require_heads(self, fresh: list[str], base: str) -> None:
        """The vocabulary head must come from the base."""
        require_vocabulary(fresh, base)

    def verbalizer(self) -> list[int]:
        """The token of each label's first piece; raises UserError when two labels share one."""
        words = [self.options.words[label] for label in self.labels]
        if self.before.endswith(" "):
            spaced = [self.encode(f" {word}") for word in words]
            # A piece that begins a word carries its space, so the mask stands for both; where the
            # vocabulary knows a word only without its space, the space stays before the mask.
            if all(self.tokenizer.piece(int(ids[0])) != SPACE for ids in spaced):
                self.before = self.before.rstrip(" ")
                words = [f" {word}" for word in words]
        ids = [int(self.encode(word)[0]) for word in words]
        for i, token in enumerate(ids):
            if token in ids[:i]:
                other = self.labels[ids.index(token)]
                raise UserError(
                    f"objective.words: the words of {other} and {self.labels[i]} begin with the "
                    f"same piece {self.tokenizer.piece(token)!r}; choose another word"
                )
        return ids

    def items(self, record: Record, index: int, *, with_gold: bool) -> list[Item]:
        """One item: the filled template; texts are cut so that the cloze itself fits."""
        t = self.tokenizer
        ends = 2 if self.trunk == "encoder" else 1
        empty = dict.fromkeys(self.fields, "")
        fixed = len(self.encode(filled(self.options.template, empty, KEY))) + ends + 2
        texts = {name: self.encode(record[name]) for name in self.fields}
        room = max(1, self.length - fixed) // len(texts)
        cut = sum(max(0, len(ids) - room) for ids in texts.values())
        short = {name: t.decode(ids[:room]) for name, ids in texts.items()}
        before = filled(self.before, short, KEY)
        after = self.encode(filled(self.after, short, KEY))
        head = [t.cls] if self.trunk == "encoder" else [t.eos]
        tail = [t.mask, *after, t.sep] if self.trunk == "encoder" else []
        tokens = np.array([*head, *self.encode(before), *tail], dtype=np.int64)
        place = len(tokens) - len(tail) - (0 if tail else 1)
        target = self.gold_of(record) if with_gold else None
        return [Item(index, [Sequence(tokens, len(tokens))], target, cut, place)]

    def targets_of(
        self, examples: list[Item], batch: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """cloze int64[S], flat place whose state predicts the word; word_ids int64[C], the labels'
        words; labels int64[S]."""
        places = batch["first"] + np.array([item.extra for item in examples])
        words = np.array(self.word_ids, dtype=np.int64)
        return super().targets_of(examples, batch) | {"cloze": places, "word_ids": words}

    def class_logits(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> Tensor:
        """The logits of the labels' words, [S, C]."""
        logits_SV = heads["lm"](hidden_BTD.flatten(0, 1)[batch["cloze"]])
        return logits_SV[:, batch["word_ids"]].float()


def vocabulary_head(transform: bool | None, trunk: str) -> HeadRequest:
    """The head that the base was pretrained with; null: an encoder's has a transform, a decoder's
    has not."""
    transform = trunk == "encoder" if transform is None else transform
    return HeadRequest("token_logits", {"transform": transform, "bias": transform})


def require_vocabulary(fresh: list[str], base: str) -> None:
    """Raises UserError when the vocabulary head does not come from the base."""
    require(
        "lm" not in fresh,
        f"{base} has no vocabulary head of this shape to fill a mask with; set "
        f"objective.transform as it was pretrained",
    )
