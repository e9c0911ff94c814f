"""A package that is installed, as if it were not."""

import importlib.util


def hide(monkeypatch, package):
    """`importlib.util.find_spec` no longer finds the package."""
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == package else known(name, *more),
    )
