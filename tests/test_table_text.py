"""The source `table`: texts of labelled files, without their labels."""

import json

import pytest

from nanolm.data.prepare.pipeline import PrepareConfig, prepare
from nanolm.data.shards.directory import open_split
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts_of(folder):
    tokenizer = Tokenizer.load(folder)
    found = []
    for split in ("train", "val"):
        for shard in open_split(folder, split)[1]:
            ids = [shard.document(number) for number in range(len(shard))]
            found += [tokenizer.decode(document) for document in ids]
    return sorted(found)


def test_fields_become_documents_and_labels_do_not(tmp_path):
    pairs = [{"text": f"one {i}", "text_pair": f"two {i}", "label": "LABEL"} for i in range(40)]
    pairs.append({"text": "one", "text_pair": None, "label": "LABEL"})
    words = [{"tokens": ["甲", "乙", str(i)], "tags": ["B-TAG", "O", "O"]} for i in range(40)]
    pairs_file = write_rows(tmp_path / "pairs.jsonl", pairs)
    words_file = write_rows(tmp_path / "words.jsonl", words)
    summary = prepare(
        PrepareConfig(
            out=str(tmp_path / "out"),
            sources=[f"table:{pairs_file}:text+text_pair", f"table:{words_file}:tokens"],
            source_options={"table": {"joiner": ""}},
            vocab_size=320,
            val_fraction=0.1,
            workers=1,
        )
    )
    expected = [f"one {i}\ntwo {i}" for i in range(40)] + [f"甲乙{i}" for i in range(40)]
    assert texts_of(tmp_path / "out") == sorted(expected)
    assert summary.manifest.cleaning["dropped/no text in field text+text_pair"] == 1


def test_a_missing_field_names_the_columns(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"text": "x", "label": 1}])
    for spec, told in ((f"table:{file}:body", "text, label"), (f"table:{file}", "names no field")):
        with pytest.raises(UserError, match=told):
            prepare(PrepareConfig(out=str(tmp_path / "out"), sources=[spec]))
