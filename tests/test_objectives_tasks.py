"""Every task objective, on both trunks: packed equals padded, nothing unused, answers in order."""

import numpy as np
import pytest
import torch

from nanolm.build import build_learner, build_objective, resolve
from nanolm.config.load import load_config
from nanolm.data.tables.files import Table
from nanolm.data.tables.packing import best_fit, rectangle
from nanolm.errors import UserError
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.splits import make_split
from nanolm.finetune.tasks.tag import entities, spaced
from nanolm.registry import OBJECTIVES
from tests.conftest import TINY, tiny_tokenizer

WORDS = [
    "the",
    "parser",
    "reads",
    "a",
    "file",
    "and",
    "returns",
    "the",
    "list",
    "of",
    "all",
    "names",
    "in",
    "it",
]


def text(i, n=7):
    return " ".join(WORDS[(i * 3 + k * k) % len(WORDS)] for k in range(1 + (i * 5) % n))


CONTEXT = [f"In {i} {text(i, 40)} stands the answer {i * i}, {text(i + 1, 30)}." for i in range(12)]
RECORDS = {
    "classify": [{"text": text(i), "label": "abc"[i % 3]} for i in range(12)],
    "regress": [{"text": text(i), "text_pair": text(i + 1), "score": i / 3} for i in range(12)],
    "similar": [{"text": text(i), "text_pair": text(i + 1), "score": i / 3} for i in range(12)],
    "tag": [
        {
            "tokens": text(i).split(),
            "tags": [
                "BIO"[k % 3].replace("O", "O") + ("-X" if k % 3 < 2 else "")
                for k in range(len(text(i).split()))
            ],
        }
        for i in range(12)
    ],
    "read": [
        {
            "question": text(i, 4),
            "context": c,
            "answers": [{"text": f"answer {i * i}", "answer_start": c.index("answer")}]
            if i % 4
            else [],
        }
        for i, c in enumerate(CONTEXT)
    ],
    "choose": [
        {"question": text(i), "choices": [text(i + k, 5) for k in range(2 + i % 3)], "label": i % 2}
        for i in range(12)
    ],
    "embed": [
        {"query": text(i), "positive": text(i + 1), "negatives": [text(i + 5)] * (i % 2)}
        for i in range(12)
    ],
    "write": [{"prompt": text(i), "response": text(i + 2)} for i in range(12)],
    "prompt": [{"text": text(i), "label": "yes" if i % 2 else "no"} for i in range(12)],
}
EXTRA = {
    "prompt": {"words": {"yes": "list", "no": "file"}, "template": "{text} so <mask>"},
    "read": {"stride": 4, "question_length": 8},
}
RECORDS["choose_dual"] = RECORDS["choose_lm"] = RECORDS["choose"]
CASES = [
    (task, trunk)
    for task in RECORDS
    for trunk in ("encoder", "decoder", "two_stream")
    if trunk in OBJECTIVES.get(task).build.trunks
]


# What a trunk cannot be without, whatever a test asks of the others.
OWN = {"two_stream": {"positions": {"name": "relative"}, "window": [None]}}


def build(task, trunk, *, pack=True, length=32, model=None, **options):
    """(learner, split) of a tiny model with this task."""
    options = {"name": task, **EXTRA.get(task, {}), **options}
    if "head_dropout" in {
        f.name for f in OBJECTIVES.get(task).options.__dataclass_fields__.values()
    }:
        options.setdefault("head_dropout", 0.0)
    base = {
        "model": TINY
        | {"trunk": trunk, "positions": {"name": "rotary"}}
        | (model or {})
        | OWN.get(trunk, {}),
        "objective": options,
        "data": {"row_length": length, "pack": pack},
    }
    config = resolve(load_config([], schema=TaskConfig, base=base), tiny_tokenizer())
    table = Table("records", RECORDS[task], list(range(1, 13)))
    task_class = OBJECTIVES.get(task).build
    import dataclasses

    config = dataclasses.replace(config, objective=task_class.resolve(config.objective, table))
    objective = build_objective(config, tiny_tokenizer())
    split = make_split("train", table, objective, config.data)
    return build_learner(config, objective), split


def tensors(objective, items):
    batch = objective.collate(items)
    return {name: torch.from_numpy(np.asarray(values)) for name, values in batch.items()}, batch


ENCODED = [
    (task, trunk, positions)
    for task, trunk in CASES
    for positions in (["relative"] if trunk == "two_stream" else ["rotary", "learned", "alibi"])
]


