"""Mutants that nothing can find, each with the reason: they compute the same, or what differs
cannot be reached. Names are those of tests/kernel_tools/mutation.py."""

EQUIVALENT: dict[str, str] = {}
