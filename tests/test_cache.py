"""A trunk that reads token by token through the cache gives what it gives in one go."""

import pytest
import torch

from nanolm.model.cache import KeyValueCache
from nanolm.model.trunk import Inputs

B, T, V = 2, 14, 512


@pytest.mark.parametrize("window", [[None], [4], [None, 3]])
@pytest.mark.parametrize("encoding", ["learned", "sinusoidal", "rotary", "alibi", "t5", "none"])
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_cached_is_uncached(make_learner, encoding, window, kernel):
    keys = {"positions": {"name": encoding}, "window": window, "n_kv_heads": 2, "qk_norm": True}
    learner = make_learner(keys, kernels={"attention": kernel})
    tokens = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = learner.trunk(Inputs(tokens_BT=tokens))
        for pieces in ([T], [6] + [1] * 8, [1, 5, 2, 6]):
            cache = KeyValueCache(2, B, T, 2, 8)
            parts = [
                learner.trunk(Inputs(tokens_BT=part, cache=cache))
                for part in tokens.split(pieces, 1)
            ]
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
            assert cache.length == T


def test_a_full_cache_refuses_more():
    cache = KeyValueCache(1, B, 4, 2, 8)
    entry = torch.zeros(B, 3, 2, 8)
    cache.extend(0, entry, entry)
    with pytest.raises(ValueError, match="holds 4 tokens, 6 were asked for"):
        cache.extend(0, entry, entry)
