"""What docstrings and comments name exists: a name that was moved or renamed is told nowhere."""

import functools
import io
import pathlib
import re
import tokenize
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = [path for place in ("nanolm", "kernels", "data") for path in (ROOT / place).rglob("*.py")]
OTHERS = {
    *("AutoTokenizer", "AutoModelForCausalLM", "AutoModelForSequenceClassification"),
    *("PeftModel", "from_pretrained", "group_by_length"),  # of transformers and peft
    *("my_package", "my_kernel", "my_pkg"),  # of a reader
    *("_orig_mod", "LineBreak"),  # of torch.compile, and of Unicode
}
"""Names of other projects, and examples."""

CODE = re.compile(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`")
METHOD = re.compile(r"\b(?:\w+_\w+\.)?([A-Z]\w*[a-z]\w*\.[a-z_]\w*)\b(?!/)")
TELLING = re.compile(r"_|[a-z][A-Z]")
"""A word that only a program would have: it has an underscore or a capital inside."""


@functools.cache
def parts(text: str) -> tuple[list[tokenize.TokenInfo], list[tokenize.TokenInfo]]:
    """(what is code of a source, what is told in it)."""
    code, told = [], []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_told = token.type == tokenize.COMMENT or token.string.startswith(('"""', 'r"""'))
        (told if is_told else code).append(token)
    return code, told


def known(sources: list[pathlib.Path]) -> set[str]:
    """All identifiers of the code, words in its strings among them, and the files' names."""
    names = {path.stem for path in ROOT.rglob("*.py")} | OTHERS
    for path in sources:
        for token in parts(path.read_text(encoding="utf-8"))[0]:
            names.update(re.findall(r"\w+", token.string))
    return names


def told_names(text: str) -> Iterator[tuple[int, str]]:
    """(line, name) of what the words of a source name: code between backticks, and methods of
    classes with what stands before them."""
    for token in parts(text)[1]:
        for found in [*CODE.finditer(token.string), *METHOD.finditer(token.string)]:
            line = token.start[0] + token.string[: found.start()].count("\n")
            for name in found[0].strip("`").partition("(")[0].split("."):
                if TELLING.search(name):
                    yield line, name


def test_what_docstrings_and_comments_name_exists():
    names = known(SOURCES)
    missing = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in SOURCES
        for line, name in told_names(path.read_text(encoding="utf-8"))
        if name not in names
    ]
    assert not missing, "\n".join(missing)


def test_the_ways_of_naming_are_seen():
    text = '"""What old_module.TheKernel.run calls,\nas `gone_name(x)` and `Kernel` do."""\n'
    assert set(told_names(text)) == {(1, "old_module"), (1, "TheKernel"), (2, "gone_name")}
    assert set(told_names("# In a journey: OldClass.forward -> `text`\n")) == {(1, "OldClass")}
