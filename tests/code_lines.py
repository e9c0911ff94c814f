"""How many lines of code and of comment the rooms have, now or at an older revision.

    python -m tests.code_lines                 the working tree, room by room
    python -m tests.code_lines --at REVISION   the same of a commit

A line of code holds a token that is neither a comment nor part of a docstring, so that a statement
over three lines counts three times. A line of comment holds nothing else.
"""

import argparse
import ast
import collections
import io
import pathlib
import subprocess
import tokenize

ROOMS = ("nanolm", "kernels", "data")
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
    """Lines of code and lines that are only comment."""
    code, comments = set(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        lines = range(token.start[0], token.end[0] + 1)
        if token.type == tokenize.COMMENT:
            comments.update(lines)
        elif token.type not in NO_CODE:
            code.update(lines)
    code -= docstring_lines(ast.parse(source))
    return len(code), len(comments - code)


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


def main() -> None:
    """Prints a line for each folder below a room, and their sum."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at", metavar="REVISION")
    totals: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for path, text in sources(parser.parse_args().at).items():
        code, comments = count(text)
        folder = "/".join(pathlib.PurePath(path).parts[:-1][:2])
        for name in (folder, "all"):
            totals[name].update(files=1, code=code, comments=comments)
    print(f"{'files':>6} {'code':>7} {'comments':>9}")
    for name, total in sorted(totals.items(), key=lambda item: item[0] == "all"):
        print(f"{total['files']:6d} {total['code']:7,d} {total['comments']:9,d}  {name}")


if __name__ == "__main__":
    main()
