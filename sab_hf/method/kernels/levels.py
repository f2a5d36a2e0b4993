"""Triton: `levels.nearest_level` and `levels.gradients`, each in one pass over the matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 32, 64


@triton.jit
def nearest_kernel(
    latent_ptr, unit_ptr, r_ptr, c_ptr, W_ptr, choice_ptr, inside_ptr, rows, columns,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """W, choice and inside [rows, columns] of a tile; the first of equally near levels is chosen."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    value = tl.load(latent_ptr + at, mask=here, other=0.0) * tl.load(unit_ptr + at, mask=here, other=0.0)
    nearest = tl.full([ROWS, COLUMNS], float("inf"), tl.float32)
    W = tl.zeros([ROWS, COLUMNS], tl.float32)
    choice = tl.zeros([ROWS, COLUMNS], tl.int32)
    largest = tl.zeros([ROWS, COLUMNS], tl.float32)
    for signs in range(2**PLANES):
        level = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in tl.static_range(PLANES):
            r = tl.load(r_ptr + k * rows + row, mask=row < rows, other=0.0)
            c = tl.load(c_ptr + k * columns + column, mask=column < columns, other=0.0)
            negative = (signs >> (PLANES - 1 - k)) & 1
            level += tl.where(negative == 1, -r, r)[:, None] * c[None, :]
        distance = tl.abs(level - value)
        closer = distance < nearest
        nearest = tl.where(closer, distance, nearest)
        W = tl.where(closer, level, W)
        choice = tl.where(closer, signs, choice)
    for k in tl.static_range(PLANES):
        r = tl.load(r_ptr + k * rows + row, mask=row < rows, other=0.0)
        c = tl.load(c_ptr + k * columns + column, mask=column < columns, other=0.0)
        largest += tl.abs(r[:, None] * c[None, :])
    tl.store(W_ptr + at, W, mask=here)
    tl.store(choice_ptr + at, choice.to(tl.int16), mask=here)
    tl.store(inside_ptr + at, tl.abs(value) <= largest, mask=here)


@triton.jit
def gradient_kernel(
    gradient_ptr, choice_ptr, inside_ptr, unit_ptr, r_ptr, c_ptr, latent_ptr, r_part_ptr, c_part_ptr, rows, columns,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient at the latent of a tile, and its part of those at the scales.

    r_part: [PLANES, column tiles, rows]; c_part: [PLANES, row tiles, columns].
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    gradient = tl.load(gradient_ptr + at, mask=here, other=0.0)
    choice = tl.load(choice_ptr + at, mask=here, other=0).to(tl.int32)
    inside = tl.load(inside_ptr + at, mask=here, other=0)
    unit = tl.load(unit_ptr + at, mask=here, other=0.0)
    tl.store(latent_ptr + at, tl.where(inside != 0, gradient * unit, 0.0), mask=here)
    for k in tl.static_range(PLANES):
        r = tl.load(r_ptr + k * rows + row, mask=row < rows, other=0.0)
        c = tl.load(c_ptr + k * columns + column, mask=column < columns, other=0.0)
        negative = (choice >> (PLANES - 1 - k)) & 1
        signed = tl.where(negative == 1, -gradient, gradient)
        r_part = r_part_ptr + (k * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * rows
        c_part = c_part_ptr + (k * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * columns
        tl.store(r_part + row, tl.sum(signed * c[None, :], 1), mask=row < rows)
        tl.store(c_part + column, tl.sum(signed * r[:, None], 0), mask=column < columns)


def nearest_level(latent: Tensor, unit: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `levels.nearest_level`; arguments contiguous."""
    W = torch.empty_like(latent)
    choice, inside = torch.empty_like(latent, dtype=torch.int16), torch.empty_like(latent, dtype=torch.bool)
    _launch(nearest_kernel, len(r), latent, unit, r.contiguous(), c.contiguous(), W, choice, inside)
    return W, choice, inside


def gradients(
    gradient: Tensor, choice: Tensor, inside: Tensor, unit: Tensor, r: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `levels.gradients`; arguments contiguous. Parts are summed in a fixed order."""
    (rows, columns), planes = gradient.shape, len(r)
    at_latent = torch.empty_like(gradient)
    r_part = gradient.new_empty(planes, triton.cdiv(columns, _COLUMNS), rows)
    c_part = gradient.new_empty(planes, triton.cdiv(rows, _ROWS), columns)
    operands = gradient, choice, inside, unit, r.contiguous(), c.contiguous(), at_latent, r_part, c_part
    _launch(gradient_kernel, planes, *operands)
    return at_latent, r_part.sum(1), c_part.sum(1)


def _launch(kernel: triton.JITFunction, planes: int, matrix: Tensor, *operands: Tensor) -> None:
    rows, columns = matrix.shape
    with torch.cuda.device_of(matrix):  # Triton launches on the current device
        kernel[(triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))](
            matrix, *operands, rows, columns, PLANES=planes, ROWS=_ROWS, COLUMNS=_COLUMNS
        )
