"""Reading as an objective: windows over long contexts, and answers that stand in some of them."""

import pytest
import torch

from nanolm.data.tables.files import Table
from nanolm.errors import UserError
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.splits import make_split, training_split
from nanolm.finetune.tasks.spans import answers_of
from tests.test_objectives_tasks import RECORDS, build


def test_windows_cover_long_contexts_and_answers_come_back():
    learner, split = build("read", "encoder")
    objective, table = learner.objective, split.table
    assert len(split.items) > 2 * len(table) and objective.options.no_answer
    # Hand the model's part a perfect score: every window that holds the answer points at it.
    answers = []
    for item in split.items:
        start = item.target[0]
        answers.append(
            [10.0 if start else -9.0, *(item.target if start else (item.extra.offset,) * 2), 0.0]
        )
    predictions = objective.predictions(table, split.items, answers)
    for record, prediction in zip(table.records, predictions):
        gold = answers_of(record)
        if gold and any(
            item.target[0] for item in split.items if item.record == table.records.index(record)
        ):
            assert gold[0].text in prediction["answer"]
            assert (
                record["context"][prediction["start"] : prediction["end"]] == prediction["answer"]
            )
        if not gold:
            assert prediction["answer"] == ""
    found = objective.report(table, predictions).figures
    assert found["f1"] > 0.8 and found["no_answer_exact_match"] == 1.0


def test_misplaced_answers_are_found_or_refused():
    record = {"question": "q", "context": "a b a b", "answers": [{"text": "b", "answer_start": 5}]}
    learner, _ = build("read", "encoder")
    assert learner.objective.located(record) == ("b", 6)
    strict, _ = build("read", "encoder", relocate=False)
    assert "does not stand at character 5" in strict.objective.check(record, with_gold=True)
    record["answers"] = {"text": ["none", "b"], "answer_start": [-1, 2]}
    assert strict.objective.check(record, with_gold=True) is None
    assert strict.objective.located(record) == ("b", 2)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_training_leaves_out_windows_that_lack_an_answer_which_stands_elsewhere(share):
    learner, whole = build("read", "encoder", empty_windows=share, length=24)
    records = [r for r in RECORDS["read"] for _ in range(20)]  # many windows: the share is exact
    table = Table("records", records, list(range(1, len(records) + 1)))
    data = TaskConfig().data
    whole = make_split("train", table, learner.objective, data)
    split = training_split("train", table, learner.objective, data)
    empty = {item.record for item in whole.items} - {
        item.record for item in whole.items if item.target != (0, 0)
    }
    lacking = [i for i in whole.items if i.target == (0, 0) and i.record not in empty]
    unheld = [i for i in whole.items if i.extra.unheld]  # no window holds the answer whole
    assert unheld and all(i.target == (0, 0) for i in unheld)
    lacking = [i for i in lacking if not i.extra.unheld]
    left_out = len(whole.items) - len(split.items)
    assert len(lacking) > 100
    assert abs(left_out - len(unheld) - (1 - share) * len(lacking)) <= 2
    kept = {id(item) for item in learner.objective.trained(whole.items)}
    assert len(kept) == len(split.items)
    others = [i for i in whole.items if i.target != (0, 0) or i.record in empty]
    assert all((id(i) in kept) != i.extra.unheld for i in others)
    assert any("are not trained on" in note for note in split.messages)
    with pytest.raises(UserError, match="is a share, between 0 and 1"):
        build("read", "encoder", empty_windows=2.0)


def test_a_window_sure_of_its_first_token_does_not_outbid_one_sure_of_a_span():
    """Raw scores are no probabilities: 9 beside a first token of 20 says less than 5 beside 0."""
    learner, _ = build("read", "encoder")
    objective = learner.objective
    first = torch.tensor([[20.0, 9.0, 0.0], [0.0, 5.0, 0.0]])
    objective.scores = lambda *_: (first, first.clone())
    answers = objective.answers(None, None, {})
    assert answers[0][0] < answers[1][0]
    assert [answer[1:3] for answer in answers] == [[1, 1], [1, 1]]
    assert answers[0][3] == pytest.approx(2 * first.log_softmax(-1)[0, 0].item())
