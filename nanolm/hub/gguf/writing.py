"""A model's values, tensors and vocabulary as a GGUF file.

values       sizes by the architecture's keys                `model_values`
vocabulary   pieces, scores or merges, special ids by role   `vocabulary_values`
tensors      matrices of one kind, norms in float32          `write_file`
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.data.byte_level_json import WORDS, Words
from nanolm.data.json_pieces import published
from nanolm.data.sentencepiece_json import parsed, replaced
from nanolm.data.tokenizer import SPACE, Tokenizer
from nanolm.errors import UserError, require
from nanolm.hub.gguf.keys import BASE, EPSILON, Architecture
from nanolm.hub.gguf.reading import gguf_package
from nanolm.hub.gguf.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    ROLE_KEYS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)

FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}
"""The kinds that go out, with the numbers that a file of them has."""
BLOCK = 32
"""Numbers of a row that share a scale in Q8_0."""
PREPENDED = {"type": "Prepend", "prepend": SPACE}
Values = dict[str, Any]


def model_values(architecture: Architecture, model: ModelConfig, kind: str) -> Values:
    """What a file says of its model."""
    arch, positions = architecture.name, model.positions
    own = {
        "block_count": model.n_layers,
        "context_length": model.max_length,
        "embedding_length": model.d_model,
        "feed_forward_length": model.ff_width,
        "attention.head_count": model.n_heads,
        "attention.head_count_kv": model.kv_heads,
        "attention.key_length": model.head_width,
        "attention.value_length": model.head_width,
        "rope.dimension_count": model.head_width,
        "vocab_size": model.vocab_size,
        EPSILON: float(model.norm_eps),
        BASE: float(vars(positions)["base"][0]),
    }
    general = {"general.name": "nanolm", "general.file_type": FILE_TYPES[kind]}
    return general | {f"{arch}.{key}": value for key, value in own.items()}


def vocabulary_values(tokenizer: Tokenizer, rows: int) -> Values:
    """What a file says of a tokenizer, for an embedding of so many rows.

    Raises UserError for one that llama.cpp does not compute.
    """
    found = of_json(tokenizer) if tokenizer.file_name == "tokenizer.json" else of_model(tokenizer)
    padding = range(len(found["tokens"]), rows)
    found["tokens"] += [f"[PAD{index}]" for index in padding]
    found["token_type"] += [UNUSED] * len(padding)
    if "scores" in found:
        found["scores"] += [0.0] * len(padding)
    roles = {f"{ROLE_KEYS[role]}_token_id": index for role, index in tokenizer.roles().items()}
    values = {f"tokenizer.ggml.{key}": value for key, value in (found | roles).items()}
    if tokenizer.chat_template is not None:
        values["tokenizer.chat_template"] = tokenizer.chat_template
    return values


def of_model(tokenizer: Tokenizer) -> Values:
    """The vocabulary of a SentencePiece model: only BPE, which is cut by scores alone."""
    model = parsed(tokenizer)
    rules = model.normalizer_spec
    require(
        model.trainer_spec.model_type == 2,
        f"{tokenizer.path} is a unigram, for which llama.cpp has no byte fallback, so texts would "
        f"get other ids; export with --format transformers, or train with --tokenizer_type bpe",
    )
    require(
        not rules.precompiled_charsmap and not rules.remove_extra_whitespaces,
        f"{tokenizer.path} rewrites a text before it is cut, which llama.cpp does not; export with "
        f"--format transformers",
    )
    return {
        "model": "llama",
        "tokens": [piece.piece for piece in model.pieces],
        "scores": [float(piece.score) for piece in model.pieces],
        "token_type": [int(piece.type) for piece in model.pieces],
        "add_space_prefix": bool(rules.add_dummy_prefix),
        "add_bos_token": False,
    }


def of_json(tokenizer: Tokenizer) -> Values:
    """The vocabulary of a tokenizer.json: byte-level BPE that is cut as llama.cpp knows, or what
    once was a SentencePiece model."""
    whole = json.loads(published(tokenizer.model_bytes))
    model = whole["model"]
    require(
        model.get("type") == "BPE",
        f"{tokenizer.path} is a {model.get('type')}, which llama.cpp does not read beside a "
        f"decoder; export with --format transformers",
    )
    added = {token["id"]: token for token in whole.get("added_tokens") or []}
    pieces = {index: piece for piece, index in model["vocab"].items()}
    pieces |= {index: token["content"] for index, token in added.items()}
    size = tokenizer.vocab_size
    begins = tokenizer.opening == [tokenizer.roles().get("bos")] and whole.get("post_processor")
    found: Values = {
        "tokens": [pieces.get(index, f"[PAD{index}]") for index in range(size)],
        "token_type": [kind_of(index, pieces, added, model) for index in range(size)],
        "add_bos_token": bool(begins),
    }
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if model.get("byte_fallback") and whole["pre_tokenizer"] is None:
        steps = (whole["normalizer"] or {}).get("normalizers", [])
        require(
            all(step in (PREPENDED, replaced(" ", SPACE)) for step in steps),
            f"{tokenizer.path} rewrites a text before it is cut, which llama.cpp does not; export "
            f"with --format transformers",
        )
        return found | {
            "model": "llama",
            "scores": scores(found["tokens"], merges),
            "add_space_prefix": PREPENDED in steps,
        }
    name = next((name for name, words in WORDS.items() if cuts(whole, words)), None)
    if name is None:
        raise UserError(
            f"{tokenizer.path} cuts a text in a way that llama.cpp has no name for among those "
            f"that nanolm knows ({', '.join(WORDS)}); export with --format transformers"
        )
    lines = [" ".join(pair) for pair in merges]
    return found | {"model": "gpt2", "pre": name, "merges": lines}


def kind_of(index: int, pieces: Mapping[int, str], added: Mapping[int, Any], model: Any) -> int:
    """The kind of a piece of a tokenizer.json."""
    piece = pieces.get(index)
    if piece is None:
        return UNUSED
    if piece == model.get("unk_token"):
        return UNKNOWN
    if index in added:
        return CONTROL if added[index]["special"] else USER_DEFINED
    byte = model.get("byte_fallback") and piece[:3] == "<0x" and len(piece) == 6
    return BYTE if byte else NORMAL


def scores(pieces: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Scores by which pieces are merged in the order of a list."""
    ranks: dict[str, int] = {}
    for first, second in merges:
        ranks.setdefault(first + second, len(ranks))
    return [-float(ranks.get(piece, len(ranks))) for piece in pieces]


