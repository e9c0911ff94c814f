"""A model as an ONNX graph that other runtimes read: rows of any number and length, logits out.

    model.onnx      input_ids [B, T], for encoders and tasks attention_mask [B, T] (1 for a token,
                    0 for what fills a row up on its right), token_type_ids [B, T] where the model
                    has segments -> logits
    config.yaml     the run's config, with the labels of a task
    tokenizer.json  as `--format transformers` writes it

The graph is traced with the reference attention kernel: the fused one asks whether there is one
query, and a traced length is no number. Before anything is written, onnxruntime computes rows of
two shapes; above a difference of 1e-4 nothing is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nanolm import build
from nanolm.config.load import dump
from nanolm.config.model import ModelConfig
from nanolm.config.schema import KernelsConfig
from nanolm.errors import UserError, require
from nanolm.hub.proof import LIMIT, same_rows
from nanolm.hub.tokenizer_files import tokenizer_files
from nanolm.model.trunk import Inputs
from nanolm.ops.masks import Mask
from nanolm.saved import Saved

Note = Callable[[str], None]
Read = Callable[[nn.ModuleDict, Tensor, Tensor], Tensor]
"""What a graph gives of (heads, hidden [B, T, D], keep [B, T])."""
Compare = Callable[[Saved, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(ours, theirs) of (model, hidden [B, T, D], keep [B, T], the graph's logits), alike in shape."""
FILE = "model.onnx"
NEEDED = ("onnx", "onnxscript")
TRUNKS = ("decoder", "encoder")


class Graph(nn.Module):
    """A trunk and what is read of it, as a function of tensors alone."""

    def __init__(self, trunk: nn.Module, heads: nn.ModuleDict, read: Read, encoder: bool) -> None:
        super().__init__()
        self.trunk, self.heads, self.read, self.encoder = trunk, heads, read, encoder

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """What `read` makes of the hidden states."""
        keep_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = Mask(key_lengths=keep_BT.sum(1)) if self.encoder else Mask()
        inputs = Inputs(tokens_BT=input_ids, segments_BT=token_type_ids, mask=mask)
        return self.read(self.heads, self.trunk(inputs), keep_BT)


