"""What all operators of this project tell PyTorch beside what they compute: their autocast rule.

`torch.library.register_autocast` names one dtype for ever. A run chooses bfloat16 or float16, so
the rule here asks for the dtype of the autocast region that the call stands in.
"""

from __future__ import annotations

from typing import Any

import torch

DEVICES = {"cuda": "AutocastCUDA", "cpu": "AutocastCPU"}
_libraries: list[torch.library.Library] = []  # a registration lasts as long as its library


def register_autocast(qualified_name: str, n_cast: int) -> None:
    """Under autocast the first `n_cast` arguments of the operator are cast to autocast's dtype.

    `qualified_name` is "namespace::operator". float64 stays, as in PyTorch's own rules, and the
    operator itself runs with autocast disabled.
    """
    namespace, name = qualified_name.split("::")
    library = torch.library.Library(namespace, "FRAGMENT")
    operator = getattr(getattr(torch.ops, namespace), name).default

    def rule_for(device: str) -> Any:
        def rule(_: Any, *arguments: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            cast = [
                x.to(dtype)
                if isinstance(x, torch.Tensor)
                and x.device.type == device
                and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
                else x
                for x in arguments[:n_cast]
            ]
            with torch.autocast(device, enabled=False):
                return operator(*cast, *arguments[n_cast:])

        return rule

    for device, key in DEVICES.items():
        library.impl(name, rule_for(device), key, with_keyset=True)
    _libraries.append(library)
