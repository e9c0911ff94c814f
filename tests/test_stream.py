"""The stream: every token once, the same order for everybody, any row at the same cost."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_shards import EOS, random_documents, write_prepared

from nanolm.data import flat as flat_module
from nanolm.data.flat import FlatTokens
from nanolm.data.rows import IGNORED, NO_DOCUMENT, fill_blocks
from nanolm.data.shards.directory import open_split
from nanolm.data.stream import RowStream, shard_rows
from nanolm.errors import UserError

PROPERTY = settings(deadline=None, derandomize=True, max_examples=30)


def build(directory, seed, shard_tokens, mean_length=20, **kwargs):
    """A prepared directory with one split and shards of these sizes, and its flat tokens."""
    rng = np.random.default_rng(seed)
    shards = [random_documents(rng, tokens, mean_length) for tokens in shard_tokens]
    write_prepared(directory, {"train": shards, "val": shards}, **kwargs)
    return np.concatenate([document for shard in shards for document in shard])


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two corpora (the first of several shards, one of them empty) and their flat tokens."""
    folder = tmp_path_factory.mktemp("stream")
    first = build(folder / "a", 0, (500, 7, 0, 300, 91))
    second = build(folder / "b", 1, (400,))
    return [str(folder / "a"), str(folder / "b")], [first, second]


@PROPERTY
@given(
    shards=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    span=st.integers(1, 90),
    seed=st.integers(0, 99),
)
def test_flat_tokens_read_what_the_concatenated_documents_hold(
    tmp_path_factory, shards, span, seed
):
    if not sum(shards):
        shards.append(5)
    folder = tmp_path_factory.mktemp("flat")
    tokens = build(folder, seed, shards, mean_length=5)
    begins = {0, *(np.flatnonzero(tokens == EOS) + 1).tolist()}
    flat = FlatTokens(open_split(folder, "train")[1])
    assert flat.total == len(tokens)
    firsts = np.random.default_rng(seed).integers(0, len(tokens), 20)
    for first, (piece, starts) in zip(firsts, flat.read(firsts, span), strict=True):
        expected = tokens[first : first + span]
        assert np.array_equal(piece, expected)
        assert starts.tolist() == [0] + [
            i for i in range(1, len(expected)) if int(first) + i in begins
        ]


def test_rows_inside_a_shard_are_views_of_the_memory_map(places):
    (first, _), _ = places
    stream = RowStream([(first, 1.0)], "train", stride=50, span=51, seed=0)
    shards = stream._flat[0].shards
    rows = stream.rows(0, stream.blocks[0])
    views = [any(np.shares_memory(row.tokens, s.tokens) for s in shards) for row in rows]
    copies = [row.block for row, view in zip(rows, views, strict=True) if not view]
    assert sorted(copies) == [9, 10, 16]  # [450, 501), [500, 551), [800, 851) leave their shards
    assert all(row.tokens.dtype == np.uint16 for row in rows)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_each_token_is_a_target_exactly_once_in_an_epoch(places, epoch):
    (first, _), (tokens, _) = places
    stream = RowStream([(first, 1.0)], "train", stride=16, span=17, seed=3)
    blocks = stream.blocks[0]
    assert blocks == (len(tokens) - 17) // 16 + 1
    rows = stream.rows(epoch * blocks, (epoch + 1) * blocks)
    assert {row.epoch for row in rows} == {epoch}
    assert sorted(row.block for row in rows) == list(range(blocks)) != [r.block for r in rows]
    rows.sort(key=lambda row: row.block)
    batch = fill_blocks(rows, 16)
    assert np.array_equal(batch["targets"].reshape(-1), tokens[1 : 1 + 16 * blocks])
    assert np.array_equal(batch["tokens"].reshape(-1), tokens[: 16 * blocks])


def test_epochs_seeds_and_corpora_have_their_own_order(places):
    (first, _), _ = places

    def order(corpora, seed, start):
        stream = RowStream(corpora, "train", stride=16, span=16, seed=seed)
        return [row.block for row in stream.rows(start, start + 20)]

    orders = {tuple(order([(first, 1)], seed, start)) for seed in (0, 1) for start in (0, 56)}
    assert len(orders) == 4
    assert order([(first, 1)], 0, 7) == order([(first, 0.3)], 0, 7)


