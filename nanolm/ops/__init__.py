"""Ops: what can be fused, as contracts, with the reference of each and the fast paths of torch.

The names below are the face that plug-ins use; no kernel of kernels/ is imported here.
"""

from nanolm.ops.bias import (
    AlibiBias,
    Bias,
    BucketBias,
    DenseBias,
)
from nanolm.ops.contract import (
    AttentionSpec,
    CrossEntropySpec,
    GluSpec,
    Kernel,
    Kernels,
    LinearSpec,
    NormSpec,
    RotarySpec,
    Spec,
    SymmetricProductSpec,
    candidates,
    choose,
    kernel,
    register_kernel,
)
from nanolm.ops.masks import (
    Mask,
)

__all__ = [
    "AlibiBias",
    "AttentionSpec",
    "Bias",
    "BucketBias",
    "CrossEntropySpec",
    "DenseBias",
    "GluSpec",
    "Kernel",
    "Kernels",
    "LinearSpec",
    "Mask",
    "NormSpec",
    "RotarySpec",
    "Spec",
    "SymmetricProductSpec",
    "candidates",
    "choose",
    "kernel",
    "register_kernel",
]
