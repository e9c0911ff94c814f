"""A model as an ONNX graph that other runtimes read: rows of any number and length, logits out.

    model.onnx      input_ids [B, T], for encoders and tasks attention_mask [B, T] (1 for a token,
                    0 for what fills a row up on its right), token_type_ids [B, T] where the model
                    has segments -> logits
                    of an encoder-decoder: input_ids [B, S] and attention_mask [B, S] of the source,
                    decoder_input_ids [B, T] -> logits [B, T, V]
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
from nanolm.hub.proof import LIMIT, TWO_SIDED, same_pairs, same_rows
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
TRUNKS = ("decoder", "encoder", "encoder_decoder", "two_stream")


class Graph(nn.Module):
    """A trunk of one stack and what is read of it, as a function of tensors alone."""

    def __init__(self, trunk: nn.Module, heads: nn.ModuleDict, read: Read, two_sided: bool) -> None:
        super().__init__()
        self.trunk, self.heads, self.read, self.two_sided = trunk, heads, read, two_sided

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """What `read` makes of the hidden states."""
        keep_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = Mask(key_lengths=keep_BT.sum(1)) if self.two_sided else Mask()
        inputs = Inputs(tokens_BT=input_ids, segments_BT=token_type_ids, mask=mask)
        return self.read(self.heads, self.trunk(inputs), keep_BT)


class TwoStackGraph(nn.Module):
    """An encoder-decoder and what is read of its decoder; every token of a target counts."""

    def __init__(self, trunk: nn.Module, heads: nn.ModuleDict, read: Read) -> None:
        super().__init__()
        self.trunk, self.heads, self.read = trunk, heads, read

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor
    ) -> Tensor:
        """What `read` makes of the decoder's hidden states."""
        inputs = Inputs(
            tokens_BT=decoder_input_ids,
            source_tokens_BS=input_ids,
            source_mask=Mask(key_lengths=attention_mask.sum(1)),
        )
        return self.read(self.heads, self.trunk(inputs), torch.ones_like(decoder_input_ids))


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
        read is not None or model.trunk != "two_stream",
        f"{saved.folder} has model.trunk=two_stream, whose logits of the vocabulary are of places "
        f"in an order that a graph of rows does not tell; fine-tune it on a task first (nanolm "
        f"finetune), or export it with --format nanolm",
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
    if model.trunk == "encoder_decoder":
        return ["input_ids", "attention_mask", "decoder_input_ids"]
    mask = ["attention_mask"] if masked or model.trunk in TWO_SIDED else []
    return ["input_ids", *mask, *(["token_type_ids"] if model.n_segments > 1 else [])]


def traceable(saved: Saved, read: Read) -> nn.Module:
    """The model with kernels that can be traced, in float32."""
    config = dataclasses.replace(
        saved.config,
        kernels=KernelsConfig(attention="reference"),
        train=dataclasses.replace(saved.config.train, precision="fp32"),
    )
    learner = build.build_learner(config, saved.learner.objective, phase="prefill")
    learner.load_state_dict(saved.learner.state_dict())
    trunk = saved.config.model.trunk
    if trunk == "encoder_decoder":
        return TwoStackGraph(learner.trunk, learner.heads, read).eval()
    return Graph(learner.trunk, learner.heads, read, trunk in TWO_SIDED).eval()


def traced(graph: nn.Module, model: ModelConfig, names: list[str], what: str) -> dict[str, bytes]:
    """model.onnx, and beside it the file of its weights where they are too large for one."""
    length = min(12, model.max_length)
    example = [torch.ones(2, length, dtype=torch.int64) for _ in names]
    batch = torch.export.Dim("batch")
    row = {0: batch, 1: torch.export.Dim("length", max=model.max_length)}
    target = {0: batch, 1: torch.export.Dim("decoder_length", max=model.max_length)}
    axes = {name: target if name == "decoder_input_ids" else row for name in names}
    try:
        with torch.no_grad(), quiet():
            program = torch.onnx.export(
                graph,
                (),
                kwargs=dict(zip(names, example, strict=True)),
                dynamo=True,
                dynamic_shapes=axes,
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
        differences = []
        for given, inputs, keep_BT in shapes_of(saved.config.model):
            try:
                (logits,) = session.run(None, {name: given[name].numpy() for name in names})
            except Exception as error:
                said = str(error).strip().splitlines()[0]
                raise UserError(
                    f"onnxruntime cannot run the graph of {saved.folder} on rows of every shape "
                    f"({said}); nothing is written; export it with --format nanolm"
                ) from error
            hidden_BTD = saved.learner.trunk(inputs)
            ours, theirs = compare(saved, hidden_BTD, keep_BT, torch.from_numpy(logits))
            differences.append((ours - theirs).abs().max())
    # Python's max forgets a NaN that is not the first.
    largest = float(torch.stack(differences).max())
    require(
        largest <= LIMIT,
        f"onnxruntime computes something else of {saved.folder}: the largest difference is "
        f"{largest:.1e}, above {LIMIT:.0e}; nothing is written",
    )
    note(f"proof: largest difference from onnxruntime {largest:.1e} (float32, rows of two shapes)")
    return largest


def shapes_of(model: ModelConfig) -> Iterator[tuple[dict[str, Tensor], Inputs, Tensor]]:
    """(what a graph may read, what the trunk reads, which tokens count) of rows of two shapes."""
    return two_pairs(model) if model.trunk == "encoder_decoder" else two_shapes(model)


def two_shapes(model: ModelConfig) -> Iterator[tuple[dict[str, Tensor], Inputs, Tensor]]:
    """Several rows, one of them half padding if the model is two-sided; and one shorter row."""
    tokens_BT, inputs, words = same_rows(model, None)
    yield {"input_ids": tokens_BT, **words}, inputs, words["attention_mask"].bool()
    length = max(1, tokens_BT.shape[1] * 2 // 3)
    given = {name: rows[:1, :length] for name, rows in {"input_ids": tokens_BT, **words}.items()}
    mask = Mask(key_lengths=torch.tensor([length])) if model.trunk in TWO_SIDED else Mask()
    segments = given.get("token_type_ids")
    shorter = Inputs(tokens_BT=given["input_ids"], segments_BT=segments, mask=mask)
    yield given, shorter, given["attention_mask"].bool()


def two_pairs(model: ModelConfig) -> Iterator[tuple[dict[str, Tensor], Inputs, Tensor]]:
    """Sources and targets of other lengths: two, the second source half padding, and one whose
    target is the longer one."""
    tokens_BS, inputs, keep_BS = same_pairs(model)
    assert inputs.tokens_BT is not None
    for rows, length in ((2, tokens_BS.shape[1]), (1, max(1, inputs.tokens_BT.shape[1] // 2))):
        source_BS, tokens_BT = tokens_BS[:rows, :length], inputs.tokens_BT[:rows]
        mask_BS = keep_BS[:rows, :length].long()
        given = {
            "input_ids": source_BS,
            "attention_mask": mask_BS,
            "decoder_input_ids": tokens_BT,
        }
        pair = dataclasses.replace(
            inputs,
            tokens_BT=tokens_BT,
            source_tokens_BS=source_BS,
            source_mask=Mask(key_lengths=mask_BS.sum(1)),
        )
        yield given, pair, torch.ones_like(tokens_BT, dtype=torch.bool)
