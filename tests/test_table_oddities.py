"""Tables as users have them: odd columns, empty cells, quotes, blanks, names of files."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from nanolm.data.tables.files import read_table
from nanolm.data.tables.splits import find_split, read_split
from nanolm.errors import UserError
from nanolm.finetune.prepare import prepare
from nanolm.finetune.splits import renamed
from nanolm.finetune.tasks.template import filled
from tests.finetuned import checkpoint, command, config, finetune, questions, table

QUICK = ("--train.steps=1", "--data.row_length=48", "--train.global_batch=6")


def read(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return read_table(str(path)).records


def ready(tmp_path, records, *words, base="mlm", task="classify"):
    for split in ("train", "val"):
        table(tmp_path / "data", split, records)
    argv = (f"--objective.name={task}", *QUICK, *words)
    return prepare(config(checkpoint(base), tmp_path / "data", tmp_path / "run", *argv))


# Which columns there are.


@pytest.mark.parametrize("place", [0, 3, 11])
@pytest.mark.parametrize("column", ["label", "text_pair"])
def test_columns_are_those_of_all_records(place, column, tmp_path):
    rows = [r | {"text_pair": "b"} for r in questions(12)]
    del rows[place][column]
    said = f"row {place + 1}: {'label is missing' if column == 'label' else 'text_pair is None'}"
    with pytest.raises(UserError, match=said):
        ready(tmp_path, rows)
    found = ready(tmp_path, rows, "--data.bad_rows=skip")
    assert len(found.train.table) == 11 and found.task.fields == ("text", "text_pair")


# What is no label.


@pytest.mark.parametrize("value", [None, "", "  ", float("nan"), ["list"], {"a": 1}])
def test_what_is_no_label_becomes_no_class(value, tmp_path):
    rows = questions(12)
    rows[4]["label"] = value
    with pytest.raises(UserError, match="row 5: label is "):
        ready(tmp_path, rows)
    found = ready(tmp_path, rows, "--data.bad_rows=skip")
    assert found.config.objective.labels == ["error", "file", "list"]
    assert "train: 3 labels: error 4, file 3, list 4" in found.train.messages


def test_an_empty_cell_of_a_csv_and_an_empty_tag_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "good,pos\nbad,neg\n" * 6 + "none,\n")
    words = (f"--data.train={path}", f"--data.val={path}", *QUICK)
    with pytest.raises(UserError, match="row 13: label is empty"):
        prepare(config(checkpoint("mlm"), tmp_path, tmp_path / "run", *words))
    rows = [{"tokens": ["a", "b"], "tags": ["X", "Y"]}, {"tokens": ["a"], "tags": [None]}]
    with pytest.raises(UserError, match="row 2: a tag is missing"):
        ready(tmp_path, rows, task="tag")


def test_a_long_label_set_is_told_shortly(tmp_path):
    rows = [{"text": f"a {i}", "label": i / 7} for i in range(40)]
    (note,) = [n for n in ready(tmp_path, rows).train.messages if "labels" in n]
    assert note.startswith("train: 40 labels: ") and note.endswith(", and 20 rarer ones")


# Null, and braces, in prompts.


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{a} {b}\n", "x \n"),
        ('{"key": "{a}", "n": 1}', '{"key": "x", "n": 1}'),
        ("{{a}} {a}}}", "{a} x}"),
        ("{} {0.x} { a }", "{} {0.x} { a }"),
    ],
)
def test_templates(template, text):
    assert filled(template, {"a": "x", "b": None}, "t") == text
    assert filled("{a}", {"a": "{b}"}, "t") == "{b}"  # content is no template
    with pytest.raises(UserError, match=r"t names \{c\}, which is no column; there are a"):
        filled("{c}", {"a": "x"}, "t")


def test_null_is_no_word_of_a_prompt(tmp_path):
    rows = [{"instruction": f"do {i}", "input": None, "response": "done"} for i in range(8)]
    words = ("--objective.template={instruction} {input}\n",)
    found = ready(tmp_path, rows, *words, base="clm", task="write")
    assert found.task.prompt(rows[0]) == "do 0 \n"


# Layouts.


def test_quotes_of_a_tsv(tmp_path):
    literal = 'text\tlabel\n"Yes, he said\tpos\nno quote\tneg\nand said bye"\tpos\n'
    assert [r["text"] for r in read(tmp_path, "a.tsv", literal)] == [
        '"Yes, he said',
        "no quote",
        'and said bye"',
    ]
    quoted = 'text\tlabel\r\n"two ""lines""\nof text"\tpos\r\n"a\ttab"\tneg\r\n'
    assert [r["text"] for r in read(tmp_path, "b.tsv", quoted)] == [
        'two "lines"\nof text',
        "a\ttab",
    ]
    assert read(tmp_path, "c.tsv", 'text\n"a ""b"""\n') == [{"text": 'a "b"'}]


