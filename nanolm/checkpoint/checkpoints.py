"""Checkpoints of a run: where they stand, which is the newest, the best, and which may go.

    runs/x/checkpoints/step-00000015/    one complete checkpoint (`container.py`)
    runs/x/checkpoints/latest            the name of the newest one
    runs/x/checkpoints/best              the name of the one with the lowest validation loss
    runs/x/checkpoints/preempted         present when the run was told to go and saved in time

Rank 0 makes the folder, every rank writes what it alone holds into it, and all learn whether it
worked. Where nodes share no disk, each node's first rank does rank 0's part for its node, and a
folder holds what its node has. `load_trunk` starts another run from one.
"""

from __future__ import annotations

import copy
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanolm.checkpoint.container import (
    begin_folder,
    discard_folder,
    finish_folder,
    read_json,
    read_tensors,
    verify,
    write_parts,
)
from nanolm.checkpoint.lazy_tensors import part_files, part_name
from nanolm.checkpoint.named_tensors import learner_tensors, load_named
from nanolm.distributed.sharding import local, shard_position
from nanolm.distributed.world import World
from nanolm.errors import UserError
from nanolm.files import RESUME, TEMPORARY, remove_leftovers, write_text
from nanolm.model.trunk import encoder_alone

TRAINER_KEYS: dict[str, Any] = {
    "step": int,
    "skips": int,
    "losses": list,
    "best": float | None,
    "patience": dict | None,
    "seconds": float,
    "scaler": dict,
    "environment": dict,
    "facts": dict,
}
"""What trainer.json must hold for a run to go on."""

Files = Mapping[str, bytes]

_NAME = re.compile(r"step-(\d{8,})")


