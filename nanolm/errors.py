"""The one exception that a user is meant to read, and the checks that raise it.

Everything that a user can get wrong (a key, a path, a damaged file) raises `UserError` with one
sentence that names the file or key and the remedy. The command line prints that sentence and exits
with status 2; anything else that escapes is a bug of ours and shows its traceback.
"""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """Bad input, told in one sentence that names the file or key and the remedy."""


def require(condition: bool, sentence: str) -> None:
    """Raises UserError(sentence) unless the condition holds."""
    if not condition:
        raise UserError(sentence)


def require_at_least(group: str, config: Any, **least: float) -> None:
    """Raises UserError for the first key whose value is neither null nor at least the given one."""
    for key, bound in least.items():
        value = getattr(config, key)
        require(value is None or value >= bound, f"{group}.{key}={value} must be at least {bound}")


def require_range(key: str, value: float, least: float, most: float) -> None:
    """Raises UserError unless least <= value <= most."""
    require(least <= value <= most, f"{key}={value} must lie in [{least}, {most}]")


def require_whole_path(key: str, path: str) -> None:
    """Raises UserError for a folder to write whose name begins with a tilde.

    No shell expands the one in `--run.dir=~/x` or in a YAML file: a folder called ~ would be made.
    """
    require(
        not (path == "~" or path.startswith("~/")),
        f"{key}={path} begins with ~, which nothing expands here; write the whole path, or "
        f"./{path} for a folder of that name",
    )


NO_DRIVER = "active drivers"
"""Of the RuntimeError that Triton raises where there is no GPU that it could compile for."""
