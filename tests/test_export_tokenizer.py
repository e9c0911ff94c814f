"""An exported tokenizer opens with plain `AutoTokenizer` and gives our ids."""

import json

import pytest
import sentencepiece
import transformers

from nanolm import cli
from nanolm.config.model import ModelConfig
from nanolm.data.prepare.tokenizer_training import train_tokenizer
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError
from nanolm.hub import tokenizer_files as module
from nanolm.hub.samples import PHRASES, sample_texts
from nanolm.hub.tokenizer_files import compared, tokenizer_files
from nanolm.registry import Options
from tests.published import write_published
from tests.test_tokenizer import corpus

ENCODER = ModelConfig(trunk="encoder", n_segments=2, positions=Options(name="learned"))
NAMES = ["a <mask>b", "<0x0A><unk>", "<extra_3>< extra_3>", "x<eos>\n<eos>", "<<pad>>"]
SENTENCES = [*corpus(), *[text for text in PHRASES if text.strip()] * 20]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request):
    return Tokenizer(train_tokenizer(SENTENCES, vocab_size=500, kind=request.param), "x.model")


def opened(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_ids_and_texts_are_ours(tokenizer, tmp_path):
    theirs = opened(tmp_path, tokenizer_files(tokenizer, ENCODER))
    texts = [*sample_texts(400), *NAMES]
    ours = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    found = theirs(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    differing = [text for text, a, b in zip(texts, ours, found, strict=True) if a != b]
    assert differing == []
    assert [theirs.decode(ids) for ids in ours] == texts
    assert compared(tokenizer, tokenizer_files(tokenizer, ENCODER)) == (0, 500)


def test_roles_frames_and_names_are_those_of_transformers(tokenizer, tmp_path):
    theirs = opened(tmp_path, tokenizer_files(tokenizer, ENCODER))
    for role, index in tokenizer.roles().items():
        assert getattr(theirs, f"{role}_token_id") == index, role
    a, b = tokenizer.encode("quick").tolist(), tokenizer.encode("fox").tolist()
    both = theirs("quick", "fox")
    cls, sep = tokenizer.cls, tokenizer.sep
    assert both.input_ids == [cls, *a, sep, *b, sep]
    assert both.token_type_ids == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert tokenizer.mask in theirs("the <mask> fox").input_ids
    decoder = opened(tmp_path / "b", tokenizer_files(tokenizer, ModelConfig()))
    assert decoder("quick").input_ids == a
    assert theirs.model_max_length == ENCODER.max_length


def test_a_difference_is_counted(tokenizer):
    files = tokenizer_files(tokenizer, ENCODER)
    spoilt = json.loads(files["tokenizer.json"])
    spoilt["normalizer"]["normalizers"].pop(0)
    differing, texts = compared(tokenizer, files | {"tokenizer.json": json.dumps(spoilt).encode()})
    assert 0 < differing < texts


@pytest.mark.parametrize("kind", ["unigram", "bpe", "word"])
def test_models_trained_elsewhere_keep_their_rules(kind, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(tmp_path / "foreign"),
        model_type=kind,
        vocab_size=300,
        character_coverage=0.98,
        hard_vocab_limit=False,
        user_defined_symbols=["[MASK]", "[CLS]"],
        minloglevel=2,
    )
    foreign = Tokenizer.load(tmp_path / "foreign.model")
    if kind == "word":
        with pytest.raises(UserError, match="a SentencePiece model of words"):
            tokenizer_files(foreign, ENCODER)
        return
    theirs = opened(tmp_path / "out", tokenizer_files(foreign, ENCODER))
    texts = sample_texts(300)
    found = theirs(texts, add_special_tokens=False).input_ids
    ours = [ids.tolist() for ids in foreign.encode_batch(texts)]
    assert sum(a != b for a, b in zip(ours, found, strict=True)) < 10


def test_a_chat_template_comes_in_and_goes_out(tmp_path):
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    write_published(tmp_path / "a", "gpt2")
    path = tmp_path / "a" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    cli.run(["import", str(tmp_path / "a"), str(tmp_path / "b")])
    words = ["export", str(tmp_path / "b"), f"--out={tmp_path / 'c'}", "--format=transformers"]
    cli.run([*words, f"--json={tmp_path / 'figures.json'}"])
    assert json.loads((tmp_path / "figures.json").read_text())["texts_with_other_ids"] == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "c", local_files_only=True)
    dialogue = [{"role": "user", "content": "the quick"}]
    assert theirs.apply_chat_template(dialogue, tokenize=False) == "[the quick]"


def test_without_transformers_the_proof_is_left_out(tokenizer, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert compared(tokenizer, tokenizer_files(tokenizer, ENCODER)) is None
