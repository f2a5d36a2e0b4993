"""How many CPU threads a run computes with: as many as there are cores that nothing else uses.

Threads of one operation wait for each other. Where other processes take the cores, a team of two is slower than one thread, and
its waiting takes cores from all. So a run that computes on a CPU looks once, before it starts, at what is free.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from . import distributed
from .resume import Left, Steps

logger = logging.getLogger(__name__)

LOOK = 0.25
"""Seconds for which the use of the cores is observed."""

_CHOSEN_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_QUOTAS = (Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))  # cgroups version 2, 1
_PERIOD = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")


class Cores(NamedTuple):
    """Cores of the machine, in cores.

    Attributes:
        usable: that this process may use: those it is bound to, or fewer where its container has a quota.
        busy: that other processes use.
        load: processes that ran or wanted to, on average over the last minute (this one included).
    """

    usable: float
    busy: float
    load: float

    @property
    def free(self) -> int:
        """Threads that find a core of their own, at least one."""
        return max(1, round(self.usable - self.busy))


@contextmanager
def free_threads(device: torch.device, steps: Steps | None = None) -> Iterator[None]:
    """Compute on a CPU with as many threads as there are free cores, for the time of a `with` statement.

    What the user chose stays: `OMP_NUM_THREADS`, `MKL_NUM_THREADS`, or a call of `torch.set_num_threads`. The number is only
    lowered, chosen once, and kept in the run's folder: sums depend on it to rounding, so a resumed run takes the same one.
    Nothing is changed where a GPU computes, nor for one of several processes, whose threads are their launcher's choice.

    Args:
        device: the compute device.
        steps: of the run; None: there is none, only a prediction.
    """
    before = torch.get_num_threads()
    if device.type != "cpu" or before == 1 or distributed.size() > 1 or _user_chose(before):
        yield
        return

    def choose() -> Left:
        cores = look()
        _tell(cores, min(before, cores.free))
        return {}, {"threads": min(before, cores.free)}

    torch.set_num_threads((steps.once("threads", choose) if steps else choose())[1]["threads"])
    try:
        yield
    finally:
        torch.set_num_threads(before)


def look(seconds: float = LOOK) -> Cores:
    """Observe the cores for a moment, in which this process should do nothing."""
    bound = _bound()
    own, start = time.process_time(), time.perf_counter()
    percent = psutil.cpu_percent(interval=seconds, percpu=True)
    own = (time.process_time() - own) / (time.perf_counter() - start)
    now = sum(percent[core] for core in bound if core < len(percent)) / 100 - own
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else now
    # a load of the last minute may be this program's own; a burst of a quarter of a second may be over at once
    return Cores(min(len(bound), _quota()), max(0.0, min(now, load)), load)


def crowding() -> float:
    """Return how many processes want each core, at least 1: a program alone on the machine wants no more than there are."""
    usable = min(len(_bound()), _quota())
    return max(1.0, os.getloadavg()[0] / usable) if hasattr(os, "getloadavg") else 1.0


def _tell(cores: Cores, threads: int) -> None:
    if cores.load > cores.usable:
        logger.warning(
            "the machine is busy: %.1f processes want %.0f cores. This run computes with %d thread%s, and takes longer than it "
            "would alone. Set OMP_NUM_THREADS for another number, and OMP_WAIT_POLICY=PASSIVE so that waiting threads sleep",
            cores.load,
            cores.usable,
            threads,
            "s" * (threads > 1),
        )
    else:
        logger.info("computing with %d of %.0f cores", threads, cores.usable)


def _user_chose(threads: int) -> bool:
    """Whether the number of threads is not PyTorch's own: one for each core, or each physical core."""
    defaults = {len(_bound()), os.cpu_count(), psutil.cpu_count(logical=False)}
    return any(os.environ.get(name) for name in _CHOSEN_BY_USER) or threads not in defaults


def _bound() -> list[int]:
    """Return the numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _quota() -> float:
    """Return the cores that the process's container may use at a time; infinite where there is no such limit."""
    for path in _QUOTAS:
        try:
            words = path.read_text().split()
            period = words[1] if len(words) > 1 else _PERIOD.read_text()
            if words[0] != "max" and int(words[0]) > 0:
                return max(1.0, int(words[0]) / int(period))
        except (OSError, ValueError, IndexError):
            continue
    return float("inf")
