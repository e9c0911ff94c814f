"""A tokenizer as the files that `AutoTokenizer` opens, and how far its ids are ours.

tokenizer.json          the tokenizer itself, written from a SentencePiece model where it is one
tokenizer.model         the SentencePiece model as it is
tokenizer_config.json   special pieces by role, the longest text, a chat template
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from nanolm.config.model import ModelConfig
from nanolm.data.json_pieces import JSON_FILE, is_json, published
from nanolm.data.sentencepiece_json import Frame, cls_first, cls_last, sentencepiece_json
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import require
from nanolm.hub.samples import sample_texts

CONFIG_FILE = "tokenizer_config.json"
FRAMES = {"encoder": cls_first, "two_stream": cls_last}
"""What stands around a text, by the trunk that reads it."""
Encode = Callable[[list[str]], list[list[int]]]
Note = Callable[[str], None]


def tokenizer_files(
    tokenizer: Tokenizer, model: ModelConfig, *, frame: Frame | None = None
) -> dict[str, bytes]:
    """The files of a model's tokenizer; `frame` is put around a text in place of what is there.

    Raises UserError for a SentencePiece model that no tokenizer.json describes.
    """
    own = tokenizer.model_bytes
    if is_json(own):
        template = None if frame is None else frame(tokenizer)
        whole = published(own)
        files = {JSON_FILE: whole if template is None else with_frame(whole, template)}
    else:
        whole = sentencepiece_json(tokenizer, frame or FRAMES.get(model.trunk))
        files = {JSON_FILE: whole, tokenizer.file_name: own}
    names = ["input_ids", *(["token_type_ids"] if model.n_segments > 1 else []), "attention_mask"]
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.max_length,
        "model_input_names": names,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": tokenizer.piece(index) for role, index in tokenizer.roles().items()},
    }
    if tokenizer.chat_template is not None:
        facts["chat_template"] = tokenizer.chat_template
    return files | {CONFIG_FILE: json.dumps(facts, ensure_ascii=False, indent=2).encode() + b"\n"}


def with_frame(content: bytes, frame: dict[str, Any]) -> bytes:
    """A tokenizer.json with this template as its post-processor, behind the step by which
    byte-level ones say where their pieces stand."""
    parsed = json.loads(content)
    old = parsed.get("post_processor") or {}
    steps = old.get("processors", [old])
    kept = [step for step in steps if step.get("type") == "ByteLevel"]
    parsed["post_processor"] = {"type": "Sequence", "processors": [*kept, frame]}
    return json.dumps(parsed, ensure_ascii=False).encode()


def require_same_frame(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Raises UserError where transformers puts other pieces around a text, or around two, than the
    folder's tokenizer.json says: some of its classes put theirs there."""
    from transformers import AutoTokenizer  # noqa: PLC0415  (slow to import)

    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for texts in (("a",), ("a", "b")):
        ours, *rest = tokenizer.around(len(texts))
        for text, after in zip(texts, rest, strict=True):
            ours = [*ours, *tokenizer.encode(text).tolist(), *after]
        require(
            theirs(*texts).input_ids == ours,
            f"transformers puts other pieces around a text than {folder / JSON_FILE} says; let it "
            f"write that file anew: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        )


def compared(tokenizer: Tokenizer, files: Mapping[str, bytes], note: Note) -> int | None:
    """Sample texts whose ids by these files, as transformers opens them, are not the tokenizer's;
    told. None where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        note("the proof of the tokenizer was left out: transformers is not installed")
        return None
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (pathlib.Path(folder) / name).write_bytes(content)
        return told(tokenizer, opened(folder), note)


def told(tokenizer: Tokenizer, encode: Encode, note: Note, by: str = "transformers") -> int:
    """Sample texts to which `encode`, which is `by` whom, gives other ids than the tokenizer;
    their number is told."""
    texts = sample_texts()
    pairs = zip(encode(texts), tokenizer.encode_batch(texts), strict=True)
    differing = sum(theirs != ours.tolist() for theirs, ours in pairs)
    note(f"tokenizer: {by} gives {differing or 'none'} of {len(texts)} sample texts other ids")
    return differing


def opened(folder: str | pathlib.Path) -> Encode:
    """What encodes texts by a folder's files; names of special pieces in them stay text."""
    from transformers import AutoTokenizer  # noqa: PLC0415  (slow to import)

    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    theirs.model_max_length = 1 << 30  # or it warns of every longer text

    def encode(texts: list[str]) -> list[list[int]]:
        return theirs(
            texts, add_special_tokens=False, split_special_tokens=True, truncation=False
        ).input_ids

    return encode
