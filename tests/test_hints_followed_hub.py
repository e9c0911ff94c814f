"""Remedies of imports, exports and other people's tokenizers are followed, as
`test_hints_followed.py` follows those of the other commands."""

import base64
import contextlib
import functools
import io
import pathlib
import sysconfig
from collections.abc import Callable

import pytest
import torch

from nanolm.finetune import published
from nanolm.hub import importing
from nanolm.inference import export_peft
from tests.finetuned import QUIET
from tests.kinds_of_run import (
    call,
    data_of,
    like_gpt2,
    pretrained,
    scratch,
    tuned,
    words_of,
    written,
)
from tests.prepared import train
from tests.published import edit_config, write_published
from tests.test_hints_followed import LORA, Row, finetuning, folder_of, follow, training

LLAMA = ("--model.norm=rmsnorm", "--model.feed_forward=swiglu", "--model.bias=false")
LLAMA += ("--model.positions.name=rotary", "--model.tied=false")
ONE_STEP = ("--train.steps=1", "--schedule.warmup=0")
GPT2 = ("--model.feed_forward=gelu_tanh", *ONE_STEP)


@functools.cache
def like_llama(*more: str) -> pathlib.Path:
    """A run of one step whose model has the shape of Llama."""
    run = scratch() / "-".join(["llama", *(word.strip("-").replace("=", "-") for word in more)])
    bpe = corpus_of("bpe", "--tokenizer_type=bpe", "--vocab_size=400")
    with contextlib.redirect_stdout(io.StringIO()):
        train(run, *ONE_STEP, *LLAMA, f"--data.path={bpe}", *more)
    return run


@functools.cache
def adapted(*more: str) -> pathlib.Path:
    """A decoder's run of one step with an adapter on `like_gpt2`."""
    run = scratch() / "-".join(["adapted", *(word.strip("-").replace("=", "-") for word in more)])
    with contextlib.redirect_stdout(io.StringIO()):
        train(run, *GPT2, f"--init_from={like_gpt2()}", *more)
    return run


@functools.cache
def with_a_head() -> pathlib.Path:
    """An encoder's run of one step with an adapter, and a head that its base has otherwise."""
    words = ("--objective.name=mlm", "--objective.transform=false", "--model.trunk=encoder")
    words += ("--model.positions.name=rotary", f"--init_from={pretrained('mlm')}")
    with contextlib.redirect_stdout(io.StringIO()):
        train(scratch() / "headed", *ONE_STEP, *words, "--peft.name=lora")
    return scratch() / "headed"


