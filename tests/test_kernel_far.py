"""Places that are further apart than 2^31 elements: every index times stride is taken in 64 bits.

The views lie in virtual memory that is never touched but for a few pages, in the middle of it: an
offset that wraps around at 32 bits lands on zeros there, and shows as a wrong number.
"""

import functools
import mmap

import pytest
import torch

from nanolm.ops.bias import DenseBias
from nanolm.ops.contract import KERNELS, candidates
from nanolm.ops.masks import Mask, Ranges
from nanolm.tools.kernel_check.op_trials import normal

if torch.cuda.is_available():
    pytest.skip("a GPU's memory is not virtual", allow_module_level=True)

HALF = 2**31 + 2**22
"""Elements on either side of where a view begins."""


def untouched(n_bytes=4 * HALF, dtype=torch.float16):
    """Zeros in memory that exists when something is written there."""
    unreserved = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's number; named by Python 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | unreserved
    memory = mmap.mmap(-1, n_bytes, flags=flags)
    return torch.frombuffer(memory, dtype=dtype)


@pytest.fixture
def space():
    """A tensor larger than any that was ever filled."""
    return untouched()


def placed(space, values, stride):
    """The values as a view with these strides, its first element in the middle of the space."""
    view = space.as_strided(values.shape, stride, HALF)
    reach = sum((n - 1) * d for n, d in zip(values.shape, stride, strict=True))
    assert 2**31 <= reach < HALF
    return view.copy_(values)


def draw(*shape, seed=0):
    return normal(*shape, dtype=torch.float16, seed=seed, device="cpu")


def kernel_of(op, name="triton"):
    candidates(op)
    return KERNELS[op].get(name).build()


SIZES = (3, 9, 5, 9)
"""Three rows, nine heads, a few queries, nine keys: T = S = 16,384 has strides like those below."""


def with_bias(name, values):
    q, k, v = draw(3, 5, 9, 16), draw(3, 9, 9, 16, seed=1), draw(3, 9, 9, 16, seed=2)
    return kernel_of("attention", name).run(q, k, v, Mask(), bias=DenseBias(values), scale=0.25)


@functools.cache
def with_near_bias(name):
    return with_bias(name, draw(*SIZES, seed=3))


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("name", ["triton", "triton_decode"])
def test_dense_bias(space, name, axis):
    stride = [405, 45, 9, 1]
    stride[axis] = 2**31 // (SIZES[axis] - 1)
    far = with_bias(name, placed(space, draw(*SIZES, seed=3), stride))
    assert torch.equal(with_near_bias(name), far)


def attended(name, x):
    return kernel_of("attention", name).run(x, x, x, Mask(), scale=0.25)


@functools.cache
def attended_near(name):
    return attended(name, draw(3, 5, 9, 16))


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("name", ["triton", "triton_decode"])
def test_queries_keys_and_values(space, name, axis):
    sizes = (3, 5, 9, 16)
    x = draw(*sizes)
    stride = [720, 144, 16, 1]
    stride[axis] = 2**31 // (sizes[axis] - 1) + 1
    assert torch.equal(attended(name, placed(space, x, stride)), attended_near(name))


@pytest.mark.parametrize("name", ["triton", pytest.param("triton_decode", marks=pytest.mark.slow)])
def test_heads_that_are_too_many_for_32_bits(space, name):
    """A view with large strides is copied first, one with a small stride of many heads is not."""
    x = draw(1, 2, 258, 16)  # the fewest whose view is not copied
    far = placed(space, x, [32, 16, 2**31 // 257 + 1, 1])
    some = [0, 1, 128, 255, 256, 257]  # heads do not see each other
    assert torch.equal(attended(name, far)[:, :, some], attended(name, x[:, :, some]))


@pytest.mark.parametrize("name", ["triton", "triton_decode"])
def test_places_that_are_too_many_for_32_bits(space, name):
    """As above along a row: the last tile, of queries or of keys, begins beyond 2^31."""
    x, one = draw(1, 321, 1, 16), draw(1, 1, 1, 16, seed=1)
    far = placed(space, x, [16, 2**31 // 320 + 1, 16, 1])
    run = kernel_of("attention", name).run
    for wide, near in (((one, far, far), (one, x, x)), ((far, one, one), (x, one, one))):
        assert torch.equal(run(*wide, Mask(), scale=0.25), run(*near, Mask(), scale=0.25))


@pytest.mark.parametrize("condition", ["documents", "order"])
def test_numbers_of_many_keys(condition):
    """Three rows of 2^30 keys, of which a window leaves the last twenty: the documents of the third
    row's, or their order, lie beyond 2^31 numbers. (So many are not sorted here: without ranges the
    window alone says what is visited.)"""
    n_rows, n_keys, window = 3, 2**30 + 2**20, 20
    space = untouched(4 * (2**31 + 2**22 + n_rows * n_keys), torch.int32)
    numbers = space[2**31 + 2**22 :].view(n_rows, n_keys)
    numbers[:, -5:] = torch.tensor([2, 4, 2, 3, 2])
    own = torch.full((n_rows, 1), 2 if condition == "documents" else 3, dtype=torch.int32)
    q, k, v = (draw(n_rows, 1, 2, 16, seed=seed) for seed in range(3))

    def attend(keys):
        fields = {condition: own, f"key_{condition}": keys}
        mask = Mask(causal=True, window=window, **fields).keeping(Ranges(None, None))
        every = [x.expand(-1, keys.shape[1], -1, -1) for x in (k, v)]
        return kernel_of("attention").run(q, *every, mask, scale=0.25, return_lse=True)

    far, near = attend(numbers), attend(numbers[:, -window:].clone())
    torch.testing.assert_close(far.out, near.out)
    torch.testing.assert_close(far.lse, near.lse)


@pytest.mark.parametrize("axis", range(4))
def test_rotary(space, axis):
    sizes = (3, 5, 9, 16)
    x, angle = draw(*sizes), draw(1, 5, 5).float()
    stride = [720, 144, 16, 1]
    stride[axis] = 2**31 // (sizes[axis] - 1) + 1
    run = kernel_of("rotary").run
    far = run(placed(space, x, stride), angle.cos(), angle.sin())
    assert torch.equal(far, run(x, angle.cos(), angle.sin()))


@pytest.mark.parametrize("axis", range(3))
def test_symmetric_product(space, axis):
    sizes = (3, 9, 37)
    x = draw(*sizes)
    stride = [333, 37, 1]
    stride[axis] = 2**31 // (sizes[axis] - 1) + 1
    run = kernel_of("symmetric_product").run
    assert torch.equal(run(placed(space, x, stride)), run(x))
