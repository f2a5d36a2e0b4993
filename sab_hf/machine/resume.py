"""The steps of a run, each done once: committed to a folder, and taken from there by a run that starts again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import distributed
from .commits import Commit, RunFolder
from .workspace import Workspace

Left = tuple[dict[str, Tensor], dict[str, Any]]
"""What a step leaves behind: tensors by name, and plain data."""

_RANDOM = "random_state."
_UNFINISHED = " (unfinished)"
_SAMPLES = "rows"  # the name in the files
_MOMENT, _PARTS = "moment", "parts"


class Steps:
    """Do each step of a run once.

    The first process reads and writes the folder; the others get what it has.

    Args:
        workspace: of the run; its limit of samples is part of a commit, so that a resumed run computes alike.
        checkpoint: the run's folder; None: nothing is committed.
    """

    def __init__(self, workspace: Workspace, checkpoint: RunFolder | None):
        self.workspace, self.checkpoint = workspace, checkpoint

    def once(
        self,
        name: str,
        make: Callable[[], Left],
        take: Callable[[dict[str, Tensor]], None] | None = None,
        share: bool = False,
    ) -> Left:
        """Do a step, or take what it left when it was done before. All processes call this together.

        Afterwards the global random generators and the limit of samples are what they were when the step was done.

        Args:
            name: of the step; different for each step of a run.
            make: does the step and returns what it left.
            take: puts the tensors into the model where this process did not make them; None: they do not belong there.
            share: the tensors of the first process become those of all; else `make` gives the same on all.
        Returns:
            What the step left; tensors may be on any device.
        Raises:
            ValueError: the commit is damaged.
            OSError: the commit cannot be written; those before it are kept.
        """
        found = distributed.broadcast(self.checkpoint.load(name) if self.checkpoint else None, source=0)
        if found is not None:
            self._continue_after(found)
            left = _without_random_state(found)
            if take is not None:
                take(left[0])
            return left
        tensors, record = make()
        if self.checkpoint is None and distributed.size() == 1:
            return tensors, record
        tensors = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
        if share and distributed.size() > 1:
            tensors = distributed.broadcast(tensors if distributed.rank() == 0 else None, source=0)
            take(tensors)
        if self.checkpoint is not None:
            kept = record | {_SAMPLES: self.workspace.limit.samples}
            self.checkpoint.save(name, tensors | _random_state(self.workspace.device), kept)
            for step in self.checkpoint.steps():
                if step.startswith(f"{name}{_UNFINISHED}"):
                    self.checkpoint.forget(step)
        return tensors, record

    def progress(self, name: str) -> Progress:
        """Return where the step called `name` keeps how far it is; it is deleted when the step is done."""
        return Progress(self.checkpoint, f"{name}{_UNFINISHED}")

    def close(self) -> None:
        """Let other processes use the folder, and delete the files of hidden states."""
        self.workspace.store.close()
        if self.checkpoint is not None:
            self.checkpoint.close()

    def _continue_after(self, step: Commit) -> None:
        self.workspace.limit.samples = step.record[_SAMPLES]
        states = {key[len(_RANDOM) :]: t for key, t in step.tensors.items() if key.startswith(_RANDOM)}
        if "cpu" in states:
            torch.set_rng_state(states["cpu"])
        if "cuda" in states and self.workspace.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.workspace.device)


class Progress:
    """How far a step is, for a run that is killed in it.

    It is kept in parts, so that no process ever holds all of them. The parts of a moment have its number in their names; they are
    there when the file that names the moment is written, and deleted when the next moment is.

    Args:
        checkpoint: the run's folder, on the first process; None: nothing is kept.
        name: in the folder.
    """

    def __init__(self, checkpoint: RunFolder | None, name: str):
        self._checkpoint, self._name = checkpoint, name
        self._kept = distributed.broadcast(checkpoint is not None, source=0)

    def load(self) -> tuple[Iterator[dict[str, Tensor]], dict[str, Any]] | None:
        """Return the parts that were saved last, one by one, and the plain data, on all processes; None if nothing was.

        Raises:
            ValueError: a file is damaged.
        """
        found = self._checkpoint.load(self._name) if self._checkpoint else None
        record = distributed.broadcast(None if found is None else found.record, source=0)
        return None if record is None else (self._parts(record), record)

    def save(self, parts: Callable[[], Iterator[dict[str, Tensor]]], record: dict[str, Any], moment: int) -> None:
        """Keep parts and plain data in place of what was saved before. All processes call this together.

        Args:
            parts: makes them; not called where nothing is kept.
            record: plain data.
            moment: a number that is larger each time.
        """
        if not self._kept:
            return
        count = 0
        for part in parts():
            if self._checkpoint is not None:
                self._checkpoint.save(self._part(moment, count), part, {})
            count += 1
        if self._checkpoint is not None:
            self._checkpoint.save(self._name, {}, record | {_MOMENT: moment, _PARTS: count})
            current = {self._name, *(self._part(moment, i) for i in range(count))}
            for step in self._checkpoint.steps():
                if step.startswith(self._name) and step not in current:
                    self._checkpoint.forget(step)

    def _part(self, moment: int, number: int) -> str:
        return f"{self._name} {moment} {number}"

    def _parts(self, record: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
        for number in range(record[_PARTS]):
            found = None
            if self._checkpoint is not None:
                part = self._checkpoint.load(self._part(record[_MOMENT], number))
                found = "missing" if part is None else part.tensors
            found = distributed.broadcast(found, source=0)
            if found == "missing":
                raise ValueError(
                    f"`checkpoint_dir` lacks a part of {self._name!r}; delete the files whose names begin so, and the next run "
                    "makes this step again"
                )
            yield found


def _without_random_state(step: Commit) -> Left:
    tensors = {key: tensor for key, tensor in step.tensors.items() if not key.startswith(_RANDOM)}
    return tensors, {key: value for key, value in step.record.items() if key != _SAMPLES}


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """Return where the global random generators are."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {f"{_RANDOM}{name}": state for name, state in states.items()}