@functools.cache
def source() -> pathlib.Path:
    """Lines of text."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    content = [(library / name).read_text() for name in ("argparse.py", "textwrap.py")]
    path = scratch() / "source.txt"
    path.write_text("".join(content))
    return path


CUT = ("--txt_documents=line", "--val_fraction=0.2", "--workers=1")


def rank_file() -> pathlib.Path:
    """The single bytes alone, under a name that no encoding has."""
    path = scratch() / "own.tiktoken"
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    path.write_text("".join(lines))
    return path


@functools.cache
def corpus_of(name: str, *words: str) -> pathlib.Path:
    """A corpus of one file, prepared with other pieces."""
    out = scratch() / f"corpus-{name}"
    done = call(["prepare", str(source()), f"--out={out}", *CUT, *words])
    assert done.status == 0, done
    return out


def of_ranks() -> pathlib.Path:
    return corpus_of("ranks", f"--tokenizer=gpt2:{rank_file()}")


def unigram() -> pathlib.Path:
    return corpus_of("unigram", "--tokenizer_type=unigram", "--vocab_size=400")


def without_family(folder: pathlib.Path) -> pathlib.Path:
    write_published(folder / "a", "gpt2")
    edit_config(folder / "a", model_type=None)
    return folder / "a"


def pickled(folder: pathlib.Path) -> pathlib.Path:
    model = write_published(folder / "a", "gpt2")
    (folder / "a" / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "a" / "pytorch_model.bin")
    return folder / "a"


def whole(folder: pathlib.Path) -> pathlib.Path:
    write_published(folder / "a", "gpt2")
    return folder / "a"


def classifying(folder: pathlib.Path, base: object) -> list[object]:
    words = finetuning("classify", folder)
    return [word for word in words if "init_from" not in str(word)] + [f"--init_from={base}"]


def exporting(run: pathlib.Path, form: str, folder: pathlib.Path, *more: str) -> list[object]:
    return ["export", run, f"--format={form}", f"--out={folder / 'x'}", *more]


def preparing(folder: pathlib.Path, *more: object) -> list[object]:
    return ["prepare", source(), f"--out={folder / 'out'}", *CUT, *more]


AS_IT_SAYS, AS_NANOLM = {"--format": None}, {"--format": "nanolm"}
ROWS: dict[str, Callable[[pathlib.Path], Row]] = {
    "a family that nobody names": lambda f: Row(
        ["import", without_family(f), f / "b"], {"--family": "gpt2"}
    ),
    "a family that is named twice": lambda f: Row(
        ["import", whole(f), f / "b", "--family=llama"], drops=("--family",)
    ),
    "a family that a file of its own names": lambda f: Row(
        [
            *("import", written("export", like_llama(), "--format=gguf"), f / "b"),
            "--family=qwen3",
        ],
        drops=("--family",),
    ),
    "a pickle": lambda f: Row(["import", pickled(f), f / "b"], {"--allow_pickle": None}),
    "a base that is a pickle": lambda f: Row(
        classifying(f, f"hf:{pickled(f)}"),
        runs="import",
        given={"OUT": f / "b"},
        behind=classifying(f, f / "b"),
    ),
    "a base of a family that nobody names": lambda f: Row(
        classifying(f, f"hf:{without_family(f)}"),
        runs="import",
        given={"OUT": f / "b", "NAME": "gpt2"},
        behind=classifying(f, f / "b"),
    ),
    "a place that is taken (import)": lambda f: Row(
        ["import", whole(f), folder_of(f / "b")], behind=["import", f / "a", f / "c"]
    ),
    "a base of no adapter": lambda f: Row(
        ["import", whole(f), f / "b", f"--base={like_gpt2()}"], drops=("--base",)
    ),
    "an adapter without its base": lambda f: Row(
        ["import", written("export", adapted("--peft.name=lora"), "--format=peft"), f / "b"],
        {"--base": like_gpt2()},
    ),
    "an adapter as an adapter's base": lambda f: Row(
        [
            *("import", written("export", adapted("--peft.name=lora"), "--format=peft"), f / "b"),
            f"--base={adapted('--peft.name=lora')}",
        ],
        {"--base": like_gpt2()},
    ),
    "no adapter to write": lambda f: Row(exporting(like_gpt2(), "peft", f), AS_IT_SAYS),
    "an adapter that peft has not": lambda f: Row(
        exporting(adapted("--peft.name=ia3"), "peft", f),
        runs="merge",
        given={"FOLDER": f / "m"},
        behind=["export", f / "m", f"--out={f / 'x'}", "--format=transformers"],
    ),
    "an adapter beside a whole head": lambda f: Row(
        exporting(with_a_head(), "peft", f),
        runs="merge",
        given={"FOLDER": f / "m"},
        behind=["export", f / "m", f"--out={f / 'x'}"],
    ),
    "an adapter as ONNX": lambda f: Row(
        exporting(LORA(), "onnx", f),
        runs="merge",
        given={"FOLDER": f / "m"},
        behind=["export", f / "m", f"--out={f / 'x'}"],
    ),
    "an adapter that --format peft writes": lambda f: Row(
        exporting(adapted("--peft.name=lora"), "gguf", f), AS_IT_SAYS
    ),
    "weights of no GGUF file": lambda f: Row(
        ["export", like_gpt2(), f"--out={f / 'x'}", "--weights=F16"], drops=("--weights",)
    ),
    "weights of a GGUF file": lambda f: Row(
        ["export", like_llama(), f"--out={f / 'x'}", "--weights=F16"], AS_IT_SAYS
    ),
    "another shape than a GGUF file's": lambda f: Row(
        exporting(like_gpt2(), "gguf", f), AS_IT_SAYS
    ),
    "rows that Q8_0 does not cut": lambda f: Row(
        exporting(like_llama("--model.d_ff=48"), "gguf", f, "--weights=Q8_0"), {"--weights": None}
    ),
    "a unigram as GGUF": lambda f: Row(
        exporting(like_llama(f"--data.path={unigram()}"), "gguf", f), AS_IT_SAYS
    ),
    "a rank file as GGUF": lambda f: Row(
        exporting(like_llama(f"--data.path={of_ranks()}"), "gguf", f), AS_IT_SAYS
    ),
    "two streams as ONNX": lambda f: Row(
        exporting(pretrained("permutation"), "onnx", f), AS_NANOLM
    ),
    "an answer that is no tensor": lambda f: Row(exporting(tuned("embed"), "onnx", f), AS_NANOLM),
    "a task that transformers has not": lambda f: Row(
        exporting(tuned("embed"), "transformers", f), AS_NANOLM
    ),
    "a rank file of no encoding": lambda f: Row(
        preparing(f, f"--tokenizer={rank_file()}"),
        behind=preparing(f, f"--tokenizer=gpt2:{rank_file()}"),
    ),
    "masks of a rank file": lambda f: Row(
        training(f, "--objective.name=mlm", "--model.trunk=encoder", f"--data.path={of_ranks()}"),
        runs="prepare",
        behind=training(f, "--objective.name=mlm", "--model.trunk=encoder"),
    ),
    "narrow embeddings without a transform": lambda f: Row(
        training(
            *(f, "--model.embedding_width=8", "--objective.name=mlm", "--model.trunk=encoder"),
            "--objective.transform=false",
        ),
        {"objective.transform": "true"},
    ),
    "a dialogue without a template": lambda f: Row(
        ["generate", like_gpt2(), "--chat=true", "--prompt=a", "--max_tokens=3"], drops=("--chat",)
    ),
    "the first token of two streams": lambda f: Row(
        [*classifying(f, pretrained("permutation")), "--objective.pooling=cls"],
        {"objective.pooling": "last"},
    ),
    "a transform of narrow embeddings": lambda f: Row(
        [*classifying(f, narrow()), "--objective.head=transform"], {"objective.head": "layer"}
    ),
    "an activation of no layer": lambda f: Row(
        [*finetuning("classify", f), "--objective.head=linear", "--objective.activation=relu"],
        drops=("objective.activation",),
    ),
    "a frame that no file gives": lambda f: Row(
        [*finetuning("classify", f), "--objective.frame=tokenizer"], drops=("objective.frame",)
    ),
}


@functools.cache
def narrow() -> pathlib.Path:
    """A run of one step with narrow embeddings."""
    words = ("--objective.name=mlm", "--model.trunk=encoder", "--model.embedding_width=8")
    with contextlib.redirect_stdout(io.StringIO()):
        train(scratch() / "narrow", *ONE_STEP, *words)
    return scratch() / "narrow"


@pytest.mark.parametrize("name", ROWS)
def test_a_remedy_that_is_followed_works(name, tmp_path, monkeypatch):
    for module in (importing, export_peft, published):  # which has tests of its own
        monkeypatch.setattr(module, "can_prove", lambda: False)
    follow(ROWS[name](tmp_path))


HEADS = {
    "a layer before the decision": (
        ["--objective.name=classify"],
        "--objective.head linear",
    ),
    "the mean of a decoder": (
        ["--objective.name=classify", "--objective.head=linear", "--objective.pooling=mean"],
        "--objective.pooling last",
    ),
    "a mean that needs a bias": (
        ["--objective.name=regress", "--objective.head=linear"],
        "--objective.mean [0]",
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_trained_as_its_refusal_says_goes_out(name, tmp_path):
    words, remedy = HEADS[name]
    task = words[0].partition("=")[2]
    begin = ["finetune", f"--init_from={like_gpt2()}", f"--data.path={data_of(task)}", *QUIET]
    begin += [*words_of(task), "--data.row_length=32", *words]
    out = [f"--out={tmp_path / 'x'}", "--format=transformers"]
    assert call([*begin, f"--run.dir={tmp_path / 'a'}"]).status == 0
    refused = call(["export", str(tmp_path / "a"), *out])
    assert refused.status == 2 and f"fine-tune with {remedy}, or export it" in refused.err
    option, value = remedy.split(" ")
    begin = [word for word in begin if not word.startswith(f"{option}=")]
    again = call([*begin, f"{option}={value}", f"--run.dir={tmp_path / 'b'}"])
    assert again.status == 0, again
    done = call(["export", str(tmp_path / "b"), *out])
    assert done.status == 0 and done.passes, done
