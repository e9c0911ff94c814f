"""Columns of Parquet that are text, and the sentence, which can be followed, for those that are
none."""

import re

import pyarrow as pa
import pyarrow.parquet
import pytest

from nanolm.data.readers import no_field
from nanolm.errors import UserError
from tests.kinds_of_run import call
from tests.prepared import prepared_corpus
from tests.test_sources import read

TEXTS = [f"This is text number {n}." for n in range(30)]
TEXTUAL = {
    "string": pa.array(TEXTS),
    "large": pa.array(TEXTS, pa.large_string()),
    "bytes": pa.array([text.encode() for text in TEXTS], pa.binary()),
    "large bytes": pa.array([text.encode() for text in TEXTS], pa.large_binary()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
}
OTHERS = {
    "struct": pa.array([{"text": text} for text in TEXTS]),
    "list": pa.array([[text] for text in TEXTS]),
    "map": pa.array([[("a", text)] for text in TEXTS], pa.map_(pa.string(), pa.string())),
    "number": pa.array(range(30)),
    "truth": pa.array([True] * 30),
    "numbers by name": pa.array(range(30)).dictionary_encode(),
}


def write(path, **columns):
    pa.parquet.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("kind", TEXTUAL)
def test_a_column_of_texts_is_read(kind, tmp_path):
    path = write(tmp_path / "a.parquet", text=TEXTUAL[kind])
    found = [text if isinstance(text, str) else text.decode() for text in read(path)]
    assert found == TEXTS


def test_a_column_of_nothing_is_counted(tmp_path):
    path = write(tmp_path / "a.parquet", text=pa.nulls(3))
    assert read(path) == []


@pytest.mark.parametrize("name", ["text", "body"])
@pytest.mark.parametrize("kind", OTHERS)
def test_another_column_is_refused_before_anything_is_read(kind, name, tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", **{name: OTHERS[kind]})
    with pytest.raises(UserError, match=r"field 'text'; none of it is text$"):
        read(path)
    columns = {name: OTHERS[kind], "number": OTHERS["number"], "content": TEXTUAL["string"]}
    path = write(tmp_path / "b.parquet", **columns)
    words = ["prepare", str(path), "--out=out", "--workers=1", "--val_fraction=0.2"]
    words.append(f"--tokenizer={prepared_corpus() / 'tokenizer.model'}")
    monkeypatch.chdir(tmp_path)
    refused = call(words)
    assert refused.status == 2 and f"{path} has " in refused.err
    remedy = re.search(r"choose (--text_field) from (\w+)\n$", refused.err)
    assert remedy and not (tmp_path / "out" / "manifest.json").exists()
    assert call([*words, *remedy.groups()]).status == 0


def test_a_stray_column_of_a_folder_is_told_with_its_file(tmp_path):
    write(tmp_path / "a.parquet", text=TEXTUAL["string"])
    write(tmp_path / "b.parquet", text=OTHERS["list"])
    with pytest.raises(UserError, match=r"has list<.*>, no text, in field 'text'; .*b\.parquet$"):
        read(tmp_path)
    assert read(tmp_path, exclude=("b.parquet",)) == TEXTS


def test_the_sentence_names_what_there_is():
    assert no_field("F", "a", ["b", "c"]) == "F has no field 'a'; choose --text_field from b, c"
    assert no_field("F", "a", [], "int64, no text,").endswith("none of it is text")
