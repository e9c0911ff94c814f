"""A trained model as one GGUF file, which llama.cpp and its kin read.

The file is written under a temporary name, read again, and compared: each tensor is what its kind
makes of ours, transformers' own class computes the same of what was read, in float32 the logits are
ours, and the ids of sample texts are counted. Only then it gets its name.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.errors import require
from nanolm.files import AGAIN, full_disk_is_told, sync, temporary_name
from nanolm.hub.families import FAMILIES
from nanolm.hub.families.base import unscaled_rotation
from nanolm.hub.gguf.importing import imported_file
from nanolm.hub.gguf.keys import ARCHITECTURES, to_gguf
from nanolm.hub.gguf.reading import gguf_package, read_file
from nanolm.hub.gguf.writing import model_values, vocabulary_values, write_file
from nanolm.hub.importing import proved
from nanolm.hub.proof import LIMIT, same_rows
from nanolm.hub.samples import sample_texts
from nanolm.inference.export_transformers import family_of, published_tensors
from nanolm.saved import Saved

Note = Callable[[str], None]
KNOWN = {name: FAMILIES[name] for name in ARCHITECTURES}


@torch.no_grad()
def gguf_file(saved: Saved, out: pathlib.Path, kind: str, note: Note) -> dict[str, Any]:
    """Writes the model as the file `out`, matrices as F32, F16 or Q8_0; returns the figures.

    Raises UserError, with nothing written, for a model or a tokenizer that the format has no name
    for, and where what was written is not what was meant.
    """
    model, ours = saved.config.model, learner_tensors(saved.learner)
    family = family_of(model, ours, saved.tokenizer.roles(), KNOWN)
    scaled = unscaled_rotation(model)
    require(
        not scaled,
        f"{', '.join(scaled)}, and nanolm writes GGUF only with none; export it with --format "
        f"transformers",
    )
    architecture = ARCHITECTURES[family.name]
    tensors = to_gguf(architecture, published_tensors(family, model, ours), model)
    values = model_values(architecture, model, kind)
    values |= vocabulary_values(saved.tokenizer, model.n_tokens)
    temporary = temporary_name(out)
    with full_disk_is_told(out, AGAIN):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_file(temporary, architecture.name, values, tensors, kind)
            sync(temporary)
            figures = compared(saved, temporary, tensors, kind, note)
            os.replace(temporary, out)
            sync(out.parent)
        finally:
            temporary.unlink(missing_ok=True)
    size = out.stat().st_size
    note(f"{saved.folder}: {len(tensors)} tensors, matrices as {kind}, {size:,} bytes in {out}")
    return {"format": "gguf", "weights": kind, "tensors": len(tensors), "bytes": size, **figures}


def compared(
    saved: Saved, path: pathlib.Path, tensors: Mapping[str, Tensor], kind: str, note: Note
) -> dict[str, Any]:
    """The file read again, beside what was written; raises UserError for a difference that the
    kind does not explain."""
    file = read_file(path)
    for name, tensor in tensors.items():
        require(
            torch.equal(file.tensors[name], rounded(tensor, kind)),
            f"{name} is read again with other numbers than were written; nothing is written",
        )
    again = imported_file(file)
    proof = proved(again, "the file", note)
    tokens_BT, inputs, _ = same_rows(saved.config.model, None)
    expected, found = (
        learner.heads["lm"](learner.trunk(inputs)) for learner in (saved.learner, again.learner)
    )
    difference = float((found - expected).abs().max())
    require(
        kind != "F32" or difference <= LIMIT,
        f"the file read again has logits that differ by {difference:.1e}; nothing is written",
    )
    alike = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    note(
        f"read again: logits differ from this model's by {difference:.1e} at most, the likeliest "
        f"token is the same at {alike:.0%} of {tokens_BT.numel()} places"
    )
    texts = sample_texts()
    pairs = zip(saved.tokenizer.encode_batch(texts), again.tokenizer.encode_batch(texts))
    differing = sum(not np.array_equal(mine, theirs) for mine, theirs in pairs)
    note(f"tokenizer: {differing or 'none'} of {len(texts)} sample texts get other ids")
    return {
        "largest_difference": None if proof is None else proof.largest,
        "difference_of_logits": difference,
        "texts_with_other_ids": differing,
    }


def rounded(tensor: Tensor, kind: str) -> Tensor:
    """What a kind makes of a tensor; norms stay as they are."""
    if tensor.ndim == 1 or kind == "F32":
        return tensor.float()
    package = gguf_package()
    number = package.GGMLQuantizationType[kind]
    array = tensor.detach().float().contiguous().numpy()
    return torch.from_numpy(
        np.array(package.quants.dequantize(package.quants.quantize(array, number), number))
    ).float()
