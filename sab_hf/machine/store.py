"""Where the calibration set's hidden states live between blocks: on the compute device, in RAM, or in memory-mapped files."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, MutableMapping
from typing import Any

import psutil
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DEFAULT_SHARE = 0.25
"""Part of the free memory of a device that hidden states may fill where no limit is given."""
GIB = 2**30


class StateStore:
    """Keep tensors on the fastest tier that has room: the compute device, then RAM, then files.

    Args:
        device: the compute device.
        device_limit, ram_limit: bytes of tensors kept on the device and in RAM; None: a quarter of what is free there now.
        folder: folder of the files; None: the system's folder for temporary files. Files die with the store.
    """

    def __init__(
        self,
        device: torch.device,
        device_limit: float | None = None,
        ram_limit: float | None = None,
        folder: str | os.PathLike | None = None,
    ):
        self.device = device
        ram = DEFAULT_SHARE * psutil.virtual_memory().available if ram_limit is None else ram_limit
        self.room = {"ram": ram}
        if device.type != "cpu":
            self.room = {"device": _free_on(device) if device_limit is None else device_limit} | self.room
        self.used = dict.fromkeys([*self.room, "disk"], 0)
        self._folder, self._files = folder, None
        self._given_up: dict[tuple, list[Tensor]] = defaultdict(list)  # in files, by shape and dtype

    def put(self, tensor: Tensor) -> Tensor:
        """Return `tensor` where there is room for it.

        Raises:
            OSError: it has to go to a file and the disk is full.
        """
        tier = next((t for t, room in self.room.items() if self.used[t] + tensor.nbytes <= room), "disk")
        self.used[tier] += tensor.nbytes
        if tier == "disk":
            return self._map(tensor)
        return tensor.to(self.device if tier == "device" else "cpu")

    def replace(self, old: Tensor, new: Tensor) -> Tensor:
        """Return `new` on the tier of `old`, whose room it takes over."""
        if old.shape != new.shape or old.dtype != new.dtype:
            self.forget(old)
            return self.put(new)
        if self._tier(old) == "disk":
            return old.copy_(new)
        return new.to(old.device)

    def forget(self, *values: Any) -> None:
        """Give up the room of tensors, also nested ones, that `put` returned and nobody reads any more: others may have it."""
        for tensor in tensors_in(values):
            tier = self._tier(tensor)
            self.used[tier] -= tensor.nbytes
            if tier == "disk":
                self._given_up[tensor.shape, tensor.dtype].append(tensor)

    def put_all(self, value: Any, seen: dict[int, tuple[Any, Any]]) -> Any:
        """Put every tensor in nested tuples, lists and dicts; `seen` remembers what comes again, which stays shared."""
        if id(value) not in seen:
            put = (
                self.put(value)
                if isinstance(value, Tensor)
                else map_nested(value, lambda item: self.put_all(item, seen))
            )
            seen[id(value)] = value, put
        return seen[id(value)][1]

    def close(self) -> None:
        """Delete the files."""
        if self._files is not None:
            self._files.cleanup()
            self._files = None
            self._given_up.clear()

    def _tier(self, tensor: Tensor) -> str:
        if getattr(tensor, "_in_file", False):
            return "disk"
        return "device" if tensor.device.type != "cpu" else "ram"

    def _map(self, tensor: Tensor) -> Tensor:
        if given_up := self._given_up[tensor.shape, tensor.dtype]:
            return given_up.pop().copy_(tensor)
        if self._files is None:
            self._files = tempfile.TemporaryDirectory(prefix="sab_hf_states_", dir=self._folder)
            logger.info("hidden states beyond the limits in memory go to %s", self._files.name)
        path = os.path.join(self._files.name, str(len(os.listdir(self._files.name))))
        try:
            with open(path, "wb") as file:  # reserve the space now: a full disk would kill the process at a later write
                if tensor.nbytes:
                    os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot keep {tensor.nbytes / 2**20:.0f} MiB of hidden states in {self._files.name} ({error.strerror}); free "
                "space there, name another folder in `offload_dir`, raise `cache_ram_gib`, or use fewer or shorter samples",
            ) from error
        stored = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        stored._in_file = True
        return stored.copy_(tensor)


def map_nested(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to the items of a tuple, list or mapping, whose type is kept; anything else is returned as it is."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(change, value))
    if isinstance(value, (tuple, list)):
        return type(value)(change(item) for item in value)
    if isinstance(value, MutableMapping):
        changed = copy.copy(value)  # a `defaultdict` or a `UserDict` of the model stays one
        for key, item in value.items():
            changed[key] = change(item)
        return changed
    return value


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to each tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return change(value)
    return map_nested(value, lambda item: map_tensors(item, change))


def tensors_in(value: Any) -> list[Tensor]:
    """Return the different tensors in nested tuples, lists and mappings."""
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        found[id(tensor)] = tensor
        return tensor

    map_tensors(value, note)
    return list(found.values())


def _free_on(device: torch.device) -> float:
    return DEFAULT_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0.0
