"""Ranks: who we are, the collectives that training needs, and weights divided over ranks.

The names below are the face that plug-ins use.
"""

from nanolm.distributed.world import (
    World,
    close,
    launch,
)

__all__ = [
    "World",
    "close",
    "launch",
]
