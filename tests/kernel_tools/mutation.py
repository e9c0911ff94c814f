"""Mutants of the kernels, made from their sources by operators on the syntax tree
(mutation_operators.py).

A mutant is one place of one function, written otherwise: `at - s < masks.window` becomes
`at - s <= masks.window`. Its name is made of words that stay when lines move,

    attention/scores.py visible bounds: at - s < masks.window -> at - s <= masks.window

with what stands around it where it is short, and `#2`, `#3` … where a function says the same again.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Iterable, Iterator

import nanolm.kernels
from tests.kernel_tools.mutation_operators import OPERATORS, Site

ROOT = pathlib.Path(next(iter(nanolm.kernels.__path__)))
FILES = (
    "attention/forward.py",
    "attention/backward.py",
    "attention/bias_gradient.py",
    "attention/scores.py",
    "attention/ranges.py",
    "attention/call.py",
    "attention/operator.py",
    "attention/decode.py",
    "tiles.py",
    "cross_entropy.py",
    "norm.py",
    "glu.py",
    "rotary.py",
    "symmetric_product.py",
    "operators.py",
)
"""What runs for every device. Not launch.py and candidates.py, which say what a GPU is given."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """[start, stop) of `file`, in bytes, becomes `new`.

    `interpreted`: inside a Triton kernel. `about`: the words of the statement and of the conditions
    that it stands under, by which a trial is found that comes by.
    """

    name: str
    file: str
    function: str
    operator: str
    start: int
    stop: int
    new: str
    interpreted: bool
    about: frozenset[str]

    def source(self) -> str:
        """The file with this one place changed."""
        text = (ROOT / self.file).read_bytes()
        return (text[: self.start] + self.new.encode() + text[self.stop :]).decode()


class Text:
    """A file's bytes by line and column, as the syntax tree counts them."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.starts = [0]
        for line in text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def span(self, node: ast.AST) -> tuple[int, int]:
        """First byte, and the one behind the last."""
        start = self.starts[node.lineno - 1] + node.col_offset
        return start, self.starts[node.end_lineno - 1] + node.end_col_offset

    def between(self, start: int, stop: int) -> str:
        """What stands from one byte to another."""
        return self.text[start:stop].decode()

    def of(self, node: ast.AST) -> str:
        """What a node says; one with operators in parentheses."""
        words = self.between(*self.span(node))
        loose = isinstance(node, ast.BinOp | ast.Compare | ast.IfExp | ast.BoolOp)
        return f"({words})" if loose else words


@dataclasses.dataclass(frozen=True)
class Place:
    """A node, its parent, whether it stands in a loop, its statement and the conditions above."""

    node: ast.AST
    parent: ast.AST
    in_loop: bool
    around: tuple[ast.AST, ...]


def inside(function: ast.FunctionDef) -> Iterator[Place]:
    """What a function does: no docstring, no annotation, no message of an exception."""

    def walk(node: ast.AST, place: Place) -> Iterator[Place]:
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.arguments):
            return
        around, in_loop = place.around, place.in_loop or isinstance(node, ast.For)
        if isinstance(node, ast.If):
            around = (*around, node.test)
        elif isinstance(node, ast.stmt) and not isinstance(node, ast.For | ast.FunctionDef):
            around = (*around, node)
        if isinstance(node, ast.FunctionDef):
            children: Iterable[ast.AST] = node.body
        else:
            yield Place(node, place.node, place.in_loop, around)
            children = ast.iter_child_nodes(node)
        for child in children:
            yield from walk(child, Place(node, place.node, in_loop, around))

    yield from walk(function, Place(function, function, False, ()))


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """(name, function) of a file; methods with their class."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    yield f"{node.name}.{method.name}", method


def plain(words: str) -> str:
    """Words on one line, whatever the line breaks."""
    return re.sub(r"\s+", " ", re.sub(r"#.*", "", words)).strip()


def is_python(text: Text, function: ast.FunctionDef, start: int, stop: int, new: str) -> bool:
    """Whether a function can be read with its bytes [start, stop) written otherwise."""
    first, last = text.span(function)
    above = "class Above:\n" + " " * function.col_offset if function.col_offset else ""
    try:
        ast.parse(above + text.between(first, start) + new + text.between(stop, last))
    except SyntaxError:
        return False
    return True


def of_file(file: str) -> Iterator[Mutant]:
    """All mutants of one file that can be read as Python, in its order."""
    unparsed = functools.cache(ast.unparse)
    text = Text((ROOT / file).read_bytes())
    seen: dict[str, int] = {}
    for function, node in functions(ast.parse(text.text)):
        names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        names |= {argument.arg for argument in ast.walk(node) if isinstance(argument, ast.arg)}
        interpreted = any(ast.unparse(mark) == "triton.jit" for mark in node.decorator_list)
        for place in inside(node):
            site = Site(place.node, text.of, place.in_loop, frozenset(names))
            about = words_of(" ".join([function, *map(unparsed, place.around)]))
            for operator, changes in OPERATORS.items():
                for changed, new in changes(site):
                    start, stop = text.span(changed)
                    if not is_python(text, node, start, stop, new):
                        continue
                    old = plain(text.between(start, stop))
                    name = f"{file} {function} {operator}: {old} -> {plain(new)}"
                    if len(old) < 16:
                        near = place.parent if changed is place.node else place.node
                        name += f" in {plain(text.between(*text.span(near)))[:70]}"
                    seen[name] = seen.get(name, 0) + 1
                    name += f" #{seen[name]}" if seen[name] > 1 else ""
                    yield Mutant(
                        name, file, function, operator, start, stop, new, interpreted,
                        frozenset(about),
                    )  # fmt: skip


def words_of(text: str) -> set[str]:
    """The words of some code, in small letters."""
    return set(re.findall(r"[a-z0-9]+", text.lower()))


@functools.cache
def mutants() -> tuple[Mutant, ...]:
    """All mutants of all files that can be read as Python."""
    return tuple(mutant for file in FILES for mutant in of_file(file))


def draw(count: int, seed: str, among: Iterable[Mutant]) -> list[Mutant]:
    """So many of them by a seed, of every operator as many. The order depends on names alone, so
    that a mutant keeps its place, or nearly, when others come or go."""
    lots = {m: hashlib.sha256(f"{seed}:{m.name}".encode()).hexdigest() for m in among}
    taken: dict[str, int] = {}
    order = []
    for mutant in sorted(lots, key=lots.get):
        taken[mutant.operator] = taken.get(mutant.operator, 0) + 1
        order.append((taken[mutant.operator], mutant.operator, mutant))
    return [mutant for _, _, mutant in sorted(order, key=lambda place: place[:2])][:count]


def held_out(mutant: Mutant) -> bool:
    """Whether it belongs to the quarter that no trial was written for: it says how well trials that
    were made for the others find what nobody has looked at."""
    return hashlib.sha256(mutant.name.encode()).digest()[0] < 64
