"""The Transformer: layers, blocks, trunks, position encodings, heads.

The names below are the face that plug-ins use.
"""

from nanolm.model.heads import (
    HeadRequest,
)
from nanolm.model.positions import (
    Positions,
)
from nanolm.model.trunk import (
    Trunk,
)

__all__ = [
    "HeadRequest",
    "Positions",
    "Trunk",
]
