"""Nodes without a common disk: which checkpoint do they all have?

With run.shared=false every node's run.dir holds what its ranks wrote: under ddp a whole checkpoint,
under fsdp its ranks' parts. A run goes on from the newest step that every node has undamaged and
whose parts are all somewhere.
"""

from __future__ import annotations

import pathlib
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from nanolm.checkpoint.checkpoints import Checkpoints
from nanolm.checkpoint.container import verify
from nanolm.checkpoint.lazy_tensors import missing_parts
from nanolm.distributed.world import World
from nanolm.errors import UserError


def common_checkpoint(run: pathlib.Path, world: World) -> tuple[pathlib.Path | None, list[str]]:
    """The newest checkpoint that all nodes have whole, and what newer ones lack; collective.

    Raises UserError, on every rank, when there are checkpoints and each lacks something somewhere.
    """
    checkpoints = Checkpoints(run, world, shared=False)
    leads = checkpoints.leads
    lacking: list[str] = []
    steps = set().union(*world.gather(checkpoints.steps() if leads else []))
    for step in sorted(steps, reverse=True):
        folder = checkpoints.path(step)
        told = world.gather(describe(folder) if leads else None)
        lack = what_lacks([node for node in told if node is not None])
        if lack is None:
            return folder, [f"{reason}: went back to {folder}" for reason in lacking]
        lacking.append(f"checkpoint {folder.name}: {lack}")
    if lacking:
        raise UserError(
            f"there is no checkpoint that all nodes have whole; {lacking[0]}; copy it there from "
            f"where it is, or start a new run in another run.dir"
        )
    return None, []


def describe(folder: pathlib.Path) -> dict[str, Any]:
    """What this node has of a checkpoint: {node, files} or {node, problem}."""
    node = {"node": socket.gethostname()}
    try:
        verify(folder)
    except UserError as error:
        return {**node, "problem": str(error)}
    return {**node, "files": [path.name for path in folder.iterdir()]}


def what_lacks(nodes: Sequence[Mapping[str, Any]]) -> str | None:
    """Which node lacks what of a checkpoint, None when nothing is lacking."""
    for node in nodes:
        if "problem" in node:
            return f"node {node['node']}: {node['problem']}"
    missing = missing_parts(name for node in nodes for name in node["files"])
    names = ", ".join(node["node"] for node in nodes)
    return f"{missing[0]} is on none of the nodes {names}" if missing else None