class Checkpoints:
    """The `checkpoints` folder of one run; methods that write are collective.

    With `shared` all ranks see one folder; otherwise each node has its own, led by its first rank.
    """

    def __init__(
        self, run: pathlib.Path, world: World, keep_last: int = 2, *, shared: bool = True
    ) -> None:
        self.run = run
        self.folder = run / "checkpoints"
        self.world = world
        self.keep_last = max(keep_last, 1)
        self.shared = shared

    def steps(self) -> list[int]:
        """Steps of which there is a folder, ascending."""
        if not self.folder.is_dir():
            return []
        matches = [_NAME.fullmatch(path.name) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> pathlib.Path:
        """Folder of one step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def clean(self) -> None:
        """Removes what killed writes and an earlier preemption left behind."""
        if self.leads and self.folder.is_dir():
            remove_leftovers(self.folder)
            (self.folder / "preempted").unlink(missing_ok=True)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        trainer: Mapping[str, Any],
        files: Files,
    ) -> pathlib.Path:
        """Writes one checkpoint, then moves `latest` to it and drops old ones; collective.

        Raises UserError on every rank when one of them could not write it.
        """
        return self.write(step, self.own_parts(tensors), trainer, files)

    def write(
        self,
        step: int,
        parts: Mapping[str, Mapping[str, Tensor]],
        trainer: Mapping[str, Any],
        files: Files,
    ) -> pathlib.Path:
        """`save` of what `own_parts` chose; may run in a thread when the world is its own."""
        files = {**files, "trainer.json": json.dumps(trainer, indent=2).encode() + b"\n"}
        folder = self.path(step)
        temporary = pathlib.Path(self._on_leader(lambda: str(begin_folder(folder))))
        try:
            self.world.call_on_all_ranks(lambda: write_parts(temporary, folder, parts))
            self._on_leader(lambda: finish_folder(temporary, folder, files))
        except UserError:
            if self.leads:
                discard_folder(temporary)
            raise
        self._on_leader(lambda: self._point_to(step))
        return folder

    def with_own_group(self) -> Checkpoints:
        """The same folder for a thread's use, with a control group of its own; collective."""
        other = copy.copy(self)
        other.world = self.world.with_own_group()
        return other

    def _point_to(self, step: int) -> None:
        write_text(self.folder / "latest", f"{self.path(step).name}\n", RESUME)
        self._prune()

    @property
    def leader(self) -> int:
        """The rank that makes and names the folders that this rank writes into."""
        return 0 if self.shared else self.world.first_of_node

    @property
    def leads(self) -> bool:
        """Whether this rank makes folders, moves markers and prunes."""
        return self.world.rank == self.leader

    def _on_leader(self, work: Callable[[], Any]) -> Any:
        """The JSON answer of this rank's leader; any leader's UserError is everybody's."""
        return self.world.call_on_all_ranks(lambda: work() if self.leads else None)[self.leader]

    def own_parts(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict]:
        """{file name: tensors} that this rank writes: of what is divided its own rows, and what is
        not divided where it leads. The tensors are the live ones."""
        found: dict[str, dict[str, Tensor]] = {}
        for part, named in tensors.items():
            divided = next((t for t in named.values() if isinstance(t, DTensor)), None)
            if divided is None:
                if self.leads:
                    found[f"{part}.safetensors"] = dict(named)
                continue
            number, count, first = shard_position(divided)
            if first if self.shared else self.world.local_rank < count:
                found[part_name(part, number, count)] = {
                    name: local(tensor)
                    for name, tensor in named.items()
                    if (isinstance(tensor, DTensor) and len(local(tensor))) or number == 0
                }
        return found

    def mark_best(self, step: int) -> None:
        """Names the checkpoint of this step the best one."""
        if self.leads:
            write_text(self.folder / "best", f"{self.path(step).name}\n", RESUME)
            self._prune()

    def mark_preempted(self, step: int, reason: str) -> None:
        """Leaves the marker that tells a scheduler to queue the run again."""
        if self.leads:
            write_text(self.folder / "preempted", f"{reason} after step {step}\n", RESUME)

    def _prune(self) -> None:
        keep = {self.path(step).name for step in self.steps()[-self.keep_last :]}
        keep |= {name for name in (self._marked("latest"), self._marked("best")) if name}
        for step in self.steps():
            path = self.path(step)
            if path.name not in keep:
                # Renamed first: a kill half-way leaves a leftover, never half a checkpoint.
                doomed = path.rename(self.folder / f"{TEMPORARY}old-{path.name}")
                shutil.rmtree(doomed)

    def best(self) -> pathlib.Path | None:
        """The checkpoint that was marked best, if there is one."""
        name = self._marked("best")
        return self.folder / name if name else None

    def _marked(self, marker: str) -> str | None:
        path = self.folder / marker
        name = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        return name if _NAME.fullmatch(name) and (self.folder / name).is_dir() else None

    def newest(self) -> tuple[pathlib.Path | None, list[str]]:
        """The newest checkpoint that passes verification, and why newer ones did not.

        Raises UserError when there are checkpoints and every one is damaged.
        """
        names = [self.path(step).name for step in reversed(self.steps())]
        latest = self._marked("latest")
        if latest:
            names.remove(latest)
            names.insert(0, latest)
        problems: list[str] = []
        for name in names:
            try:
                verify(self.folder / name)
                return self.folder / name, problems
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError(f"no usable checkpoint in {self.folder}: {problems[0]}")
        return None, problems


def locate(path: str | pathlib.Path, *, best: bool = False) -> pathlib.Path:
    """The checkpoint folder that a path means: itself, or the newest good one of a run's folder
    (with `best` the one that was marked best, when there is one).

    Verified. Raises UserError when there is none or it is damaged.
    """
    folder = pathlib.Path(path)
    if (folder / "checkpoints").is_dir():
        marked = Checkpoints(folder, World()).best() if best else None
        if marked is not None:
            verify(marked)
            return marked
        found, _ = Checkpoints(folder, World()).newest()
        if found is None:
            raise UserError(f"run {folder} holds no checkpoint yet")
        return found
    verify(folder)
    return folder


def load_weights(folder: pathlib.Path, learner: nn.Module, *, ema: bool = True) -> None:
    """Fills the learner with a verified checkpoint's weights (its EMA when it has one and `ema`).

    Raises UserError naming the first key that differs.
    """
    saved = read_tensors(folder, "model")
    if ema and part_files(folder, "ema"):
        saved.update(read_tensors(folder, "ema"))
    load_named(learner_tensors(learner), saved, f"checkpoint {folder}")


def load_trunk(path: str | pathlib.Path, learner: nn.Module, *, ema: bool = True) -> list[str]:
    """Fills the trunk, and each head that matches in names and shapes, from a checkpoint.

    `path` is a checkpoint's folder or a run's. Returns the names of the heads that start fresh. An
    encoder takes of an encoder-decoder the encoder, and no head. Raises UserError when the trunk is
    of another shape.
    """
    folder, saved = trained_tensors(path, ema=ema)
    if not getattr(learner.trunk, "causal", True):  # a plug-in's trunk need not say it
        saved = encoder_alone(saved)
    return fill_learner(learner, saved, f"checkpoint {folder}")


def trained_tensors(
    path: str | pathlib.Path, *, ema: bool = True
) -> tuple[pathlib.Path, dict[str, Tensor]]:
    """(folder, tensors) of a checkpoint's folder or a run's, with the average of the weights in
    their place where there is one."""
    folder = locate(path)
    saved = read_tensors(folder, "model")
    if ema and part_files(folder, "ema"):
        saved.update(read_tensors(folder, "ema"))
    return folder, saved


def fill_learner(learner: nn.Module, saved: Mapping[str, Tensor], what: str) -> list[str]:
    """Fills the trunk, and each head that matches; returns the names of the heads that do not.

    Raises UserError, which says `what` the tensors are of, when the trunk is of another shape.
    """
    live = learner_tensors(learner)
    load_named(_part(live, "trunk."), _part(saved, "trunk."), what)
    fresh = []
    for name in cast(nn.ModuleDict, learner.heads):
        mine, theirs = _part(live, f"heads.{name}."), _part(saved, f"heads.{name}.")
        same = {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
        if same:
            load_named(mine, theirs, what)
        else:
            fresh.append(name)
    return fresh


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read_trainer(folder: pathlib.Path) -> dict[str, Any]:
    """trainer.json of a checkpoint; raises UserError unless it holds what a resume needs."""
    trainer = read_json(folder, "trainer.json")
    for key, kinds in TRAINER_KEYS.items():
        if not isinstance(trainer.get(key), kinds):
            raise UserError(f"checkpoint file {folder / 'trainer.json'} has no usable {key!r}")
    return trainer
