"""The proof of an import: transformers' own class and ours compute the same, in float32.

transformers' class is built from the published config.json and gets the file's own tensors; ours
has been filled by the family's table. Both read the same random rows, some of them padded where
the family pads, and the largest difference of hidden states and logits is what was proved.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from nanolm.errors import UserError
from nanolm.hub.published import Imported
from nanolm.model.trunk import Inputs
from nanolm.ops.masks import Mask

LIMIT = 1e-4
ROWS, TOKENS = 2, 32


def can_prove() -> bool:
    """Whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


@torch.no_grad()
def largest_difference(imported: Imported) -> float:
    """Of hidden states and logits, over all positions that count; raises UserError when
    transformers finds no place for a tensor."""
    theirs = their_model(imported)
    model = imported.config.model
    length = min(TOKENS, model.max_length)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, model.n_tokens, (ROWS, length), generator=generator)
    encoder = model.trunk == "encoder"
    lengths_B = torch.tensor([length, length // 2 if encoder else length])
    segments_BT = None
    if model.n_segments > 1:
        segments_BT = (torch.arange(length) >= length // 3).long().expand(ROWS, length)
    keep_BT = torch.arange(length) < lengths_B[:, None]
    inputs = Inputs(
        tokens_BT=tokens_BT,
        segments_BT=segments_BT,
        mask=Mask(key_lengths=lengths_B) if encoder else Mask(),
    )
    words: dict[str, Tensor] = {"attention_mask": keep_BT.long()}
    if segments_BT is not None:
        words["token_type_ids"] = segments_BT
    hidden_BTD = imported.learner.trunk(inputs)
    expected = theirs.base_model(tokens_BT, **words).last_hidden_state
    differences = [(hidden_BTD - expected)[keep_BT]]
    answer = theirs(tokens_BT, **words)
    heads = imported.learner.heads
    if not any(key.startswith("cls.predictions.") for key in imported.fresh):
        logits = answer.logits if "logits" in answer else answer.prediction_logits
        differences.append((heads["lm"](hidden_BTD) - logits)[keep_BT])
    if "pair" in heads and not any(key.startswith("cls.seq") for key in imported.fresh):
        differences.append(heads["pair"](hidden_BTD) - answer.seq_relationship_logits)
    return max(float(difference.abs().max()) for difference in differences)


def their_model(imported: Imported) -> Any:
    """transformers' model of the published config, with the file's tensors, in evaluation mode."""
    import transformers  # noqa: PLC0415  (slow to import, and not always installed)

    family, names = imported.family, imported.family.classes
    pooled = "pair" in imported.learner.heads
    try:
        config = getattr(transformers, names.config)(**dict(imported.published.values))
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"transformers refuses {imported.published.path} ({said}); mend that file, since "
            f"without transformers' model nothing can be proved"
        ) from error
    config._attn_implementation = "eager"
    model = (
        getattr(transformers, str(names.pooled if pooled else names.plain))(config).float().eval()
    )
    answer = model.load_state_dict(imported.theirs, strict=False)
    if imported.config.model.tied:
        model.tie_weights()
    twins = {family.projection, *family.duplicates} if imported.config.model.tied else set()
    twins |= set(family.duplicates)
    for key, twin in family.duplicates.items():
        if twin in imported.theirs:
            model.get_parameter(key).data = imported.theirs[twin]
    missing = set(answer.missing_keys) - twins - set(imported.fresh)
    strange = [*answer.unexpected_keys, *missing]
    if strange:
        raise UserError(
            f"transformers {transformers.__version__} and nanolm disagree about the tensor "
            f"{strange[0]} of a {family.name}; nothing was proved and nothing is written"
        )
    return model
