"""`nanolm export --format transformers` of fine-tuned models: transformers' class for the task
opens them and answers the same."""

import dataclasses

import pytest
import torch
import transformers
from safetensors.torch import save_file

from nanolm import build
from nanolm.config.load import load_config
from nanolm.config.model import ModelConfig
from nanolm.data.prepare.tokenizer_training import train_tokenizer
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError
from nanolm.finetune import published
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.published import task_folder
from nanolm.hub.folder import read_tokenizer
from nanolm.hub.heads import activation_of
from nanolm.inference.export_transformers import transformers_folder
from nanolm.inference.parity import randomise
from nanolm.saved import Saved
from tests.published import write_tokenizer
from tests.test_tokenizer import corpus

TASKS = {
    "classify": ("--objective.labels=[yes,no,perhaps]", "--objective.pair=false"),
    "regress": (
        *("--objective.scores=[warm,cold]", "--objective.mean=[3.0,-1.0]"),
        *("--objective.std=[2.0,0.5]", "--objective.pair=false"),
    ),
    "tag": ("--objective.labels=[O,B-X,I-X]",),
    "read": (),
    "choose": (),
}
POOLED = ("classify", "regress", "choose")
SHAPES = {
    "bert": {"n_segments": 2, "norm_eps": 1e-12},
    "roberta": {"n_segments": 1},
    "distilbert": {"n_segments": 0, "norm_eps": 1e-12},
    "albert": {"n_segments": 2, "embedding_width": 12, "share_layers": True},
}
AUTO = {
    "classify": "AutoModelForSequenceClassification",
    "regress": "AutoModelForSequenceClassification",
    "tag": "AutoModelForTokenClassification",
    "read": "AutoModelForQuestionAnswering",
    "choose": "AutoModelForMultipleChoice",
}


def tuned(shape: str, task: str, folder, pooling: str = "cls") -> Saved:
    """A model with random weights, as fine-tuning on the task would have saved it."""
    words = [f"--objective.name={task}", "--init_from=unused", "--data.path=unused"]
    if task in POOLED:
        words.append(f"--objective.pooling={pooling}")
        words.append(f"--objective.activation={activation_of(shape)}")
    config = load_config([*words, *TASKS[task], f"--run.dir={folder}"], schema=TaskConfig)
    model = ModelConfig(
        **({"trunk": "encoder", "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48}),
        **({"norm_position": "post", "embedding_norm": True, "max_length": 48}),
        **({"vocab_size": 448} | SHAPES[shape]),
    )
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


CASES = [
    *[("bert", task) for task in TASKS],
    *[("roberta", task) for task in TASKS],
    *[("distilbert", task) for task in TASKS],
    *[("albert", task) for task in TASKS],
]


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


def test_what_transformers_decides_differently_is_refused(tmp_path):
    saved = tuned("bert", "classify", tmp_path / "a", pooling="mean")
    with pytest.raises(UserError, match=r"--objective\.pooling cls"):
        task_folder(saved)
    saved = tuned("distilbert", "classify", tmp_path / "b")
    with pytest.raises(UserError, match=r"bert is nearest.*id of padding|norm_eps|n_segments"):
        only = {"roberta": published.task_families("classify")["roberta"]}
        transformers_folder(saved.config, saved.tokenizer, {}, only)


def test_a_wrong_head_is_caught_by_the_proof(tmp_path, monkeypatch):
    saved = tuned("bert", "regress", tmp_path / "a")
    monkeypatch.setattr(published, "scaled", lambda task, options, tensors: tensors)
    with pytest.raises(UserError, match="computes something else"):
        task_folder(saved)
