"""Sources and readers: the same documents however a file is cut, packed or found."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import pathlib
from collections import Counter

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nanolm.data.prepare.huggingface
import nanolm.data.prepare.table_text  # noqa: F401  (both register a source)
from nanolm.data import json_records, readers
from nanolm.data.documents import blocks, bounded, lines, paragraphs
from nanolm.data.prepare.sources import SOURCES, StandardLibrary, build_source
from nanolm.errors import UserError

COMMON = {"text_field": "text", "txt_documents": "auto"}


def read(spec, counts=None, **common) -> list[bytes | str]:
    counts = Counter() if counts is None else counts
    source = build_source(str(spec), {**COMMON, **common}, {})
    return [text for piece in source.pieces() for text in piece.documents(counts)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.sampled_from([b"a", b"\n", b"\n\n", b"bc d", b" \n", b"\r\n"]), max_size=30),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
@pytest.mark.parametrize("reader", [lines, paragraphs])
def test_byte_ranges_give_the_documents_of_the_whole(reader, parts, cuts):
    content = b"".join(parts)
    bounds = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    whole = list(reader(io.BufferedReader(io.BytesIO(content)), 0, len(content), Counter()))
    ranges = [
        document
        for begin, end in itertools.pairwise(bounds)
        if begin < end
        for document in reader(io.BufferedReader(io.BytesIO(content)), begin, end, Counter())
    ]
    assert ranges == whole
    if reader is lines:
        assert whole == [kept for line in content.split(b"\n") if (kept := line.rstrip(b"\r"))]


def test_formats_and_compressions(tmp_path):
    records = "".join(json.dumps({"text": f"text {n} 秦", "n": n}) + "\n" for n in range(5))
    texts = [f"text {n} 秦" for n in range(5)]
    (tmp_path / "a.jsonl").write_text(records)
    # Two members one after the other are one file in both formats.
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(records.encode()) * 2)
    frame = pa.Codec("zstd").compress(records.encode(), asbytes=True)
    (tmp_path / "c.jsonl.zst").write_bytes(frame * 2)
    table = pa.table({"text": [*texts, None], "n": range(6)})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=2)
    assert read(tmp_path / "a.jsonl") == texts
    assert read(tmp_path / "b.json.gz") == texts * 2
    assert read(tmp_path / "c.jsonl.zst") == texts * 2
    counts = Counter()
    assert read(tmp_path / "d.parquet", counts) == texts
    assert counts == {"dropped/no text in field text": 1}
    for name, fields in (("a.jsonl", "text, n"), ("d.parquet", "text$")):
        with pytest.raises(UserError, match=rf"{name} has no field 'body'; choose.* {fields}"):
            read(tmp_path / name, text_field="body")


def test_folders_and_globs_are_walked_in_order(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.py", "sub/.hidden.txt", ".git/d.txt", "e.bin"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert read(tmp_path) == [b"a.md", b"b.txt", b"sub/c.py"]
    assert read(tmp_path / "**/*.py") == [b"sub/c.py"]
    assert read(tmp_path / "*") == [b"a.md", b"b.txt", b"sub/c.py"]
    assert read(tmp_path / "**") == [b"a.md", b"b.txt", b"sub/c.py"]
    assert read(tmp_path / "s*") == [b"sub/c.py"]


def walked(spec, **common):
    """({name: text}, what was passed over) of a folder."""
    source = build_source(str(spec), {**COMMON, **common}, {})
    pieces = list(source.pieces())
    found = {p.path.removeprefix(f"{spec}/"): list(p.documents(Counter())) for p in pieces}
    return found, dict(source.passed_over)


def test_every_file_of_a_folder_is_read_once_or_counted(tmp_path):
    """A tree with each kind of entry that a folder can hold."""
    tree = tmp_path / "tree"
    texts = ["a.txt", "sub/b.md", "sub/deep/c.txt.gz", "d.txt.xz", "e.txt.bz2", "old/f.txt"]
    others = ["x.csv", "y.tar.gz", "sub/z.CSV", "LICENSE", "g.pdf"]
    hidden = [".git/h.txt", "sub/.i.txt", "__pycache__/j.py"]
    packers = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
    for name in [*texts, *others, *hidden]:
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packers.get(path.suffix, bytes)(name.encode()))
    (tree / "n.ndjson").write_text('{"text": "n"}\n')
    (tree / "package.json").write_text('{"name": "demo"}')
    (tree / "list.json").write_text('[{"text": "one"}, {"text": "two"}]')
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "k.txt").write_text("k")
    for link, target in (
        ("link", tmp_path / "elsewhere"),
        ("again", tmp_path / "elsewhere"),
        ("round", tree),
        ("sub/twin.md", tree / "sub" / "b.md"),
        ("gone.txt", tree / "nothing"),
    ):
        (tree / link).symlink_to(target)
    found, passed = walked(tree)
    assert found == {
        **{name: [name.encode()] for name in texts},
        "n.ndjson": ["n"],
        "list.json": ["one", "two"],
        "again/k.txt": [b"k"],
    }
    assert passed == {
        **{".csv": 2, ".tar.gz": 1, "no extension": 1, ".pdf": 1, "hidden": 3, "broken link": 1},
        ".json without 'text'": 1,
    }
    fewer, passed = walked(tree, exclude=("*.json", "old", "sub/deep/*"))
    left_out = {"list.json", "old/f.txt", "sub/deep/c.txt.gz"}
    assert fewer == {name: texts for name, texts in found.items() if name not in left_out}
    assert passed["excluded"] == 4
    (tree / "bad.jsonl").write_text('{"body": "n"}\n')
    with pytest.raises(UserError, match=r"no field 'text'.*--exclude bad\.jsonl"):
        walked(tree)
    assert walked(tree, exclude=("bad.jsonl",))[0] == found
    with pytest.raises(UserError, match="no field 'text'; choose --text_field from name"):
        walked(tree / "package.json")
    with pytest.raises(UserError, match=r"write table:\S+x.csv:COLUMN"):
        walked(tree / "x.csv")
    with pytest.raises(UserError, match=r"holds nothing to read \(passed over: 1 excluded"):
        walked(tmp_path / "elsewhere", exclude=("*.txt",))


def test_what_a_document_is_in_a_text_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"one\ntwo\n\n\nthree\n")
    assert read(path) == [b"one\ntwo\n\n\nthree\n"]
    assert read(path, txt_documents="line") == [b"one", b"two", b"three"]
    assert read(path, txt_documents="paragraph") == [b"one\ntwo", b"three"]
    kinds = {}
    for name, content in {
        "long": b"w " * 300 + b"\n" + b"w " * 300,
        "blank": b"short\nlines\n\n" * 20,
        "short": b"short\n" * 40,
        "small": b"short\n",
    }.items():
        kinds[name] = readers.guess_documents(content, len(content) > 100)
    assert kinds == {"long": "line", "blank": "paragraph", "short": "line", "small": "file"}


@pytest.mark.parametrize("place", [0, 1, 5])
@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "array", "parquet"])
@pytest.mark.parametrize("missing", [None, 7, "absent"])
def test_a_record_without_text_is_counted_wherever_it_stands(tmp_path, place, suffix, missing):
    records = [{"id": n, "text": f"t{n}"} for n in range(6)]
    if missing == "absent":
        del records[place]["text"]
    else:
        records[place]["text"] = missing
    path = tmp_path / f"a.{'json' if suffix == 'array' else suffix}"
    if suffix == "parquet":
        texts = [None if n == place else f"t{n}" for n in range(6)]
        pyarrow.parquet.write_table(pa.table({"text": texts}), path)
    elif suffix == "array":
        path.write_text(json.dumps(records))
    else:
        path.write_text("\n".join(map(json.dumps, records)))
    counts = Counter()
    assert read(path, counts) == [f"t{n}" for n in range(6) if n != place]
    assert counts == {"dropped/no text in field text": 1}


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    held=st.lists(JSON, max_size=6),
    indent=st.sampled_from([None, 1]),
    probe=st.integers(1, 9),
    array=st.booleans(),
)
def test_json_values_of_any_layout(held, indent, probe, array):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "PROBE_BYTES", probe)
        if not array:  # an array at the top is one that holds the values
            held = [value for value in held if not isinstance(value, list)]
        texts = [json.dumps(value, indent=indent, ensure_ascii=False) for value in held]
        whole = f"[{','.join(texts)}]\n" if array else "\n".join(texts)
        content = whole.encode("utf-8", "surrogatepass")
        assert list(json_records.values(io.BytesIO(content))) == held
    for broken in (b"{", b'["a", nul', b'{"a": 1}} {"b"'):
        with pytest.raises(ValueError):
            list(json_records.values(io.BytesIO(broken)))


def test_long_documents_are_cut_between_characters():
    text = ("漢字 " * 40 + "漢" * 100 + "\n" + "x" * 50).encode()
    for limit in (16, 17, 18, 64):
        for reader in (
            lambda limit, counts: blocks(io.BytesIO(text), counts, limit),
            lambda limit, counts: bounded(text, counts, limit),
        ):
            counts = Counter()
            parts = list(reader(limit, counts))
            assert b"".join(parts) == text and max(map(len, parts)) <= limit
            assert counts["changed/long documents cut"] == len(parts) - 1
            for part in parts:
                part.decode()
        file = io.BufferedReader(io.BytesIO(text))
        parts = list(lines(file, 0, len(text), Counter(), limit))
        assert b"".join(parts) == text.replace(b"\n", b"")


def test_bad_files_are_dropped_and_counted_or_refused(tmp_path):
    counts = Counter()
    (tmp_path / "binary.txt").write_bytes(b"\x7fELF\0\0" * 9)
    assert read(tmp_path / "binary.txt", counts) == []
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "ok"}\n[1]\nno json\n{"text": 5}\n\n')
    assert read(tmp_path / "bad.jsonl", counts) == ["ok"]
    assert counts == {
        "dropped/binary file": 1,
        "dropped/not a JSON object": 2,
        "dropped/no text in field text": 1,
    }
    whole = gzip.compress(b"some text " * 500)
    (tmp_path / "cut.txt.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no.txt.zst").write_bytes(b"no zstd at all")
    (tmp_path / "no.parquet").write_bytes(b"no parquet")
    for name in ("cut.txt.gz", "no.txt.zst", "no.parquet"):
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            read(tmp_path / name)
    (tmp_path / "x.pdf").write_bytes(b"%PDF")
    for spec, sentence in (
        (tmp_path / "x.pdf", "of no format that nanolm reads"),
        (tmp_path / "missing.txt", "there is no file, folder or source"),
        (tmp_path / "*.docx", "holds nothing to read"),
        ("nosuchsource:x", "hf, stdlib, table"),
    ):
        with pytest.raises(UserError, match=sentence):
            read(spec)


def test_the_standard_library_has_no_tests_and_no_machine_in_it():
    source = build_source("stdlib", COMMON, {})
    assert isinstance(source, StandardLibrary)
    paths = source.paths()
    assert paths == sorted(paths) and len(paths) > 300
    parts = {part for path in paths for part in pathlib.PurePath(path).parts}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}
    assert "asyncio/base_events.py" in paths and not any("sysconfigdata" in p for p in paths)
    first = next(iter(source.pieces()))
    assert next(iter(first.documents(Counter()))) == (source.root / paths[0]).read_bytes()


def test_a_plugin_source_has_typed_options_of_its_own(example_source):
    source = build_source("countdown:abc", COMMON, {"countdown": {"length": 2}})
    documents = [d for piece in source.pieces() for d in piece.documents(Counter())]
    assert documents == ["abc 2", "abc 1"]
    for options, sentence in (({"size": 2}, "no such option"), ({"length": "2"}, "must be int")):
        with pytest.raises(UserError, match=sentence):
            build_source("countdown:abc", COMMON, {"countdown": options})


@pytest.fixture
def example_source():
    import dataclasses

    from nanolm.data.prepare.sources import SourceOptions

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class CountdownOptions(SourceOptions):
        name: str = "countdown"
        length: int = 3

    @dataclasses.dataclass
    class CountdownPiece:
        word: str
        size: int
        label: str = "countdown"

        def documents(self, counts):
            return iter([f"{self.word} {n}" for n in range(self.size, 0, -1)])

        def identity(self):
            return [self.word, self.size]

    @SOURCES.register("countdown", options=CountdownOptions)
    class Countdown:
        def __init__(self, options):
            self.options = options

        def pieces(self):
            return [CountdownPiece(self.options.argument, self.options.length)]

    yield Countdown
    del SOURCES._entries["countdown"]


def test_a_hugging_face_data_set(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    with open(folder / "train.jsonl", "w") as file:
        file.writelines(json.dumps({"text": f"row {n}"}) + "\n" for n in range(5000))
    source = build_source(f"hf:{folder}:train", COMMON, {})
    pieces = list(source.pieces())
    assert len(pieces) == 2
    assert [d for p in pieces for d in p.documents(Counter())] == [f"row {n}" for n in range(5000)]
    with pytest.raises(UserError, match="no field 'body'"):
        read(f"hf:{folder}", text_field="body")
    with pytest.raises(UserError, match="cannot load hf:"):
        read(f"hf:{folder}:nosplit")
