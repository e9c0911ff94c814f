"""Every YAML in configs/finetune is read, built, and takes two shrunken steps; the tasks that are
made from the standard library are sound."""

import json
import pathlib

import pytest

from nanolm.data.tables import stdlib
from nanolm.data.tables.labels import tag_labels
from nanolm.data.tables.stdlib import SPLITS, TASKS, stdlib_table
from nanolm.errors import UserError
from nanolm.finetune.prepare import prepare
from nanolm.finetune.run import load_task_config
from nanolm.finetune.tasks.template import FIELD
from tests.finetuned import checkpoint, command, config, finetune, table
from tests.test_objectives_tasks import CONTEXT, RECORDS

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs" / "finetune").glob("*.yaml"))
BASES = dict.fromkeys(("write", "translate", "demo_clm"), "clm") | {"summarise": "span"}


@pytest.fixture(scope="module", autouse=True)
def a_small_library():
    """Five packages instead of the whole library, so that nothing takes long."""
    stdlib.functions.cache_clear()
    stdlib._neighbours.cache_clear()
    everything = stdlib.LEFT_OUT
    root = pathlib.Path(stdlib.sysconfig.get_paths()["stdlib"])
    names = {path.stem for path in root.iterdir()}
    kept = {"email", "json", "logging", "asyncio", "urllib", "argparse"}
    stdlib.LEFT_OUT = everything | (names - kept)
    stdlib.largest_packages.cache_clear()
    yield
    stdlib.LEFT_OUT = everything
    stdlib._neighbours.cache_clear()
    stdlib.functions.cache_clear()
    stdlib.largest_packages.cache_clear()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_shrunken_steps(path, tmp_path):
    base = base_of(path)
    full = load_task_config([f"--config={path}", f"--init_from={base}"])
    name, data = full.objective.name, full.data.path
    if name == "multi":
        data = "null"  # each task brings its own
    elif data is None:
        for split in ("train", "val"):
            table(tmp_path / "data", split, own_records(full))
        data = tmp_path / "data"
    words = [f"--config={path}", "--data.row_length=96", "--data.limit=24"]
    words += [
        "--train.steps=2",
        "--train.global_batch=6",
        "--schedule.warmup=0",
        "--eval.batches=2",
    ]
    if path.stem in ("tag", "multi"):  # a tag that is rare may be missing from so few rows
        words.append("--data.bad_rows=skip")
    if name == "read":  # windows of so short a row overlap by less
        words.append("--objective.stride=16")
    if name == "prompt":
        words.append('--objective.words={"yes": list, "no": file}')
    summary = finetune(base, data, tmp_path / "run", *words)
    assert summary["steps"] == 2 and summary["metric"] in summary["val"]


def base_of(path):
    return checkpoint(BASES.get(path.stem, "mlm"))


def own_records(full):
    """Records of the config's task, with the columns that it names."""
    names = {field: column for field, column in full.data.columns.items() if column}
    if full.objective.name == "write":
        (names["prompt"],) = FIELD.findall(full.objective.template)
    records = RECORDS[full.objective.name]
    return [{names.get(key, key): value for key, value in record.items()} for record in records]


def test_a_summary_is_written_of_what_a_document_says_first(tmp_path):
    """A T5 reads a document behind the paper's prefix, cut at its end; beams write its summary, and
    ROUGE judges it on test."""
    records = [{"document": text, "summary": text[:20]} for text in CONTEXT]
    for split in ("train", "val", "test"):
        path = table(tmp_path / "data", split, records)
    base, run = checkpoint("span"), tmp_path / "run"
    words = [f"--config={ROOT / 'configs' / 'finetune' / 'summarise.yaml'}", "--train.steps=1"]
    words += ["--data.row_length=32", "--objective.max_new_tokens=5", "--schedule.warmup=0"]
    ready = prepare(config(base, path.parent, run, *words))
    encode, eos = ready.tokenizer.encode, ready.tokenizer.eos
    for record, item in zip(records, ready.train.items, strict=True):
        source = encode(f"summarize: {record['document']}").tolist()
        assert item.sequences[0].tokens.tolist() == [*source[:31], eos]
        assert item.cut == max(0, len(source) - 31)
        assert item.target.tolist() == [*encode(record["summary"]), eos]
    assert any(item.cut for item in ready.train.items)
    finetune(base, path.parent, run, *words)
    command("evaluate", str(run), f"--json={tmp_path / 'figures.json'}")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert 0 <= figures["rougeL"] <= 1 and figures["perplexity"] > 1
    answers = command("predict", str(run), str(path)).splitlines()
    assert len(answers) == len(records)


def distinct(record, number):
    """The record with a text of its own: equal ones are carved together."""
    if "tokens" in record:
        return {"tokens": [*record["tokens"], str(number)], "tags": [*record["tags"], "O"]}
    read = {"text", "question", "context", "query", "prompt", "source", "document"}
    return {k: f"{v} {number}" if k in read else v for k, v in record.items()}


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != "multi"], ids=str)
def test_a_shipped_config_reads_a_file_of_ones_own(path, tmp_path):
    """Nothing but the file is named; val is carved. (Rows are short here, since the base is.)"""
    full = load_task_config([f"--config={path}", f"--init_from={base_of(path)}"])
    records = [distinct(record, i) for i, record in enumerate(own_records(full) * 4)]
    if full.objective.name == "prompt":
        records = [r | {"label": {"yes": "pos", "no": "neg"}[r["label"]]} for r in records]
    file = table(tmp_path, "mine", records)
    words = [f"--config={path}", f"--init_from={base_of(path)}", f"--data.train={file}"]
    if full.objective.name == "read":
        words += ["--data.row_length=128", "--objective.stride=16"]
    if path.stem == "summarise":
        words.append("--data.row_length=96")
    ready = prepare(load_task_config(words))
    assert ready.train.table.path == ready.val.table.path == str(file)
    expected = min(full.data.limit or len(records), len(records))
    assert len(ready.train.table) + len(ready.val.table) == expected


@pytest.mark.parametrize("task", TASKS)
def test_records_from_the_standard_library(task):
    tables = {split: stdlib_table(task, split) for split in SPLITS}
    records = [record for each in tables.values() for record in each.records]
    ids = [record["id"] for record in records]
    assert len(set(ids)) == len(ids) and len(tables["train"]) > 3 * len(tables["val"]) > 0
    assert stdlib_table(task, "val").digest() == tables["val"].digest()
    if task == "package":
        assert not any(record["label"] in record["text"].split() for record in records)
    if task == "tokens":
        tags = tag_labels((tag for r in records for tag in r["tags"]), task)
        assert {"KEYWORD", "NAME", "OPERATOR"} <= set(tags)
    if task == "alike":
        assert {record["score"] for record in records} == {0, 1, 2}
        for name, here in tables.items():  # both texts are of the split's own functions
            own = {f.source for f in stdlib.functions() if stdlib.in_split(f.name, name)}
            assert all({r["text"], r["text_pair"]} <= own for r in here.records)
    if task == "parameter":
        for record in records:
            (answer,) = record["answers"]
            start = answer["answer_start"]
            assert record["context"][start:].startswith(answer["text"])
    with pytest.raises(UserError, match="is no task; choose from stdlib:package"):
        stdlib_table("nothing", "val")
