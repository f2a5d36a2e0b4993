"""How many samples go through a block at once: as many as a batch has, fewer once memory has run out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .store import map_nested

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class SampleLimit:
    """The most samples of one forward pass; None while whole batches fit."""

    def __init__(self) -> None:
        self.samples: int | None = None

    def retry(
        self, what: str, largest: int, work: Callable[[], Result], undo: Callable[[], None] | None = None
    ) -> Result:
        """Run `work`, again with half as many samples at once each time it runs out of memory.

        Args:
            what: is done, for the log.
            largest: samples of the largest batch that `work` runs.
            work: can be run again from its start.
            undo: takes back what an attempt has left that ran out of memory.
        Raises:
            RuntimeError: one sample at a time is still too much; the message says what to lower.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                self._halve(what, largest, error)
            if torch.cuda.is_available():  # outside of the handler, which keeps the failed pass alive
                torch.cuda.empty_cache()
            if undo is not None:
                undo()

    def _halve(self, what: str, largest: int, error: torch.OutOfMemoryError) -> None:
        now = min(largest, self.samples or largest)
        if now <= 1:
            raise RuntimeError(
                f"out of memory while {what}, with one sample at a time; lower `max_length`, set `refine_steps=0`, or free "
                "memory on the device. Blocks that are committed in `checkpoint_dir` are kept"
            ) from error
        self.samples = now // 2
        logger.warning("out of memory while %s: from now on %d samples at once instead of %d", what, self.samples, now)

    def slices(self, batch: int) -> list[slice]:
        """Return the parts that a batch of `batch` samples runs in."""
        step = self.samples or batch
        return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def take_samples(value: Any, rows: slice, batch: int, length: int) -> Any:
    """Return the arguments of a block for some samples of a batch.

    Masks, positions and rotary factors have the batch beside the length (`[B, L, …]`, `[3, B, L, …]`), in front of a
    square (`[B, 1, L, L]`), or alone (`[B]`); features of images may have that of their tiles times the batch in front
    (`[B · tiles, F, D]`). What has no batch axis is shared by all samples.

    Args:
        value: nested tuples, lists and dicts of tensors and anything else.
        rows: which samples.
        batch, length: sizes of the hidden states [batch, length, hidden_size].
    """
    if isinstance(value, Tensor):
        axis = _batch_axis(value, batch, length)
        if axis is None:
            return value
        each = value.shape[axis] // batch
        return value.narrow(axis, each * rows.start, each * (rows.stop - rows.start))
    return map_nested(value, lambda item: take_samples(item, rows, batch, length))


def _batch_axis(tensor: Tensor, batch: int, length: int) -> int | None:
    shape = tuple(tensor.shape)
    if len(shape) == 4 and shape[2:] == (length, length) and shape[0] in (1, batch):  # [B, heads, L, L], maybe B heads
        return 0 if shape[0] == batch else None
    beside = [axis for axis in range(len(shape) - 1) if shape[axis : axis + 2] == (batch, length)]
    if beside:
        return beside[0]
    if not shape or shape == (length,):  # [L] are positions that all samples share
        return None
    by_tile = len(shape) == 3 and tensor.is_floating_point() and shape[0] and shape[0] % batch == 0
    return 0 if shape[0] == batch or by_tile else None
