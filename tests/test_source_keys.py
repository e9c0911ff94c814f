"""What all sources are told is used by a source or refused: nothing is ignored in silence."""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet
import pytest

from nanolm.data.prepare.config import PrepareConfig
from nanolm.data.prepare.pipeline import list_pieces
from nanolm.data.prepare.sources import (
    SHARED_KEYS,
    SOURCES,
    build_source,
    name_and_argument,
    require_heeded,
)
from nanolm.errors import UserError

COMMON = {"text_field": "text", "txt_documents": "auto"}


@pytest.fixture
def silent_plugin():
    """A source of a plug-in that does not say what it heeds."""

    @SOURCES.register("silent")
    class Silent:
        def __init__(self, options):
            self.options = options

        def pieces(self):
            return []

    yield Silent
    del SOURCES._entries["silent"]


def kinds_of_source(tmp_path):
    """{what sources says: the shared keys that it has a use for}"""
    contents = {"a.txt": "a", "b.py": "b", "c.jsonl": '{"text": "c"}\n', "folder/d.txt": "d"}
    (tmp_path / "folder").mkdir()
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    pyarrow.parquet.write_table(pa.table({"text": ["e"]}), tmp_path / "e.parquet")
    text = {"exclude", "encoding"}
    return {
        f"{tmp_path}/a.txt": text | {"txt_documents"},
        f"{tmp_path}/b.py": text,
        f"{tmp_path}/c.jsonl": text | {"text_field"},
        f"{tmp_path}/e.parquet": {"exclude", "text_field"},
        f"{tmp_path}/folder": set(SHARED_KEYS),
        f"{tmp_path}/*.txt": set(SHARED_KEYS),
        f"table:{tmp_path}/c.jsonl:text": set(),
        "stdlib": {"exclude"},
        "hf:imdb": {"text_field"},
        "silent:abc": set(SHARED_KEYS),  # a plug-in that does not say
    }


def test_a_key_that_no_source_heeds_is_refused(tmp_path, silent_plugin):
    """Every kind of source with every shared key: used or refused, never ignored."""
    values = {"exclude": ["x"], "text_field": "x", "txt_documents": "line", "encoding": "cp1251"}
    kinds = kinds_of_source(tmp_path)
    assert set(values) == set(SHARED_KEYS)
    # Plug-ins of other tests may be in the registry too.
    entries = SOURCES._entries.items()
    ours = {name for name, entry in entries if entry.build.__module__.startswith("nanolm.")}
    assert {name_and_argument(spec)[0] for spec in kinds} == {*ours, "silent"}

    def ask(*specs, **told):
        config = PrepareConfig(out="out", sources=list(specs), **told)
        sources = [(spec, build_source(spec, COMMON, {})) for spec in specs]
        require_heeded(sources, config.told(SHARED_KEYS), config.source_options)

    for spec, heeded in kinds.items():
        ask(spec)
        for key, value in values.items():
            if key in heeded:
                ask(spec, **{key: value})
                continue
            with pytest.raises(UserError, match=rf"^{key} has no effect on .*; leave --{key} out$"):
                ask(spec, **{key: value})
            ask(spec, "silent:abc", **{key: value})  # one source with a use for it is enough
    with pytest.raises(UserError, match=r"^source_options.tabel is for a source tabel, and"):
        ask("stdlib", source_options={"tabel": {"joiner": ""}})
    ask("stdlib", "silent:abc", source_options={"silent": {"encoding": "cp1251"}})
    with pytest.raises(UserError, match=r"^text_field has no effect on stdlib; leave --text_fie"):
        list_pieces(PrepareConfig(out="out", sources=["stdlib"], text_field="body"))


def test_exclude_holds_for_every_source_that_heeds_it(tmp_path):
    source = build_source("stdlib", COMMON, {})
    everything = set(source.paths())
    patterns = ("tkinter", "asyncio/*", "ast.py")
    fewer = build_source("stdlib", {**COMMON, "exclude": patterns}, {})
    gone = everything - set(fewer.paths())
    assert gone == {
        path
        for path in everything
        if path.startswith(("tkinter/", "asyncio/")) or path.split("/")[-1] == "ast.py"
    }
    assert fewer.passed_over["excluded"] == 2 + sum(p.startswith("asyncio/") for p in everything)
    with pytest.raises(UserError, match=r"--exclude \* leaves nothing of the standard library"):
        build_source("stdlib", {**COMMON, "exclude": ("*",)}, {}).paths()
    # What a shell makes of a glob is names.
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    for name, texts in (("a.txt", [b"a.txt"]), ("b.txt", [])):
        source = build_source(str(tmp_path / name), {**COMMON, "exclude": ("b.txt",)}, {})
        assert [t for piece in source.pieces() for t in piece.documents(Counter())] == texts
        assert source.passed_over == ({} if texts else {"excluded": 1})
