"""What a machine does in a second, measured in about one: what the minutes of a run are predicted from.

On a CPU the rates are those of an undisturbed machine, by the processor time that they take; how many processes want its cores is
a number of its own.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import psutil
import torch

from ..method.trainable import pass_dtype
from . import distributed
from .placement import free_memory
from .threads import crowding
from .workspace import Workspace

QUICK, THOROUGH = 0.01, 0.15
"""Seconds for which each rate is measured: at first, and where the run will take more than a minute."""

_MOST = 4096  # rows and columns of the matrix: larger ones have the same rate, and take long
_TOKENS = {"cpu": 1024, "cuda": 8192}  # that are multiplied: a GPU must have more to do than launches take
_ELEMENTS = 1 << 20  # of an elementwise operation: 4 MiB, as a matrix of a small model


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        products: dtype → operations of a matrix product (a multiplication and an addition are two).
        bandwidth: bytes that elementwise operations read and write.
        calls: small operations, one after the other.
    """

    products: dict[torch.dtype, float]
    bandwidth: float
    calls: float


@dataclass(frozen=True)
class Machine:
    """A machine on which a run may take place; it need not be this one.

    Attributes:
        device: the compute device.
        name: in words.
        free: bytes that are free on the compute device.
        ram: bytes that are free in RAM.
        room: bytes of hidden states kept by place, as `StateStore.room`.
        rates: of the compute device; None: not known, so that nothing can be said about time.
        crowded: how many times as long a thread takes because others want the cores too, at least 1.
        processes: that share the run, each with a device like this.
    """

    device: torch.device
    name: str
    free: float
    ram: float
    room: dict[str, float]
    rates: Rates | None = None
    crowded: float = 1.0
    processes: int = 1

    @classmethod
    def here(cls, workspace: Workspace) -> Machine:
        """Return this machine with what is free on it, for the run of a workspace; rates are not measured."""
        device, threads = workspace.device, torch.get_num_threads()
        cuda = device.type == "cuda"
        name = (
            torch.cuda.get_device_name(device) if cuda else f"{threads} thread{'s' * (threads > 1)} of {_processor()}"
        )
        ram = psutil.virtual_memory().available
        free = free_memory(device) / distributed.sharing(device)
        crowded = 1.0 if cuda else crowding()
        return cls(device, name, free, ram, workspace.store.room, crowded=crowded, processes=distributed.size())

    def measured(self, shape: tuple[int, int], dtype: torch.dtype, seconds: float = QUICK) -> Machine:
        """Return the same machine, this one, with rates that are measured now.

        Args:
            shape: (out_features, in_features) of a Linear as the model has them: small ones are slower.
            dtype: of the model's weights.
            seconds: for each rate.
        """
        n, m = (min(size, _MOST) for size in shape)
        dtypes = tuple(sorted({dtype, torch.float32, pass_dtype(self.device)}, key=str))
        return replace(self, rates=_measured(self.device, n, m, dtypes, seconds, torch.get_num_threads()))


@lru_cache(maxsize=64)
def _measured(
    device: torch.device, n: int, m: int, dtypes: tuple[torch.dtype, ...], seconds: float, threads: int
) -> Rates:
    """Measure the rates of a device; `threads` are those that compute, a part of the key."""
    products = {dtype: product_rate(device, n, m, dtype, seconds, threads) for dtype in dtypes}
    a, b, c = (torch.ones(_ELEMENTS, dtype=torch.float32, device=device) for _ in range(3))
    bandwidth = 12.0 * _ELEMENTS / _seconds_of(lambda: torch.mul(a, b, out=c), device, seconds, threads)
    small = torch.ones(8, dtype=torch.float32, device=device)
    return Rates(products, bandwidth, 1 / _seconds_of(lambda: small.add_(1.0), device, seconds, 1))


def product_rate(device: torch.device, n: int, m: int, dtype: torch.dtype, seconds: float, threads: int) -> float:
    """Return the operations in a second of a Linear [n, m] on a batch of tokens, measured for so many seconds."""
    tokens = _TOKENS[device.type]
    x, W = (torch.full(size, 0.5, dtype=dtype, device=device) for size in ((tokens, m), (n, m)))
    return 2.0 * tokens * n * m / _seconds_of(lambda: x @ W.T, device, seconds, threads)


def _seconds_of(work: Callable[[], object], device: torch.device, seconds: float, threads: int) -> float:
    """Return how long a call of `work` takes on so many undisturbed threads, or on a GPU; on average over so many seconds."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return time.perf_counter()
        return time.process_time() / threads

    work()
    start, done, count = now(), 0, 1
    while now() - start < seconds:
        for _ in range(count):
            work()
        done += count
        count = min(2 * count, 256)
    return (now() - start) / max(1, done)


def _processor() -> str:
    """Return the name of the processor where Linux tells it, else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
