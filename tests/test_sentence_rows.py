"""Rows of whole sentences (data.rows=sentences): every token once, no sentence cut that fits."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_shards import EOS, random_documents, sentences_of, write_prepared

from nanolm.data.cuts import row_bounds
from nanolm.data.rows import IGNORED, fill_blocks
from nanolm.data.stream import RowStream, shard_rows
from nanolm.errors import UserError

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)


def build(directory, seed, shard_tokens, mean_length=20):
    """A prepared directory, its flat tokens, and where sentences begin in them."""
    rng = np.random.default_rng(seed)
    shards = [random_documents(rng, tokens, mean_length) for tokens in shard_tokens]
    write_prepared(directory, {"train": shards, "val": shards}, sentences=sentences_of)
    documents = [document for shard in shards for document in shard]
    lengths = np.concatenate([sentences_of(document) for document in documents])
    return np.concatenate(documents), np.cumsum([0, *lengths])[:-1]


def open_stream(*directories, stride, ahead=0, seed=3, split="train", partial=False):
    corpora = [(str(directory), 1.0) for directory in directories]
    span = stride + ahead
    options = {"stride": stride, "span": span, "seed": seed, "partial": partial}
    return RowStream(corpora, split, cut="sentences", **options)


def one_after_the_other(starts, total, longest):
    """The rule of `row_bounds`, word by word."""
    bounds = [0]
    while bounds[-1] < total:
        begin = bounds[-1]
        fitting = [place for place in [*starts, total] if begin < place <= begin + longest]
        bounds.append(fitting[-1] if fitting else begin + longest)
    return bounds


@PROPERTY
@given(
    shards=st.lists(st.integers(0, 90), min_size=1, max_size=6),
    stride=st.integers(1, 40),
    mean=st.integers(1, 80),
    seed=st.integers(0, 99),
)
def test_rows_hold_every_token_once_and_whole_sentences(
    tmp_path_factory, shards, stride, mean, seed
):
    shards = [*shards, 3]
    folder = tmp_path_factory.mktemp("rows")
    tokens, starts = build(folder, seed, shards, mean)
    ends = [*starts[1:].tolist(), len(tokens)]
    stream = open_stream(folder, stride=stride)
    rows = list(stream.eval_rows())
    assert np.array_equal(np.concatenate([row.tokens for row in rows]), tokens)
    bounds = np.cumsum([0, *(len(row.tokens) for row in rows)]).tolist()
    assert bounds == one_after_the_other(starts.tolist(), len(tokens), stride)
    known = set(starts.tolist())
    for row, begin, end in zip(rows, bounds, bounds[1:], strict=False):
        assert 0 < len(row.tokens) <= stride
        sentence = max(start for start in known if start <= begin)
        longer = ends[starts.tolist().index(sentence)] - sentence > stride
        assert begin in known or longer
        # No sentence that would have fitted is left to the next row.
        assert (
            end == len(tokens) or ends[np.searchsorted(starts, end, "right") - 1] > begin + stride
        )
        # Documents stand apart by what ends them, also inside a row.
        behind = np.flatnonzero(row.tokens[:-1] == EOS) + 1
        assert row.starts.tolist() == [0, *behind.tolist()]
    assert np.array_equal(row_bounds(stream._flat[0].shards, stride), bounds)


def test_a_sentence_longer_than_a_row_begins_one_and_is_cut(tmp_path):
    document = np.array([6, 5, 6, 6, 6, 6, 6, 6, 6, 6, 5, 6, EOS])  # 5 ends a sentence
    write_prepared(tmp_path / "d", {"train": [[document]]}, sentences=sentences_of)
    rows = list(open_stream(tmp_path / "d", stride=4).eval_rows())
    assert [row.tokens.tolist() for row in rows] == [
        [6, 5],
        [6, 6, 6, 6],
        [6, 6, 6, 6],
        [5, 6, EOS],
    ]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentence-rows")
    flats = [build(folder / "a", 0, (500, 7, 0, 300, 91)), build(folder / "b", 1, (400,))]
    return [folder / "a", folder / "b"], flats


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("partial", [False, True])
def test_training_and_evaluation_read_the_same_rows_and_what_is_ahead(places, ahead, partial):
    (first, _), ((tokens, _), _) = places
    stream = open_stream(first, stride=16, ahead=ahead, partial=partial)
    rows = stream.rows(0, len(stream))
    assert sorted(row.block for row in rows) == list(range(len(stream))) != [r.block for r in rows]
    rows.sort(key=lambda row: row.block)
    own = [row.tokens[: len(row.tokens) - ahead] for row in rows]
    assert np.array_equal(np.concatenate(own), tokens[: len(tokens) - ahead])
    for row, own_tokens, begin in zip(
        rows, own, np.cumsum([0, *map(len, own)]).tolist(), strict=False
    ):
        assert np.array_equal(row.tokens, tokens[begin : begin + len(own_tokens) + ahead])
    if ahead == 1:
        targets = fill_blocks(rows, 16)["targets"]
        assert np.array_equal(targets[targets != IGNORED], tokens[1:])


@pytest.mark.parametrize("start", [0, 31, 10**9])
def test_a_block_equals_its_rows(places, start):
    paths, _ = places
    stream = open_stream(*paths, stride=24, ahead=1)
    where = stream.places(start, start + 90)
    block, rows = stream.read_block(where), stream.read(where)
    assert block.tokens.shape == (90, 25) and block.tokens.dtype == np.uint16
    for length in (20, 24, 30):
        ours, theirs = fill_blocks(block, length), fill_blocks(rows, length)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    for b, row in enumerate(rows):
        assert block.tokens[b].tolist() == [*row.tokens, *[0] * (25 - len(row.tokens))]
        assert block.short.get(b, 25) == len(row.tokens)
        inside = [o for r, o in zip(block.start_rows, block.start_offsets) if r == b]
        assert inside == row.starts[1:].tolist()


def test_every_world_and_every_cut_see_the_same_rows_and_a_pickled_stream_too(places):
    paths, _ = places
    stream = open_stream(*paths, stride=24)
    first = 5 * stream._page_rows - 30  # the rows lie on both sides of a page's end
    wanted = [row.tokens.tolist() for row in stream.rows(first, first + 64)]
    for world, micro in ((1, 64), (3, 5), (64, 7)):
        again = pickle.loads(pickle.dumps(open_stream(*paths, stride=24)))  # noqa: S301 (our own)
        got = []
        for step in (first // 2 + i for i in range(32)):
            for rank in range(world):
                for piece in shard_rows(step, 2, rank, world, micro):
                    got += [row.tokens.tolist() for row in again.rows(piece.start, piece.stop)]
        assert got == wanted


def test_shards_are_looked_at_one_at_a_time(places):
    (first, _), _ = places
    stream = open_stream(first, stride=24)
    shards = [shard for shard in stream._flat[0].shards if len(shard)]
    together = np.concatenate([s.sentence_starts() + b for s, b in zip(shards, (0, 500, 507, 807))])
    bounds = one_after_the_other(together.tolist(), 898, 24)
    assert row_bounds(shards, 24).tolist() == bounds
    assert max(b - a for a, b in itertools.pairwise(bounds)) <= 24


def test_data_without_sentences_and_too_little_data_are_refused(tmp_path):
    documents = [[np.array([5, 6, 7, EOS])]]
    plain = write_prepared(tmp_path / "plain", {"train": documents})
    with pytest.raises(UserError, match="prepare the data into another folder with --sentences"):
        open_stream(plain, stride=8)
    known = write_prepared(tmp_path / "s", {"train": documents}, sentences=sentences_of)
    assert [row.tokens.tolist() for row in open_stream(known, stride=8).eval_rows()] == [
        [5, 6, 7, EOS]
    ]
    with pytest.raises(UserError, match="too few for one row"):
        open_stream(known, stride=8, ahead=4)