def test_separators_long_cells_and_headers_of_a_csv(tmp_path):
    assert read(tmp_path, "a.csv", "text;label\na, b;x\n") == [{"text": "a, b", "label": "x"}]
    assert read(tmp_path, "b.csv", 'text,label\n"a; b",x\n') == [{"text": "a; b", "label": "x"}]
    long = "x" * 200_000
    assert read(tmp_path, "c.csv", f"text,label\n{long},x\n")[0]["text"] == long
    for name, content in (("d.csv", "a,b,a\n1,2,3\n"), ("d.tsv", "a\tb\ta\n1\t2\t3\n")):
        with pytest.raises(UserError, match="has two columns called 'a'"):
            read(tmp_path, name, content)


def test_json_in_either_layout(tmp_path):
    rows = [{"text": "a"}, {"text": "b"}]
    for name in ("a.json", "a.jsonl"):
        assert read(tmp_path, name, json.dumps(rows, indent=1)) == rows
        assert read(tmp_path, name, "\n".join(map(json.dumps, rows))) == rows


def test_columns_of_words(tmp_path):
    assert read(tmp_path, "a.conll", "von O\n1\u00a0000 B-M\nEuro\u3000x  I-M\n") == [
        {"tokens": ["von", "1\u00a0000", "Euro\u3000x"], "tags": ["O", "B-M", "I-M"]}
    ]
    edges = read(tmp_path, "c.conll", "\u00a0a O\nb\u00a0\tO\nc\tO-\u00a0\n")
    assert edges == [{"tokens": ["\u00a0a", "b\u00a0", "c"], "tags": ["O", "O", "O-\u00a0"]}]
    trailing = read(tmp_path, "b.conll", "EU\tB-ORG\t\nrejects\tO\t\r\n \nGerman\tB-MISC\t\n")
    assert [r["tags"] for r in trailing] == [["B-ORG", "O"], ["B-MISC"]]
    indexed = "1\tThe\tDET\t_\n2\tfile\tNOUN\t_\n\n"
    (tmp_path / "train.txt").write_text(indexed)
    found = renamed(
        read_table(str(tmp_path / "train.txt")), {"tokens": "column_2", "tags": "column_3"}
    )
    assert found.records[0]["tokens"] == ["The", "file"]
    assert found.records[0]["tags"] == ["DET", "NOUN"]


# Names.


@pytest.mark.parametrize("name", ["train.txt", "Train.jsonl", "TRAIN.CSV", "train.v2.jsonl"])
def test_names_of_files(name, tmp_path):
    content = {"txt": "a O\n", "csv": "text\na\n"}.get(name[-3:].lower(), '{"text": "a"}\n')
    (tmp_path / name).write_text(content)
    (tmp_path / "training-notes.jsonl").write_text("{}")
    if "v2" in name:
        assert find_split(str(tmp_path), {}, "train") is None
        return
    assert find_split(str(tmp_path), {}, "train") == str(tmp_path / name)
    assert len(read_split(find_split(str(tmp_path), {}, "train"), "train")) == 1
    (tmp_path / "train.parquet").write_bytes(b"")
    if name == "train.txt":  # what says that it is a table goes before
        assert find_split(str(tmp_path), {}, "train").endswith("train.parquet")
    else:
        with pytest.raises(UserError, match="several train files"):
            find_split(str(tmp_path), {}, "train")


def test_shards_are_one_split(tmp_path):
    for n in range(3):
        rows = pa.Table.from_pylist([{"text": f"{n} {i}"} for i in range(2)])
        pa.parquet.write_table(rows, tmp_path / f"train-0000{n}-of-00003.parquet")
    where = find_split(str(tmp_path), {}, "train")
    found = read_split(where, "train")
    assert [r["text"] for r in found.records] == ["0 0", "0 1", "1 0", "1 1", "2 0", "2 1"]
    assert found.numbers == list(range(1, 7))
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(UserError, match="2 files of 3"):
        read_split(find_split(str(tmp_path), {}, "train"), "train")


def test_a_column_can_be_given_taken_back_and_is_known_to_predict(tmp_path):
    rows = [{"body": r["text"], "label": r["label"]} for r in questions(12)]
    for split in ("train", "val"):
        table(tmp_path / "data", split, rows)
    run = tmp_path / "run"
    finetune(checkpoint("mlm"), tmp_path / "data", run, *QUICK, "--data.columns={text: body}")
    said = command("predict", str(run), str(tmp_path / "data" / "val.jsonl"))
    assert len(said.splitlines()) == 12
    other = table(tmp_path, "other", [{"query": "open a file"}])
    assert "label" in command("predict", str(run), str(other), "--columns={text: query}")
    plain = table(tmp_path, "plain", [{"text": "open a file"}])
    assert "label" in command("predict", str(run), str(plain))
    words = ("--data.columns={text: body}", "--data.columns={text: null}")
    with pytest.raises(UserError, match="no column text; it has body, label"):
        prepare(config(checkpoint("mlm"), tmp_path / "data", run, *QUICK, words[1]))
