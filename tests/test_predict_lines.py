"""`nanolm predict`: one line of output for every input, in order, and a file that is whole."""

import io
import json
import sys

import pytest

from nanolm.errors import UserError
from tests.finetuned import checkpoint, command, finetune, questions, table


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{task: a run that leaves bad rows out}."""
    folder = tmp_path_factory.mktemp("predict")
    answers = [{"prompt": r["text"], "response": r["label"]} for r in questions(12)]
    found = {}
    for task, base, records in (("classify", "mlm", questions(12)), ("write", "clm", answers)):
        for split in ("train", "val"):
            table(folder / task, split, records)
        found[task] = folder / f"{task}-run"
        limit = ["--objective.max_new_tokens=3"] if task == "write" else []
        words = (f"--objective.name={task}", "--train.steps=1", "--data.bad_rows=skip", *limit)
        finetune(checkpoint(base), folder / task, found[task], *words)
    return found


def say(run, data, *words):
    """The predictions for these bytes of standard input."""
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(data))
    try:
        return [json.loads(line) for line in command("predict", str(run), *words).splitlines()]
    finally:
        sys.stdin = before


LINES = ["open a file", "", "raise an error", "  ", '{"text": "append", "id": 7}', '{"text": ""}']


@pytest.mark.parametrize("task", ["classify", "write"])
@pytest.mark.parametrize("batch", [1, 2, 64])
def test_one_line_for_every_line(runs, task, batch):
    lines = [line.replace('"text"', '"prompt"') if task == "write" else line for line in LINES]
    found = say(runs[task], "\n".join(lines).encode() + b"\n", f"--batch={batch}")
    assert len(found) == len(lines)
    key = "text" if task == "write" else "label"
    assert [key in answer for answer in found] == [True, False, True, False, True, False]
    assert found[1] == found[3] == {"error": "the line is empty"} and found[4]["id"] == 7
    assert found[5]["error"].endswith("is empty")
    alone = [say(runs[task], line.encode())[0] for line in (lines[0], lines[2])]
    assert [found[0][key], found[2][key]] == [answer[key] for answer in alone]


def test_one_line_for_every_row_of_a_table(runs, tmp_path):
    rows = [{"text": "open", "id": 0}, {"text": None, "id": 1}, {"text": "a list", "id": 2}]
    file = table(tmp_path, "rows", rows)
    found = [
        json.loads(line)
        for line in command("predict", str(runs["classify"]), str(file)).splitlines()
    ]
    assert [answer["id"] for answer in found] == [0, 1, 2]
    assert [answer.get("error") for answer in found] == [None, "text is None, not text", None]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_marks_of_an_editor_change_no_answer(runs, mark, end):
    plain = say(runs["classify"], b"open a file\nraise an error\n")
    data = f"{mark}open a file{end}raise an error{end}".encode()
    assert say(runs["classify"], data) == plain
    with pytest.raises(UserError, match="standard input row 2 is not UTF-8"):
        say(runs["classify"], b"open a file\n\xff\xfeopen\n")


def test_an_error_leaves_the_output_as_it_was(runs, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("before\n")
    with pytest.raises(UserError, match="standard input row 2 is not valid JSON"):
        say(runs["classify"], b"open a file\n{broken\n", "--batch=1", f"--out={out}")
    assert out.read_text() == "before\n" and list(tmp_path.iterdir()) == [out]
    link = tmp_path / "link"
    link.symlink_to(out)
    say(runs["classify"], b"open a file\n", f"--out={link}")
    assert link.is_symlink() and len(out.read_text().splitlines()) == 1
    say(runs["classify"], b"open a file\n", "--out=/dev/null")
    with pytest.raises(UserError, match=r"cannot write .*out: No such file"):
        say(runs["classify"], b"open a file\n", f"--out={tmp_path / 'none' / 'out'}")


NO_RECORDS = {
    "torn": '{"text": "a',
    "too deep": '{"text": ' + "[" * 100_000,
    "too long a number": '{"text": "a", "id": ' + "9" * 5000 + "}",
    "half a character": '{"text": "a", "id": "\\ud83d"}',
}


@pytest.mark.parametrize("kind", NO_RECORDS)
def test_json_that_is_no_record_is_one_sentence_wherever_it_is_read(runs, kind, tmp_path):
    """From a pipe, a file and a command line: all three read it with one function."""
    run, line, file = str(runs["classify"]), NO_RECORDS[kind], tmp_path / "rows.jsonl"
    file.write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(UserError, match=r"^standard input row 2 is not valid JSON: [^\n]*$"):
        say(runs["classify"], f"open a file\n{line}\n".encode(), f"--out={tmp_path / 'out'}")
    with pytest.raises(UserError, match=r"^.*rows.jsonl row 2 is not valid JSON: [^\n]*$"):
        command("predict", run, str(file))
    with pytest.raises(UserError, match=r"^the text is not valid JSON: [^\n]*$"):
        command("explain", run, line, f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command_name", ["predict", "evaluate"])
@pytest.mark.parametrize("batch", [0, -1])
def test_no_rows_at_a_time_are_refused(runs, command_name, batch):
    with pytest.raises(UserError, match=f"batch={batch} must be at least 1"):
        command(command_name, str(runs["classify"]), f"--batch={batch}")
