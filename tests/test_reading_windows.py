"""Windows of a long context: together they reach its end, and what none of them holds is told."""

import itertools

import pytest
import torch

from nanolm.data.tables.files import Table
from nanolm.errors import UserError
from nanolm.finetune.splits import make_split, training_split
from nanolm.finetune.tasks.read import NO_SPAN
from tests.finetuned import checkpoint, config
from tests.test_objectives_tasks import WORDS, build


@pytest.mark.parametrize("stride", [1, 4, 11])
@pytest.mark.parametrize("n_words", [1, 9, 20, 33, 64, 97])
def test_windows_reach_the_end_of_every_context(stride, n_words):
    task = build("read", "encoder", stride=stride, question_length=8)[0].objective
    context = " ".join(WORDS[(3 * i) % len(WORDS)] for i in range(n_words))
    for question in ("the", "the parser reads a file and returns the list of all names in it"):
        last = context.split()[-1]
        answers = [{"text": last, "answer_start": len(context) - len(last)}]
        record = {"question": question, "context": context, "answers": answers}
        items = task.items(record, 0, with_gold=True)
        assert items[-1].extra.ends[-1] == len(context.encode())
        assert items[0].extra.begins[0] == 0
        for before, after in itertools.pairwise(items):
            assert after.extra.begins[0] < before.extra.ends[-1]
        assert items[-1].target != NO_SPAN


@pytest.mark.parametrize(
    ("stride", "length", "refused"), [(32, 64, True), (29, 64, True), (28, 64, False)]
)
def test_a_stride_without_a_way_forward_is_refused(stride, length, refused):
    words = {"stride": stride, "question_length": 48, "length": length}
    if not refused:
        build("read", "encoder", **words)
        return
    with pytest.raises(UserError, match=f"stride={stride} leaves no way forward.*room for 29"):
        build("read", "encoder", **words)


def test_answers_that_no_window_holds_and_those_that_were_moved_are_counted():
    learner, _ = build("read", "encoder", stride=2, question_length=8)
    context = " ".join(WORDS * 3)
    long = context[: len(context) // 2]
    records = [
        {"question": "the", "context": context, "answers": [{"text": "the", "answer_start": 0}]},
        {"question": "the", "context": context, "answers": [{"text": long, "answer_start": 0}]},
        {"question": "the", "context": context, "answers": [{"text": "parser", "answer_start": 1}]},
        {"question": "the", "context": context, "answers": []},
    ]
    data = config(checkpoint("mlm"), "x", "y", "--objective.name=read").data
    rows = Table("t", records, [1, 2, 3, 4])
    found = make_split("val", rows, learner.objective, data)
    told = "\n".join(found.messages)
    assert "val: 1 answers stand in no window whole" in told
    assert "val: 1 answers do not stand where their record says and were relocated" in told
    assert "longer than" not in told


@pytest.mark.parametrize("with_none", [False, True])
def test_an_answer_that_no_window_holds_is_never_trained_as_none(with_none):
    """Whether other questions have no answer: this one has."""
    task = build("read", "encoder", stride=2, question_length=8)[0].objective
    context = " ".join(WORDS * 3)
    long = context[: len(context) // 2]
    records = [
        {"question": "the", "context": context, "answers": [{"text": long, "answer_start": 0}]}
    ]
    data = config(checkpoint("mlm"), "x", "y", "--objective.name=read").data
    with pytest.raises(UserError, match=r"none of its 1 records .*1 answers stand in no window"):
        training_split("train", Table("t", records, [1]), task, data)
    records.append(
        {
            "question": "the",
            "context": context,
            "answers": [{"text": "file", "answer_start": context.index("file")}],
        }
    )
    records += [{"question": "the", "context": context, "answers": []}] * with_none
    rows = Table("t", records, list(range(1, len(records) + 1)))
    found = training_split("train", rows, task, data)
    whole = make_split("train", rows, task, data)
    n_unheld = sum(item.record == 0 for item in whole.items)
    assert n_unheld > 1 and len(found.items) == len(whole.items) - n_unheld
    assert {item.record for item in found.items} == set(range(1, len(records)))
    assert f"train: {n_unheld} of {len(whole.items)} rows are not trained on" in found.messages
    assert len(make_split("val", rows, task, data).items) == len(whole.items)  # all are evaluated


def test_answers_too_long_to_be_given_are_counted():
    task = build("read", "encoder", stride=4, length=64, longest_answer=8)[0].objective
    context = " ".join(WORDS)
    records = [
        {"question": "the", "context": context, "answers": [{"text": text, "answer_start": 0}]}
        for text in (context[:3], context[:30])
    ]
    data = config(checkpoint("mlm"), "x", "y", "--objective.name=read").data
    found = make_split("val", Table("t", records, [1, 2]), task, data)
    assert [note for note in found.messages if "val: 1 answers are longer than" in note]


def test_cut_questions_are_blamed_on_their_own_limit():
    task = build("read", "encoder", stride=4, question_length=4)[0].objective
    record = {"question": " ".join(WORDS), "context": " ".join(WORDS * 4), "answers": []}
    data = config(checkpoint("mlm"), "x", "y", "--objective.name=read").data
    notes = make_split("val", Table("t", [record], [1]), task, data).messages
    (note,) = [note for note in notes if "were cut" in note]
    assert "a question of 4 tokens (objective.question_length" in note


def test_no_answer_is_where_the_first_token_scores_least():
    """One window that is sure to hold nothing does not outbid another one that holds the answer."""
    task = build("read", "encoder", stride=4, question_length=8, no_answer=True)[0].objective
    record = {"question": "the", "context": " ".join(WORDS * 3), "answers": []}
    items = task.items(record, 0, with_gold=True)
    rows = Table("t", [record], [1])
    assert len(items) > 1
    for at in range(len(items)):  # the window whose first token scores least
        answers = [[1.0, *(item.extra.offset,) * 2, 3.0] for item in items]
        answers[at][3] = 0.5
        (found,) = task.predictions(rows, items, answers)
        assert found["answer"] and found["score"] == 0.5


def test_the_window_that_is_surest_of_its_span_answers():
    task = build("read", "encoder", stride=4, question_length=8, no_answer=True)[0].objective
    record = {"question": "the", "context": " ".join(f"{n}{WORDS[n % 9]}" for n in range(40))}
    items, rows = task.items(record, 0, with_gold=False), Table("t", [record], [1])
    assert len(items) > 2
    for at, item in enumerate(items):
        answers = [[1.0, each.extra.offset, each.extra.offset + 3, -9.0] for each in items]
        answers[at][0] = 2.0
        (found,) = task.predictions(rows, items, answers)
        begin, end = int(item.extra.begins[0]), int(item.extra.ends[3])
        assert found["answer"] == record["context"].encode()[begin:end].decode().strip()
        assert found["answer"] and found["score"] == 2.0 + 9.0


@pytest.mark.parametrize(("longest", "last"), [(1, 2), (3, 4), (4, 5), (9, 5)])
def test_no_answer_is_longer_than_it_may_be(longest, last):
    """The best start is token 2 and the best end token 5; an end at 4 or at 2 is the next best."""
    task = build("read", "encoder", stride=4, longest_answer=longest)[0].objective
    start, end = torch.full((1, 8), -9.0), torch.full((1, 8), -9.0)
    start[0, 2], end[0, [5, 4, 2]] = 9.0, torch.tensor([9.0, 5.0, 3.0])
    task.scores = lambda *_: (start, end)
    ((_, *span, _),) = task.answers(None, None, {})
    assert span == [2, last]
