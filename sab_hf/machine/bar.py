"""One progress bar over a whole run. Stages count by the time that they are predicted to take."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch
from tqdm import auto, notebook
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.utils.logging import is_progress_bar_enabled, tqdm

from . import distributed
from .store import GIB

Item = TypeVar("Item")

REDRAW, LINE = 0.2, 30.0
"""Least seconds between two drawings on a terminal or in a notebook, and between two lines elsewhere."""

_FORMAT = "{desc}: {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}"
_LINE_FORMAT = "{desc}: {percentage:3.0f} %, {elapsed} gone, {remaining} left{postfix}"


@dataclass(frozen=True)
class Moment:
    """Where a run is.

    Attributes:
        share: of the work, 0 to 1.
        stage: name of the stage at work, as in `QuantizationRecord.stages`.
        block, blocks: number of the language block at work, from 1, and of how many; 0 outside of blocks.
        done, total: steps of the stage at work, where it counts some: training steps, matrices, batches or blocks.
        note: what the stage tells, such as the loss on held-out samples.
        seconds, seconds_left: since the start, and predicted by the work that is left; None at the start.
        ram_gib: resident memory of the process.
        gpu_gib: memory allocated on the compute device; None on a CPU.
    """

    share: float
    stage: str
    block: int
    blocks: int
    done: int
    total: int
    note: str
    seconds: float
    seconds_left: float | None
    ram_gib: float
    gpu_gib: float | None

    def __str__(self) -> str:
        steps = f" {self.done}/{self.total}" if self.total > 1 else ""
        return (f"block {self.block}/{self.blocks}, " if self.block else "") + f"{self.stage}{steps}"

    @property
    def beside(self) -> str:
        """Memory and note in words."""
        gpu = "" if self.gpu_gib is None else f", GPU {self.gpu_gib:.1f} GiB"
        return f"RAM {self.ram_gib:.1f} GiB{gpu}" + (f", {self.note}" if self.note else "")


class Bar:
    """Tell how far a run is: a bar on a terminal or in a notebook, a line now and then elsewhere, or calls of a function.

    What works reports its steps; which stage that is in, the clock of stages tells by `enter` and `leave`. A stage may run many
    times (once a block); each time counts the same part of its predicted seconds.

    Args:
        seconds: stage → predicted seconds.
        runs: stage → how many times it runs; one that is not named runs once.
        tell: called with a `Moment` in place of drawing, at most once in `REDRAW` seconds, and at the end.
        device: whose memory is told, if it is a GPU.
    """

    def __init__(
        self,
        seconds: dict[str, float] | None = None,
        runs: dict[str, int] | None = None,
        tell: Callable[[Moment], Any] | None = None,
        device: torch.device | None = None,
    ):
        self._each = {name: value / (runs or {}).get(name, 1) for name, value in (seconds or {}).items()}
        self._seconds = dict(seconds or {})
        self._total = max(sum(self._seconds.values()), 1e-9)
        self._finished: dict[str, float] = {}
        self._stage, self._note, self._block, self._blocks = "", "", 0, 0
        self._levels: list[Count] = []
        self._most = 0.0
        self._tell, self._device = tell, device
        self._start, self._last, self._interval = time.perf_counter(), 0.0, REDRAW
        self._drawn: Any = None

    @contextmanager
    def shown(self) -> Iterator[Bar]:
        """Show the bar for the time of a `with` statement; of several processes, the first one's."""
        with ExitStack() as stack:
            if distributed.rank() > 0:
                self._tell = None
            elif self._tell is None and is_progress_bar_enabled():
                self._draw(stack)
            try:
                yield self
                self._finished, self._stage, self._block = dict(self._seconds), "done", 0
                self.show(now=True)
            finally:
                self._drawn = self._tell = None

    def enter(self, stage: str) -> None:
        """Note that a stage begins."""
        self._stage, self._note, self._levels = stage, "", [Count(self, 0, 1, 1.0)]
        self.show()

    def leave(self) -> None:
        """Note that the stage at work is over."""
        known = self._finished.get(self._stage, 0.0) + self._each.get(self._stage, 0.0)
        self._finished[self._stage] = min(known, self._seconds.get(self._stage, 0.0))
        self._levels = []

    def count(self, stages: Iterable[str], runs: int) -> None:
        """Note that stages have run so many times, or need not, because an interrupted run did them."""
        for stage in stages:
            known = max(self._finished.get(stage, 0.0), runs * self._each.get(stage, 0.0))
            self._finished[stage] = min(known, self._seconds.get(stage, 0.0))

    @contextmanager
    def steps(self, total: int, done: int = 0, part: float = 1.0) -> Iterator[Count]:
        """Count steps in a `with` statement.

        Args:
            total, done: steps, and how many of them are behind.
            part: of the enclosing step, or of the stage, for which they stand; less than 1 where others stand for the rest.
        """
        own = Count(self, done, max(1, total), part)
        self._levels.append(own)
        try:
            yield own
        finally:
            if own in self._levels:
                del self._levels[self._levels.index(own) :]
            if part < 1 and self._levels:
                self._levels[-1].done += part

    def over(self, items: Sequence[Item], part: float = 1.0) -> Iterator[Item]:
        """Yield `items`, each a step; `part` as in `steps`."""
        with self.steps(len(items), part=part) as steps:
            for item in items:
                yield item
                steps.update()

    def note(self, text: str) -> None:
        """Show a text beside the bar."""
        self._note = text
        self.show()

    def in_block(self, number: int, of: int) -> None:
        """Note which language block is at work, from 1; 0 for none."""
        self._block, self._blocks = number, of

    def moment(self) -> Moment:
        """Return where the run is."""
        part = 0.0
        for level in reversed(self._levels):
            part = level.part * min(1.0, (level.done + part) / level.total)
        counted = next((level for level in self._levels if level.total > 1), None)
        inside = self._each.get(self._stage, 0.0) * part
        known = self._finished.get(self._stage, 0.0)
        inside = min(inside, self._seconds.get(self._stage, 0.0) - known)
        share = min(1.0, (sum(self._finished.values()) + inside) / self._total)
        share = self._most = max(
            self._most, share
        )  # what is done again, with fewer samples at once, moves nothing back
        seconds = time.perf_counter() - self._start
        gpu = self._device is not None and self._device.type == "cuda"
        return Moment(
            share,
            self._stage,
            self._block,
            self._blocks,
            int(counted.done) if counted else 0,
            counted.total if counted else 0,
            self._note,
            seconds,
            seconds * (1 - share) / share if share > 0 else None,
            psutil.Process().memory_info().rss / GIB,
            torch.cuda.memory_allocated(self._device) / GIB if gpu else None,
        )

    def show(self, now: bool = False) -> None:
        """Show where the run is, if the last time is long enough ago, or `now`."""
        clock = time.perf_counter()
        if (self._drawn is None and self._tell is None) or (clock - self._last < self._interval and not now):
            return
        self._last, moment = clock, self.moment()
        if self._tell is not None:
            self._tell(moment)
            return
        self._drawn.n = moment.share
        self._drawn.set_description_str(f"binarizing: {moment}", refresh=False)
        self._drawn.set_postfix_str(moment.beside, refresh=False)
        self._drawn.refresh()

    def _draw(self, stack: ExitStack) -> None:
        """Make the bar that suits where standard error goes."""
        in_notebook = issubclass(auto.tqdm, notebook.tqdm_notebook)
        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        options = {"total": 1.0, "desc": "binarizing", "bar_format": _FORMAT, "dynamic_ncols": on_terminal}
        if not in_notebook and not on_terminal:
            self._interval = LINE
            options |= {"bar_format": _LINE_FORMAT, "file": _Lines(), "delay": 1e-9, "leave": False}
        if on_terminal:
            stack.enter_context(logging_redirect_tqdm(_speakers()))
        self._drawn = stack.enter_context(tqdm(**options))


class Count:
    """Steps of a stage, or of a step of it, made by `Bar.steps`."""

    def __init__(self, bar: Bar, done: float, total: int, part: float):
        self.done, self.total, self.part, self._bar = done, total, part, bar

    def update(self, count: int = 1) -> None:
        """Note that so many further ones are done."""
        self.done += count
        self._bar.show()

    def note(self, text: str) -> None:
        """Show a text, such as a loss, beside the bar."""
        self._bar.note(text)


class _Lines:
    """A file for a progress bar that writes a line for each of its drawings, in place of going back to the line's start."""

    def write(self, text: str) -> None:
        text = text.replace("\r", "").rstrip()
        if text:
            sys.stderr.write(f"{text}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def _speakers() -> list[logging.Logger]:
    """Return the loggers whose lines go to the terminal; those of a root without handlers do, too."""
    root = logging.getLogger()
    known = (root, logging.getLogger("transformers"), logging.getLogger("sab_hf"))
    console = (sys.stdout, sys.stderr)
    found = [one for one in known if any(getattr(handler, "stream", None) in console for handler in one.handlers)]
    return found if root.handlers else [root, *found]
