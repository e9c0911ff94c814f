"""How many lines of the files to read give reasons: `python -m tests.comment_lines [FILE …]`.

Without files those of docs/reading_order.txt. A comment line is a line that holds a comment and is
no order to a tool (`# fmt: skip`, `# noqa`, `# type: ignore`); a code line is one that is neither
blank nor docstring nor comment alone.
"""

from __future__ import annotations

import io
import pathlib
import re
import sys
import tokenize

ROOT = pathlib.Path(__file__).parent.parent
ORDERS = re.compile(r"#\s*(fmt:|noqa|type: ignore|pragma)")
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def to_read() -> list[str]:
    """The files of the reading order."""
    text = (ROOT / "docs" / "reading_order.txt").read_text(encoding="utf-8")
    return re.findall(r"^([a-z]+/\S+\.py)", text, re.M)


def count(text: str) -> tuple[int, int]:
    """(code lines, comment lines) of a source."""
    code, comments = set(), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not ORDERS.match(token.string):
            comments.add(token.start[0])
        elif token.type not in SILENT and not token.string.startswith(('"""', 'r"""')):
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code), len(comments)


def main(files: list[str]) -> None:
    """Prints both counts of each file, and their sums."""
    total_code = total_comments = 0
    for name in files:
        code, comments = count((ROOT / name).read_text(encoding="utf-8"))
        total_code, total_comments = total_code + code, total_comments + comments
        print(f"{comments:5} {code:6}  {name}")
    print(f"{total_comments:5} {total_code:6}  comment and code lines of {len(files)} files")


if __name__ == "__main__":
    main(sys.argv[1:] or to_read())
