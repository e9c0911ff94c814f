"""Filling masks with an encoder."""

import dataclasses
import json

import pytest

from nanolm.cli import main
from nanolm.commands.fill import fill, mask_ids
from nanolm.errors import UserError
from nanolm.saved import open_saved
from tests.prepared import trained_run


@pytest.fixture(scope="module")
def saved():
    return open_saved(trained_run("mlm"))


def test_a_mask_stands_for_a_word_with_its_space(saved):
    tokenizer = saved.tokenizer
    ids = mask_ids("import <mask> as x", saved)
    at = ids.index(tokenizer.mask)
    assert ids[0] == tokenizer.cls and ids[-1] == tokenizer.sep
    assert tokenizer.decode(ids[1:at]) == "import"
    assert tokenizer.decode(ids[at + 1 : -1]) == " as x"


def test_candidates_are_ordinary_pieces_in_order_of_probability(saved):
    masks = fill(saved, "def <mask>(self, <mask>):", top=5)
    assert [len(candidates) for candidates in masks] == [5, 5]
    for candidates in masks:
        values = [c["probability"] for c in candidates]
        assert values == sorted(values, reverse=True) and sum(values) <= 1
        assert not any(saved.tokenizer.special_mask[c["token"]] for c in candidates)


def test_refusals(saved):
    with pytest.raises(UserError, match="<mask>"):
        fill(saved, "nothing to fill", top=1)
    for trunk, remedy in (("decoder", True), ("encoder_decoder", True), ("two_stream", False)):
        model = dataclasses.replace(saved.config.model, trunk=trunk)
        other = dataclasses.replace(saved, config=dataclasses.replace(saved.config, model=model))
        with pytest.raises(UserError, match=f"model.trunk={trunk}; only an encoder") as refused:
            fill(other, "a <mask>", top=1)
        assert ("nanolm generate" in str(refused.value)) == remedy
    with pytest.raises(UserError, match="tokens"):
        fill(saved, "x = 1\n" * 200 + "<mask>", top=1)


def test_command(tmp_path, capsys):
    out = tmp_path / "masks.json"
    main(["fill", str(trained_run("mlm")), "--text=def <mask>():", "--top=3", f"--json={out}"])
    assert "probability" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["masks"][0]) == 3
