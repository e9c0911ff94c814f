"""Where sentences end: in texts of many scripts, among tokens of any kind, and in shards."""

import itertools
import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_shards import sentences_of, write_prepared

from nanolm.data import sentences as module
from nanolm.data.prepare.pipeline import PrepareConfig, prepare
from nanolm.data.prepare.progress import Silent
from nanolm.data.sentences import ends, sentence_lengths
from nanolm.data.shards.directory import open_split, open_tokenizer, verify
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError

PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)
SCRIPTS = {
    "english": [
        "He said no.",
        " Then he left!",
        ' "Go on."',
        " She did (at 3.14 e.g. that).",
        " Yes?",
    ],
    "lines": ["First line\n", "second. \n\n", "  third\n", "fourth"],
    "chinese": ["我来了。", "你呢？", "「好。」", "他说……走吧！\n", "走"],
    "japanese": ["今日は晴れ。", "「そう｡」", "はい．", "えっ！？", "本当"],
    "arabic": ["هل أنت هنا؟", " نعم۔", " لا"],
    "hindi": ["यह घर है।", " वह नहीं॥", " ठीक"],
    "thai": ["สวัสดีครับ ผมชื่อสมชาย\n", "ยินดีที่ได้รู้จัก"],
    "khmer": ["សួស្តី។", " អរគុណ"],
    "amharic": ["ሰላም ነው።", " አዎ"],
    "burmese": ["မင်္ဂလာပါ။", " ဟုတ်ကဲ့"],
    "armenian": ["Բարև։", " Այո"],
    "tibetan": ["བཀྲ་ཤིས་བདེ་ལེགས།", " ཐུགས་རྗེ་ཆེ།", " ལགས"],
    "french": ["«\u00a0Oui.\u00a0»", " Non\u202f!", " Si ?"],
    "german": ["»Ja.«", " »Nein.«", " Doch"],
    "spaces first": ["\n\n A b.", " C"],
    "spaces last": ["A.\n\n \n"],
    "no text": [""],
    "nothing but ends": ["…?!.. \n"],
}


def cut(text):
    bounds = [0, *ends(text), len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(bounds)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_sentences_of_many_scripts(script):
    assert cut("".join(SCRIPTS[script])) == SCRIPTS[script]


@PROPERTY
@given(st.text(alphabet='aA1 \n\t.!?。")」…।', max_size=40))
def test_no_sentence_is_empty_or_spaces_alone(text):
    found = cut(text)
    assert "".join(found) == text
    assert not text.strip() or all(sentence.strip() for sentence in found)


def test_signs_are_those_of_unicode():
    regex = pytest.importorskip("regex")
    known = module.SPACED + module.UNSPACED
    listed = regex.compile(f"[{known}]")
    sign = regex.compile(r"\p{Sentence_Terminal}")
    everything = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    differ = {
        character
        for character in everything
        if bool(sign.match(character)) != bool(listed.match(character))
    }
    assert differ <= set("…།༎")


@pytest.mark.parametrize("text", [".", "\n", " ", ". ", ".\n", "\n ", "。", ".)", ") ", "! a"])
def test_a_text_of_nothing_but_ends_takes_linear_time(text):
    def seconds(count):
        begin = time.process_time()
        for _ in ends(text * count):
            pass
        return time.process_time() - begin

    assert seconds(100_000) < 1 + 30 * seconds(10_000)


def tokens_of(tokenizer, text):
    ids, _ = tokenizer.encode_documents([text])
    return ids, sentence_lengths(tokenizer, text, ids)


@PROPERTY
@given(st.text(alphabet="ab. é\n。中!▁\uf4a1", max_size=60))
def test_tokens_of_a_sentence_stand_for_its_text(tokenizer, text):
    ids, lengths = tokens_of(tokenizer, text)
    assert lengths.sum() == len(ids) and lengths.min() >= 1
    pieces = np.split(ids, np.cumsum(lengths)[:-1])
    got = np.cumsum([sum(tokenizer.byte_length[piece]) for piece in pieces])
    begins, _ = tokenizer.places(text, ids[:-1])
    wanted = np.cumsum([len(sentence.encode()) for sentence in cut(text)])
    if not set(text) & {"▁", "\uf4a1"}:
        # Each end lies where a sentence ends, or inside the token before it.
        for end in wanted[:-1]:
            place = begins[begins >= end]
            assert not len(place) or int(place[0]) in got.tolist()
        assert len(lengths) <= len(wanted)


def test_a_lossless_vocabulary_cuts_at_the_very_place(tokenizer):
    text = "He left. Then 走了。你呢？\nYes! It is."
    ids, lengths = tokens_of(tokenizer, text)
    pieces = np.split(ids, np.cumsum(lengths)[:-1])
    assert [tokenizer.decode(piece) for piece in pieces] == cut(text)
    assert pieces[-1][-1] == tokenizer.eos


def word_piece_tokenizer():
    words = [
        "[UNK]",
        "[PAD]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "he",
        "left",
        ".",
        "then",
        "走",
        "。",
        "yes",
    ]
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    model |= {"max_input_chars_per_word": 100, "vocab": {word: i for i, word in enumerate(words)}}
    added = [
        {"id": i, "content": words[i], "special": True, "single_word": False}
        | dict.fromkeys(("lstrip", "rstrip", "normalized"), False)
        for i in range(5)
    ]
    cleaning = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None}
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "BertNormalizer", "lowercase": True, **cleaning},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": model,
    }
    return Tokenizer(json.dumps(content).encode())


