"""One block for all layers, and embeddings narrower than the blocks (Lan et al. 2020)."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanolm.build import build_learner, build_objective, initialiser, resolve
from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.config.load import load_config
from nanolm.config.model import ModelConfig
from nanolm.distributed.sharding import whole
from nanolm.errors import UserError
from nanolm.model.trunk import Inputs
from nanolm.ops.masks import Mask
from nanolm.tools.estimate import Sizes, largest, scaled
from nanolm.training.engine import Engine
from nanolm.training.flops import forward_flops_per_token
from tests.conftest import TINY, tiny_tokenizer
from tests.tiny_run import in_ranks

MLM = {"name": "mlm"}
ENCODER = {"trunk": "encoder", "n_layers": 3, "norm_position": "post", "embedding_norm": True}
SHARED = ENCODER | {"share_layers": True}
TOKENS = torch.arange(32).view(2, 16) * 7 % 512
MASK = Mask(key_lengths=torch.tensor([16, 9]))


@pytest.mark.parametrize("encoding", ["learned", "rotary", "alibi", "t5"])
@pytest.mark.parametrize("position", ["pre", "post"])
def test_a_shared_block_is_as_many_blocks_with_equal_weights(make_learner, encoding, position):
    """The same hidden states bit for bit, and the sum of the blocks' gradients."""
    keys = {"positions": {"name": encoding}, "norm_position": position, "embedding_norm": False}
    shared, apart = (make_learner(start | keys, MLM) for start in (SHARED, ENCODER))
    assert len(shared.trunk.blocks) == 1 and len(apart.trunk.blocks) == 3
    own = shared.state_dict()
    for name, tensor in apart.state_dict().items():
        head, number, tail = name.partition("blocks.")
        tensor.copy_(own[f"{head}{number}0{tail[1:]}" if number else name])
    found = [m.trunk(Inputs(tokens_BT=TOKENS, mask=MASK)) for m in (shared, apart)]
    assert torch.equal(*found)
    for hidden in found:
        hidden.square().sum().backward()
    for name, parameter in shared.trunk.blocks[0].named_parameters():
        grads = [dict(block.named_parameters())[name].grad for block in apart.trunk.blocks]
        torch.testing.assert_close(parameter.grad, sum(grads), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("encoding", ["learned", "sinusoidal", "rotary", "alibi", "t5"])
def test_narrow_embeddings_are_projected_after_their_norm(make_learner, encoding):
    keys = ENCODER | {"embedding_width": 12, "n_segments": 2, "positions": {"name": encoding}}
    learner = make_learner(keys, MLM)
    trunk = learner.trunk
    assert trunk.embedding.weight.shape == (512, 12) and trunk.segments.weight.shape == (2, 12)
    segments = (torch.arange(16) > 4).long().expand(2, 16)
    summed = trunk.embedding(TOKENS) + trunk.segments(segments)
    normed = trunk.embedding_norm(trunk.positions.embed(summed, torch.arange(16)[None]))
    x, _ = trunk.embed(Inputs(tokens_BT=TOKENS, segments_BT=segments))
    torch.testing.assert_close(x, normed @ trunk.projection.weight.T + trunk.projection.bias)
    logits = learner.heads["lm"](trunk(Inputs(tokens_BT=TOKENS, segments_BT=segments)))
    assert logits.shape == (2, 16, 512)
    assert learner.heads["lm"].weight is trunk.embedding.weight


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu2"])
def test_the_heads_transform_has_the_activation_that_the_model_names(make_learner, activation):
    head = make_learner(ENCODER | {"head_activation": activation}, MLM).heads["lm"]
    x = torch.linspace(-2, 2, 32)
    functions = {
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
        "relu": torch.relu,
        "relu2": lambda y: torch.relu(y) ** 2,
    }
    expected = head.transform.norm(functions[activation](head.transform.dense(x)))
    assert torch.equal(head.transform(x), expected)


REFUSED = {
    "a decoder's blocks": ({"share_layers": True}, "model.share_layers=True is for encoders"),
    "a decoder's embeddings": ({"embedding_width": 8}, "model.embedding_width=8 is for encoders"),
    "windows by layer": (SHARED | {"window": [4, None]}, "model.window or model.positions.base"),
    "bases by layer": (
        SHARED | {"positions": {"name": "rotary", "base": [10.0, 20.0]}},
        "model.window or model.positions.base",
    ),
    "a first block of its own": (SHARED | {"norm_position": "pre"}, "norm_position to post"),
    "no width": (ENCODER | {"embedding_width": 0}, "embedding_width"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_shared_or_narrow_is_refused_in_one_sentence(kind, make_learner):
    keys, said = REFUSED[kind]
    with pytest.raises(UserError, match=said) as caught:
        make_learner(keys, MLM if keys.get("trunk") else {"name": "clm"})
    assert "\n" not in str(caught.value)


def test_a_narrow_embedding_needs_the_heads_transform(make_learner):
    with pytest.raises(UserError, match=r"set objective\.transform to true"):
        make_learner(ENCODER | {"embedding_width": 12}, MLM | {"transform": False})


def test_flops_are_what_pytorch_counts(make_learner):
    keys = SHARED | {"embedding_width": 12, "d_ff": 40}
    learner = make_learner(keys, MLM, kernels={"attention": "reference"})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        learner.heads["lm"](learner.trunk(Inputs(tokens_BT=TOKENS)))
    model = ModelConfig(**keys, d_model=32, n_heads=4, vocab_size=512)
    assert counter.get_total_flops() == pytest.approx(32 * forward_flops_per_token(model, 16))


def config_of(**distributed):
    config = load_config(
        [],
        base={
            "model": {**TINY, **SHARED, "embedding_width": 12},
            "objective": MLM,
            "data": {"row_length": 16},
            "distributed": distributed,
        },
    )
    return resolve(config, tiny_tokenizer())


def test_the_largest_models_size_does_not_grow_with_its_depth():
    config = config_of()

    def sizes_of(model):
        changed = dataclasses.replace(config, model=model)
        objective = build_objective(changed, tiny_tokenizer())
        return Sizes.of(build_learner(changed, objective, meta=True))

    (limit,) = largest(config, sizes_of, [("ddp", 1)], "rtx4090")
    assert limit.model == scaled(config.model, limit.model.kv_heads)
    assert limit.parameters == sizes_of(limit.model).total
    assert limit.model.embedding_width / 12 == pytest.approx(limit.model.d_model / 32, rel=0.1)


def gradients(world):
    """A shared block's gradients over two ranks, gathered by FSDP, are one process's."""
    config = config_of(strategy="fsdp")
    objective = build_objective(config, tiny_tokenizer())
    born = build_learner(config, objective, meta=True)
    engine = Engine(born, world, config, initialise=initialiser(config))
    plain = build_learner(config, objective)
    expected = learner_tensors(plain)
    for name, tensor in learner_tensors(born).items():
        assert torch.equal(whole(tensor), expected[name]), name
    index = torch.tensor([1, 4, 20])
    batch = {"tokens": TOKENS, "masked_index": index, "masked_targets": TOKENS.flatten()[index]}
    born.train()
    for number in range(2):
        with engine.synchronised(number == 1):
            engine.module(batch)["mlm"].sum.backward()
    (2 * world.size * plain(batch)["mlm"].sum).backward()
    for (name, left), right in zip(born.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(left.grad), right.grad, msg=name, rtol=1e-4, atol=1e-3)
    return "same"


@pytest.mark.slow  # test_sharding.py divides weights of blocks that are not shared
def test_a_shared_block_is_sharded_and_its_gradients_are_summed():
    assert in_ranks(2, gradients) == ["same"] * 2
