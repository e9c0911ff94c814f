"""The proof of an import: transformers' own class and ours compute the same, in float32.

transformers' class is built from the published config.json and gets the file's own tensors; ours
has been filled by the family's table. Both read the same random rows, some of them padded where
the family pads, and the largest difference of hidden states and logits is what was proved. Decoders
then write a few tokens each, and the tokenizers encode sample texts (`tokenizer_files.py`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any, cast

import torch
from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.errors import UserError, require
from nanolm.hub.heads import answers, head_of, their_answers
from nanolm.hub.published import Imported
from nanolm.hub.two_streams import differences_of_two_streams
from nanolm.model.cache import KeyValueCache
from nanolm.model.trunk import EncoderDecoder, Inputs
from nanolm.ops.masks import Mask

LIMIT = 1e-4
ROWS, TOKENS = 2, 32
PROMPT, GREEDY = 8, 32
TWO_SIDED = ("encoder", "two_stream")
"""Trunks of one stack whose tokens see what is behind them, padding unless a mask hides it."""


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
def prove(imported: Imported, theirs: Any = None) -> Proof:
    """Ours beside transformers' model of the published tensors, or beside `theirs`, where that is
    more (an adapter on it). Raises UserError when transformers finds no place for a tensor."""
    theirs, model = theirs or their_model(imported), imported.config.model
    compare = PROOFS.get(model.trunk, differences_of_a_stack)
    compare = differences_of_a_task if head_of(imported.config) else compare
    # Python's max forgets a NaN that is not the first.
    largest = float(torch.stack([each.abs().max() for each in compare(imported, theirs)]).max())
    if model.trunk != "decoder" or head_of(imported.config) or not largest <= LIMIT:
        return Proof(largest, None)
    tokens_BT, _, _ = same_rows(model, theirs.config.pad_token_id)
    return Proof(largest, alike(imported, theirs, tokens_BT[:1, :PROMPT]))


def differences_of_a_stack(imported: Imported, theirs: Any) -> list[Tensor]:
    """Where an encoder's or a decoder's hidden states and its heads' logits differ."""
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
        logits = answer.sop_logits if "sop_logits" in answer else answer.seq_relationship_logits
        differences.append(heads["pair"](hidden_BTD) - logits)
    return differences


def differences_of_a_task(imported: Imported, theirs: Any) -> list[Tensor]:
    """Where hidden states and the answers of a task's head differ."""
    pad = theirs.config.pad_token_id
    tokens_BT, inputs, words = same_rows(imported.config.model, pad, padded=can_pad(pad))
    keep_BT, options = words["attention_mask"].bool(), imported.config.objective
    hidden_BTD = imported.learner.trunk(inputs)
    expected = theirs.base_model(tokens_BT, **words).last_hidden_state
    ours = answers(options, imported.learner.heads, hidden_BTD, keep_BT)
    logits = their_answers(theirs, options.name, tokens_BT, words)
    return [(hidden_BTD - expected)[keep_BT], ours - logits]


def differences_of_two_stacks(imported: Imported, theirs: Any) -> list[Tensor]:
    """Where an encoder-decoder's hidden states, of both stacks, and its logits differ."""
    trunk = cast(EncoderDecoder, imported.learner.trunk)
    source_BS, inputs, keep_BS = same_pairs(imported.config.model)
    answer = theirs(
        source_BS,
        attention_mask=keep_BS.long(),
        decoder_input_ids=inputs.tokens_BT,
        output_hidden_states=True,
    )
    hidden_BTD = trunk(inputs)
    return [
        (trunk.encode(inputs) - answer.encoder_last_hidden_state)[keep_BS],
        hidden_BTD - answer.decoder_hidden_states[-1],
        imported.learner.heads["lm"](hidden_BTD) - answer.logits,
    ]


PROOFS = {
    "encoder_decoder": differences_of_two_stacks,
    "two_stream": differences_of_two_streams,
}
"""What is compared of trunks that are not one stack."""


def can_pad(pad: int | None) -> bool:
    """Whether rows can be filled up with this id; some config.json have -1 for none."""
    return pad is not None and pad >= 0


def same_rows(
    model: ModelConfig, pad: int | None, *, padded: bool = False
) -> tuple[Tensor, Inputs, dict[str, Tensor]]:
    """(tokens, what our trunk reads, what theirs reads besides) of random rows, both of two
    segments where the model has them; the second is half padding if `padded` or two-sided."""
    widest = max(width or 0 for width in model.window)
    length = min(max(TOKENS, 2 * widest), model.max_length)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, model.n_tokens, (ROWS, length), generator=generator)
    two_sided = model.trunk in TWO_SIDED
    lengths_B = torch.tensor([length, length // 2 if two_sided or padded else length])
    keep_BT = torch.arange(length) < lengths_B[:, None]
    if pad is not None:  # RoBERTa counts positions by what is not padding
        tokens_BT[tokens_BT == pad] = (pad + 1) % model.n_tokens
        tokens_BT[~keep_BT] = pad
    words: dict[str, Tensor] = {"attention_mask": keep_BT.long()}
    if model.n_segments > 1:
        segments_BT = (torch.arange(length) >= length // 3).long().expand(ROWS, length)
        words["token_type_ids"] = segments_BT
    mask = Mask(key_lengths=lengths_B) if two_sided else Mask()
    inputs = Inputs(tokens_BT=tokens_BT, segments_BT=words.get("token_type_ids"), mask=mask)
    return tokens_BT, inputs, words


def same_pairs(model: ModelConfig) -> tuple[Tensor, Inputs, Tensor]:
    """(source tokens, what our trunk reads, which of the source count) of random sources, the
    second half padding, and shorter targets."""
    length = min(TOKENS, model.max_length)
    generator = torch.Generator().manual_seed(0)
    source_BS, tokens_BT = (
        torch.randint(1, model.n_tokens, (ROWS, n), generator=generator)
        for n in (length, length // 2)
    )
    lengths_B = torch.tensor([length, length // 2])
    keep_BS = torch.arange(length) < lengths_B[:, None]
    inputs = Inputs(
        tokens_BT=tokens_BT, source_tokens_BS=source_BS, source_mask=Mask(key_lengths=lengths_B)
    )
    return source_BS, inputs, keep_BS


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
        config._attn_implementation = "eager"
        named = str(names.pooled) if pooled else names.plain
        model = getattr(transformers, named)(config).float().eval()
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"transformers refuses {imported.published.path} ({said}); mend that file, since "
            f"without transformers' model nothing can be proved"
        ) from error
    if not imported.config.model.tied:
        untie(model)
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


def untie(model: Any) -> None:
    """Gives the head a weight of its own; transformers ties every T5 that it builds, whatever its
    config.json says."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
