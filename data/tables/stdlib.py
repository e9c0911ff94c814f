"""Labelled tasks made from the Python standard library, which every installation carries.

    stdlib:package    a function's source -> the package or module that it comes from    classify
    stdlib:tokens     a line's tokens -> their lexical category, as `tokenize` says      tag
    stdlib:parameter  docstring sentence + signature -> the parameter it speaks of       read
    stdlib:docstring  first docstring line -> the function that it describes             embed, rank
    stdlib:alike      two functions -> 2 of one module, 1 of one package, else 0         similar

No download is needed; the records differ by Python version, as the library does. A record's split
follows from the hash of its function's qualified name: 80 % train, 10 % val, 10 % test.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import keyword
import pathlib
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

from nanolm.data.tables.files import Record, Table
from nanolm.errors import UserError

SPLITS = {"val": range(8, 9), "test": range(9, 10), "train": range(8)}
PACKAGES = 12
LONGEST_SOURCE = 1200
LONGEST_LINE = 24
LEFT_OUT = {
    *("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"),
    *("__pycache__", "distutils", "encodings", "ensurepip", "pydoc_data", "lib-dynload"),
}
OPERATORS = {tokenize.OP: "OPERATOR", tokenize.NUMBER: "NUMBER", tokenize.STRING: "STRING"}


class Function(NamedTuple):
    """A function of the library: its module, its qualified name, its source and its node."""

    module: str
    name: str
    source: str
    node: ast.FunctionDef


@functools.cache
def functions() -> tuple[Function, ...]:
    """All functions and methods of the library's own modules, in the order of paths."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found: list[Function] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if LEFT_OUT.isdisjoint(parts) and not path.is_symlink():
            found += _functions_of(path, ".".join(parts))
    if not found:
        raise UserError(f"{root} holds no module of the standard library to make tasks from")
    return tuple(found)


def _functions_of(path: pathlib.Path, module: str) -> Iterator[Function]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError):
        return  # a few files of the library are meant to be broken
    lines = text.splitlines(keepends=True)
    for node in _definitions(tree.body):
        source = "".join(lines[node.lineno - 1 : node.end_lineno])
        if len(source) <= LONGEST_SOURCE:
            yield Function(module, f"{module}.{node.name}:{node.lineno}", source, node)


def _definitions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Functions and methods; looking into every expression would take ten times as long."""
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _definitions(node.body)


def in_split(name: str, split: str) -> bool:
    """Whether the record of this name belongs to a split."""
    return hashlib.sha256(name.encode()).digest()[0] % 10 in SPLITS[split]


def stdlib_table(task: str, split: str) -> Table:
    """The records of a task's split; raises UserError for an unknown task."""
    if task not in TASKS:
        raise UserError(f"stdlib:{task} is no task; choose from stdlib:{', stdlib:'.join(TASKS)}")
    records = [r for f in functions() if in_split(f.name, split) for r in TASKS[task](f)]
    return Table(f"stdlib:{task}/{split}", records, list(range(1, len(records) + 1)))


@functools.cache
def largest_packages() -> tuple[str, ...]:
    """The packages and modules with the most functions."""
    counts: dict[str, int] = {}
    for function in functions():
        package = function.module.split(".")[0]
        if not package.startswith("_"):
            counts[package] = counts.get(package, 0) + 1
    return tuple(sorted(counts, key=lambda package: (-counts[package], package))[:PACKAGES])


def package_records(function: Function) -> Iterator[Record]:
    """text: the function; label: its package. Its own name in the text would give it away."""
    package = function.module.split(".")[0]
    if package in largest_packages() and function.source.count("\n") >= 3:
        text = re.sub(rf"\b{re.escape(package)}\b", "package", function.source)
        yield {"id": function.name, "text": text, "label": package}


