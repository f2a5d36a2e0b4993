"""What kernels derive from packed tensors: made at the first use, once, shared by all callers, never saved."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class _Entry(NamedTuple):
    storage: StorageWeakRef
    version: int
    layout: Any


_LOCK = threading.RLock()
_CACHE: dict[tuple, _Entry] = {}


def cached(name: str, source: Tensor, make: Callable[[], Any], keep: bool = True) -> Any:
    """Return `make()`, computed once for the memory that `source` views and for its present contents.

    Parameters hold their storage across calls, while `tensor.view(dtype)` makes a new tensor at each, and a device move
    gives a parameter new memory: so the storage is the key, with the version counter that in-place writes raise. An entry
    lives as long as its storage (freed ones are dropped when the next layout is made).

    Args:
        name: which layout; it must name the kernel and all that `make` depends on beside `source`.
        source: the packed tensor that the layout is made from.
        make: makes the layout; its result must not hold `source` or a view of it, which would keep it alive.
        keep: False returns a layout that is not there yet without keeping it.
    """
    storage = source.untyped_storage()
    key = (name, storage._cdata, source.storage_offset(), tuple(source.shape), source.dtype)
    version = version_of(source)
    entry = _CACHE.get(key)
    if entry is None or entry.version != version or entry.storage.expired():
        if not keep:
            return make()
        with _LOCK:
            entry = _CACHE.get(key)
            if entry is None or entry.version != version or entry.storage.expired():
                for old in [old for old, value in _CACHE.items() if value.storage.expired()]:
                    del _CACHE[old]
                entry = _CACHE[key] = _Entry(StorageWeakRef(storage), version, make())
    return entry.layout


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written in place; 0 for those of `torch.inference_mode`, which do not count it."""
    return 0 if tensor.is_inference() else tensor._version
