"""All kernels that outsiders get wrong, attention first.

`python -m tests.kernel_tools.outsiders` prints what `kernels check` says of each.
"""

from __future__ import annotations

from nanolm.tools.kernel_check.conformance import checks_of
from tests.kernel_tools import (
    wrong_attention,
    wrong_calls,
    wrong_gradients,
    wrong_habits,
    wrong_masks,
    wrong_narrow,
    wrong_numbers,
    wrong_ops,
    wrong_process,
)
from tests.kernel_tools.outsider import WRONG

__all__ = [
    "WRONG",
    "wrong_attention",
    "wrong_calls",
    "wrong_gradients",
    "wrong_habits",
    "wrong_masks",
    "wrong_narrow",
    "wrong_numbers",
    "wrong_ops",
    "wrong_process",
]


def told(wrong):
    """What `kernels check` says of a wrong kernel: the sentence that names its fault, else all."""
    checks = [check for check in checks_of(wrong.op) if wrong.at in (None, check.name)]
    found = [check(wrong.kernel(), "cpu") for check in checks]
    words = [finding.words for finding in found if finding.verdict == "FAIL"]
    return next((sentence for sentence in words if wrong.words in sentence), "; ".join(words))


def main():
    """Prints each wrong kernel and its sentence, as a table."""
    print("| op | a kernel that | is told |\n|---|---|---|")
    for wrong in WRONG:
        name = wrong.name.replace("_", " ")
        print(f"| `{wrong.op}` | {name} | {told(wrong).splitlines()[0]} |", flush=True)


if __name__ == "__main__":
    main()
