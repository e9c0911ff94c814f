"""Adapters of `peft`, in and out: its own model computes the same on the mapped weights."""

import dataclasses
import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nanolm import cli
from nanolm.errors import UserError
from nanolm.finetune.published_adapter import task_adapter
from nanolm.hub.adapter_files import CONFIG, WEIGHTS
from nanolm.hub.adapters import suffixes
from nanolm.inference import export_peft
from nanolm.inference.export_peft import PART, adapter_folder
from nanolm.model.trunk import Inputs
from nanolm.peft.base import attach
from nanolm.registry import PEFT
from nanolm.saved import open_saved
from tests.published import SHAPES, VOCAB, write_published
from tests.test_export_tasks import AUTO, tuned

TOKENS = torch.randint(5, VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))
EVERYTHING = {  # modules of theirs, in the blocks
    "gpt2": ["c_attn", "c_fc", "attn.c_proj", "mlp.c_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bert-mlm": ["query", "value", "attention.output.dense", "intermediate.dense"],
    "roberta": ["query", "key"],
    "distilbert": ["q_lin", "v_lin", "lin1", "lin2"],
    "modernbert": ["Wqkv", "attn.Wo", "Wi"],
}


@torch.no_grad()
def randomise(named, seed=5):
    """Changes large enough that a wrong row or scale shows."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in named:
        tensor.copy_(tensor + 0.2 * torch.randn(tensor.shape, generator=generator))


def base_of(shape, folder):
    """(published folder, its import)."""
    write_published(folder / "published", shape)
    cli.run(["import", str(folder / "published"), str(folder / "base")])
    return folder / "published", folder / "base"


def logits_of_ours(run, tokens=TOKENS):
    saved = open_saved(run)
    with torch.no_grad():
        return saved.learner.heads["lm"](saved.learner.trunk(Inputs(tokens_BT=tokens)))


def their_base(shape, published):
    model_class = getattr(transformers, SHAPES[shape][0])
    return model_class.from_pretrained(
        published, attn_implementation="eager", local_files_only=True
    ).eval()


def logits_of_theirs(model, tokens=TOKENS):
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def their_adapter(shape, published, out, seed=5, **options):
    """An adapter as peft writes it, with random weights; returns its logits on the base."""
    base = their_base(shape, published)
    model = peft.get_peft_model(base, peft.LoraConfig(**options))
    randomise((p for p in model.parameters() if p.requires_grad), seed)
    model.save_pretrained(out)
    return logits_of_theirs(model)


KINDS = {
    "lora": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
}
CASES = [
    *[("gpt2", "lora"), ("llama", "dora"), ("bert-mlm", "rslora"), ("roberta", "lora")],
    *[("distilbert", "dora"), ("modernbert", "rslora")],  # every family, and every kind twice
    *[
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [("gpt2", "rslora"), ("gpt2", "dora"), ("llama", "lora")]
    ],
]


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_an_adapter_of_peft_comes_in_and_goes_out_again(shape, kind, tmp_path):
    options = KINDS[kind]
    published, base = base_of(shape, tmp_path)
    options = options | {"target_modules": EVERYTHING[shape], "lora_dropout": 0.1}
    expected = their_adapter(shape, published, tmp_path / "adapter", **options)
    figures = tmp_path / "figures.json"
    words = ["import", str(tmp_path / "adapter"), str(tmp_path / "run"), f"--base={base}"]
    cli.run([*words, f"--json={figures}"])
    told = json.loads(figures.read_text())
    assert 0 < told["largest_difference"] < 1e-5
    assert told["method"] == ("dora" if options.get("use_dora") else "lora")
    torch.testing.assert_close(logits_of_ours(tmp_path / "run"), expected, atol=1e-5, rtol=1e-5)
    assert (logits_of_ours(base) - expected).abs().max() > 0.01
    out = ["export", str(tmp_path / "run"), f"--out={tmp_path / 'again'}", "--format=peft"]
    cli.run(out)
    again, first = (load_file(tmp_path / name / WEIGHTS) for name in ("again", "adapter"))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in first.items())
    theirs = peft.PeftModel.from_pretrained(their_base(shape, published), tmp_path / "again")
    torch.testing.assert_close(logits_of_theirs(theirs), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_two_stacks_comes_in(tmp_path):
    """One that reads across is refused, since our adapters leave that as it is."""
    published, base = base_of("t5-gated", tmp_path)
    for modules in (["SelfAttention.q", "wi_1"], ["EncDecAttention.q"]):
        config = peft.LoraConfig(r=3, target_modules=modules)
        model = peft.get_peft_model(their_base("t5-gated", published), config)
        randomise(p for p in model.parameters() if p.requires_grad)
        model.save_pretrained(tmp_path / modules[0])
    words = [str(tmp_path / "run"), f"--base={base}", f"--json={tmp_path / 'figures.json'}"]
    with pytest.raises(UserError, match=r"EncDecAttention.q, which nanolm does not change"):
        cli.run(["import", str(tmp_path / "EncDecAttention.q"), *words])
    cli.run(["import", str(tmp_path / "SelfAttention.q"), *words])
    assert 0 < json.loads((tmp_path / "figures.json").read_text())["largest_difference"] < 1e-5
    assert open_saved(tmp_path / "run").config.peft.targets == ["q", "up"]


def adapted(saved, name="lora", heads=(), **options):
    """A model as a run with an adapter saves it, with random weights in it."""
    chosen = PEFT.get(name).options(**options)
    adapter = attach(saved.learner, chosen, heads=heads)
    randomise(adapter.tensors(saved.learner).values())
    config = dataclasses.replace(saved.config, peft=chosen)
    return dataclasses.replace(saved, config=config)


def write(out, tensors, files):
    out.mkdir()
    save_file(tensors, out / f"{PART}.safetensors")
    for name, content in files.items():
        (out / name).write_bytes(content)
    return out


FUSED = [  # what one module of theirs holds of several parts of ours, and the other way round
    ("gpt2", "lora", ["q", "v"], 6, {}),
    ("gpt2", "dora", ["v"], 3, {}),
    ("gpt2", "lora", ["k", "v", "out", "down"], 3, {"c_attn": 6}),
    ("modernbert", "lora", ["q", "gate"], 3, {}),
    ("llama", "dora", ["qkv", "gate_up"], 3, {}),
    ("t5-gated", "lora", ["q", "v", "out", "gate"], 3, {}),
]


@pytest.mark.parametrize(("shape", "name", "targets", "rank", "pattern"), FUSED)
def test_parts_of_fused_weights_go_out(shape, name, targets, rank, pattern, tmp_path):
    published, base = base_of(shape, tmp_path)
    saved = adapted(open_saved(base), name, rank=3, alpha=5.0, targets=targets)
    tensors, files, figures = adapter_folder(saved, lambda line: None)
    assert 0 < figures["largest_difference"] < 1e-5
    facts = json.loads(files[CONFIG])
    assert facts["r"] == rank and facts["lora_alpha"] == pytest.approx(5 / 3 * rank)
    assert facts["rank_pattern"] == pattern
    assert facts["use_dora"] == (name == "dora")
    out = write(tmp_path / "out", tensors, files)
    theirs = peft.PeftModel.from_pretrained(their_base(shape, published), out).eval()
    named = {key.replace(".default", "") for key, _ in theirs.named_parameters() if "lora_" in key}
    dora = {f"{key}.weight" for key in tensors if key.endswith("magnitude_vector")}
    assert {key for key in tensors if f"{key}.weight" not in dora} | dora == named
    if shape.startswith("t5"):
        return  # the proof above has compared it: its trunk reads a source too
    with torch.no_grad():
        ours = saved.learner.heads["lm"](saved.learner.trunk(Inputs(tokens_BT=TOKENS)))
    torch.testing.assert_close(ours, logits_of_theirs(theirs), atol=1e-5, rtol=1e-5)
    assert (logits_of_ours(base) - ours).abs().max() > 0.01


@pytest.mark.parametrize(
    ("shape", "task"),
    [("bert", "classify"), ("roberta", "regress"), ("roberta", "choose"), ("distilbert", "tag")],
)
def test_an_adapter_of_a_task_brings_its_head(shape, task, tmp_path):
    saved = tuned(shape, task, tmp_path / "run")
    saved = adapted(saved, heads=(task,), rank=3, targets=["q", "v", "down"])
    told = []
    tensors, files, figures = task_adapter(saved, told.append)
    assert 0 < figures["largest_difference"] < 1e-5
    assert "proof: largest difference" in told[0]
    heads = [key for key in tensors if "lora_" not in key]
    assert len(heads) == (2 if task == "tag" else 4)
    facts = json.loads(files[CONFIG])
    assert all(any(f".{name}." in key for name in facts["modules_to_save"]) for key in heads)
    assert AUTO[task]  # the class that opens it


def test_a_wrong_scale_is_caught_and_nothing_is_written(tmp_path, monkeypatch):
    _, base = base_of("llama", tmp_path)
    saved = adapted(open_saved(base), rank=3, targets=["q"])
    right = export_peft.to_theirs
    monkeypatch.setattr(
        export_peft,
        "to_theirs",
        lambda family, model, own, scale, weights: right(family, model, own, 1.1 * scale, weights),
    )
    with pytest.raises(UserError, match="computes something else of the adapter"):
        adapter_folder(saved, lambda line: None)


def test_the_proof_is_left_out_without_peft(tmp_path, monkeypatch):
    _, base = base_of("gpt2", tmp_path)
    saved = adapted(open_saved(base), rank=3, targets=["q"])
    monkeypatch.setattr(export_peft.importlib.util, "find_spec", lambda name: None)
    told = []
    tensors, _, figures = adapter_folder(saved, told.append)
    assert tensors and figures["largest_difference"] is None
    assert told == ["the proof was left out: transformers or peft is not installed"]


def test_an_export_without_an_adapter_or_with_another_one_is_refused(tmp_path):
    _, base = base_of("llama", tmp_path)
    with pytest.raises(UserError, match=r"has no adapter .*--format transformers"):
        cli.run(["export", str(base), f"--out={tmp_path / 'out'}", "--format=peft"])
    saved = adapted(open_saved(base), "ia3")
    with pytest.raises(UserError, match=r"of the method ia3, .* writes lora and dora"):
        adapter_folder(saved, lambda line: None)
    saved = adapted(open_saved(base), heads=("lm",))
    with pytest.raises(UserError, match=r"trained its head lm whole"):
        adapter_folder(saved, lambda line: None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(base, adapter): a llama that was imported, and an adapter of it."""
    folder = tmp_path_factory.mktemp("llama")
    published, base = base_of("llama", folder)
    their_adapter("llama", published, folder / "adapter", r=4, target_modules=["q_proj"])
    return base, folder / "adapter"


def first(tensors, end):
    return next(key for key in tensors if key.endswith(end))


def without_b(tensors):
    del tensors[first(tensors, "lora_B.weight")]


def without_a_layer(tensors):
    for letter in "AB":
        del tensors[first(tensors, f"lora_{letter}.weight")]


def another_shape(tensors):
    key = first(tensors, "lora_A.weight")
    tensors[key] = tensors[key][:, 1:].contiguous()


def another_module(tensors):
    key = first(tensors, "lora_A.weight")
    tensors[key.replace("q_proj", "z_proj")] = tensors.pop(key)
    other = key.replace("_A.", "_B.")
    tensors[other.replace("q_proj", "z_proj")] = tensors.pop(other)


def a_whole_head(tensors):
    tensors["base_model.model.lm_head.weight"] = torch.zeros(2, 2)


REFUSED = [
    ({"peft_type": "IA3"}, None, r"peft_type 'IA3'.*merge_and_unload"),
    ({"bias": "all"}, None, r"sets bias to 'all'"),
    ({"modules_to_save": ["lm_head"]}, None, r"sets modules_to_save to \['lm_head'\]"),
    ({"init_lora_weights": "pissa"}, None, r"sets init_lora_weights to 'pissa'"),
    ({"trainable_token_indices": [1]}, None, r"sets trainable_token_indices to \[1\]"),
    ({"a_new_option": True}, None, r"sets a_new_option to True"),
    ({"r": 5}, None, r"the rank 5, and its A has 4 rows"),
    ({"lora_alpha": "8"}, None, r"lora_alpha as '8'"),
    ({"lora_alpha": 0}, None, r"lora_alpha as 0; it must be a number above 0"),
    ({"lora_alpha": float("nan")}, None, r"lora_alpha as nan"),
    ({"lora_dropout": "x"}, None, r"adapter_config.json gives lora_dropout as 'x'"),
    ({"lora_dropout": 1.5}, None, r"adapter_config.json gives lora_dropout as 1.5"),
    ({"alpha_pattern": {"layers.0.self_attn.q_proj": 3}}, None, r"several ranks or scales"),
    ({"alpha_pattern": {"(": 3}}, None, r"the alpha_pattern '\(', no pattern"),
    ({"use_dora": True}, None, r"lacks .*q_proj.lora_magnitude_vector"),
    ({}, without_b, r"lacks .*q_proj.lora_B"),
    ({}, without_a_layer, r"changes q in 1 of 2 layers"),
    ({}, another_shape, r"has 4 x 31 for .*on this base it is 4 x 32"),
    ({}, another_module, r"z_proj, which nanolm does not change in a llama; merge it"),
    ({}, a_whole_head, r"holds base_model.model.lm_head.weight, which is no low-rank change"),
]


@pytest.mark.parametrize(("keys", "change", "words"), REFUSED)
def test_what_would_be_computed_differently_is_refused(keys, change, words, llama, tmp_path):
    base, adapter = llama
    broken = tmp_path / "broken"
    broken.mkdir()
    facts = json.loads((adapter / CONFIG).read_text()) | keys
    (broken / CONFIG).write_text(json.dumps(facts))
    tensors = load_file(adapter / WEIGHTS)
    if change is not None:
        change(tensors)
    save_file(tensors, broken / WEIGHTS)
    with pytest.raises(UserError, match=words):
        cli.run(["import", str(broken), str(tmp_path / "out"), f"--base={base}"])
    assert not (tmp_path / "out").exists()


def test_a_base_is_asked_for_where_it_is_needed_and_only_there(llama, tmp_path):
    base, adapter = llama
    words = ["import", str(adapter), str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"holds an adapter .*--base OUT"):
        cli.run(words)
    with pytest.raises(UserError, match=r"holds no adapter_config.json; leave it out"):
        cli.run(["import", str(base), str(tmp_path / "a"), f"--base={base}"])
    cli.run([*words, f"--base={base}"])
    with pytest.raises(UserError, match=r"--base .* holds an adapter itself"):
        cli.run(["import", str(adapter), str(tmp_path / "b"), f"--base={tmp_path / 'run'}"])
    before = logits_of_ours(tmp_path / "run")
    cli.run(["merge", str(tmp_path / "run"), f"--out={tmp_path / 'merged'}"])
    after = logits_of_ours(tmp_path / "merged")
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("wanted", "others", "ends"),
    [
        (["h.0.a.proj", "h.1.a.proj"], ["h.0.m.proj", "h.0.fc"], ["a.proj"]),
        (["h.0.q"], ["h.0.k"], ["q"]),
        (["h.0.out.dense"], ["h.0.at.out.dense"], ["0.out.dense"]),
    ],
)
def test_the_shortest_end_that_no_other_module_has(wanted, others, ends):
    assert suffixes(wanted, [*wanted, *others]) == ends
