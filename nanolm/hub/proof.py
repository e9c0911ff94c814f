"""The proof of an import: transformers' own class and ours compute the same, in float32.

transformers' class is built from the published config.json and gets the file's own tensors; ours
has been filled by the family's table. Both read the same random rows, some of them padded where
the family pads, and the largest difference of hidden states and logits is what was proved. Decoders
then write a few tokens each, and the tokenizers encode sample texts (`tokenizer_files.py`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import torch
from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.errors import UserError, require
from nanolm.hub.published import Imported
from nanolm.model.cache import KeyValueCache
from nanolm.model.trunk import Inputs
from nanolm.ops.masks import Mask

LIMIT = 1e-4
ROWS, TOKENS = 2, 32
PROMPT, GREEDY = 8, 32


def can_prove() -> bool:
    """Whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


@dataclasses.dataclass(frozen=True)
class Proof:
    """What was found when both computed the same."""

    largest: float
    """The largest difference of hidden states and logits, over all positions that count."""
    greedy: int | None
    """Tokens that both wrote alike, the likeliest each time and with a cache; None of an encoder,
    which writes none, and above LIMIT. Fewer than GREEDY where the model ends, or where two tokens
    are as likely."""


@torch.no_grad()
def prove(imported: Imported) -> Proof:
    """Raises UserError when transformers finds no place for a tensor."""
    theirs = their_model(imported)
    tokens_BT, inputs, words = same_rows(imported.config.model, theirs.config.pad_token_id)
    keep_BT = words["attention_mask"].bool()
    hidden_BTD = imported.learner.trunk(inputs)
    expected = theirs.base_model(tokens_BT, **words).last_hidden_state
    differences = [(hidden_BTD - expected)[keep_BT]]
    answer = theirs(tokens_BT, **words)
    heads = imported.learner.heads
    fresh = {
        name
        for name, prefixes in imported.family.heads.items()
        if any(key.startswith(prefixes) for key in imported.fresh)
    }
    if "lm" not in fresh:
        logits = answer.logits if "logits" in answer else answer.prediction_logits
        differences.append((heads["lm"](hidden_BTD) - logits)[keep_BT])
    if "pair" in heads and "pair" not in fresh:
        differences.append(heads["pair"](hidden_BTD) - answer.seq_relationship_logits)
    largest = max(float(difference.abs().max()) for difference in differences)
    writes = imported.config.model.trunk == "decoder" and largest <= LIMIT
    greedy = alike(imported, theirs, tokens_BT[:1, :PROMPT]) if writes else None
    return Proof(largest, greedy)


def same_rows(model: ModelConfig, pad: int | None) -> tuple[Tensor, Inputs, dict[str, Tensor]]:
    """(tokens, what our trunk reads, what theirs reads besides) of random rows: for an encoder the
    second is half padding, and both have two segments where the model has."""
    widest = max(width or 0 for width in model.window)
    length = min(max(TOKENS, 2 * widest), model.max_length)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, model.vocab_size, (ROWS, length), generator=generator)
    encoder = model.trunk == "encoder"
    lengths_B = torch.tensor([length, length // 2 if encoder else length])
    keep_BT = torch.arange(length) < lengths_B[:, None]
    if pad is not None:  # RoBERTa counts positions by what is not padding
        tokens_BT[tokens_BT == pad] = (pad + 1) % model.vocab_size
        tokens_BT[~keep_BT] = pad
    words: dict[str, Tensor] = {"attention_mask": keep_BT.long()}
    if model.n_segments > 1:
        segments_BT = (torch.arange(length) >= length // 3).long().expand(ROWS, length)
        words["token_type_ids"] = segments_BT
    mask = Mask(key_lengths=lengths_B) if encoder else Mask()
    inputs = Inputs(tokens_BT=tokens_BT, segments_BT=words.get("token_type_ids"), mask=mask)
    return tokens_BT, inputs, words


def alike(imported: Imported, theirs: Any, prompt_1T: Tensor) -> int:
    """How many tokens both write alike after a prompt, GREEDY at most; raises UserError where they
    part although one token is clearly the likeliest."""
    model, trunk = imported.config.model, imported.learner.trunk
    wanted = min(GREEDY, model.max_length - prompt_1T.shape[1])
    room = (1, prompt_1T.shape[1] + wanted, model.kv_heads, model.head_width)
    ours, past = KeyValueCache(model.n_layers, *room), None
    new_1T = prompt_1T
    for written in range(wanted):
        logits_V = imported.learner.heads["lm"](trunk(Inputs(tokens_BT=new_1T, cache=ours)))[0, -1]
        answer = theirs(new_1T, past_key_values=past, use_cache=True)
        past, expected = answer.past_key_values, int(answer.logits[0, -1].argmax())
        best = int(logits_V.argmax())
        if best != expected:
            require(
                float(logits_V[best] - logits_V[expected]) <= 2 * LIMIT,
                f"transformers writes another token than nanolm after {written} that are alike; "
                f"nothing is written",
            )
            return written
        new_1T = torch.tensor([[best]])
    return wanted


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
    model = getattr(transformers, names.pooled if pooled else names.plain)(config).float().eval()
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
