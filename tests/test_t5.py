"""T5, both versions, against `transformers`: the same weights give the same numbers to 1e-5."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from nanolm.config.load import load_config
from nanolm.errors import UserError
from nanolm.inference.beam_search import BeamSearch
from nanolm.inference.generate import Chosen, write
from nanolm.inference.generate_from_source import SourceGenerator
from nanolm.inference.sampling import Sampling
from nanolm.inference.t5_names import from_transformers, to_transformers
from nanolm.model.trunk import Inputs
from nanolm.ops.masks import Mask
from nanolm.pretrain import run_train
from nanolm.saved import Saved, open_saved
from tests.prepared import SMALL, prepared_corpus, trained_run

B, S, T, V = 3, 40, 23, 512
SEED = 2  # of those for which greedy decoding says more than one thing in some row
LENGTHS = torch.tensor([40, 17, 5])
PADDED = (torch.arange(S) < LENGTHS[:, None]).long()
SHAPE = {
    "trunk": "encoder_decoder",
    "n_layers": 3,
    "d_model": 64,
    "n_heads": 4,
    "head_dim": 24,
    "d_ff": 96,
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "bias": False,
    "positions": {"name": "t5"},
    "attention_scale": 1.0,
    "weight_init": "t5",
    "vocab_size": V,
}
VERSIONS = {
    "v1_0": ({"feed_forward": "relu", "tied": True, "logit_scale": True}, "relu"),
    "v1_1": ({"feed_forward": "geglu_tanh", "tied": False}, "gated-gelu"),
}


def peer(version, **keys):
    """T5ForConditionalGeneration of SHAPE with random weights; v1.1's head is its own."""
    config = T5Config(
        vocab_size=V,
        d_model=64,
        d_kv=24,
        d_ff=96,
        num_layers=3,
        num_heads=4,
        feed_forward_proj=VERSIONS[version][1],
        tie_word_embeddings=version == "v1_0",
        decoder_start_token_id=0,
        **keys,
    )
    with torch.random.fork_rng(devices=[]):  # the weights are the same in every run
        torch.manual_seed(SEED)
        model = T5ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(1)
    if version == "v1_1":  # `transformers` ties a model that it builds, whatever its config says
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data * 0.5 + 0.08 * noise + 0.3 * (parameter.data == 1)
        if name.startswith("decoder") and name.endswith(("o.weight", "wo.weight")):
            parameter.data *= 4  # what is written depends on more than the token before
    return model.eval()


def model_config(version):
    return load_config([], base={"model": SHAPE | VERSIONS[version][0]}).model


@pytest.fixture(params=VERSIONS)
def pair(request, make_learner):
    """(the version, ours, theirs) with the same weights."""
    theirs = peer(request.param)
    ours = make_learner({**SHAPE, **VERSIONS[request.param][0]}, {"name": "span"}, row_length=40)
    ours.load_state_dict(from_transformers(model_config(request.param), theirs.state_dict()))
    return request.param, ours, theirs


BEAMS = {
    "do_sample": False,
    "early_stopping": False,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "return_dict_in_generate": True,
    "output_scores": True,
}


def some_tokens(length, seed=2):
    return torch.randint(1, V, (B, length), generator=torch.Generator().manual_seed(seed))


def source_inputs(**keys):
    return Inputs(source_tokens_BS=some_tokens(S), source_mask=Mask(key_lengths=LENGTHS), **keys)


def test_hidden_states_and_logits_with_padding(pair):
    _, ours, theirs = pair
    written = some_tokens(T, seed=3)
    with torch.no_grad():
        out = theirs(
            input_ids=some_tokens(S),
            attention_mask=PADDED,
            decoder_input_ids=written,
            output_hidden_states=True,
        )
        encoded = ours.trunk.encode(source_inputs())
        hidden = ours.trunk(source_inputs(tokens_BT=written))
        logits = ours.heads["lm"](hidden)
    kept = PADDED.bool()
    expected = out.encoder_last_hidden_state
    torch.testing.assert_close(encoded[kept], expected[kept], atol=1e-5, rtol=1e-5)
    expected = out.decoder_hidden_states[-1]
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, out.logits, atol=1e-5, rtol=1e-5)
    targets = some_tokens(T, seed=5).flatten()
    expected = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets, reduction="sum")
    keys = {"label_smoothing": 0.0, "z_loss": 0.0}
    loss = ours.heads["lm"].cross_entropy(hidden.flatten(0, 1), targets, **keys).loss
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)  # what is trained is the same


def test_names_map_there_and_back(pair):
    version, ours, theirs = pair
    model = model_config(version)
    named = to_transformers(model, ours.state_dict())
    assert set(named) == {name for name, _ in theirs.named_parameters()}
    for name, parameter in theirs.named_parameters():
        assert torch.equal(named[name], parameter), name
    back = from_transformers(model, named)
    assert set(back) == set(ours.state_dict())
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back[name], tensor), name


def train(folder, *words):
    """A small run of T5's blocks with all its places of dropout."""
    shape = {**SHAPE, **VERSIONS["v1_1"][0], "vocab_size": "null", "positions.name": "t5"}
    del shape["positions"]
    keys = shape | dict.fromkeys(
        ("dropout", "attention_dropout", "feed_forward_dropout", "final_dropout"), 0.1
    )
    argv = [
        *(f"--model.{key}={str(value).lower()}" for key, value in keys.items()),
        *SMALL,
        *("--objective.name=span", "--schedule.name=constant", "--run.log_every=1"),
        *(f"--data.path={prepared_corpus()}", f"--run.dir={folder}"),
    ]
    run_train(load_config([*argv, *words]))
    return folder


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


