"""Finished blocks: committed, restored, and made the same on all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..packed.swap import swap_in_empty
from . import distributed
from .commits import RunCheckpoint, Stage
from .fingerprint import Fingerprint
from .workspace import Workspace

_RANDOM = "random_state."


class FinishedBlocks:
    """Commit each block when it is finished, and give it back to a run that starts again.

    The first process reads and writes; the others get what it has.

    Args:
        model: whose blocks they are.
        modules: name → sizes of all modules that become packed (`Plan.modules`).
        workspace: of the run; its limit of samples is part of a commit, so that a resumed run computes alike.
        checkpoint: None: nothing is committed.
    """

    def __init__(
        self, model: nn.Module, modules: dict[str, list[int]], workspace: Workspace, checkpoint: RunCheckpoint | None
    ):
        self.model, self.modules, self.workspace, self.checkpoint = model, modules, workspace, checkpoint

    def find(self, name: str) -> Stage | None:
        """Return what was committed of the module called `name`, or None; the limit of samples becomes what it was then.

        Raises:
            ValueError: the commit is damaged.
        """
        stage = self.checkpoint.load(name) if self.checkpoint else None
        stage = distributed.broadcast(stage, source=0)
        if stage is not None:
            self.workspace.limit.rows = stage.record["rows"]
        return stage

    def restore(self, name: str, stage: Stage) -> dict[str, Any]:
        """Make the module called `name` what it was when it was committed; returns its record."""
        self._fill(name, stage.tensors)
        _set_random_state(stage.tensors, self.workspace.device)
        return {key: value for key, value in stage.record.items() if key != "rows"}

    def commit(self, name: str, record: dict[str, Any]) -> None:
        """Commit the finished module called `name`, and make it on all processes what it is on the first.

        Args:
            name: of the module.
            record: plain data, handed back by `restore`.
        Raises:
            OSError: the commit cannot be written; those before it are kept.
        """
        if self.checkpoint is None and distributed.size() == 1:
            return
        module = self.model.get_submodule(name)
        tensors = {key: tensor.detach().cpu() for key, tensor in module.state_dict().items()}
        if distributed.size() > 1:
            shared = distributed.broadcast(tensors if distributed.rank() == 0 else None, source=0)
            self._fill(name, shared)
        if self.checkpoint is not None:
            record = record | {"rows": self.workspace.limit.rows}
            self.checkpoint.save(name, tensors | _random_state(self.workspace.device), record)

    def remember(
        self, name: str, compute: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and the plain data that `compute` returned when it ran first; all processes call it together.

        Args:
            name: of the step.
            compute: the step; gives the same on all processes.
        """
        stage = self.find(name)
        if stage is not None:
            return stage.tensors, stage.record
        tensors, record = compute()
        if self.checkpoint is not None:
            self.checkpoint.save(name, tensors, record | {"rows": self.workspace.limit.rows})
        return tensors, record

    def _fill(self, name: str, tensors: dict[str, Tensor]) -> None:
        module = self.model.get_submodule(name)
        packed = set(self.model.get_submodule(name).state_dict()) & tensors.keys()
        missing = {
            inner: size
            for inner, size in self.modules.items()
            if inner.startswith(f"{name}.") and f"{inner[len(name) + 1 :]}.signs" not in packed
        }
        if missing:
            swap_in_empty(self.model, missing)
        own = {key: t.to(self.workspace.device) for key, t in tensors.items() if not key.startswith(_RANDOM)}
        module.load_state_dict(own, assign=True)


def open_checkpoint(folder: str | None, make_fingerprint: Callable[[], Fingerprint]) -> RunCheckpoint | None:
    """Open `checkpoint_dir` on the first process; on the others, and without a folder, return None.

    Args:
        folder: `checkpoint_dir`.
        make_fingerprint: called for the fingerprint only where it is needed: it reads every weight.
    """
    if folder is None or distributed.rank() != 0:
        return None
    return RunCheckpoint(folder, make_fingerprint())


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """Return where the global random generators are."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {f"{_RANDOM}{name}": state for name, state in states.items()}


def _set_random_state(tensors: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(tensors[f"{_RANDOM}cpu"])
    if device.type == "cuda" and f"{_RANDOM}cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"{_RANDOM}cuda"], device)
