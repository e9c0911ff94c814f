"""A dialogue as a published model reads it: its authors' chat template, filled in.

The template is Jinja, and runs in Jinja's sandbox. It writes special pieces by name; these become
their ids here, and the same names in what a user says stay text, so that no user can end a turn.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError, require
from nanolm.inference.generate import Generator

Dialogue = Sequence[Mapping[str, str]]
PRIVATE_USE = range(0xE000, 0xF8FF)


class ChatGenerator(Generator):
    """Generates the answer to a user's message; prompts are messages."""

    def document(self, text: str) -> list[int]:
        """Token ids of a dialogue of one message, up to where the answer begins."""
        return dialogue_ids(self.saved.tokenizer, [{"role": "user", "content": text}])

    def held(self, prompt: str) -> tuple[str, str]:
        """All of a message is read, and the answer begins anew."""
        return prompt, ""


def dialogue_ids(tokenizer: Tokenizer, dialogue: Dialogue) -> list[int]:
    """Token ids of messages (role, content) by the tokenizer's chat template, up to where the next
    answer begins.

    Raises UserError where there is no template, or it refuses these messages.
    """
    special = sorted(filter(None, map(tokenizer.piece, special_ids(tokenizer))), key=len)
    names = re.compile("|".join(map(re.escape, reversed(special))) or "(?!)")
    said = "".join(message["content"] for message in dialogue)
    mark = next(chr(code) for code in PRIVATE_USE if chr(code) not in said)
    marked = [
        {**message, "content": names.sub(lambda m: f"{m[0][0]}{mark}{m[0][1:]}", text)}
        for message in dialogue
        for text in [message["content"]]
    ]
    text = rendered(tokenizer, marked)
    ids: list[int] = []
    begin = 0
    for found in names.finditer(text):
        ids += tokenizer.encode(text[begin : found.start()].replace(mark, "")).tolist()
        ids.append(tokenizer.piece_id(found[0]))
        begin = found.end()
    return [*ids, *tokenizer.encode(text[begin:].replace(mark, "")).tolist()]


def special_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of special pieces."""
    return tokenizer.special_mask.nonzero()[0].tolist()


def rendered(tokenizer: Tokenizer, dialogue: Dialogue) -> str:
    """The text that the template makes of messages."""
    template = tokenizer.chat_template
    if template is None:
        raise UserError(
            f"the tokenizer {tokenizer.path} has no chat template, which says how a dialogue is "
            f"written; leave --chat out"
        )
    try:
        import jinja2  # noqa: PLC0415  (only who has such a template needs it)
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415
    except ImportError as error:
        raise UserError(
            "a chat template is filled in by the package jinja2, which is not installed; install "
            "it: pip install jinja2"
        ) from error

    def refused(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    room = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    roles = {f"{role}_token": tokenizer.piece(index) for role, index in tokenizer.roles().items()}
    known: dict[str, Any] = {
        "raise_exception": refused,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        **roles,
    }
    try:
        return room.from_string(template).render(
            messages=dialogue, add_generation_prompt=True, **known
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        raise UserError(
            f"the chat template of {tokenizer.path} cannot be filled in ({error}); leave --chat out"
        ) from error


def require_chat(tokenizer: Tokenizer, trunk: str) -> None:
    """Raises UserError for a model that answers nobody."""
    require(trunk == "decoder", f"--chat is for decoders, and this model is an {trunk}")
    rendered(tokenizer, [{"role": "user", "content": "a"}])