def token_records(function: Function) -> Iterator[Record]:
    """tokens and tags of the function's third line, when it is neither short nor long."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(_dedented(function.source)).readline))
    except (tokenize.TokenError, IndentationError, SyntaxError):
        return
    line = 3
    here = [t for t in tokens if t.start[0] == t.end[0] == line and t.string.strip()]
    if 4 <= len(here) <= LONGEST_LINE:
        tags = [_category(t) for t in here]
        yield {"id": function.name, "tokens": [t.string for t in here], "tags": tags}


def _category(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.NAME:
        is_keyword = keyword.iskeyword(token.string) or token.string == "self"
        return "KEYWORD" if is_keyword else "NAME"
    name = tokenize.tok_name[token.type]
    if name.startswith(("FSTRING", "TSTRING")):  # what Python 3.12 and 3.14 take strings apart into
        return "STRING"
    return OPERATORS.get(token.type, name)


def parameter_records(function: Function) -> Iterator[Record]:
    """question: a docstring sentence with the parameter's name blanked; context: the signature."""
    document = ast.get_docstring(function.node) or ""
    names = [a.arg for a in function.node.args.args + function.node.args.kwonlyargs]
    names = [name for name in names if name not in ("self", "cls") and len(name) > 1]
    context = function.source.split(":\n")[0].strip()
    if len(names) < 2 or len(context) > 200:
        return
    for number, sentence in enumerate(re.split(r"(?<=[.])\s+", document)):
        spoken = [name for name in names if re.search(rf"\b{re.escape(name)}\b", sentence)]
        if len(spoken) == 1 and 20 < len(sentence) < 200:
            name = spoken[0]
            place = re.search(rf"\b{re.escape(name)}\b", context[context.index("(") :])
            if place is not None:
                start = context.index("(") + place.start()
                yield {
                    "id": f"{function.name}#{number}",
                    "question": re.sub(rf"\b{re.escape(name)}\b", "it", " ".join(sentence.split())),
                    "context": context,
                    "answers": [{"text": name, "answer_start": start}],
                }


def docstring_records(function: Function) -> Iterator[Record]:
    """query: the docstring's first line; positive: the function without its docstring."""
    document = ast.get_docstring(function.node)
    if not document or len(document.splitlines()[0]) < 15:
        return
    first = function.node.body[0]
    lines = function.source.splitlines(keepends=True)
    begin = first.lineno - function.node.lineno
    end = (first.end_lineno or first.lineno) - function.node.lineno + 1
    body = "".join(lines[:begin] + lines[end:])
    if begin > 0 and body.count("\n") >= 2:
        yield {"id": function.name, "query": document.splitlines()[0], "positive": body}


@functools.cache
def _neighbours(split: str) -> dict[str, tuple[Function, ...]]:
    """{module, package, or "" for all: its functions} within a split, so that none crosses it."""
    found: dict[str, list[Function]] = {}
    for function in functions():
        if in_split(function.name, split):
            for place in {function.module, function.module.split(".")[0], ""}:
                found.setdefault(place, []).append(function)
    return {place: tuple(members) for place, members in found.items()}


def alike_records(function: Function) -> Iterator[Record]:
    """text, text_pair: two functions; score: 2 when they are of one module, 1 when they are of one
    package's other modules, else 0. The name's hash draws score and partner."""
    draw = hashlib.sha256(f"alike {function.name}".encode()).digest()
    split = next(split for split in SPLITS if in_split(function.name, split))
    package, score = function.module.split(".")[0], draw[0] % 3
    place = {2: function.module, 1: package, 0: ""}[score]
    partners = _neighbours(split)[place]
    begin = int.from_bytes(draw[1:5], "big")
    for step in range(min(len(partners), 50)):
        partner = partners[(begin + step) % len(partners)]
        same_module = partner.module == function.module
        same_package = partner.module.split(".")[0] == package
        if partner.name != function.name and same_module + same_package == score:
            texts = {"text": function.source, "text_pair": partner.source}
            yield {"id": function.name, **texts, "score": score}
            return


def _dedented(source: str) -> str:
    indent = len(source) - len(source.lstrip())
    lines = source.splitlines(keepends=True)
    return "".join(line[indent:] if not line[:indent].strip() else line for line in lines)


TASKS = {
    "package": package_records,
    "tokens": token_records,
    "parameter": parameter_records,
    "docstring": docstring_records,
    "alike": alike_records,
}
