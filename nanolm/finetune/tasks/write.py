"""Writing: instructions, translation, summaries, dialogue; a language model's loss on answers only.

    loss = - sum over answer tokens log p(x_t | prompt, x_<t)

A record is a prompt and a response, or a dialogue in which every turn of the assistant is an
answer. The prompt passes through a template; the end of document closes an answer, so the model
learns to stop (Ouyang et al. 2022, section 3.5).

Shapes: B rows, T tokens, S sequences, M tokens of all sequences, N answer tokens, D model width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from torch import Tensor, nn

from nanolm.config.model import ModelConfig
from nanolm.config.schema import Config
from nanolm.data.tables.files import Record, Table
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError, require, require_range
from nanolm.finetune.tasks import metrics
from nanolm.finetune.tasks.base import Task
from nanolm.finetune.tasks.items import Item, Sequence, text_problem
from nanolm.finetune.tasks.metrics import Metric, Report, higher, lower
from nanolm.finetune.tasks.template import FIELD, filled
from nanolm.model.heads import HeadRequest
from nanolm.objectives.base import Term, TokenLossOptions, token_terms
from nanolm.registry import OBJECTIVES


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteOptions(TokenLossOptions):
    """Text that answers a prompt."""

    name: str = "write"
    template: str = "{prompt}\n"
    """What stands before the answer; {column} takes any column of the record."""
    turn: str = "{role}: {content}\n"
    """How one message of a dialogue is written; the assistant's content is what is learned."""
    chat: bool | None = None
    """Records are dialogues (`messages`); null: when the train split has a column messages."""
    max_new_tokens: int = 64
    """Longest answer that `nanolm predict` and `nanolm evaluate` write, in tokens."""
    beams: int = 1
    """Texts that are followed side by side while an answer is searched for; 1 takes the most
    probable token each time."""
    length_penalty: float = 1.0
    """Beams are compared by their log probability over their length to this power: above 0 it
    prefers longer answers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("objective.beams", self.beams, 1, 256)
        require_range("objective.length_penalty", self.length_penalty, -100, 100)
        require(self.max_new_tokens >= 1, "objective.max_new_tokens must be at least 1")
        require("{content}" in self.turn, "objective.turn must contain {content}")


@OBJECTIVES.register("write", options=WriteOptions)
class Write(Task):
    """What to write after a prompt; for an encoder-decoder see write_from_source.py."""

    options: WriteOptions
    trunks: tuple[str, ...] = ("decoder", "encoder_decoder")
    fields: tuple[str, ...] = ("prompt",)
    gold: tuple[str, ...] = ("response",)
    metric = "perplexity"
    term = "write"
    generates = True

    def __init__(self, options: WriteOptions, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(options, config, tokenizer)
        if options.chat:
            self.fields, self.gold = ("messages",), ()
        elif "{prompt}" not in options.template:
            self.fields = ()
        self.heads = {"lm": HeadRequest("token_logits", options.used())}

    @classmethod
    def gold_fields(cls, options: WriteOptions) -> tuple[str, ...]:
        """A dialogue holds its own answers, and whether records are some may not be known yet."""
        return () if options.chat or options.chat is None else cls.gold

    @classmethod
    def resolve(cls, options: WriteOptions, table: Table) -> WriteOptions:
        """Whether records are dialogues, from the training records."""
        chat = "messages" in table.columns if options.chat is None else options.chat
        return dataclasses.replace(options, chat=chat)

    @classmethod
    def metrics(cls, options: WriteOptions) -> tuple[Metric, ...]:
        """The language model's figures, and those of what `nanolm evaluate` has it write."""
        found = super().metrics(options) + lower("nll", "perplexity") + higher("accuracy")
        return found + metrics.GENERATION

    def offered(self, table: Table) -> list[str]:
        """Nothing is written while it is trained."""
        written = {metric.name for metric in metrics.GENERATION}
        return [name for name in super().offered(table) if name not in written]

    @classmethod
    def split_columns(cls, options: WriteOptions) -> tuple[str, ...]:
        """The dialogue, or what stands in the template."""
        return ("messages", *(name for name in FIELD.findall(options.template) if name))

    def check_model(self, model: ModelConfig) -> None:
        """The longest prompt and the longest answer must fit into the model together."""
        half = self.length // 2
        longest = self.length - min(self.options.max_new_tokens, half)
        most = model.max_length - (self.length - half)
        require(
            longest + self.options.max_new_tokens <= model.max_length,
            f"objective.max_new_tokens={self.options.max_new_tokens} behind prompts of up to "
            f"{longest} tokens (data.row_length={self.length}) exceeds the model's "
            f"max_length={model.max_length}; set it to at most {most}",
        )

    def require_heads(self, fresh: list[str], base: str) -> None:
        """The vocabulary head must come from the base."""
        require("lm" not in fresh, f"{base} has no language-model head to write with")

    def check(self, record: Record, *, with_gold: bool) -> str | None:
        """Prompt and response must be texts, a dialogue a list of messages."""
        if self.options.chat:
            return self.check_messages(record, with_gold=with_gold)
        try:
            self.prompt(record)
        except UserError as error:
            return str(error)
        return text_problem(record, self.fields + (self.gold if with_gold else ()))

    def check_messages(self, record: Record, *, with_gold: bool) -> str | None:
        """Why a dialogue cannot be used, or None."""
        messages = record.get("messages")
        if not isinstance(messages, list) or not messages:
            return "messages is no list of {role, content}"
        for i, message in enumerate(messages):
            if not isinstance(message, dict):
                return f"messages[{i}] is {message!r}, no {{role, content}}"
            if problem := text_problem(message, ("role", "content")):
                return f"messages[{i}].{problem}"
        if with_gold and not any(m["role"] == "assistant" for m in messages):
            return "messages has no turn of the assistant"
        return None

    def prompt(self, record: Record, *, with_gold: bool = False) -> str:
        """The text before the answer; with gold, before the one that a dialogue has as its last."""
        if not self.options.chat:
            return filled(self.options.template, record, "objective.template")
        messages = record["messages"]
        if with_gold:
            messages = messages[: last_answer(messages)]
        elif messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return "".join(map(self.message, messages)) + self.opening()

    def message(self, message: dict[str, str]) -> str:
        """One message as text."""
        return filled(self.options.turn, message, "objective.turn")

    def opening(self) -> str:
        """What stands before the assistant's content."""
        before = self.options.turn.partition("{content}")[0]
        return filled(before, {"role": "assistant"}, "objective.turn")

    def pieces(self, record: Record) -> list[tuple[str, bool]]:
        """The record as texts, each with whether it is learned."""
        if not self.options.chat:
            return [(self.prompt(record), False), (record["response"], True)]
        found: list[tuple[str, bool]] = []
        behind = self.options.turn.partition("{content}")[2]
        closing = filled(behind, {"role": "assistant"}, "objective.turn")
        for message in record["messages"]:
            if message["role"] == "assistant":
                found += [(self.opening(), False), (message["content"] + closing, True)]
            else:
                found.append((self.message(message), False))
        while found and not found[-1][1]:  # nothing is learned behind the last answer
            found.pop()
        return found

    def prompt_tokens(self, text: str) -> np.ndarray:
        """<eos> prompt, as generation begins; cut on the left so that an answer has room."""
        room = max(1, self.length - 1 - min(self.options.max_new_tokens, self.length // 2))
        return np.concatenate([[self.tokenizer.eos], self.encode(text)[-room:]]).astype(np.int64)

    def items(self, record: Record, index: int, *, with_gold: bool) -> list[Item]:
        """<eos> prompt answer <eos>; `target` is true where a token is an answer's (its end
        included). Too long, the front is cut first, the answer's end last."""
        if not with_gold:
            tokens = self.prompt_tokens(self.prompt(record))
            return [Item(index, [Sequence(tokens, len(tokens))], None)]
        eos = self.tokenizer.eos
        texts = [(self.encode(text), learned) for text, learned in self.pieces(record)]
        tokens = np.concatenate([*(ids for ids, _ in texts), [eos]]).astype(np.int64)
        learned = np.concatenate([*(np.full(len(i), flag) for i, flag in texts), [True]])
        room = self.length - 1
        cut = max(0, len(tokens) - room)
        front = min(cut, max(0, int(np.argmax(learned)) - room // 4))
        tokens, learned = tokens[front:][:room], learned[front:][:room]
        tokens, learned = np.append(eos, tokens), np.append(False, learned)
        return [Item(index, [Sequence(tokens, len(tokens))], learned, cut)]

    def record_of(self, line: str) -> Record:
        """A line as the prompt, or as the user's first message."""
        if self.options.chat:
            return {"messages": [{"role": "user", "content": line}]}
        return {"prompt": line}

    def targets_of(
        self, examples: list[Item], batch: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """answer int64[N], flat places of the tokens before each answer token; labels int64[N]."""
        if examples[0].target is None:
            return {}
        learned_M = np.concatenate([item.target for item in examples])
        where = np.flatnonzero(learned_M)  # never a sequence's first token
        flat = batch["tokens"].reshape(-1)
        return {"answer": batch["index"][where - 1], "labels": flat[batch["index"][where]]}

    def counts(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """Answer tokens."""
        return {"write": len(batch["answer"])}

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Term]:
        """The language model's loss at answers, with nll (hence perplexity) and accuracy."""
        hidden_ND = hidden_BTD.flatten(0, 1)[batch["answer"]]
        return token_terms("write", heads["lm"], hidden_ND, batch["labels"], self.options)

    def logits(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Logits [N, V] of the answer tokens, for rules that compare probabilities."""
        return {"write": heads["lm"](hidden_BTD.flatten(0, 1)[batch["answer"]])}

    def answers(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> list[Any]:
        """Nothing: answers are written by `nanolm.finetune.generation`."""
        return []

    def report(self, table: Table, predictions: list[dict[str, Any]]) -> Report:
        """Exact match, BLEU, chrF and ROUGE of what was written."""
        golds = [
            record["messages"][last_answer(record["messages"])]["content"]
            if self.options.chat
            else record["response"]
            for record in table.records
        ]
        return metrics.generation(golds, [prediction["text"] for prediction in predictions])


def last_answer(messages: list[dict[str, str]]) -> int:
    """Where the assistant's last turn stands in a dialogue that has one."""
    return max(i for i, message in enumerate(messages) if message["role"] == "assistant")
