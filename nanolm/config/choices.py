"""The fields of the schema where a registered name decides which options dataclass stands.

`choose` swaps the matching dataclasses in, so that the keys of a choice, a plug-in's included, are
typed, documented and refused like all others; `widen` turns a config that was read against such a
schema back into the plain classes of `config/schema.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

from nanolm.config.schema import Config
from nanolm.config.typed import fields_of
from nanolm.registry import (
    KERNELS,
    OBJECTIVES,
    OPTIMIZERS,
    PEFT,
    POSITIONS,
    RULES,
    SCHEDULES,
    TIMED,
    TRUNKS,
    Options,
    Registry,
)

CHOICES: dict[str, Registry] = {
    "objective": OBJECTIVES,
    "optim": OPTIMIZERS,
    "schedule": SCHEDULES,
    "peft": PEFT,
    "model.positions": POSITIONS,
    "train.rule": RULES,
    "train.rule.inner": RULES,
    "train.rule.inner.inner": RULES,
}
"""Keys of the schema where a registered name decides which options dataclass stands.

A rule may wrap another one, and that a third."""


def registered_names(key: str, schema: type) -> list[str] | None:
    """What may stand at a key of the schema, where registered names do; None where others do.

    Of objectives, those that a run of this schema trains.
    """
    op = key.removeprefix("kernels.")
    if op in KERNELS and op != key:
        return ["auto", *["fastest"] * (op in TIMED), *KERNELS[op].names()]
    if key == "model.trunk":
        return TRUNKS.names()
    registry = CHOICES.get(key.removesuffix(".name"))
    if registry is None or not key.endswith(".name"):
        return None
    if registry is not OBJECTIVES:
        return registry.names()
    plain = getattr(schema, "narrowed_from", schema)
    builders = {name: registry.get(name).build for name in registry.names()}
    return [name for name, build in builders.items() if getattr(build, "schema", Config) is plain]


def narrow(schema: type, **fields: type) -> type:
    """A dataclass like `schema` in which the named fields have more specific dataclass types."""
    return narrowed(schema, *fields.items())


@functools.cache  # to make a dataclass takes milliseconds, and every config that is read needs some
def narrowed(schema: type, *fields: tuple[str, type]) -> type:
    """What `narrow` makes: of the same types, the same dataclass."""
    items = [(key, kind, dataclasses.field(default_factory=kind)) for key, kind in fields]
    return dataclasses.make_dataclass(
        schema.__name__,
        items,
        bases=(schema,),
        frozen=True,
        kw_only=True,
        namespace={"__doc__": schema.__doc__, "narrowed_from": schema},
    )


def widen(value: Any) -> Any:
    """The same config in the plain classes that `narrow` started from."""
    if not dataclasses.is_dataclass(value) or not hasattr(type(value), "narrowed_from"):
        return value
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return cast(Any, type(value)).narrowed_from(
        **{key: widen(part) for key, part in fields.items()}
    )


def choose(names: dict[str, str], schema: type = Config) -> type:
    """The schema whose choices are fixed to the given names, e.g. {"objective": "mlm"}.

    Choices that are not named keep the schema's default. Raises UserError for unknown names.
    """
    kinds = fields_of(schema)
    options = {
        key: registry.get(names.get(key, _default_name(schema, key))).options or Options
        for key, registry in CHOICES.items()
        if key.split(".")[0] in kinds
    }
    model = narrow(kinds["model"], positions=options["model.positions"])
    train = narrow(kinds["train"], rule=nested(options, "train.rule"))
    tops = {key: kind for key, kind in options.items() if "." not in key}
    return narrow(schema, model=model, train=train, **tops)


def nested(options: dict[str, type], key: str) -> type:
    """The options dataclass of a choice that may hold one of its own kind under `inner`."""
    if key not in options:
        return RULES.get("plain").options or Options
    kind = options[key]
    if "inner" not in fields_of(kind):
        return kind
    return narrow(kind, inner=nested(options, f"{key}.inner"))


def _default_name(schema: type, key: str) -> str:
    if key.endswith(".inner"):
        return "plain"
    value = schema()
    for part in key.split("."):
        value = getattr(value, part)
    return value.name
