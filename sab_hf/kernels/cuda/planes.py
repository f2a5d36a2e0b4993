"""Packed planes as the Triton kernels read them: in place, as 32-bit words, with what is derived from them.

Derived (`layouts.py`) are a padded copy where the rows are not whole words, and two small index tables of the significant
columns.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from ...packing import unpack_bits, unpack_mask
from .. import layouts
from ..ops import Operands, marked_columns


class Planes(NamedTuple):
    """The op's tensors and what is derived from them.

    words: [K, n, ≥⌈m/32⌉] int32, the planes. residual_words: [n, ≥⌈k/32⌉] int32; columns: [k] int32, the significant
    columns; rank: [m] int32, a column's place among them or -1. Without a residual plane those are None.
    """

    signs: Tensor
    row_scale: Tensor
    col_scale: Tensor
    residual_signs: Tensor | None
    residual_row_scale: Tensor | None
    residual_col_scale: Tensor | None
    words: Tensor
    residual_words: Tensor | None
    columns: Tensor | None
    rank: Tensor | None

    @property
    def num_planes(self) -> int:
        return self.row_scale.shape[0]

    @property
    def rows(self) -> int:
        return self.row_scale.shape[1]

    @property
    def in_features(self) -> int:
        return self.col_scale.shape[1]

    @property
    def num_significant(self) -> int:
        return 0 if self.residual_col_scale is None else self.residual_col_scale.numel()

    @property
    def num_words(self) -> int:
        return -(-self.in_features // 32)

    @property
    def num_residual_words(self) -> int:
        return -(-self.num_significant // 32)


def planes(
    signs: Tensor, row_scale: Tensor, col_scale: Tensor, significant_columns: Tensor | None, residual_signs: Tensor | None,
    residual_row_scale: Tensor | None, residual_col_scale: Tensor | None,
) -> Planes:  # fmt: skip
    """Collect the op's tensors; derive what the kernels need at the first call.

    Raises:
        ValueError: the mask marks another number of columns than the residual plane has. While a stream is being captured
            nothing can be counted; then no column lies outside of matrix and residual plane.
    """
    words, residual_words, columns, rank = _words(signs), None, None, None
    if significant_columns is not None:
        residual_words = _words(residual_signs)
        count, length = residual_col_scale.numel(), col_scale.shape[1]

        def index() -> tuple[Tensor, Tensor]:
            captured = significant_columns.is_cuda and torch.cuda.is_current_stream_capturing()
            mask = unpack_bits(significant_columns, length)
            if not captured:
                unpack_mask(significant_columns, length, count)
            rank = torch.where(mask, (mask.cumsum(0).int() - 1).clamp(max=count - 1), -1).int()
            return marked_columns(mask, count).int(), rank

        columns, rank = _derived(f"columns {length} {count}", significant_columns, index)
    return Planes(
        signs.contiguous(), row_scale.contiguous(), col_scale.contiguous(), residual_signs, residual_row_scale,
        residual_col_scale, words, residual_words, columns, rank,
    )  # fmt: skip


def sizes(operands: Operands) -> Planes:
    """Return planes that tell their sizes only, for tensors that need not have memory."""
    nothing = dict.fromkeys(Planes._fields)
    return Planes(
        **nothing | {name: getattr(operands, name) for name in ("row_scale", "col_scale", "residual_col_scale")}
    )


def negated_scales(planes: Planes, dtype: torch.dtype, residual: bool) -> Tensor:
    """Return the negated column scales in a 16-bit dtype, as pairs: [planes, words rounded up to 8, 16] int32.

    Args:
        residual: those of the residual plane, spread to the columns of the matrix, 0 in the others.
    """

    def make() -> Tensor:
        scales = _spread(planes) if residual else planes.col_scale
        pad = -planes.in_features % 256
        return torch.nn.functional.pad(-scales.to(dtype), (0, pad)).view(torch.int32)

    source = planes.residual_col_scale if residual else planes.col_scale
    return _derived(f"negated scales {dtype} {residual}", source, make)


def spread_scales(planes: Planes) -> Tensor:
    """Return the residual plane's column scales at the columns of the matrix, 0 in the others: [1, m] float32."""

    return _derived("spread scales", planes.residual_col_scale, lambda: _spread(planes))


def _spread(planes: Planes) -> Tensor:
    spread = planes.residual_col_scale.new_zeros(1, planes.in_features, dtype=torch.float32)
    return spread.index_copy(1, planes.columns.long(), planes.residual_col_scale.float()[None])


def expansion(planes: Planes) -> Tensor:
    """Return how the residual plane's bits are spread to their columns: [7, words] int32.

    The first five are masks: the bits that come from places 16, 8, 4, 2 and 1 below, one step after the other. Then the mask
    of significant columns, and how many there are in the words before. (Hacker's Delight, 7-5.)
    """

    def make() -> Tensor:
        marked = torch.nn.functional.pad(planes.rank >= 0, (0, -planes.in_features % 32)).unflatten(0, (-1, 32)).long()
        count = marked.sum(1)
        # place[w, q]: where the word's bit q has to go; it is shifted by the bits of place - q, the largest first
        order = torch.argsort(1 - marked, dim=1, stable=True)
        bit = torch.arange(32, device=marked.device)
        exists = bit < count[:, None]
        distance = torch.where(exists, order - bit, 0)
        now, steps = bit.expand_as(order), []
        for shift in (16, 8, 4, 2, 1):
            moves = exists & (distance & shift > 0)
            now = now + shift * moves
            steps.append((moves.long() << now).sum(1))
        masks = torch.stack([*steps, (marked << bit).sum(1), count.cumsum(0) - count])
        return torch.where(masks >= 2**31, masks - 2**32, masks).int()

    return _derived("expansion", planes.rank, make)


def _words(packed: Tensor) -> Tensor:
    """Return rows of bytes as rows of 32-bit words: a view where that can be, else a copy padded to 16 bytes."""
    if packed.is_contiguous() and packed.shape[-1] % 4 == 0 and packed.storage_offset() % 4 == 0:
        return packed.view(torch.int32)
    pad = -packed.shape[-1] % 16
    return _derived("words", packed, lambda: torch.nn.functional.pad(packed, (0, pad)).contiguous().view(torch.int32))


def _derived(name, source, make):
    """Return a cached layout.

    It is made in a thread of its own, on the default stream, and waited for: in this thread, allocations may be going to
    the memory pool of a CUDA graph, which forgets them. While this very stream is being captured nothing is kept.
    """
    if not source.is_cuda:
        return layouts.cached(name, source, make)
    if torch.cuda.is_current_stream_capturing():
        return layouts.cached(name, source, make, keep=False)

    def apart():
        torch.cuda.current_stream(source.device).synchronize()

        def work():
            with torch.cuda.device(source.device), torch.no_grad():
                result = make()
                torch.cuda.current_stream().synchronize()
                return result

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(work).result()

    return layouts.cached(name, source, apart)
