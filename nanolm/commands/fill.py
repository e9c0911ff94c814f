"""`nanolm fill`: what an encoder believes stands where <mask> is."""

from __future__ import annotations

import dataclasses

import torch
from rich.table import Column, Table

from nanolm.commands.json_file import write_json
from nanolm.commands.pretrained import require_pretrained
from nanolm.config.ranges import Count
from nanolm.distributed.devices import DeviceWord
from nanolm.errors import require
from nanolm.inference.masked import mask_ids
from nanolm.model.trunk import Inputs
from nanolm.saved import Saved, open_saved
from nanolm.tables import show
from nanolm.terminal import say

POSITIONAL = ("run", "text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Fill masks with an encoder."""

    run: str
    """Folder of a run or of a checkpoint."""
    text: str
    """Text with one or several <mask>."""
    top: Count = 5
    """Candidates to show for each mask."""
    device: DeviceWord = "cpu"
    """Where it is computed; auto takes CUDA when there is any."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Plug-ins that the checkpoint was trained with."""
    json: str | None = None
    """Also write the candidates to this file."""


OTHERWISE = {
    "decoder": "; a decoder writes on: `nanolm generate`",
    "encoder_decoder": "; what stands in gaps is written by `nanolm generate`",
}
"""What to do with another trunk."""


@torch.no_grad()
def fill(saved: Saved, text: str, top: int) -> list[list[dict]]:
    """For each mask the `top` candidates: token, text, probability; each mask by itself."""
    trunk = saved.config.model.trunk
    require(
        trunk == "encoder",
        f"{saved.folder} has model.trunk={trunk}; only an encoder fills masks"
        f"{OTHERWISE.get(trunk, '')}",
    )
    tokenizer, learner = saved.tokenizer, saved.learner
    ids = torch.tensor([mask_ids(text, saved)], device=learner.trunk.embedding.weight.device)
    hidden_BTD = learner.trunk(Inputs(tokens_BT=ids))
    hidden_MD = hidden_BTD[0, ids[0] == tokenizer.mask]
    logits_MV = learner.heads["lm"](hidden_MD)[:, : tokenizer.vocab_size].float()
    special_V = torch.from_numpy(tokenizer.special_mask).to(logits_MV.device)
    probability_MV = logits_MV.masked_fill(special_V, -torch.inf).softmax(dim=-1)
    values_MK, tokens_MK = probability_MV.topk(min(top, tokenizer.vocab_size), dim=-1)
    return [
        [
            {"token": token, "text": tokenizer.decode([token]), "probability": value}
            for token, value in zip(tokens, values, strict=True)
        ]
        for tokens, values in zip(tokens_MK.tolist(), values_MK.tolist(), strict=True)
    ]


def run(arguments: Arguments) -> None:
    """Fill and print."""
    saved = open_saved(arguments.run, device=arguments.device, plugins=arguments.plugins)
    require_pretrained(saved, "fill")
    masks = fill(saved, arguments.text, arguments.top)
    table = Table(*(Column(name, justify="right") for name in ("mask", "probability")), "text")
    for index, candidates in enumerate(masks):
        for c in candidates:
            table.add_row(str(index + 1), f"{c['probability']:.3f}", repr(c["text"]))
        table.add_section()
    say(arguments.text)
    show(table)
    write_json(arguments.json, {"text": arguments.text, "masks": masks})