@pytest.mark.parametrize(("task", "trunk", "positions"), ENCODED)
def test_packed_equals_padded(task, trunk, positions):
    model = {"positions": {"name": positions}, "window": [None, 9], "n_segments": 2}
    results = []
    for pack in (True, False):
        learner, split = build(task, trunk, pack=pack, model=model)
        objective = learner.objective
        batch, arrays = tensors(objective, split.items)
        terms = learner(batch)
        total = sum(w * terms[n].sum / terms[n].count for n, w in objective.weights.items())
        total.backward()
        gradients = {n: p.grad for n, p in learner.named_parameters() if p.requires_grad}
        assert all(g is not None for g in gradients.values())  # DDP must find nothing unused
        counts = {n: int(terms[n].count) for n in objective.weights}
        assert counts == objective.counts(arrays)
        with torch.no_grad():
            hidden = learner.trunk(objective.inputs(batch))
            answers = objective.answers(hidden, learner.heads, batch)
        results.append((total.item(), gradients, answers, batch["tokens"].numel()))
    packed, padded = results
    assert packed[0] == pytest.approx(padded[0], abs=1e-5)
    for name, gradient in packed[1].items():
        torch.testing.assert_close(gradient, padded[1][name], rtol=1e-4, atol=1e-5)
    assert len(packed[2]) == len(padded[2])
    for left, right in zip(packed[2], padded[2]):
        np.testing.assert_allclose(np.array(left, float), np.array(right, float), atol=1e-5)
    assert packed[3] <= padded[3] and (task == "write" or packed[3] < padded[3])


@pytest.mark.parametrize(("task", "trunk"), CASES)
def test_a_batch_is_its_rows_one_by_one(task, trunk):
    """Sums and counts add up over micro-batches, and answers do not depend on the company."""
    if task == "embed":
        pytest.skip("in-batch negatives couple the rows on purpose")
    learner, split = build(task, trunk)
    objective = learner.objective
    whole = learner(tensors(objective, split.items)[0])
    parts = [learner(tensors(objective, [item])[0]) for item in split.items]
    for name, term in whole.items():
        assert term.sum.item() == pytest.approx(sum(p[name].sum.item() for p in parts), abs=1e-4)
        assert int(term.count) == sum(int(p[name].count) for p in parts)


def test_tags_stand_at_first_or_last_pieces_and_windows_join():
    for trunk in ("encoder", "decoder"):
        learner, split = build("tag", trunk, length=8)
        objective, tokenizer = learner.objective, tiny_tokenizer()
        assert len(split.items) > len(split.table)
        batch, _ = tensors(objective, split.items)
        answers = [list(map(int, item.target)) for item in split.items]
        predictions = objective.predictions(split.table, split.items, answers)
        assert [p["tags"] for p in predictions] == [r["tags"] for r in split.table.records]
        assert objective.report(split.table, predictions).figures["f1"] == 1.0
        item = split.items[0]
        words = split.table.records[0]["tokens"]
        pieces = tokenizer.encode_batch(spaced(words, "auto"))
        side = 0 if trunk == "encoder" else -1
        found = item.sequences[0].tokens[item.extra]
        assert found.tolist() == [int(ids[side]) for ids in pieces[: len(found)]]
        assert batch["word_index"].numel() == sum(len(i.extra) for i in split.items)


def test_entities_of_bio_and_bioes():
    words = ["Ada", "Lovelace", "met", "Charles", "Babbage"]
    found = entities(words, ["B-P", "I-P", "O", "B-P", "B-P"])
    assert [(e["type"], e["start"], e["stop"]) for e in found] == [
        ("P", 0, 2),
        ("P", 3, 4),
        ("P", 4, 5),
    ]
    found = entities(words, ["B-P", "E-P", "O", "S-P", "S-P"])
    assert [e["words"] for e in found] == [words[:2], ["Charles"], ["Babbage"]]
    assert spaced(["我", "爱", "Py", "3"], "auto") == ["我", "爱", "Py", " 3"]


def test_only_answers_are_learned_and_dialogues_have_several():
    learner, split = build("write", "decoder", template="Q: {prompt} A:")
    tokenizer, objective = tiny_tokenizer(), learner.objective
    item = split.items[3]
    tokens = item.sequences[0].tokens
    answer = tokenizer.decode(tokens[item.target][:-1])
    assert answer == split.table.records[3]["response"] and tokens[item.target][-1] == tokenizer.eos
    prompt = objective.prompt_tokens(objective.prompt(split.table.records[3]))
    assert tokens[: len(prompt)].tolist() == prompt.tolist()
    turns = [("user", "a file"), ("assistant", "the list"), ("user", "b"), ("assistant", "names")]
    chat = {"messages": [{"role": r, "content": c} for r, c in turns]}
    learner, _ = build("write", "decoder", chat=False)
    object.__setattr__(learner.objective.options, "chat", True)
    learner.objective.length = 64
    (item,) = learner.objective.items(chat, 0, with_gold=True)
    learned = item.sequences[0].tokens[item.target]
    assert tokenizer.decode(learned) == "the list\nnames\n"
    assert learner.objective.prompt(chat).endswith("user: b\nassistant: ")


def test_long_answers_and_long_prompts_are_cut_to_fit():
    learner, _ = build("write", "decoder", length=16)
    objective = learner.objective
    for prompt, response in (("word " * 50, "yes"), ("a", "word " * 50), ("w " * 50, "w " * 50)):
        (item,) = objective.items({"prompt": prompt, "response": response}, 0, with_gold=True)
        assert len(item.sequences[0].tokens) == 16 and item.target.any() and item.cut > 0
        assert not item.target[0]


