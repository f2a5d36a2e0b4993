"""Packed tensors cut by rows and by columns, for one rank of several that share a matrix.

Rows are cut where a product's outputs are shared, columns where its inputs are. A cut by columns may fall anywhere: bits are
shifted to whole bytes. The columns of the residual plane follow those of the matrix, so ranks have different numbers of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import packing
from ..packing import unpack_mask

ROW_AXIS = packing.ROW_AXIS | {"weight": 0}
"""The axis of a matrix's rows in each tensor that has them; `weight` is a dense one."""
BY_MASK = ("significant_columns", "residual_signs", "residual_col_scale")
"""Tensors of which a cut by columns needs all three, for the mask says which columns the others have."""


def take_rows(tensor: Tensor, axis: int, spans: Sequence[tuple[int, int]], padding: int = 0) -> Tensor:
    """Return the rows of some spans, one after the other.

    Args:
        tensor: one of `ROW_AXIS`, and the axis of its rows.
        spans: first row and the one behind the last, for each span.
        padding: rows of zeros to add behind them: their scales are zero, so their products are.
    """
    pieces = [tensor.narrow(axis, start, stop - start) for start, stop in spans]
    if padding:
        shape = [*tensor.shape]
        shape[axis] = padding
        pieces.append(tensor.new_zeros(shape))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)


def take_columns(name: str, tensor: Tensor, start: int, stop: int) -> Tensor:
    """Return the columns from `start` to before `stop` of the tensor called `name`, none of `BY_MASK`."""
    if name == "signs":
        return cut_bits(tensor, start, stop)
    if name in ("col_scale", "weight"):
        return tensor[..., start:stop]
    return tensor


def take_significant(tensors: dict[str, Tensor], in_features: int, start: int, stop: int) -> dict[str, Tensor]:
    """Return the tensors of `BY_MASK` for the columns from `start` to before `stop`; {} if none of these is significant.

    Args:
        tensors: `significant_columns` [⌈m/8⌉], `residual_signs` [rows, ⌈k/8⌉], `residual_col_scale` [k].
        in_features: columns of the whole matrix, m.
    Raises:
        ValueError: the mask marks another number of columns than the residual plane has.
    """
    mask, signs, scale = (tensors[name] for name in BY_MASK)
    marked = unpack_mask(mask, in_features, scale.numel())
    first, count = int(marked[:start].sum()), int(marked[start:stop].sum())
    if not count:
        return {}
    significant = (cut_bits(mask, start, stop), cut_bits(signs, first, first + count), scale[first : first + count])
    return dict(zip(BY_MASK, significant, strict=True))


def cut_bits(packed: Tensor, start: int, stop: int) -> Tensor:
    """Return entries of the last axis of packed bits, as packed bits.

    Args:
        packed: [..., bytes] uint8, eight entries a byte, least significant bit first.
        start, stop: the first entry and the one behind the last.
    Returns:
        [..., ⌈(stop − start)/8⌉] uint8; spare bits are 0.
    """
    count = math.ceil((stop - start) / 8)
    first, shift = divmod(start, 8)
    bits = packed[..., first : first + count]
    if shift:
        above = packed[..., first + 1 : first + 1 + count]
        above = torch.nn.functional.pad(above, (0, count - above.shape[-1]))
        bits = (bits >> shift) | (above << (8 - shift))
    spare = 8 * count - (stop - start)
    if spare:
        bits = bits.clone()
        bits[..., -1] &= 0xFF >> spare
    return bits
