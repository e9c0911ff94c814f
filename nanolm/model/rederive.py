"""Keeping an activation's input instead of its output.

y = function(inner(x)) needs x for inner's backward pass and inner(x) for function's. When inner is
cheap (GELU: 1 % of a step) its output need not be kept: it is computed again where it is used. In a
feed-forward that is a quarter of what a block keeps. The numbers are the same to the last bit.

This is activation checkpointing (Chen et al. 2016) of one element-wise function, without computing
the product after it again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def keeping_input(
    function: Callable[[Tensor], Tensor], inner: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """function(inner(x)); whatever function keeps of inner(x) is computed from x when needed.

    A compiler decides for itself what to keep, so a graph that is being traced is left alone.
    """
    # Called by FeedForward alone, and switched by Stack where recomputing a whole block makes it
    # idle. It may not leave the core: saved-tensor hooks act while the layer runs.
    y = inner(x)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(y)
    source, storage, dtype = x.detach(), y.untyped_storage().data_ptr(), y.dtype

    def pack(saved: Tensor) -> Tensor | torch.Size:
        same = saved.untyped_storage().data_ptr() == storage and saved.is_contiguous()
        return saved.shape if same and saved.numel() == source.numel() else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return inner(source).to(dtype).view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return function(y)
