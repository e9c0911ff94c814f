"""What all operators of this project tell PyTorch beside what they compute: autocast, gradients.

`torch.library.register_autocast` names one dtype for ever. A run chooses bfloat16 or float16, so
the rule here asks for the dtype of the autocast region that the call stands in.

`torch.library`'s own derivative of an operator goes through the operator's schema in Python at each
call, in a time that grows with the square of the number of arguments: about 0.3 ms of host time for
attention's twenty, before any kernel starts. `differentiable` registers that derivative, which
torch.compile needs, and gives the same one to a `torch.autograd.Function` for eager calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

DEVICES = {"cuda": "AutocastCUDA", "cpu": "AutocastCPU"}
_libraries: list[torch.library.Library] = []  # a registration lasts as long as its library


def autocast_arguments(arguments: tuple, device: str, n_cast: int) -> list:
    """The arguments, the first `n_cast` tensors in the dtype of the surrounding autocast region.

    float64 and tensors of another device stay as they are, as in PyTorch's own rules.
    """
    dtype = torch.get_autocast_dtype(device)
    cast = [
        x.to(dtype)
        if isinstance(x, torch.Tensor)
        and x.device.type == device
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        else x
        for x in arguments[:n_cast]
    ]
    return [*cast, *arguments[n_cast:]]


def register_autocast(qualified_name: str, n_cast: int) -> None:
    """Under autocast the first `n_cast` arguments of the operator are cast to autocast's dtype.

    `qualified_name` is "namespace::operator". The operator itself runs with autocast disabled.
    """
    namespace, name = qualified_name.split("::")
    library = torch.library.Library(namespace, "FRAGMENT")
    operator = getattr(getattr(torch.ops, namespace), name).default

    def rule_for(device: str) -> Any:
        def rule(_: Any, *arguments: Any) -> Any:
            cast = autocast_arguments(arguments, device, n_cast)
            with torch.autocast(device, enabled=False):
                return operator(*cast)

        return rule

    for device, key in DEVICES.items():
        library.impl(name, rule_for(device), key, with_keyset=True)
    _libraries.append(library)


def differentiable(
    operator: Any,
    backward: Callable[..., tuple],
    save_for_backward: Callable[[Any, tuple, Any], None],
    n_cast: int = 0,
) -> Callable[..., Any]:
    """The operator with its derivative, as code outside a compiled graph should call it.

    backward           (ctx, *gradients of the outputs) -> gradients in the arguments' order
    save_for_backward  (ctx, inputs, output) -> None, as torch.library.register_autograd takes them
    n_cast             arguments that autocast casts, as in register_autocast

    The first argument is a tensor. Dispatch modes (FLOP counting, selective checkpointing) and
    profilers meet the operator by its own name either way.
    """
    operator.register_autograd(backward, setup_context=save_for_backward)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = operator(
            *inputs
        )  # no gradient is recorded here, so the schema is not gone through
        save_for_backward(ctx, inputs, output)
        return output

    # With forward and setup_context apart, `apply` would ask for forward's signature at each call.
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(operator._name.rpartition(":")[2], (torch.autograd.Function,), members)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return operator(*arguments)
        device = arguments[0].device.type
        if n_cast == 0 or device not in DEVICES or not torch.is_autocast_enabled(device):
            return function.apply(*arguments)
        # Before `apply`: what is saved for the backward pass has autocast's dtype too.
        cast = autocast_arguments(arguments, device, n_cast)
        with torch.autocast(device, enabled=False):
            return function.apply(*cast)

    return call
