"""The tokenizer: byte-exact both ways, roles out of reach of text, words known by their pieces."""

import pickle
import random
import re

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.data.prepare.tokenizer_training import LOSSLESS, sentences, train_tokenizer
from nanolm.data.tokenizer import BATCH, EXTRA_TOKENS, ROLES, Tokenizer, escape, unescape
from nanolm.data.tokenizer_warning import WARNED_OF, load_with_warning
from nanolm.errors import UserError

CODE = "def add(a, b):\n\treturn a + b  # 加法\n\n\nclass Größe:\n    pass\n"
WORDS = "quick brown fox jumps over lazy dogs while many small birds sing in old trees"
CHINESE = "秦川雄帝宅，函谷壯皇居。綺殿千尋起，離宮百雉餘。"


def corpus() -> list[str]:
    rng = random.Random(0)
    text = [" ".join(rng.choices(WORDS.split(), k=12)) + "." for _ in range(200)]
    return [s for part in [*text, *[CODE] * 10, *[CHINESE] * 10] for s in sentences(part)]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(train_tokenizer(corpus(), vocab_size=390, kind=request.param), "test.model")


TEXTS = st.text() | st.text(alphabet="▁\uf4a1\uf4a2 \t\n\r\0a<mask>é漢😀▅\u2047\ufeff")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_round_trip_is_exact_and_meets_no_special_piece(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == text
    assert not tokenizer.special_mask[ids].any()
    assert unescape(escape(text)) == text
    doubled = text.count("\uf4a1") + text.count("\uf4a2")
    assert tokenizer.byte_length[ids].sum() == len(text.encode()) + 3 * doubled


def largest(lines: list[str], kind: str) -> bytes:
    """A tokenizer of as many pieces as the lines support."""
    with pytest.raises(UserError, match="use at most") as refused:
        train_tokenizer(lines, vocab_size=5000, kind=kind)
    size = int(re.search(r"at most (\d+)", str(refused.value))[1])
    return train_tokenizer(lines, vocab_size=size, kind=kind)


SPARSE = {
    "no space": [CHINESE + chr(0x4E00 + i) for i in range(80)],
    "a space in a thousand lines": [CHINESE + chr(0x4E00 + i) for i in range(80)] * 12 + ["天 地"],
    "no line ends": ["".join(WORDS.split()) + str(i) for i in range(80)],
    "spaces and one letter": [" " * i + "a" * (i % 7) for i in range(1, 80)],
    "signs that stand for spaces": ["▁\uf4a1\uf4a2" * i + chr(0x0E01 + i) for i in range(1, 80)],
}


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("sample", SPARSE)
def test_what_the_sample_lacks_comes_back_too(sample: str, kind: str):
    """Whatever a tokenizer was trained on, any text is what it was."""
    lines = [s for line in SPARSE[sample] for s in sentences(line)]
    trained = Tokenizer(largest(lines, kind), "test.model")
    assert trained.lossless and trained.can_place
    for text in (" a  b ", "天 ▁地\n\t", "\uf4a1 \uf4a2▁", "e\u0301 ▁▁ x\r\n"):
        assert trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("extra_tokens", [0, 32])
def test_the_least_size_that_a_refusal_names_works(kind: str, extra_tokens: int):
    """Whatever size was too small, also one without room for the special pieces."""
    lines = [s for i in range(80) for s in sentences(f"{CHINESE} {WORDS} {chr(0x4E00 + i)}")]
    named = set()
    for size in (1, 10, 200, 297, 300):
        with pytest.raises(UserError, match=f"vocab_size {size} is too small: ") as refused:
            train_tokenizer(lines, vocab_size=size, kind=kind, extra_tokens=extra_tokens)
        named.add(int(re.search(r"use at least (\d+)", str(refused.value))[1]))
    (least,) = named
    trained = train_tokenizer(lines, vocab_size=least, kind=kind, extra_tokens=extra_tokens)
    assert Tokenizer(trained).vocab_size == least
    with pytest.raises(UserError, match="too small"):
        train_tokenizer(lines, vocab_size=least - 1, kind=kind, extra_tokens=extra_tokens)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_tokenizer_that_loses_spaces_is_told_once(kind: str, tmp_path, monkeypatch, capsys):
    """As versions before `required_chars` trained it on text without spaces."""
    lines = [CHINESE.replace(" ", "") + chr(0x4E00 + i) for i in range(80)]
    good = largest(lines, kind)
    monkeypatch.delitem(LOSSLESS, "required_chars")
    bad = largest(lines, kind)
    for name, model in (("good", good), ("bad", bad)):
        (tmp_path / f"{name}.model").write_bytes(model)
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(model)
    assert load_with_warning(tmp_path / "good").decode(Tokenizer(good).encode("a b")) == "a b"
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "1")
    load_with_warning(tmp_path / "bad.model")
    assert capsys.readouterr().err == "", "the first rank alone says it"
    monkeypatch.delenv("RANK")
    WARNED_OF.clear()  # of another process
    for _ in range(2):
        found = load_with_warning(tmp_path / "bad.model")
    load_with_warning(tmp_path / "bad")  # the same one elsewhere, as `prepare` copies it
    assert found.decode(found.encode("a b")) == "a▁b"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nanolm: the tokenizer {tmp_path / 'bad.model'} gives spaces back as ▁")
    assert "nanolm prepare TEXTS --out FOLDER" in line