def test_a_resumed_run_ends_bit_equal_to_an_undisturbed_one(tmp_path):
    whole = train(tmp_path / "whole", "--train.steps=6")
    halves = train(tmp_path / "halves", "--train.steps=3")
    train(tmp_path / "halves", "--train.steps=6", "--resume=auto")
    assert losses(whole) == losses(halves) and len(losses(whole)) == 6
    weights = [
        load_file(run / "checkpoints" / "step-00000006" / "model.safetensors")
        for run in (whole, halves)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def chosen(generator, prompts, count):
    """The most likely tokens [B, count], one after the other."""
    logits = generator.logits(prompts, count)
    tokens = [next(logits).argmax(dim=-1)]
    for _ in range(count - 1):
        tokens.append(logits.send(Chosen(tokens[-1])).argmax(dim=-1))
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_decoding_writes_what_transformers_writes(pair, tokenizer, tmp_path, use_cache):
    version, ours, theirs = pair
    config = load_config([], base={"model": SHAPE | VERSIONS[version][0]})
    generator = SourceGenerator(Saved(tmp_path, config, tokenizer, ours), use_cache=use_cache)
    sources, count = some_tokens(S), 20
    prompts = [row[:n].tolist() for row, n in zip(sources, LENGTHS.tolist(), strict=True)]
    theirs.generation_config.eos_token_id = None  # all rows write on to the end
    expected = theirs.generate(
        sources, attention_mask=PADDED, max_new_tokens=count, do_sample=False, num_beams=1
    )
    found = chosen(generator, prompts, count)
    assert expected.shape == (B, count + 1) and (expected[:, 0] == 0).all()
    assert torch.equal(found, expected[:, 1:])
    assert len(found.unique()) > B  # some row says more than one thing


@pytest.mark.parametrize(
    ("size", "penalty"),
    [
        (5, 1.0),
        (2, 0.0),
        (5, 2.0),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in [(2, 1.0), (5, 0.0), (2, 2.0)]),
    ],
)
def test_beams_find_what_those_of_transformers_find(pair, tokenizer, tmp_path, size, penalty):
    version, ours, theirs = pair
    config = load_config([], base={"model": SHAPE | VERSIONS[version][0]})
    generator = SourceGenerator(Saved(tmp_path, config, tokenizer, ours), use_cache=size == 5)
    generator.forbidden_V[:] = False
    sources, count, ends = some_tokens(S), 12, set()
    prompts = [row[:n].tolist() for row, n in zip(sources, LENGTHS.tolist(), strict=True)]
    greedy = chosen(generator, prompts, count)
    for eos in greedy[:, :4].unique().tolist():  # ends that some texts reach and others do not
        generator.saved = dataclasses.replace(
            generator.saved, tokenizer=SimpleNamespace(eos=eos, pad=0)
        )
        found = BeamSearch(size, count, penalty)(generator, prompts)
        expected = theirs.generate(
            *(sources, GenerationConfig(**BEAMS)),
            attention_mask=PADDED, num_beams=size, num_return_sequences=size,
            length_penalty=penalty, max_new_tokens=count, eos_token_id=eos,
        )  # fmt: skip
        rows = expected.sequences[:, 1:].split(size)
        scores = expected.sequences_scores.split(size)
        for texts, theirs_KT, scores_K in zip(found, rows, scores, strict=True):
            assert [score for score, _ in texts] == pytest.approx(scores_K.tolist(), rel=1e-5)
            for (_, text), ids in zip(texts, theirs_KT.tolist(), strict=True):
                assert text == ids[: ids.index(eos) if eos in ids else count]
                ends.add(len(text))
    assert len(ends) > 1  # texts of more lengths than one were compared


def test_a_cache_projects_the_source_once_and_changes_no_logit(pair, tokenizer, tmp_path):
    version, ours, _ = pair
    config = load_config([], base={"model": SHAPE | VERSIONS[version][0]})
    written = some_tokens(T, seed=4)
    with torch.no_grad():
        whole = ours.trunk(source_inputs(tokens_BT=written))
        generator = SourceGenerator(Saved(tmp_path, config, tokenizer, ours))
        cache = generator.new_cache(B, T)
        encoded = ours.trunk.encode(source_inputs())
        steps, kept = [], []
        for t in range(T):
            one = source_inputs(tokens_BT=written[:, t : t + 1], cache=cache, source_BSD=encoded)
            steps.append(ours.trunk(one))
            kept.append(cache.sources[0][0].data_ptr())
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-5)
    assert len(set(kept)) == 1 and len(cache.sources) == SHAPE["n_layers"]


def test_a_trained_model_fills_gaps_and_names_them():
    generator = SourceGenerator(open_saved(trained_run("span")))
    sentinels, tokenizer = generator.sentinels, generator.saved.tokenizer
    ids = generator.prompt_ids("def f(<mask>, x):\n    return <mask>")
    assert [i for i in ids if i in sentinels] == sentinels[:2] and ids[-1] == tokenizer.eos
    prompts = ["def f(<mask>):", "import <mask>"]
    keys = {"max_tokens": 12, "sampling": Sampling(temperature=0)}
    texts = write(generator, prompts, **keys)
    assert all(text.startswith(tokenizer.piece(sentinels[0])) for text in texts)
    assert [write(generator, [prompt], **keys)[0] for prompt in prompts] == texts
    with pytest.raises(UserError, match="33 gaps"):
        generator.prompt_ids("<mask>" * 33)