def test_a_cloze_reads_the_labels_words():
    learner, split = build("prompt", "encoder", template="{text} It was <mask>, so.")
    objective, tokenizer = learner.objective, tiny_tokenizer()
    batch, _ = tensors(objective, split.items)
    assert (batch["tokens"].flatten()[batch["cloze"]] == tokenizer.mask).all()
    assert set(learner.heads) == {"lm"}
    logits = objective.logits(learner.trunk(objective.inputs(batch)), learner.heads, batch)
    assert logits["classify"].shape == (12, 2)
    learner, split = build("prompt", "decoder")
    batch, _ = tensors(learner.objective, split.items)
    assert (batch["cloze"] == batch["last"]).all()
    with pytest.raises(UserError, match="must end with <mask>"):
        build("prompt", "decoder", template="<mask> is {text}")
    with pytest.raises(UserError, match="begin with the same piece"):
        build("prompt", "encoder", words={"yes": "list", "no": "list"})
    with pytest.raises(UserError, match="needs a word per label"):
        build("prompt", "encoder", words={})


def test_class_weights_smoothing_and_several_labels():
    learner, split = build("classify", "encoder", class_weights="balanced", label_smoothing=0.1)
    options = learner.objective.options
    assert options.labels == ["a", "b", "c"] and options.class_weights == [1.0, 1.0, 1.0]
    terms = learner(tensors(learner.objective, split.items)[0])
    assert terms["classify"].sum.item() > 0
    learner, split = build("classify", "encoder", class_weights=[1.0, 0.5, 3.0])
    batch, _ = tensors(learner.objective, split.items)
    hidden = learner.trunk(learner.objective.inputs(batch))
    logits = learner.objective.class_logits(hidden, learner.heads, batch)
    each = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    expected = (each * torch.tensor([1.0, 0.5, 3.0])[batch["labels"]]).sum()
    torch.testing.assert_close(learner(batch)["classify"].sum, expected)
    records = [{"text": text(i), "label": ["a", "b"][: i % 3]} for i in range(12)]
    old, RECORDS["classify"] = RECORDS["classify"], records
    try:
        learner, split = build("classify", "encoder", multi_label=True)
    finally:
        RECORDS["classify"] = old
    batch, _ = tensors(learner.objective, split.items)
    assert batch["labels"].shape == (12, 2) and batch["labels"].dtype == torch.float32
    hidden = learner.trunk(learner.objective.inputs(batch))
    answers = learner.objective.answers(hidden, learner.heads, batch)
    predictions = learner.objective.predictions(split.table, split.items, answers)
    assert set(predictions[0]) == {"labels", "probabilities"}
    assert 0 <= learner.objective.report(split.table, predictions).figures["micro_f1"] <= 1


@pytest.mark.parametrize(
    ("task", "record", "sentence"),
    [
        ("classify", {"text": "", "label": "a"}, "text is empty"),
        ("classify", {"text": 3, "label": "a"}, "text is 3, not text"),
        ("classify", {"text": "x", "label": "z"}, "label 'z' is not in the label set a, b, c"),
        ("regress", {"text": "x", "text_pair": "y", "score": "high"}, "'high', not a number"),
        ("regress", {"text": "x", "text_pair": " ", "score": 1}, "text_pair is empty"),
        ("tag", {"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens have 1 tags"),
        ("tag", {"tokens": ["a"], "tags": ["B-Z"]}, "tag 'B-Z' is not in the tag set"),
        ("tag", {"tokens": ["a", ""], "tags": ["O", "O"]}, "tokens[1] is empty"),
        ("tag", {"tokens": [], "tags": []}, "tokens is empty"),
        ("choose", {"question": "q", "choices": ["a"], "label": 0}, "at least two texts"),
        ("choose", {"question": "q", "choices": ["a", "b"], "label": 2}, "names none of the 2"),
        ("embed", {"query": "q", "positive": ""}, "positive is empty"),
        ("write", {"prompt": "p", "response": " "}, "response is empty"),
        (
            "read",
            {"question": "q", "context": "c d", "answers": [{"text": "x", "answer_start": 0}]},
            "'x' does not stand at character 0 of its context",
        ),
        ("read", {"question": "q", "context": "c d", "answers": "d"}, "no list of"),
    ],
)
def test_records_that_cannot_be_used_say_why(task, record, sentence):
    learner, _ = build(task, "decoder")
    assert sentence in learner.objective.check(record, with_gold=True)


def test_packing_wastes_little_and_loses_nothing():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(3, 40, size=rng.integers(1, 60)).tolist()
        rows, offsets = best_fit(lengths, max(lengths))
        ends: dict[int, int] = {}
        for row, offset, length in sorted(zip(rows, offsets, lengths)):
            assert offset == ends.get(row, 0)
            ends[row] = offset + length
        assert max(ends.values()) <= max(lengths)
        assert len(ends) <= -(-11 * sum(lengths) // (9 * max(lengths))) + 1
    sequences = [np.arange(1, n + 1) for n in (3, 5, 2)]
    for packed in (True, False):
        arrays, index = rectangle(sequences, 0, packed=packed)
        assert arrays["tokens"].reshape(-1)[index].tolist() == np.concatenate(sequences).tolist()
