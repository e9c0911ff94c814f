"""What is RoBERTa's own: rows of full sentences across documents, and where its tokens stand."""

import itertools

import numpy as np
import pytest

from nanolm.build import build_objective, resolve
from nanolm.config.load import load_config
from nanolm.data.rows import Row
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError
from nanolm.hub.folder import read_tokenizer
from nanolm.hub.samples import sample_texts
from tests.conftest import TINY, tiny_tokenizer
from tests.published import write_tokenizer


@pytest.fixture(scope="module", params=["roberta", "bert"])
def published_tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_tokenizer(folder, request.param)
    return read_tokenizer(folder)


def test_a_row_goes_on_in_the_next_document_behind_a_separator(published_tokenizer):
    """FULL-SENTENCES (Liu et al. 2019, section 4.2): `<s> … </s> … </s>`, positions run on, and the
    separators are never what is to be predicted."""
    tokenizer = published_tokenizer
    base = {"model": TINY | {"trunk": "encoder"}, "objective": {"name": "mlm", "mask_rate": 0.9}}
    config = resolve(load_config([], base=base | {"data": {"row_length": 16}}), tokenizer)
    objective = build_objective(config, tokenizer)
    words = tokenizer.encode("the quick brown fox jumps over the lazy dog").tolist()
    flat = (words[:5] + [tokenizer.eos] + words * 2)[: objective.span]
    starts = np.array([0, 6])
    row = Row(np.array(flat, np.uint16), starts, corpus=0, block=0, epoch=0, row_id=0)
    assert tokenizer.eos == tokenizer.sep
    for seed in range(20):
        example = objective.example(row, np.random.default_rng(seed), draw=None)
        batch = objective.collate([example])
        clean = batch["tokens"].flatten()
        clean[batch["masked_index"]] = batch["masked_targets"]
        assert clean.tolist() == [tokenizer.cls, *flat, tokenizer.sep]
        assert not {0, 6, 15} & {*batch["masked_index"].tolist()}
        assert "positions" not in batch and "documents" not in batch


def test_pairs_have_as_many_separators_as_the_file_says(published_tokenizer):
    tokenizer = published_tokenizer
    assert tokenizer.separators == (2 if tokenizer.piece(tokenizer.sep) == "</s>" else 1)
    assert tiny_tokenizer().separators == 1


def test_tokens_cover_their_texts_in_order(published_tokenizer):
    tokenizer = published_tokenizer
    assert tokenizer.can_place
    for text in sample_texts(200):
        ids, begins, ends = tokenizer.encode_places(text)
        assert ids.tolist() == tokenizer.encode(text).tolist()
        assert len(begins) == len(ends) == len(ids)
        data = text.encode()
        assert all(0 <= begin <= end <= len(data) for begin, end in zip(begins, ends, strict=True))
        assert all(a <= b for a, b in itertools.pairwise(begins))
        assert all(a <= b for a, b in itertools.pairwise(ends))
        if tokenizer.lossless:
            assert b"".join(data[b:e] for b, e in zip(begins, ends, strict=True)) == data


def test_a_tokenizer_that_drops_accents_says_which_bytes_a_piece_stands_for(tmp_path):
    write_tokenizer(tmp_path, "bert")
    tokenizer = read_tokenizer(tmp_path)
    text = "中文 Héllo  QUICK"
    ids, begins, ends = tokenizer.encode_places(text)
    found = [text.encode()[b:e].decode() for b, e in zip(begins, ends, strict=True)]
    assert "".join(found) == text.replace(" ", "")
    plain = "".join(found).replace("é", "e").lower()
    assert "".join(tokenizer.piece(i).removeprefix("##") for i in ids) == plain


def test_a_tokenizer_that_does_not_say_where_it_changed_a_text_is_refused():
    tokenizer = Tokenizer(tiny_tokenizer().model_bytes)
    tokenizer.lossless = False
    assert not tokenizer.can_place
    with pytest.raises(UserError, match="changes the text"):
        tokenizer.encode_places("x")