def onnx_folder(
    saved: Saved, note: Note = print, read: Read | None = None, compare: Compare | None = None
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(files, figures of the proof) of a model; a task says what is read and how it is compared.

    Raises UserError when a package is missing, the model is of another kind, torch's exporter
    refuses it, or onnxruntime computes something else.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    require(not missing, f"--format onnx needs {' and '.join(missing)}: pip install 'nanolm[onnx]'")
    model = saved.config.model
    require(
        model.trunk in TRUNKS,
        f"{saved.folder} has model.trunk={model.trunk}, and --format onnx writes "
        f"{' and '.join(TRUNKS)}; export it with --format nanolm",
    )
    require(
        read is not None or "lm" in saved.learner.heads,
        f"{saved.folder} has no vocabulary head, whose logits --format onnx writes; export it with "
        f"--format nanolm",
    )
    names = input_names(model, masked=read is not None)
    files = traced(traceable(saved, read or vocabulary), model, names, str(saved.folder))
    figures = {"largest_difference": proved(saved, files, names, compare or of_every_token, note)}
    files |= tokenizer_files(saved.tokenizer, model)
    return files | {"config.yaml": dump(saved.config).encode()}, figures


def vocabulary(heads: nn.ModuleDict, hidden_BTD: Tensor, keep_BT: Tensor) -> Tensor:
    """Logits [B, T, V] of the vocabulary head."""
    return heads["lm"](hidden_BTD)


def of_every_token(
    saved: Saved, hidden_BTD: Tensor, keep_BT: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """The vocabulary's logits of the tokens that count."""
    return saved.learner.heads["lm"](hidden_BTD)[keep_BT], logits[keep_BT]


def input_names(model: ModelConfig, *, masked: bool) -> list[str]:
    """What the graph reads, in order. A decoder's token sees nothing behind it, so only what is
    read of a whole row asks where that ends."""
    mask = ["attention_mask"] if masked or model.trunk == "encoder" else []
    return ["input_ids", *mask, *(["token_type_ids"] if model.n_segments > 1 else [])]


def traceable(saved: Saved, read: Read) -> Graph:
    """The model with kernels that can be traced, in float32."""
    config = dataclasses.replace(
        saved.config,
        kernels=KernelsConfig(attention="reference"),
        train=dataclasses.replace(saved.config.train, precision="fp32"),
    )
    learner = build.build_learner(config, saved.learner.objective, phase="prefill")
    learner.load_state_dict(saved.learner.state_dict())
    return Graph(learner.trunk, learner.heads, read, saved.config.model.trunk == "encoder").eval()


def traced(graph: Graph, model: ModelConfig, names: list[str], what: str) -> dict[str, bytes]:
    """model.onnx, and beside it the file of its weights where they are too large for one."""
    length = min(12, model.max_length)
    example = [torch.ones(2, length, dtype=torch.int64) for _ in names]
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=model.max_length)}
    try:
        with torch.no_grad(), quiet():
            program = torch.onnx.export(
                graph,
                (),
                kwargs=dict(zip(names, example, strict=True)),
                dynamo=True,
                dynamic_shapes=dict.fromkeys(names, axes),
                input_names=names,
                output_names=["logits"],
                verbose=False,
            )
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"torch's exporter refuses {what} ({said}); export it with --format nanolm"
        ) from error
    assert program is not None  # it returns None only with dynamo=False
    with tempfile.TemporaryDirectory() as scratch:
        program.save(pathlib.Path(scratch) / FILE)
        return {path.name: path.read_bytes() for path in pathlib.Path(scratch).iterdir()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, torch's exporter tells nothing of packages and axes that no model here has."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def proved(
    saved: Saved, files: Mapping[str, bytes], names: list[str], compare: Compare, note: Note
) -> float | None:
    """The largest difference between onnxruntime and us on rows of two shapes, told; None without
    onnxruntime. Raises UserError above LIMIT."""
    if importlib.util.find_spec("onnxruntime") is None:
        note("the proof was left out: onnxruntime is not installed")
        return None
    import onnxruntime  # noqa: PLC0415  (slow to import, and not always installed)

    with tempfile.TemporaryDirectory() as scratch:
        for name, content in files.items():
            (pathlib.Path(scratch) / name).write_bytes(content)
        session = onnxruntime.InferenceSession(pathlib.Path(scratch) / FILE)
        largest = 0.0
        for tokens_BT, inputs, keep_BT in two_shapes(saved.config.model):
            given = {
                "input_ids": tokens_BT,
                "attention_mask": keep_BT.long(),
                "token_type_ids": inputs.segments_BT,
            }
            feed = {name: tensor.numpy() for name in names if (tensor := given[name]) is not None}
            (logits,) = session.run(None, feed)
            hidden_BTD = saved.learner.trunk(inputs)
            ours, theirs = compare(saved, hidden_BTD, keep_BT, torch.from_numpy(logits))
            largest = max(largest, float((ours - theirs).abs().max()))
    require(
        largest <= LIMIT,
        f"onnxruntime computes something else of {saved.folder}: the largest difference is "
        f"{largest:.1e}, above {LIMIT:.0e}; nothing is written",
    )
    note(f"proof: largest difference from onnxruntime {largest:.1e} (float32, rows of two shapes)")
    return largest


def two_shapes(model: ModelConfig) -> Iterator[tuple[Tensor, Inputs, Tensor]]:
    """(tokens, what the trunk reads, which tokens count) of several rows, one of them half padding
    if the model is an encoder; and of one shorter row."""
    tokens_BT, inputs, words = same_rows(model, None)
    yield tokens_BT, inputs, words["attention_mask"].bool()
    length = max(1, tokens_BT.shape[1] * 2 // 3)
    tokens_1T = tokens_BT[:1, :length]
    segments = inputs.segments_BT
    mask = Mask(key_lengths=torch.tensor([length])) if model.trunk == "encoder" else Mask()
    shorter = Inputs(
        tokens_BT=tokens_1T,
        segments_BT=None if segments is None else segments[:1, :length],
        mask=mask,
    )
    yield tokens_1T, shorter, torch.ones_like(tokens_1T, dtype=torch.bool)
