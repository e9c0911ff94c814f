"""What a checkpoint keeps of its data: any change of corpora or weights gives another hash."""

import itertools
from types import SimpleNamespace

import pytest

from nanolm.checkpoint.facts import data_hash, facts_of, require_same_facts
from nanolm.errors import UserError

MIXTURES = [
    [("a", 1.0)],
    [("b", 1.0)],
    [("a", 1.0), ("b", 1.0)],
    [("b", 1.0), ("a", 1.0)],
    [("a", 1.0), ("b", 2.0)],
    [("a", 2.0), ("b", 1.0)],
    [("a", 1.0), ("a", 1.0)],
]


def stream(mixture, tokenizer="t"):
    """What a stream of these (data, weight) says of itself."""
    manifests = [SimpleNamespace(data_hash=name, tokenizer_hash=tokenizer) for name, _ in mixture]
    return SimpleNamespace(manifests=manifests, corpora=[(None, weight) for _, weight in mixture])


def test_other_corpora_or_weights_are_other_data():
    for one, other in itertools.combinations(MIXTURES, 2):
        assert data_hash(stream(one)) != data_hash(stream(other)), (one, other)
    assert data_hash(stream([("a", 3.0)])) == "a"  # a weight alone changes nothing


@pytest.mark.parametrize("changed", ["data_hash", "tokenizer_hash"])
def test_each_fact_is_compared(changed, tmp_path):
    facts = facts_of(stream([("a", 1.0)]))
    require_same_facts(tmp_path, facts, "mend it", saved=facts)
    require_same_facts(tmp_path, facts, "mend it", saved={})
    with pytest.raises(UserError, match=f"another {changed} .*; mend it"):
        require_same_facts(tmp_path, facts, "mend it", saved=facts | {changed: "other"})