def test_batch_equals_one_by_one(tokenizer: Tokenizer):
    texts = [CODE, "", CHINESE, "a ▁ b"]
    for batch, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(batch, tokenizer.encode(text))
    ids, lengths = tokenizer.encode_documents(texts)
    documents = np.split(ids, np.cumsum(lengths))[:-1]
    assert [tokenizer.decode(document[:-1]) for document in documents] == texts
    assert all(document[-1] == tokenizer.eos for document in documents)
    assert len(tokenizer.encode_documents([])[0]) == 0


@pytest.mark.parametrize("texts", [1, BATCH - 1, BATCH, BATCH + 1])
def test_few_texts_are_no_list(tokenizer: Tokenizer, texts: int, monkeypatch):
    """SentencePiece starts a thread for each list that it is given."""
    given, encode = [], tokenizer._processor.encode

    def noted(text, **options):
        given.append(type(text))
        return encode(text, **options)

    expected = [f"{number} ▁ birds" for number in range(texts)]
    monkeypatch.setattr(tokenizer._processor, "encode", noted, raising=False)
    found = tokenizer.encode_batch(expected)
    assert given == ([str] * texts if texts < BATCH else [list])
    assert [tokenizer.decode(ids) for ids in found] == expected
    assert {ids.dtype for ids in found} == {tokenizer.dtype}


def test_roles_have_fixed_ids_and_show_only_when_asked(tokenizer: Tokenizer):
    assert [getattr(tokenizer, role) for role in ROLES] == list(range(7))
    assert tokenizer.extra_ids == tuple(range(7, 7 + EXTRA_TOKENS))
    assert tokenizer.special_mask.sum() == 7 + EXTRA_TOKENS
    ids = [tokenizer.bos, *tokenizer.encode("the <mask> fox").tolist(), tokenizer.mask, 3]
    assert tokenizer.decode(ids) == "the <mask> fox"
    assert tokenizer.decode(ids, specials=True) == "<bos>the <mask> fox<mask><eos>"
    with pytest.raises(ValueError, match="ids run"):
        tokenizer.decode([tokenizer.vocab_size])


