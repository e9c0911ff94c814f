"""From a GGUF file to a model of ours, as `../published.py` does it from a folder."""

from __future__ import annotations

import pathlib

from nanolm.errors import require
from nanolm.hub.configs import Published
from nanolm.hub.families import FAMILIES
from nanolm.hub.gguf.keys import architecture_of, published_config, require_whole, to_published
from nanolm.hub.gguf.reading import GgufFile, read_file
from nanolm.hub.gguf.vocabulary import read_vocabulary
from nanolm.hub.published import Imported, as_config, assembled, model_keys


def read_gguf(path: pathlib.Path, *, family: str | None = None) -> Imported:
    """Reads and checks a GGUF file; raises UserError in one sentence that names the fault."""
    return imported_file(read_file(path), family)


def imported_file(file: GgufFile, family: str | None = None) -> Imported:
    """A file's model, under our names; the numbers are what its quantised ones stand for."""
    architecture = architecture_of(file, family)
    chosen = FAMILIES[architecture.name]
    published = Published(file.path, published_config(file, architecture), chosen.name)
    keys = model_keys(chosen, published)
    tokenizer = read_vocabulary(file)
    require(
        tokenizer.vocab_size <= keys["vocab_size"],
        f"{file.path} has {tokenizer.vocab_size} pieces and an embedding of {keys['vocab_size']}; "
        f"fetch it again",
    )
    model = as_config(chosen, keys, frozenset(), tokenizer).model
    require_whole(file, architecture, model)
    tensors = to_published(architecture, file.tensors, model)
    return assembled(chosen, published, keys, tensors, tokenizer, file.path)
