"""Lines and branches of the kernels that the questions of `examination.py` reach, interpreted.

    python -m tests.kernel_tools.coverage [--out runs/coverage.json] [--only norm,glu]

A statement counts when it runs; an `if` has two branches, a loop one that enters and one that ends
it. (An `x if c else y` is one line, whose sides are the mutants' to tell apart.) What was asked
before is read from --out while the kernels' sources are the same, so that a run can be broken off.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch

from nanolm.files import Finished
from tests.kernel_tools.examination import ALL
from tests.kernel_tools.mutation import FILES, ROOT, functions
from tests.kernel_tools.tracing import Arc, traced


def lines(*nodes: ast.AST) -> set[int]:
    """All lines of some nodes."""
    return {n for node in nodes for n in range(node.lineno, node.end_lineno + 1)}


def head(statement: ast.stmt) -> set[int]:
    """The lines of a statement without those of its body."""
    body = getattr(statement, "body", None)
    if not body:
        return lines(statement)
    return set(range(statement.lineno, max(body[0].lineno, statement.lineno + 1)))


def statements(file: str) -> list[ast.stmt]:
    """The statements of a file's functions, without docstrings."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return [
        node
        for _, function in functions(tree)
        for part in function.body
        for node in ast.walk(part)
        if isinstance(node, ast.stmt)
        and not isinstance(node, ast.FunctionDef)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]


def branches(file: str) -> Iterator[tuple[int, str, set[int], set[int], bool]]:
    """(line, way, from, lines, whether it leads to them or past them) of every branch."""
    for node in statements(file):
        if isinstance(node, ast.If | ast.For | ast.While):
            loop = not isinstance(node, ast.If)
            body = lines(*node.body)
            yield node.lineno, "is entered" if loop else "is true", head(node), body, True
            yield node.lineno, "ends" if loop else "is false", head(node), body | head(node), False


def reached(file: str, arcs: set[Arc]) -> tuple[list[int], int, list[str], int]:
    """(statements that never ran, how many there are, branches never taken, how many)."""
    steps = {(a, b) for name, a, b in arcs if name == file}
    ran = {b for _, b in steps}
    every = statements(file)
    missed = sorted({s.lineno for s in every if not head(s) & ran})
    ways = list(branches(file))
    untaken = [
        f"{line} {way}"
        for line, way, start, target, into in ways
        if not any(a in start and (b in target) == into for a, b in steps)
    ]
    return missed, len(every), untaken, len(ways)


def digest() -> str:
    """Of the sources, whose line numbers the arcs are."""
    text = b"".join((ROOT / file).read_bytes() for file in FILES)
    return hashlib.sha256(text).hexdigest()[:12]


def measured(groups: list[str], finished: Finished) -> set[Arc]:
    """The arcs of all questions."""
    arcs: set[Arc] = set()
    for group in groups:
        for question in ALL[group]():
            key = f"{digest()} {group} {question.name}"
            if key not in finished.cells:
                with traced() as found:
                    seen = question.ask()
                if seen is not None:
                    raise SystemExit(f"the kernels fail {group} {question.name}: {seen}")
                finished.put(key, {"arcs": sorted(found)})
            arcs |= {tuple(arc) for arc in finished.cells[key]["arcs"]}
    return arcs


def main() -> None:
    """Ask, count, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/kernel_coverage.json", help="what was asked")
    parser.add_argument("--only", default=",".join(ALL), help="groups of questions")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arcs = measured(arguments.only.split(","), Finished(arguments.out, "kernel coverage"))
    totals = [0, 0, 0, 0]
    print(f"{'file':<28} {'statements':>12} {'branches':>12}")
    for file in FILES:
        missed, n_statements, untaken, n_branches = reached(file, arcs)
        counts = [n_statements - len(missed), n_statements, n_branches - len(untaken), n_branches]
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
        print(f"{file:<28} {counts[0]:>5} of {counts[1]:>3} {counts[2]:>5} of {counts[3]:>3}")
        text = (ROOT / file).read_text(encoding="utf-8").splitlines()
        for line in missed:
            print(f"    never runs: {line}: {text[line - 1].strip()}")
        for way in untaken:
            line = int(way.split()[0])
            print(f"    never {way.partition(' ')[2]}: {line}: {text[line - 1].strip()}")
    print(f"{'all':<28} {totals[0]:>5} of {totals[1]:>3} {totals[2]:>5} of {totals[3]:>3}")


if __name__ == "__main__":
    main()
