"""Checkpoints: folders of safetensors with checksums that are whole or not there.

The names below are the face that plug-ins use.
"""

from nanolm.checkpoint.checkpoints import (
    Checkpoints,
    load_trunk,
    locate,
    read_trainer,
)

__all__ = [
    "Checkpoints",
    "load_trunk",
    "locate",
    "read_trainer",
]