@pytest.mark.parametrize("count", [0, 1, 100])
def test_the_number_of_extra_pieces_is_a_choice(count):
    model = train_tokenizer(corpus(), vocab_size=350 + count, kind="bpe", extra_tokens=count)
    chosen = Tokenizer(model)
    assert chosen.extra_ids == tuple(range(7, 7 + count))
    assert chosen.special_mask.sum() == 7 + count and chosen.vocab_size == 350 + count
    ids = chosen.encode("<extra_0>")
    assert not chosen.special_mask[ids].any() and chosen.decode(ids) == "<extra_0>"


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    """Cut a text where token i does not continue the word of token i - 1."""
    ids = tokenizer.encode(text)
    joined = tokenizer.joins_left[ids[1:]] & tokenizer.joins_right[ids[:-1]]
    groups = np.split(ids, np.flatnonzero(~joined) + 1)
    return [tokenizer.decode(group).strip(" ") for group in groups]


def test_words_are_known_from_pieces(tokenizer: Tokenizer):
    text = "quickish foxes, dogs (unsung)"
    assert [w for w in words(tokenizer, text) if w.isalpha()] == [
        "quickish",
        "foxes",
        "dogs",
        "unsung",
    ]
    # Chinese characters are words of their own unless the vocabulary itself joined them.
    found = words(tokenizer, CHINESE)
    assert "".join(found) == CHINESE and len(found) > len(CHINESE) / 3
    # A character written as bytes is never split.
    assert "🜚" in words(tokenizer, "the 🜚 fox")


def test_training_is_deterministic_and_sentences_drop_nothing():
    one, two = (train_tokenizer(corpus(), vocab_size=390, kind="unigram") for _ in range(2))
    assert one == two
    long = "word " * 5000 + "x" * 9000 + CHINESE * 300 + CODE
    parts = list(sentences(long))
    assert "".join(parts) == long
    assert max(len(part.encode()) for part in parts) <= 4000


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_vocabularies_that_do_not_fit_are_refused_in_words(kind: str):
    with pytest.raises(UserError, match=r"vocab_size 9000 is larger.*use at most \d+"):
        train_tokenizer(corpus(), vocab_size=9000, kind=kind)
    with pytest.raises(UserError, match="vocab_size 100 is too small"):
        train_tokenizer(corpus(), vocab_size=100, kind=kind)
    with pytest.raises(UserError, match=r"vocab_size 300 is too small.*use at least \d+"):
        train_tokenizer(
            ["".join(map(chr, range(0x4E00, 0x4E60)))] * 9,
            vocab_size=300,
            kind=kind,
            character_coverage=1.0,
        )


def test_foreign_models_are_mapped_by_their_pieces(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(tmp_path / "foreign"),
        vocab_size=180,
        character_coverage=0.98,
        hard_vocab_limit=False,
        user_defined_symbols=["[MASK]", "[CLS]", *(f"<extra_id_{i}>" for i in range(40))],
        minloglevel=2,
    )
    foreign = Tokenizer.load(tmp_path / "foreign.model")
    assert not foreign.lossless
    assert (foreign.unk, foreign.bos, foreign.eos) == (0, 1, 2)
    assert foreign.special_mask[[0, 1, 2, foreign.mask, foreign.cls]].all()
    with pytest.raises(UserError, match="has no pad piece"):
        _ = foreign.pad
    assert len(foreign.extra_ids) == 40 and foreign.special_mask[list(foreign.extra_ids)].all()


def test_loading(tokenizer: Tokenizer, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        assert Tokenizer.load(path).hash == tokenizer.hash
    assert pickle.loads(pickle.dumps(tokenizer)).hash == tokenizer.hash  # noqa: S301
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"bad\.model is no SentencePiece model"):
        Tokenizer.load(tmp_path / "bad.model")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "missing.model")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("a torn shard"), OSError("gone")])
@pytest.mark.parametrize("before", [0, 50])
def test_what_reading_the_sample_raises_is_no_fault_of_the_corpus(error, before):
    """SentencePiece makes a RuntimeError of whatever its iterator raises."""

    def samples():
        yield from corpus()[:before]
        raise error

    with pytest.raises(type(error)) as told:
        train_tokenizer(samples(), vocab_size=390, kind="bpe")
    assert told.value is error
