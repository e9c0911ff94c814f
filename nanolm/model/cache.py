"""The key/value cache of incremental decoding: what earlier tokens left for later ones to see.

Each block's keys and values are kept in one preallocated buffer, so that a step copies only the new
token. Bytes: 2 x layers x B x capacity x G x K x element size. A decoder that reads a source also
keeps, block by block, the source's keys and values, which no token that it writes changes.

Shapes: B batch, T new tokens, S tokens so far, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of every block, for up to `capacity` tokens."""

    def __init__(
        self,
        n_layers: int,
        batch: int,
        capacity: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (n_layers, 2, batch, capacity, n_kv_heads, head_dim)
        self.buffer = torch.empty(shape, dtype=dtype, device=device)
        self.lengths = [0] * n_layers
        self.sources: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens that every block has seen."""
        return self.lengths[-1]

    def grow(self, count: int) -> None:
        """Makes room for `count` more tokens; only an empty cache can grow.

        Raises ValueError when it holds tokens.
        """
        if self.length:
            raise ValueError("a cache that holds tokens cannot grow")
        shape = list(self.buffer.shape)
        shape[3] += count
        self.buffer = self.buffer.new_empty(shape)

    def of_source(
        self, layer: int, project: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The source's keys and values in block `layer`, projected when first asked for."""
        if layer not in self.sources:
            self.sources[layer] = project()
        return self.sources[layer]

    def reorder(self, rows_B: Tensor) -> None:
        """Row b becomes a copy of row rows_B[b]. Both have the same source, whose keys and values
        stay where they are."""
        length = self.length
        self.buffer[:, :, :, :length] = self.buffer[:, :, rows_B, :length]

    def extend(self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Append T tokens to block `layer`; all its keys and values so far, [B, S, G, K].

        Raises ValueError when the capacity is exceeded.
        """
        start, stop = self.lengths[layer], self.lengths[layer] + k_BTGK.shape[1]
        keys, values = self.buffer[layer]
        if stop > keys.shape[1]:
            raise ValueError(f"the cache holds {keys.shape[1]} tokens, {stop} were asked for")
        keys[:, start:stop], values[:, start:stop] = k_BTGK, v_BTGK
        self.lengths[layer] = stop
        return keys[:, :stop], values[:, :stop]
