"""A published folder as it lies there: config.json, weights in one file or several, tokenizer.

    config.json
    model.safetensors  |  model.safetensors.index.json + shards  |  pytorch_model.bin (a pickle)
    tokenizer.json  tokenizer_config.json  special_tokens_map.json  |  tokenizer.model

A pickle can name code to run. It is read only when the user says so, and only by torch's reader
that knows tensors and refuses everything else.
"""

from __future__ import annotations

import json
import pathlib
import pickle
import zipfile
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanolm.data.json_pieces import JSON_FILE, with_roles
from nanolm.data.tokenizer import MODEL_FILE, ROLES, Tokenizer
from nanolm.errors import UserError, require

SINGLE, SHARDED = "model.safetensors", "model.safetensors.index.json"
TEMPLATE = "chat_template.jinja"
PICKLE, PICKLES = "pytorch_model.bin", "pytorch_model.bin.index.json"


class NeedsFlagError(UserError):
    """What `nanolm import` reads once the user has given a flag of it, `flag`."""

    def __init__(self, sentence: str, flag: str) -> None:
        super().__init__(sentence)
        self.flag = flag


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; raises UserError when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); name the folder of a published model"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}); fetch the file again") from error
    require(isinstance(value, dict), f"{path} holds no JSON object; fetch the file again")
    return value


def read_weights(folder: pathlib.Path, *, pickled: bool) -> dict[str, Tensor]:
    """All tensors of the folder by their published keys, on the CPU, as they are stored.

    `pickled` allows pytorch_model.bin. Raises UserError for what is missing or cannot be read.
    """
    if (folder / SINGLE).is_file():
        return read_safetensors(folder / SINGLE)
    if (folder / SHARDED).is_file():
        return read_shards(folder, SHARDED, read_safetensors)
    found = next((folder / name for name in (PICKLE, PICKLES) if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} holds no weights: neither {SINGLE} nor {SHARDED}")
    if not pickled:
        raise NeedsFlagError(
            f"{found} is a pickle, a format that can hide code; if you trust its authors add "
            f"--allow_pickle true, and only its tensors are read",
            "--allow_pickle true",
        )
    if found.name == PICKLES:
        return read_shards(folder, PICKLES, read_pickle)
    return read_pickle(found)


def read_shards(folder: pathlib.Path, index: str, read: Any) -> dict[str, Tensor]:
    """The tensors that an index file names, each from the file that it gives."""
    where = read_object(folder / index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"{folder / index} has no weight_map; fetch the file again")
    found: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        inside = pathlib.PurePath(name).name == name
        require(inside, f"{folder / index} names {name!r}, which is outside of its folder")
        require(
            (folder / name).is_file(),
            f"{folder / index} names {name}, which is not there; fetch that file too",
        )
        for key, tensor in read(folder / name).items():
            require(key not in found, f"{folder / name} holds {key}, which another file holds too")
            found[key] = tensor
    missing = sorted(where.keys() - found.keys())
    require(
        not missing,
        f"{folder / where[missing[0]] if missing else folder} lacks {', '.join(missing[:3])}, "
        f"which {index} says it holds; fetch the file again",
    )
    return found


def read_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of one file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); fetch it again") from (
            error
        )


def read_pickle(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a pickle; anything else in it is refused before it is made."""
    broken = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, zipfile.BadZipFile)
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (*broken, ValueError, LookupError, AttributeError, TypeError) as error:
        # Of torch's advice only the finding: the rest says how to run what the pickle hides.
        said = str(error).partition(". ")[0].strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path} holds something else than tensors, or is damaged ({said[0]}); "
            f"choose a checkpoint in safetensors"
        ) from error
    good = isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(part, Tensor) for key, part in value.items()
    )
    require(good, f"{path} holds something else than named tensors; choose one in safetensors")
    return dict(value)


def read_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """The folder's tokenizer, with the roles that the files beside it give.

    Raises UserError when there is none that can be read.
    """
    path = folder / JSON_FILE
    if not path.is_file():
        require(
            (folder / MODEL_FILE).is_file(),
            f"{folder} holds neither {JSON_FILE} nor {MODEL_FILE}; transformers writes the former: "
            f"AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        )
        return Tokenizer.load(folder / MODEL_FILE)
    roles = roles_inside(read_object(path)) | roles_beside(folder)
    content = with_roles(path.read_bytes(), roles, chat_template(folder))
    return Tokenizer(content, str(path))


def roles_inside(parsed: dict[str, Any]) -> dict[str, str]:
    """role -> piece of cls and sep, where tokenizer.json frames a text as BERT or RoBERTa does:
    the files beside RoBERTa's name no roles."""
    step = parsed.get("post_processor")
    if not isinstance(step, dict) or step.get("type") not in (
        "BertProcessing",
        "RobertaProcessing",
    ):
        return {}
    framed = {role: step.get(role) for role in ("cls", "sep")}
    # Of another form is what the package `tokenizers` refuses, in its own words.
    return {role: pair[0] for role, pair in framed.items() if isinstance(pair, list) and pair}


def roles_beside(folder: pathlib.Path) -> dict[str, str]:
    """role -> piece, from special_tokens_map.json and tokenizer_config.json."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        values = read_object(folder / name)
        for role in ROLES:
            piece = values.get(f"{role}_token")
            piece = piece.get("content") if isinstance(piece, dict) else piece
            if isinstance(piece, str):
                found[role] = piece
    return found


def chat_template(folder: pathlib.Path) -> str | None:
    """The chat template, from its own file or tokenizer_config.json; of several the default."""
    if (folder / TEMPLATE).is_file():
        try:
            return (folder / TEMPLATE).read_text(encoding="utf-8")
        except ValueError as error:
            raise UserError(
                f"{folder / TEMPLATE} is no text in UTF-8 ({error}); fetch the file again"
            ) from error
    if not (folder / "tokenizer_config.json").is_file():
        return None
    found = read_object(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        named = {part.get("name"): part.get("template") for part in found if isinstance(part, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
