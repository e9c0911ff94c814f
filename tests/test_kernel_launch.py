"""Which launch a kernel gets: by architecture, width, groups, biases and Triton's version."""

import pytest
import torch

from nanolm.kernels import launch
from nanolm.kernels.attention import call
from nanolm.kernels.attention.operator import attention
from nanolm.kernels.launch import Launch, attention_launch, forced_arch
from nanolm.ops.bias import AlibiBias, BucketBias, DenseBias
from nanolm.ops.masks import Mask

CPU = torch.device("cpu")


def of(arch, kind, columns, words=""):
    with forced_arch(arch):
        return attention_launch(kind, CPU, columns, torch.bfloat16, frozenset(words.split()))


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
    assert of("sm_90", "key_value", 128, "grouped") == Launch(32, 128, 8, 1)
    assert of("sm_90", "key_value", 64) == Launch(64, 64, 4, 3)
    assert of("sm_80", "key_value", 128) == Launch(64, 64, 8, 2)


def entries(table):
    """(place, words, launch) of a table's entries."""
    return [(*place, words, own) for place, by in table.items() for words, own in by.items()]


@pytest.mark.parametrize(("arch", "columns", "kind", "words", "own"), entries(launch.LIGHT))
def test_masks_and_groups_have_launches_of_their_own(monkeypatch, arch, columns, kind, words, own):
    monkeypatch.setattr(launch, "TRITON", (3, 7))  # an older one may need the same for all
    assert of(arch, kind, columns, words) == own != of(arch, kind, columns)
    # Beside a bias or dropout the launch for these counts.
    heavy = of(arch, kind, columns, "softcap")
    assert of(arch, kind, columns, f"{words} softcap") == heavy


@pytest.mark.parametrize(("arch", "columns", "kind", "words", "own"), entries(launch.HEAVY))
def test_launches_beside_a_bias_are_the_table_s(arch, columns, kind, words, own):
    assert of(arch, kind, columns, words or "dropout") == own


@pytest.mark.parametrize("table", [launch.LIGHT, launch.HEAVY])
def test_every_entry_can_be_reached(table):
    """An entry counts for calls with all of its words, unless one before it does."""
    for place, by in table.items():
        names = [set(words.split()) for words in by]
        assert not any(a <= b for i, b in enumerate(names) for a in names[:i]), place


NUMBERS = torch.zeros(1, 4, dtype=torch.int64)
OTHERS = {
    "key_lengths": NUMBERS[:, 0],
    "documents": NUMBERS,
    "prefix_lengths": NUMBERS[:, 0],
    "order": NUMBERS,
}


BIASES = {
    "": None,
    "alibi": AlibiBias(torch.ones(2)),
    "bucket": BucketBias(torch.zeros(4, 2), bidirectional=True, max_distance=4),
    "dense": DenseBias(torch.zeros(1, 2, 4, 4)),
}


PLAIN = {"n_groups": 2, "window": None, "other": "", "bias": "", "dropout": 0.0, "softcap": None}
ONE = [{"n_groups": 1}, {"window": 2}, {"dropout": 0.5}, {"softcap": 2.0}]
ONE += [{"other": name} for name in OTHERS] + [{"bias": name} for name in BIASES if name]
ALL = {"n_groups": 1, "window": 2, "other": "order", "bias": "dense", "dropout": 0.5}
ALL["softcap"] = 2.0


@pytest.mark.parametrize("case", [{}, *ONE, ALL, *({**ALL, name: PLAIN[name]} for name in PLAIN)])
def test_a_call_says_what_takes_registers(monkeypatch, case):
    n_groups, window, other, bias, dropout, softcap = (PLAIN | case).values()
    asked = []

    def record(kind, device, columns, dtype, words):
        asked.append(words)
        return Launch(16, 16)

    monkeypatch.setattr(call, "attention_launch", record)
    q, k = torch.zeros(1, 4, 2, 16), torch.zeros(1, 4, n_groups, 16)
    mask = Mask(causal=True, window=window, **({other: OTHERS[other]} if other else {}))
    attention(q, k, k, mask, scale=1.0, dropout=dropout, softcap=softcap, bias=BIASES[bias])
    present = {
        "grouped": n_groups < 2,
        "window": window is not None,
        "numbers": other != "",
        "ranges": other in ("documents", "order"),
        bias: bias != "",
        "dropout": dropout > 0,
        "softcap": softcap is not None,
    }
    assert asked == [{word for word, there in present.items() if there}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
def test_wide_numbers_get_small_tiles_whatever_the_call_has(arch, dtype):
    """float64 too, of which registers hold half as many."""
    with forced_arch(arch):
        for kind in launch.KINDS:
            for columns, warps in ((16, 4), (64, 4), (128, 8), (256, 8)):
                for words in ("", "grouped window", "dense dropout"):
                    given = (kind, CPU, columns, dtype, frozenset(words.split()))
                    assert attention_launch(*given) == Launch(32, 32, warps, 1), given
        assert launch.product_launch(CPU, dtype) == Launch(32, 32, 4, 2)


@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_120"])
def test_relatives_share_a_column(arch):
    assert of(arch, "bias", 256) == Launch(16, 32, 4, 1)
    assert of(arch, "bias", 128) == Launch(32, 32, 8, 2)
