"""Tables of every format, splits, label sets, and the stream that the loader reads."""

import gzip
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from nanolm.data.tables.files import Table, read_table
from nanolm.data.tables.labels import (
    class_weights,
    infer_labels,
    label_text,
    ordered,
    tag_labels,
)
from nanolm.data.tables.splits import carve, find_split, sample, sample_per_label
from nanolm.data.tables.stream import TaskStream
from nanolm.errors import UserError
from nanolm.training.loader import Loader, eval_batches

RECORDS = [{"text": "naïve, yes", "label": "a"}, {"text": 'a "quoted" line', "label": "b"}]


def test_formats_say_the_same(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, RECORDS)) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, RECORDS)))
    (tmp_path / "a.csv").write_text('\ufefftext,label\n"naïve, yes",a\n"a ""quoted"" line",b\n')
    (tmp_path / "a.tsv").write_text('text\tlabel\nnaïve, yes\ta\n"a ""quoted"" line"\tb\n')
    pa.parquet.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        table = read_table(str(path))
        assert table.records == RECORDS and table.columns == ["text", "label"], path
        assert table.where(1) == f"{path} row 2"
        assert table.digest() == read_table(str(tmp_path / "a.json")).digest()


def test_column_files_and_squad(tmp_path):
    conll = "-DOCSTART- -X- O\n\n# id = 3\nU.N. NNP B-ORG\nmet VB O\n\n\nEU NNP B-ORG\n"
    (tmp_path / "a.conll").write_text(conll)
    assert read_table(str(tmp_path / "a.conll")).records == [
        {
            "tokens": ["U.N.", "met"],
            "tags": ["B-ORG", "O"],
            "column_1": ["U.N.", "met"],
            "column_2": ["NNP", "VB"],
            "column_3": ["B-ORG", "O"],
        },
        {
            "tokens": ["EU"],
            "tags": ["B-ORG"],
            "column_1": ["EU"],
            "column_2": ["NNP"],
            "column_3": ["B-ORG"],
        },
    ]
    question = {"id": 7, "question": "q?", "answers": [{"text": "c", "answer_start": 0}]}
    none = {"id": "8", "question": "r?", "answers": [], "is_impossible": True}
    squad = {"data": [{"paragraphs": [{"context": "c d", "qas": [question, none]}]}]}
    (tmp_path / "a.json").write_text(json.dumps(squad))
    records = read_table(str(tmp_path / "a.json")).records
    assert [r["id"] for r in records] == ["7", "8"] and records[1]["answers"] == []
    assert records[0]["context"] == "c d"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.xls", b"x", "is no table that is read"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "row 2 is not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "row 2 is no JSON object"),
        ("a.jsonl", b"\n\n", "holds no record"),
        ("a.jsonl", b'{"a": "\xff"}', "is not UTF-8"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"row 2 has 3 columns, its header 2 \(a, b\)"),
        ("a.parquet", b"no parquet", "cannot read"),
        ("a.json", b'{"data": [{"paragraphs": [{"qas": [{}]}]}]}', "is no SQuAD file"),
        ("a.conll", b"word\n", "line 1 has one column"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_table(str(path))
    with pytest.raises(UserError, match="cannot read"):
        read_table(str(tmp_path / "none.jsonl"))


def test_folders_and_carved_splits(tmp_path):
    for name in ("train.csv", "dev.csv", "notes.txt"):
        (tmp_path / name).write_text("text,label\na,b\n")
    assert find_split(str(tmp_path), {}, "val").endswith("dev.csv")
    assert find_split(str(tmp_path), {}, "test") is None
    assert find_split(str(tmp_path), {"val": "x.csv"}, "val") == "x.csv"
    (tmp_path / "val.jsonl").write_text("{}")
    with pytest.raises(UserError, match="several val files"):
        find_split(str(tmp_path), {}, "val")
    records = [{"text": str(i // 2), "n": i} for i in range(400)]
    table = Table("t", records, list(range(1, 401)))
    train, val = carve(table, 0.1, ("text",))
    assert 20 < len(val) < 60 and len(train) + len(val) == 400
    assert not {r["text"] for r in train.records} & {r["text"] for r in val.records}
    shuffled = Table("t", records[::-1], list(range(400, 0, -1)))
    assert sorted(carve(shuffled, 0.1, ("text",))[1].numbers) == val.numbers
    few = sample(table, 7, 3)
    assert (
        len(few) == 7 and few.records == sample(table, 7, 3).records != sample(table, 7, 4).records
    )
    labelled = Table("t", [{"label": i % 3} for i in range(30)], list(range(30)))
    shots = sample_per_label(labelled, 2, "label", 0)
    assert sorted(r["label"] for r in shots.records) == [0, 0, 1, 1, 2, 2]


def test_label_sets_are_ordered():
    assert infer_labels([10, 9, 2, 2], "t") == ["2", "9", "10"]
    assert infer_labels(["b", "a", "ä"], "t") == ["a", "b", "ä"]
    equal = ["1", "01", "001", "2"]  # numbers that are equal are labels that are not
    assert all(ordered(each) == ["001", "01", "1", "2"] for each in itertools.permutations(equal))
    assert [label_text(v) for v in (True, 1.0, 2, "x")] == ["true", "1", "2", "x"]
    assert tag_labels(["O", "B-A", "I-A", "B-B"], "t") == ["O", "B-A", "I-A", "B-B", "I-B"]
    assert tag_labels(["NOUN", "VERB"], "t") == ["NOUN", "VERB"]
    assert class_weights(["a", "a", "a", "b"], ["a", "b", "c"]) == [0.666667, 2.0, 0.0]
    with pytest.raises(UserError, match="1 different labels"):
        infer_labels(["a", "a"], "t")


class Plain:
    """An objective that only shows its rows."""

    def example(self, row, rng, draw):
        return row.item, rng.integers(1000), draw(0).item

    def collate(self, examples):
        items, noise, others = zip(*examples)
        assert all(a != b for a, b in zip(items, others))
        return {"items": np.array(items), "noise": np.array(noise)}

    def counts(self, batch):
        return {"x": len(batch["items"])}


def test_worker_processes_bring_the_same_batches():
    def read(workers):
        stream = TaskStream(list(range(100, 123)), seed=5)
        loader = Loader(stream, Plain(), global_batch=6, micro_batch=3, workers=workers)
        steps = [next(batches) for batches in [iter(loader)] for _ in range(2)]
        loader.close()
        return [batch.tensors["items"].tolist() for step in steps for batch in step]

    assert read(workers=1) == read(workers=0)


def test_the_stream_is_the_same_for_any_ranks_and_restarts():
    stream = TaskStream(list(range(100, 123)), seed=5)
    rows = stream.rows(0, 69)
    for epoch in range(3):
        assert sorted(r.item for r in rows[23 * epoch :][:23]) == list(range(100, 123))
    assert [r.item for r in rows[:23]] != [r.item for r in rows[23:46]]

    def read(world, start):
        parts = [
            Loader(
                stream,
                Plain(),
                global_batch=7,
                micro_batch=2,
                rank=r,
                world=world,
                start_step=start,
            )
            for r in range(world)
        ]
        steps = zip(*(iter(part) for part in parts))
        found = []
        for _, shares in zip(range(8 - start), steps):
            batches = [b for share in shares for b in share]
            found.append(
                [
                    t
                    for b in batches
                    for t in zip(b.tensors["items"].tolist(), b.tensors["noise"].tolist())
                ]
            )
        return found

    whole = read(1, 0)
    assert read(3, 0) == whole and read(2, 3) == whole[3:]
    seen = [
        i
        for r in range(2)
        for b in eval_batches(stream, Plain(), 4, r, 2)
        for i in b.tensors["items"].tolist()
    ]
    assert seen == list(range(100, 123))
    with pytest.raises(UserError, match="has no usable row"):
        TaskStream([], seed=0)