def test_mixture_reads_both_corpora_by_weight_with_unique_row_ids(places):
    paths, flats = places
    stream = RowStream(list(zip(paths, (0.7, 0.3), strict=True)), "train", stride=8, span=9, seed=1)
    rows = stream.rows(0, 1000)
    assert abs(sum(row.corpus == 0 for row in rows) - 700) < 2
    for row in rows:
        begin = row.block * 8
        assert np.array_equal(row.tokens, flats[row.corpus][begin : begin + 9])
        assert row.row_id == row.block + (stream.blocks[0] if row.corpus else 0)
    seen = {(row.epoch, row.row_id) for row in rows}
    assert len(seen) == 1000
    assert max(row.epoch for row in rows if row.corpus == 1) == 299 // stream.blocks[1]


@pytest.mark.parametrize("stride,span", [(16, 17), (16, 16), (100, 103), (898, 898), (5000, 5001)])
def test_evaluation_covers_the_whole_split_in_order(places, stride, span):
    paths, flats = places
    stream = RowStream(
        [(path, 1) for path in paths], "val", stride=stride, span=span, seed=0, partial=True
    )
    rows = list(stream.eval_rows())
    assert [row.row_id for row in rows] == list(range(len(stream)))
    for corpus, tokens in enumerate(flats):
        own = [row.tokens[:stride] for row in rows[:-1] if row.corpus == corpus]
        last = [row for row in rows if row.corpus == corpus][-1]
        own = [row.tokens[:stride] for row in rows if row.corpus == corpus and row is not last]
        assert np.array_equal(np.concatenate([*own, last.tokens]), tokens)
    if span == stride + 1:
        targets = fill_blocks(rows, stride)["targets"]
        assert (targets != IGNORED).sum() == sum(len(tokens) - 1 for tokens in flats)


def test_draw_gives_another_row_of_the_same_corpus(places):
    paths, _ = places
    stream = RowStream([(path, 1) for path in paths], "train", stride=50, span=50, seed=0)
    for row in stream.rows(0, 60):
        drawn = [stream.draw(row, k) for k in range(30)]
        assert all(other.block != row.block for other in drawn)
        assert all(other.corpus == row.corpus for other in drawn)
        assert [other.block for other in drawn] == [stream.draw(row, k).block for k in range(30)]
        assert len({other.block for other in drawn}) > 4
    short = RowStream([(paths[1], 1)], "train", stride=300, span=300, seed=0)
    with pytest.raises(UserError, match="single row"):
        short.draw(short.row(0), 0)


