"""How many lines of code and of comment the rooms have, now or at an older revision.

    python -m tests.code_lines                 the working tree, room by room
    python -m tests.code_lines --to_read       the files of docs/reading_order.txt, one by one
    python -m tests.code_lines --at REVISION   of a commit

A line of code holds a token that is neither a comment nor part of a docstring, so that a statement
over three lines counts three times. A line of comment holds a comment, after code or alone, that is
no order to a tool (`# fmt: skip`, `# noqa`, `# type: ignore`).
"""

import argparse
import ast
import collections
import io
import pathlib
import re
import subprocess
import tokenize

ROOMS = ("nanolm", "kernels", "data")
ORDERS = re.compile(r"#\s*(fmt:|noqa|type: ignore|pragma)")
NO_CODE = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}


def docstring_lines(tree: ast.AST) -> set[int]:
    """The lines of texts that stand as statements: docstrings, also those of attributes."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Expr(ast.Constant(str())):
                found |= set(range(node.lineno, node.end_lineno + 1))
    return found


def count(source: str) -> tuple[int, int]:
    """Lines of code and lines with a comment."""
    code, comments = set(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT and token.type not in NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
        elif token.type == tokenize.COMMENT and not ORDERS.match(token.string):
            comments.add(token.start[0])
    return len(code - docstring_lines(ast.parse(source))), len(comments)


def sources(revision: str | None) -> dict[str, str]:
    """Path -> text of every Python file of the rooms."""
    command = ["git", "ls-tree", "-r", "--name-only", revision, "--", *ROOMS]
    if revision is None:
        command = ["git", "ls-files", "--", *ROOMS]
    listed = subprocess.check_output(command, text=True).splitlines()
    paths = [path for path in listed if path.endswith(".py")]
    if revision is None:
        return {path: pathlib.Path(path).read_text(encoding="utf-8") for path in paths}
    show = ["git", "show"]
    return {p: subprocess.check_output([*show, f"{revision}:{p}"], text=True) for p in paths}


def to_read() -> set[str]:
    """The files of the reading order."""
    text = pathlib.Path("docs/reading_order.txt").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z]+/\S+\.py)", text, re.M))


def main() -> None:
    """Prints a line for each folder or file, and their sum."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at", metavar="REVISION")
    parser.add_argument("--to_read", action="store_true")
    arguments = parser.parse_args()
    found = sources(arguments.at)
    name_of = {path: "/".join(pathlib.PurePath(path).parts[:-1][:2]) for path in found}
    if arguments.to_read:
        name_of = {path: path for path in found.keys() & to_read()}
    totals: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for path, name in name_of.items():
        code, comments = count(found[path])
        for total in (totals[name], totals["all"]):
            total.update(files=1, code=code, comments=comments)
    print(f"{'files':>6} {'code':>7} {'comments':>9}")
    for name, total in sorted(totals.items(), key=lambda item: (item[0] == "all", item[0])):
        print(f"{total['files']:6d} {total['code']:7,d} {total['comments']:9,d}  {name}")


if __name__ == "__main__":
    main()