def test_a_vocabulary_that_drops_spaces_and_case_is_cut_by_its_offsets():
    pytest.importorskip("tokenizers")
    _, lengths = tokens_of(word_piece_tokenizer(), "He left.  Then he left. 走。走。Yes")
    assert lengths.tolist() == [3, 4, 2, 2, 2]  # the last is "yes" and the end of the document


def test_a_vocabulary_that_cannot_say_is_refused(tokenizer):
    class Blind(Tokenizer):
        lossless = property(lambda self: False, lambda self, value: None)

    blind = Blind(tokenizer.model_bytes, "old.model")
    with pytest.raises(UserError, match=r"old\.model changes the text"):
        tokens_of(blind, "A. B")


TEXTS = ["One. Two! Three\nfour. " * 3, "我来了。你呢？走吧。" * 4, "no end at all", "1. 2. 3."]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """The same texts prepared with sentences and without."""
    folder = tmp_path_factory.mktemp("sentences")
    texts = [f"{text} {number}" for number in range(40) for text in TEXTS]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text(lines)
    (folder / "tiny.model").write_bytes(tokenizer.model_bytes)

    def made(name, **options):
        config = PrepareConfig(
            out=str(folder / name),
            sources=[str(folder / "texts.jsonl")],
            tokenizer=str(folder / "tiny.model"),
            shard_tokens=700,
            val_fraction=0.2,
            **{"workers": 1, **options},
        )
        prepare(config, Silent())
        return folder / name

    return made("with", sentences=True), made("without"), made("again", sentences=True, workers=2)


def test_prepare_keeps_sentences_of_every_document(folders):
    with_them, without, again = folders
    manifest = verify(with_them)
    tokenizer = open_tokenizer(with_them, manifest)
    for split in ("train", "val"):
        shards, plain = open_split(with_them, split)[1], open_split(without, split)[1]
        assert len(shards) == len(plain) > 1 or split == "val"
        for shard, other in zip(shards, plain, strict=True):
            assert np.array_equal(shard.tokens, other.tokens) and other.sentences is None
            assert np.array_equal(shard.offsets, other.offsets)
            starts = shard.sentence_starts()
            for index in range(len(shard)):
                begin, end = shard.offsets[index : index + 2]
                inside = starts[(starts >= begin) & (starts < end)]
                bounds = np.append(inside, end - 1)  # without the end of the document
                texts = [tokenizer.decode(shard.tokens[a:b]) for a, b in itertools.pairwise(bounds)]
                assert texts == cut("".join(texts))
    assert [path.read_bytes() for path in sorted(with_them.glob("*.arrow"))] == [
        path.read_bytes() for path in sorted(again.glob("*.arrow"))
    ]
    assert "sentences" not in verify(without).config


def test_damaged_sentences_are_told(tmp_path, folders):
    _, without, _ = folders
    with pytest.raises(UserError, match="does not say where sentences begin"):
        open_split(without, "train")[1][0].sentence_starts()
    documents = [np.array([5, 10, 7, 3]), np.array([8, 3])]
    for first, second in (([4], [3]), ([3], [3]), ([2, 3], [1]), ([4], [1])):
        given = iter([np.array(first), np.array(second)])
        with pytest.raises(ValueError, match="do not add up"):
            write_prepared(
                tmp_path / "bad", {"train": [documents]}, sentences=lambda _, it=given: next(it)
            )
    write_prepared(tmp_path / "good", {"train": [documents]}, sentences=sentences_of)
    shard = open_split(tmp_path / "good", "train")[1][0]
    assert shard.sentence_starts().tolist() == [0, 1, 2, 4]
    for wrong in ([1, 1, 2, 3], [1, 2, 1], [1, 2, 3], [0, 2, 2, 2]):
        shard.sentences = np.array(wrong, np.int32)
        with pytest.raises(UserError, match="damaged"):
            shard.sentence_starts()
