"""What the values of a table's columns are taken for: numbers, words and texts, and why not."""

import decimal
import json
import math
import string

import pytest

from nanolm.config import strict_yaml
from nanolm.data.tables.labels import ordered, tag_labels
from nanolm.data.tables.numbers import LARGEST, number, whole_number
from nanolm.finetune.tasks.spans import answers_of
from nanolm.finetune.tasks.tag import tags_of
from tests.test_objectives_tasks import build

NUMBERS = ["0", "1", "-2", "+3", "007", "1.5", "-.5", "4.", "3e-4", "1E3", "2.5e+2"]
NO_NUMBERS = [
    "1_000",
    "1_0.5",
    "1,5",
    "1,000",
    "0x10",
    "0b1",
    "1e",
    "e3",
    ".",
    "",
    "-",
    "--1",
    "1 2",
]
NO_NUMBERS += [
    "inf",
    "-Infinity",
    "nan",
    "\u0661\u0662",
    "\uff11",
    "\u00b2",
    "1\u00a0",
    "1e999",
    "x",
]
ODD_VALUES = [None, True, False, [1], {"a": 1}, 10**400, math.inf, -math.inf, math.nan, 2 * LARGEST]


@pytest.mark.parametrize("text", NUMBERS + NO_NUMBERS)
def test_a_text_is_a_number_where_a_config_would_read_one(text):
    meant = strict_yaml.parse(text, "here") if text.isascii() and "0x" not in text else None
    known = isinstance(meant, (int, float)) and math.isfinite(meant)
    assert known == (text in NUMBERS)
    for shown in (text, f" {text}\t"):
        assert number(shown) == (float(meant) if known else None)
        whole = known and float(meant).is_integer()
        assert whole_number(shown) == (int(meant) if whole else None)


def test_every_single_character_between_digits_is_told_from_a_number():
    read = {c for c in map(chr, range(0x3000)) if number(f"1{c}1") is not None}
    assert read == {*string.digits, ".", "e", "E"}


@pytest.mark.parametrize("value", ODD_VALUES, ids=repr)
def test_other_values_are_no_numbers(value):
    assert number(value) is None and whole_number(value) is None


def test_numbers_of_json_and_parquet_are_numbers():
    assert number(decimal.Decimal("2.50")) == 2.5 and whole_number(decimal.Decimal("3.00")) == 3
    assert number(-LARGEST) == -LARGEST and whole_number(1.0) == 1 and whole_number(1.5) is None


def test_labels_of_many_digits_are_ordered_as_texts():
    labels = ["2", "10", "1" * 5000]
    assert ordered(labels) == sorted(labels) and ordered(labels[:2]) == ["2", "10"]


# Each column of numbers and of texts, in each task that has one.

NO_WHOLE = [*NO_NUMBERS, *ODD_VALUES, "1.5", 0.5]


@pytest.mark.parametrize("value", [value for value in NO_WHOLE if value != ""], ids=repr)
def test_no_place_and_no_candidate_is_taken_for_another(value):
    assert answers_of({"answers": [{"text": "d", "answer_start": value}]}) is None
    assert answers_of({"answers": {"text": ["d"], "answer_start": [value]}}) is None
    record = {"question": "q", "choices": ["a", "b"], "label": value}
    assert "names none of the 2 choices" in CHOOSE.check(record, with_gold=True)


@pytest.mark.parametrize("value", [1, 1.0, "1", " 1 ", "1.0", "b"], ids=repr)
def test_a_candidate_is_named_by_its_number_or_its_text(value):
    assert CHOOSE.right({"choices": ["a", "b"], "label": value}) == 1


@pytest.mark.parametrize("value", [None, 3, ["d"]], ids=repr)
def test_an_answer_that_is_no_text_is_none(value):
    assert answers_of({"answers": [{"text": value, "answer_start": 0}]}) is None


CHOOSE = build("choose", "encoder")[0].objective
LISTS = {
    "tag": ({"tags": ["O", "O", "O"]}, "tokens"),
    "choose": ({"question": "q", "label": 0}, "choices"),
    "embed": ({"query": "q", "positive": "p"}, "negatives"),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    ("value", "reason"), [(3, "is 3, not text"), (None, "is None, not text"), ("\t", "is empty")]
)
@pytest.mark.parametrize("task", LISTS)
def test_the_element_of_a_list_that_is_no_text_is_named(task, value, reason, place):
    record, column = LISTS[task]
    values = ["a", "b", "c"]
    values[place] = value
    learner, _ = build(task, "encoder")
    said = learner.objective.check(record | {column: values}, with_gold=True)
    assert said == f"{column}[{place}] {reason}"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("hello", "messages[1] is 'hello', no {role, content}"),
        ({"role": "assistant", "content": None}, "messages[1].content is None, not text"),
        ({"content": "ok"}, "messages[1].role is None, not text"),
        ({"role": "assistant", "content": ""}, "messages[1].content is empty"),
    ],
)
def test_the_message_of_a_dialogue_that_is_none_is_named(message, reason):
    learner, _ = build("write", "decoder")
    messages = [{"role": "user", "content": "say"}, message]
    assert learner.objective.check_messages({"messages": messages}, with_gold=True) == reason


@pytest.mark.parametrize("tags", [[0, 1], [0.0, 1.0], ["0", "1"], [False, True]], ids=repr)
def test_tags_are_the_texts_that_the_tag_set_has(tags):
    record = json.loads(json.dumps({"tokens": ["a", "b"], "tags": tags}))
    assert sorted(tags_of(record)) == tag_labels(record["tags"], "here")
