"""`nanolm export --format transformers` of fine-tuned models: transformers' class for the task
opens them and answers the same."""

import dataclasses

import pytest
import torch
import transformers
from safetensors.torch import save_file

from nanolm import build
from nanolm.config.load import load_config
from nanolm.data.prepare.tokenizer_training import train_tokenizer
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError
from nanolm.finetune import published
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.published import task_folder
from nanolm.hub.folder import read_tokenizer
from nanolm.hub.task_heads import TASK_HEADS
from nanolm.inference.export_transformers import transformers_folder
from nanolm.inference.parity import randomise
from nanolm.saved import Saved
from tests.published import write_tokenizer
from tests.test_tokenizer import corpus

TASKS = {
    "classify": ("--objective.labels=[yes,no,perhaps]", "--objective.pair=false"),
    "regress": (
        *("--objective.scores=[warm,cold]", "--objective.std=[2.0,0.5]", "--objective.pair=false"),
    ),
    "tag": ("--objective.labels=[O,B-X,I-X]",),
    "read": (),
    "choose": (),
}
POOLED = ("classify", "regress", "choose")
POST = {"trunk": "encoder", "norm_position": "post", "embedding_norm": True}
ROTARY = {"positions": {"name": "rotary"}, "bias": False}
LLAMA = ROTARY | {"norm": "rmsnorm", "feed_forward": "swiglu", "tied": False, "n_kv_heads": 2}
SHAPES = {
    "bert": POST | {"n_segments": 2, "norm_eps": 1e-12},
    "roberta": POST | {"n_segments": 1},
    "distilbert": POST | {"n_segments": 0, "norm_eps": 1e-12},
    "albert": POST | {"n_segments": 2, "embedding_width": 12, "share_layers": True},
    "modernbert": ROTARY
    | {"trunk": "encoder", "embedding_norm": True, "norm_bias": False, "feed_forward": "geglu"},
    "gpt2": {"feed_forward": "gelu_tanh"},
    "llama": LLAMA,
    "qwen3": LLAMA | {"qk_norm": True},
}
UNPUBLISHED = {
    "t5-encoder": {
        "trunk": "encoder",
        "norm": "rmsnorm",
        "bias": False,
        "positions": {"name": "t5"},
        "attention_scale": 1.0,
    },
    "xlnet": {
        "trunk": "two_stream",
        "norm_position": "post",
        "positions": {"name": "relative"},
        "n_segments": 3,
    },
}
"""Shapes whose heads of tasks transformers has in another form, or nanolm does not write."""
DECODERS = ("gpt2", "llama", "qwen3")
AUTO = {
    "classify": "AutoModelForSequenceClassification",
    "regress": "AutoModelForSequenceClassification",
    "tag": "AutoModelForTokenClassification",
    "read": "AutoModelForQuestionAnswering",
    "choose": "AutoModelForMultipleChoice",
}


def tuned(shape: str, task: str, folder, pooling: str = "cls", **options) -> Saved:
    """A model with random weights, as fine-tuning on the task would have saved it with the head
    that its family has in transformers, or with other options."""
    pooling = "last" if pooling == "cls" and shape in DECODERS else pooling
    if shape in TASK_HEADS:
        head = TASK_HEADS[shape][task]
        options = {"head": head.head} | options
        if head.head == "layer" and task in POOLED:
            options = {"activation": head.activation} | options
    if task == "regress":
        options = {"mean": "[0,0]" if shape in DECODERS else "[3.0,-1.0]"} | options
    words = [f"--objective.name={task}", "--init_from=unused", "--data.path=unused"]
    if task in POOLED:
        words.append(f"--objective.pooling={pooling}")
    words += [*TASKS[task], *(f"--objective.{key}={value}" for key, value in options.items())]
    config = load_config([*words, f"--run.dir={folder}"], schema=TaskConfig)
    shape_of = (SHAPES | UNPUBLISHED)[shape]
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48, "max_length": 48}
    model = load_config([], base={"model": sizes | {"vocab_size": 448} | shape_of}).model
    folder.mkdir()
    if shape == "roberta":
        write_tokenizer(folder, shape)
        tokenizer = read_tokenizer(folder)
    else:
        tokenizer = Tokenizer(train_tokenizer(corpus(), vocab_size=390, kind="bpe"))
    config = dataclasses.replace(config, model=model)
    learner = build.build_learner(config, build.build_objective(config, tokenizer), phase="prefill")
    randomise(learner)
    return Saved(folder, config, tokenizer, learner.eval())


CASES = [(shape, task) for shape in SHAPES for task in TASK_HEADS[shape]]


@pytest.mark.parametrize(("shape", "task"), CASES)
def test_transformers_answers_the_same(shape, task, tmp_path):
    told = []
    tensors, files, figures = task_folder(tuned(shape, task, tmp_path / "run"), told.append)
    assert 0 < figures["largest_difference"] < 1e-5
    assert figures["texts_with_other_ids"] == 0
    out = tmp_path / "out"
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        (out / name).write_bytes(content)
    auto = getattr(transformers, AUTO[task])
    model, report = auto.from_pretrained(out, local_files_only=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.model_type == shape
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, local_files_only=True)
    words = dict(tokenizer("quick brown", "fox", return_tensors="pt"))
    if task == "choose":
        words = {key: value[None] for key, value in words.items()}
    with torch.no_grad():
        answer = model.eval()(**words)
    assert torch.isfinite(answer[0]).all()
    if task == "classify":
        assert list(model.config.id2label.values()) == ["yes", "no", "perhaps"]
    if task == "regress":
        assert model.config.problem_type == "regression" and model.config.num_labels == 2


DIFFERENT = [
    ("bert", "classify", {"pooling": "mean"}, r"--objective\.pooling cls"),
    ("gpt2", "classify", {"pooling": "mean"}, r"--objective\.pooling last"),
    ("gpt2", "classify", {"head": "layer"}, r"--objective\.head linear"),
    ("llama", "regress", {"mean": "[0,2.5]"}, r"--objective\.mean \[0,0\]"),
    ("modernbert", "tag", {"head": "linear"}, r"--objective\.head transform"),
    ("modernbert", "classify", {"head": "linear"}, r"--objective\.head transform"),
    ("bert", "read", {"head": "transform"}, r"--objective\.head linear"),
    ("bert", "classify", {"activation": "relu"}, r"--objective\.activation tanh"),
]


def test_what_transformers_decides_differently_is_refused(tmp_path):
    for number, (shape, task, options, told) in enumerate(DIFFERENT):
        saved = tuned(shape, task, tmp_path / str(number), **options)
        with pytest.raises(UserError, match=told) as caught:
            task_folder(saved)
        assert str(caught.value).endswith("or export it with --format nanolm")
    saved = tuned("distilbert", "classify", tmp_path / "b")
    with pytest.raises(UserError, match=r"bert is nearest.*id of padding|norm_eps|n_segments"):
        only = {"roberta": published.task_families("classify")["roberta"]}
        transformers_folder(saved.config, saved.tokenizer, {}, only)


def test_a_wrong_head_is_caught_by_the_proof(tmp_path, monkeypatch):
    saved = tuned("bert", "regress", tmp_path / "a")
    monkeypatch.setattr(published, "scaled", lambda task, options, tensors: tensors)
    with pytest.raises(UserError, match="computes something else"):
        task_folder(saved)
