"""Every objective learns: after 80 to 250 small steps it is clearly below what a unigram model
reaches on the very same targets. The share is stated and not the bits, since the text is that of
the Python at hand."""

import json

import pytest

from tests.prepared import trained_run

# Bits per byte on the validation split over the unigram model's, which the run must undercut.
STATED = {
    "clm": 0.86,
    "prefix": 0.88,
    "mlm": 0.92,
    "mlm_pair": 0.925,
    "span": 0.8,
    "permutation": 0.9,
}


@pytest.mark.parametrize(
    "objective",
    [
        *("clm", "mlm", "span"),
        pytest.param("prefix", marks=pytest.mark.slow),
        pytest.param("mlm_pair", marks=pytest.mark.slow),
        pytest.param("permutation", marks=pytest.mark.slow),
    ],
)
def test_below_the_stated_share_of_a_unigram_models_bits(objective):
    summary = json.loads((trained_run(objective) / "summary.json").read_text())
    assert summary["bits_per_byte"] < STATED[objective] * summary["unigram_bits_per_byte"]


def test_validation_loss_falls():
    lines = (trained_run("clm") / "metrics.jsonl").read_text().splitlines()
    train = [json.loads(line)["loss"] for line in lines if '"train"' in line]
    assert train[-1] < train[0] - 1.0
