"""Triton: the inner part of the sign sweep of `fit.sweep_signs`, one launch for a block of columns.

The columns of a block depend on each other, its rows do not: a program takes some rows and goes through the columns with the
weights that are left in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_COLUMNS = 128
"""Most columns of a block: they live in registers."""
_ROWS = 32


@triton.jit
def sweep_kernel(
    rest_ptr, U_ptr, row_scale_ptr, col_scale_ptr, errors_ptr, choices_ptr, start, width, rows, columns,
    PLANES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Columns start to start + width - 1 of rest [columns, rows], one after the other: the nearest level, its error.

    errors [width, rows] float32; choices [width, rows] int64, the number of the level in the order of
    `levels.sign_combinations`. rest is not written: the caller carries the errors on to the columns after the block.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    column = tl.arange(0, WIDTH)
    inside = column < width
    at = rest_ptr + (start + column).to(tl.int64)[:, None] * rows + row[None, :]
    rest = tl.load(at, mask=inside[:, None] & here[None, :], other=0.0)  # [WIDTH, ROWS]
    for j in range(width):
        left = tl.sum(tl.where(column[:, None] == j, rest, 0.0), 0)
        nearest = tl.full([ROWS], float("inf"), tl.float32)
        error = tl.zeros([ROWS], tl.float32)
        choice = tl.zeros([ROWS], tl.int64)
        for signs in range(2**PLANES):
            level = tl.zeros([ROWS], tl.float32)
            for k in tl.static_range(PLANES):
                r = tl.load(row_scale_ptr + k * rows + row, mask=here, other=0.0)
                c = tl.load(col_scale_ptr + k * columns + start + j)
                negative = (signs >> (PLANES - 1 - k)) & 1
                level += tl.where(negative == 1, -c, c) * r
            distance = tl.abs(level - left)
            closer = distance < nearest
            nearest = tl.where(closer, distance, nearest)
            error = tl.where(closer, left - level, error)
            choice = tl.where(closer, signs, choice)
        U_row = U_ptr + (start + j).to(tl.int64) * columns + start
        error = error / tl.load(U_row + j)
        tl.store(errors_ptr + j * rows + row, error, mask=here)
        tl.store(choices_ptr + j * rows + row, choice, mask=here)
        push = tl.load(U_row + column, mask=inside & (column > j), other=0.0)
        rest -= push[:, None] * error[None, :]


def sweep_block(rest: Tensor, U: Tensor, r: Tensor, c: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Choose the levels of columns `start` to `end - 1`, at most `MAX_COLUMNS`.

    Args:
        rest: [in_features, out_features] float32 contiguous, the weights that are left, columns as rows.
        U: [in_features, in_features] float32, upper triangular.
        r, c: [K, out_features] and [K, in_features] float32, scales.
    Returns:
        Choices [end - start, out_features] int64, and the errors to push on, the same shape.
    """
    columns, rows = rest.shape
    errors = torch.empty(end - start, rows, device=rest.device)
    choices = torch.empty(end - start, rows, dtype=torch.long, device=rest.device)
    with torch.cuda.device_of(rest):  # Triton launches on the current device
        sweep_kernel[(triton.cdiv(rows, _ROWS),)](
            rest, U.contiguous(), r.contiguous(), c.contiguous(), errors, choices, start, end - start, rows, columns,
            PLANES=r.shape[0], WIDTH=MAX_COLUMNS, ROWS=_ROWS, num_warps=1,
        )  # fmt: skip
    return choices, errors
