"""Which launch a kernel gets: by architecture, width, groups, biases and Triton's version."""

import pytest
import torch

from nanolm.kernels import launch
from nanolm.kernels.attention import call
from nanolm.kernels.attention.operator import attention
from nanolm.kernels.launch import Launch, attention_launch, forced_arch
from nanolm.ops.masks import Mask

CPU = torch.device("cpu")


def of(arch, kind, columns, **how):
    with forced_arch(arch):
        return attention_launch(kind, CPU, columns, torch.bfloat16, **how)


@pytest.mark.parametrize(
    ("triton", "expected"),
    [
        ((3, 6), Launch(32, 128, 8, 1)),
        ((3, 7), Launch(32, 128, 8, 2)),
        ((3, 8), Launch(32, 128, 8, 2)),
    ],
)
def test_an_older_triton_gets_what_fits_its_registers(monkeypatch, triton, expected):
    monkeypatch.setattr(launch, "TRITON", triton)
    assert of("sm_90", "key_value", 128) == expected
    assert of("sm_90", "key_value", 128, grouped=True) == Launch(32, 128, 8, 1)
    assert of("sm_90", "key_value", 64) == Launch(64, 64, 4, 3)
    assert of("sm_80", "key_value", 128) == Launch(64, 64, 8, 2)


@pytest.mark.parametrize(("arch", "columns", "kind"), launch.GROUPED)
def test_groups_have_launches_of_their_own(monkeypatch, arch, columns, kind):
    monkeypatch.setattr(launch, "TRITON", (3, 7))  # an older one may need the same for all
    own = launch.GROUPED[arch, columns, kind]
    assert of(arch, kind, columns, grouped=True) == own
    assert of(arch, kind, columns) != own
    # Beside a bias or dropout the launch for these is the smaller one.
    heavy = of(arch, kind, columns, heavy=True)
    assert of(arch, kind, columns, heavy=True, grouped=True) == heavy


@pytest.mark.parametrize(("arch", "columns", "kind"), launch.CROWDED)
def test_a_window_beside_another_mask_has_launches_of_its_own(arch, columns, kind):
    own = launch.CROWDED[arch, columns, kind]
    assert of(arch, kind, columns, crowded=True) == own != of(arch, kind, columns)
    heavy = of(arch, kind, columns, heavy=True)
    assert of(arch, kind, columns, heavy=True, crowded=True) == heavy


NUMBERS = torch.zeros(1, 4, dtype=torch.int64)
OTHERS = {
    "key_lengths": NUMBERS[:, 0],
    "documents": NUMBERS,
    "prefix_lengths": NUMBERS[:, 0],
    "order": NUMBERS,
}


@pytest.mark.parametrize("n_heads", [1, 2])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("other", [None, *OTHERS])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_call_says_what_takes_registers(monkeypatch, n_heads, window, other, dropout):
    asked = []

    def record(kind, *place, **how):
        asked.append(how)
        return Launch(16, 16)

    monkeypatch.setattr(call, "attention_launch", record)
    q, k = torch.zeros(1, 4, n_heads, 16), torch.zeros(1, 4, 1, 16)
    mask = Mask(causal=True, window=window, **({other: OTHERS[other]} if other else {}))
    attention(q, k, k, mask, scale=1.0, dropout=dropout)
    how = {"heavy": dropout > 0, "grouped": n_heads > 1}
    assert asked == [how | {"crowded": window is not None and other is not None}]


@pytest.mark.parametrize(("arch", "columns", "kind"), launch.HEAVY)
def test_launches_beside_a_bias_are_the_table_s(arch, columns, kind):
    assert of(arch, kind, columns, heavy=True) == launch.HEAVY[arch, columns, kind]


@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_120"])
def test_relatives_share_a_column(arch):
    assert of(arch, "bias", 256) == Launch(16, 32, 4, 1)
    assert of(arch, "bias", 128) == Launch(32, 32, 8, 2)