def cuts(whole: Mapping[str, Any], words: Words) -> bool:
    """Whether a tokenizer.json cuts a text in this way."""
    step, form = whole["pre_tokenizer"] or {}, whole["normalizer"]
    steps = step.get("pretokenizers", [step])
    return (
        steps == list(words.steps)
        and (form or {}).get("type") == words.normal_form
        and bool(whole["model"].get("ignore_merges")) == words.whole_pieces
    )


def write_file(
    path: pathlib.Path, arch: str, values: Values, tensors: Mapping[str, Tensor], kind: str
) -> None:
    """Writes a file of these values and tensors; matrices are of one kind, norms float32.

    Raises UserError for a matrix that cannot be of this kind.
    """
    package = gguf_package()
    writer = package.GGUFWriter(path, arch)
    for key, value in values.items():
        add_value(writer, key, value)
    for name, tensor in tensors.items():
        array = tensor.detach().float().contiguous().numpy()
        if array.ndim == 1 or kind == "F32":
            writer.add_tensor(name, array)
            continue
        require(
            kind != "Q8_0" or array.shape[1] % BLOCK == 0,
            f"{name} has rows of {array.shape[1]} numbers, and Q8_0 wants a multiple of {BLOCK}; "
            f"export with --weights F16",
        )
        number = package.GGMLQuantizationType[kind]
        writer.add_tensor(name, package.quants.quantize(array, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_value(writer: Any, key: str, value: Any) -> None:
    """Adds a value in the type that files of the format have for it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, float(np.float32(value)))
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
