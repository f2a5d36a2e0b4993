"""Time and peak memory of each stage of a quantization."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .bar import Bar

logger = logging.getLogger(__name__)


@dataclass
class Stage:
    """One stage, summed over all blocks.

    Attributes:
        seconds: wall time.
        last_seconds: seconds of the last run of the stage (the last block, where blocks have runs of their own).
        peak_ram_mib: most resident memory of the process up to the end of the stage, MiB; None where the system does not tell.
        peak_gpu_mib: most GPU memory allocated during the stage, MiB; None without a GPU.
    """

    seconds: float = 0.0
    last_seconds: float = 0.0
    peak_ram_mib: float | None = None
    peak_gpu_mib: float | None = None


@dataclass
class StageClock:
    """Stages by name, in the order in which they first ran.

    Attributes:
        device: whose memory is read, if it is a GPU; else, or None: the current GPU's.
        bar: is told which stage is at work.
    """

    stages: dict[str, Stage] = field(default_factory=dict)
    device: torch.device | None = None
    bar: Bar = field(default_factory=Bar, repr=False, compare=False)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time of the enclosed code to the stage `name`; stages do not nest."""
        if name not in self.stages:
            logger.info("%s …", name)  # once, not for every block
        gpu = torch.cuda.is_available()
        device = self.device if self.device is not None and self.device.type == "cuda" else None
        if gpu:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        self.bar.enter(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            if gpu:
                torch.cuda.synchronize(device)
            stage = self.stages.setdefault(name, Stage())
            stage.last_seconds = time.perf_counter() - start
            stage.seconds += stage.last_seconds
            self.bar.leave()
            stage.peak_ram_mib = peak_ram_mib()
            if gpu:
                stage.peak_gpu_mib = max(stage.peak_gpu_mib or 0.0, torch.cuda.max_memory_allocated(device) / 2**20)


def peak_ram_mib() -> float | None:
    """Return the most resident memory that this process ever had, in MiB; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