def test_every_world_and_every_cut_see_the_same_rows_and_a_pickled_stream_too(places):
    paths, _ = places
    stream = RowStream([(path, 1) for path in paths], "train", stride=8, span=9, seed=5)
    middle = 20 * stream._page_rows  # the rows lie on both sides of a page's end
    first = middle - 30
    names = [(row.epoch, row.row_id) for row in stream.rows(first, first + 64)]
    for world, micro in ((1, 64), (3, 5), (64, 1), (64, 7)):
        again = pickle.loads(pickle.dumps(stream))  # noqa: S301 (our own)
        got = []
        for step in (first // 2 + i for i in range(32)):
            for rank in range(world):
                for piece in shard_rows(step, 2, rank, world, micro):
                    got += again.rows(piece.start, piece.stop)
        assert [(row.epoch, row.row_id) for row in got] == names


def test_seeking_far_does_the_same_work_as_starting(places, monkeypatch):
    paths, _ = places
    work = []
    real = flat_module.FlatTokens._read_from

    def counted(self, home, firsts, span):
        found = real(self, home, firsts, span)
        work.append(("read", len(firsts), sum(len(tokens) for tokens, _ in found)))
        return found

    monkeypatch.setattr(flat_module.FlatTokens, "_read_from", counted)
    located = RowStream._locate

    def locate(self, rows):
        work.append(("locate", len(rows), 0))
        return located(self, rows)

    monkeypatch.setattr(RowStream, "_locate", locate)

    def work_of(step):
        work.clear()
        stream = RowStream([(paths[1], 1)], "train", stride=8, span=8, seed=5)
        stream.rows(step * 16, step * 16 + 16)
        return list(work)

    assert work_of(0) == work_of(10**6) == work_of(10**10) != []


def test_documents_and_positions_restart_and_padding_stands_apart(tmp_path):
    documents = [np.array([5, 6, 7, EOS]), np.array([8, EOS]), np.array([9, 10, 11, 12, 13, EOS])]
    write_prepared(tmp_path / "d", {"val": [documents]})
    stream = RowStream([(str(tmp_path / "d"), 1)], "val", stride=8, span=9, seed=0, partial=True)
    batch = fill_blocks(list(stream.eval_rows()), 8)
    assert batch["tokens"].tolist() == [[5, 6, 7, 3, 8, 3, 9, 10], [11, 12, 13, 3, 0, 0, 0, 0]]
    assert batch["targets"].tolist() == [[6, 7, 3, 8, 3, 9, 10, 11], [12, 13, 3] + [IGNORED] * 5]
    assert batch["positions"].tolist()[0] == [0, 1, 2, 3, 0, 1, 0, 1]
    assert batch["documents"].tolist() == [[0, 0, 0, 0, 1, 1, 2, 2], [0] * 4 + [NO_DOCUMENT] * 4]
    assert all(values.dtype == np.int64 for values in batch.values())
    assert set(fill_blocks(list(stream.eval_rows()), 8, with_documents=False)) == {
        "tokens",
        "targets",
    }


@PROPERTY
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 5),
    length=st.integers(1, 40),
    mean=st.integers(1, 60),
)
def test_blocks_equal_their_definition(tmp_path_factory, seed, count, length, mean):
    folder = tmp_path_factory.mktemp("blocks")
    build(folder, seed, (length * count + 1,), mean_length=mean)
    stream = RowStream([(str(folder), 1)], "train", stride=length, span=length + 1, seed=0)
    rows = stream.rows(0, count)
    batch = fill_blocks(rows, length)
    for b, row in enumerate(rows):
        assert np.array_equal(batch["tokens"][b], row.tokens[:-1])
        assert np.array_equal(batch["targets"][b], row.tokens[1:])
        ended = row.tokens[: length - 1] == EOS
        documents = np.concatenate([[0], np.cumsum(ended)])
        assert np.array_equal(batch["documents"][b], documents)
        begin = np.maximum.accumulate(np.concatenate([[0], (np.arange(length)[1:]) * ended]))
        assert np.array_equal(batch["positions"][b], np.arange(length) - begin)


def test_bad_streams_are_refused(places, tmp_path):
    paths, _ = places
    with pytest.raises(UserError, match="too few for one row"):
        RowStream([(paths[0], 1), (paths[1], 1)], "train", stride=401, span=401, seed=0)
    build(tmp_path / "other", 2, (100,), tokenizer_hash="another")
    with pytest.raises(UserError, match="another tokenizer"):
        RowStream([(paths[0], 1), (str(tmp_path / "other"), 1)], "train", stride=8, span=8, seed=0)
    with pytest.raises(UserError, match="no test split"):
        RowStream([(paths[0], 1)], "test", stride=8, span=8, seed=0)
    with pytest.raises(UserError, match="is empty"):
        RowStream([], "train", stride=8, span=8, seed=0)
    with pytest.raises(ValueError, match="span=7"):
        RowStream([(paths[0], 1)], "train", stride=8, span=7, seed=0)


@PROPERTY
@given(
    seed=st.integers(0, 10**6),
    start=st.integers(0, 3000),
    count=st.integers(1, 40),
    partial=st.booleans(),
)
def test_a_block_equals_its_rows(places, seed, start, count, partial):
    paths, _ = places
    stream = RowStream(
        [(path, 1) for path in paths], "train", stride=40, span=41, seed=seed, partial=partial
    )
    where = stream.places(start, start + count)
    block, rows = stream.read_block(where), stream.read(where)
    for length in (30, 40, 50):
        ours, theirs = fill_blocks(block, length), fill_blocks(rows, length)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    for b, row in enumerate(rows):
        assert np.array_equal(block.tokens[b, : len(row.tokens)], row.tokens)
        assert block.short.get(b, 41) == len(row.tokens)
        inside = [o for r, o in zip(block.start_rows, block.start_offsets) if r == b]
        assert inside == row.starts[1:].tolist()
