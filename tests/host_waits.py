"""What forbids a wait of the host for the device, on torch's meta device in the place of a GPU.

A wait leaves a GPU idle until the host has asked for more. What makes the host wait: reading a
number from the device, an operator whose result's shape only the device knows, and a copy that is
not told to go on by itself; `torch.tensor(n, device=…)` is one.
"""

import contextlib

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
ATEN = torch.ops.aten
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = (ATEN.index, ATEN.index_put, ATEN.index_put_)
COPIES = (ATEN._to_copy.default, ATEN.copy_.default)
FROM_HOST = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
ITEMS = (Tensor.__getitem__, Tensor.__setitem__)


class HostWaitsError(AssertionError):
    """The host would wait for the device."""


def devices(*values):
    return {x.device.type for x in tree_leaves(values) if isinstance(x, Tensor)}


class ForbiddenOperators(TorchDispatchMode):
    """Operators that read from the device, or copy to or from it."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        involved = devices(args, kwargs)
        if "meta" in involved and operator.overloadpacket in INDEXING:
            if any(index is not None and index.dtype == torch.bool for index in args[1]):
                raise HostWaitsError(f"{operator} with a mask")
        elif "meta" in involved and READS & set(operator.tags):
            raise HostWaitsError(str(operator))
        if operator in COPIES:
            target = kwargs.get("device")
            involved |= set() if target is None else {target.type}
            goes_on = kwargs.get("non_blocking") or (operator is COPIES[1] and args[2:] == (True,))
            if len(involved) > 1 and not goes_on:
                raise HostWaitsError(str(operator))
        return operator(*args, **kwargs)


class ForbiddenCalls(TorchFunctionMode):
    """Calls that make a tensor on the device of numbers on the host; operators do not show them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        if function in FROM_HOST and devices(found) == {"meta"}:
            data = args[1] if function is Tensor.new_tensor else args[0]
            if not isinstance(data, Tensor):
                raise HostWaitsError(f"{function.__name__} of {data!r}")
        if function in ITEMS and devices(args[0]) == {"meta"}:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, (list, np.ndarray)) for part in index):
                raise HostWaitsError(f"{function.__name__} with numbers of the host")
        return found


@contextlib.contextmanager
def no_waits():
    """Inside, what would make the host wait raises HostWaitsError."""
    with ForbiddenOperators(), ForbiddenCalls():
        yield
