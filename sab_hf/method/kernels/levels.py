"""Triton: `levels.nearest_level` and `levels.descend`, each in one pass over the matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import levels

_ROWS, _COLUMNS = 32, 64
_BETA1, _BETA2, _EPSILON = (tl.constexpr(value) for value in (*levels.BETAS, levels.EPSILON))


@triton.jit
def _nearest(
    value, row, column, r_ptr, c_ptr, rows, columns, PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The level nearest to each value of a tile, its number (the first of equals), and the largest level."""
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
    return W, choice, largest


@triton.jit
def _unit(row, column, r_ptr, c_ptr, rows, columns, PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The smallest size of a plane that is not 0, of a tile; 0 where all are."""
    unit = tl.full([ROWS, COLUMNS], float("inf"), tl.float32)
    for k in tl.static_range(PLANES):
        r = tl.load(r_ptr + k * rows + row, mask=row < rows, other=0.0)
        c = tl.load(c_ptr + k * columns + column, mask=column < columns, other=0.0)
        size = tl.abs(r[:, None] * c[None, :])
        unit = tl.where(size > 0, tl.minimum(unit, size), unit)
    return tl.where(unit == float("inf"), 0.0, unit)


@triton.jit
def nearest_kernel(
    latent_ptr, r_start_ptr, c_start_ptr, r_ptr, c_ptr, W_ptr, rows, columns,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The weight [rows, columns] of a tile."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    unit = _unit(row, column, r_start_ptr, c_start_ptr, rows, columns, PLANES, ROWS, COLUMNS)
    value = tl.load(latent_ptr + at, mask=here, other=0.0).to(tl.float32) * unit
    W, _, _ = _nearest(value, row, column, r_ptr, c_ptr, rows, columns, PLANES, ROWS, COLUMNS)
    tl.store(W_ptr + at, W.to(W_ptr.dtype.element_ty), mask=here)


@triton.jit
def descend_kernel(
    gradient_ptr, latent_ptr, first_ptr, second_ptr, r_start_ptr, c_start_ptr, r_ptr, c_ptr, numbers_ptr,
    r_part_ptr, c_part_ptr, rows, columns,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AT_RANDOM: tl.constexpr,
):  # fmt: skip
    """One step for the latents of a tile, and its part of the gradients at the scales.

    r_part: [PLANES, column tiles, rows]; c_part: [PLANES, row tiles, columns].
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    gradient = tl.load(gradient_ptr + at, mask=here, other=0.0).to(tl.float32)
    unit = _unit(row, column, r_start_ptr, c_start_ptr, rows, columns, PLANES, ROWS, COLUMNS)
    latent = tl.load(latent_ptr + at, mask=here, other=0.0).to(tl.float32)
    value = latent * unit
    _, choice, largest = _nearest(value, row, column, r_ptr, c_ptr, rows, columns, PLANES, ROWS, COLUMNS)
    for k in tl.static_range(PLANES):
        r = tl.load(r_ptr + k * rows + row, mask=row < rows, other=0.0)
        c = tl.load(c_ptr + k * columns + column, mask=column < columns, other=0.0)
        negative = (choice >> (PLANES - 1 - k)) & 1
        signed = tl.where(negative == 1, -gradient, gradient)
        r_part = r_part_ptr + (k * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * rows
        c_part = c_part_ptr + (k * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * columns
        tl.store(r_part + row, tl.sum(signed * c[None, :], 1), mask=row < rows)
        tl.store(c_part + column, tl.sum(signed * r[:, None], 0), mask=column < columns)
    gradient = tl.where(tl.abs(value) <= largest, gradient * unit, 0.0)
    first = tl.load(first_ptr + at, mask=here, other=0.0).to(tl.float32)
    second = tl.load(second_ptr + at, mask=here, other=0.0).to(tl.float32)
    first += (gradient - first) * (1 - _BETA1)
    second += (gradient * gradient - second) * (1 - _BETA2)
    tl.store(first_ptr + at, first.to(first_ptr.dtype.element_ty), mask=here)
    tl.store(second_ptr + at, second.to(second_ptr.dtype.element_ty), mask=here)
    root = tl.sqrt(second * tl.load(numbers_ptr + 2)) + _EPSILON
    latent -= tl.load(numbers_ptr) * first * tl.load(numbers_ptr + 1) / root
    if AT_RANDOM:
        random = tl.randint(tl.load(numbers_ptr + 3).to(tl.int32), at.to(tl.int32)).to(tl.int32, bitcast=True)
        bits = latent.to(tl.int32, bitcast=True) + (random & 0xFFFF)
        latent = (bits & -65536).to(tl.float32, bitcast=True)
    tl.store(latent_ptr + at, latent.to(latent_ptr.dtype.element_ty), mask=here)
    tl.debug_barrier()  # threads may store in another order than they load, so all must have loaded
    tl.store(gradient_ptr + at, tl.zeros([ROWS, COLUMNS], tl.float32).to(gradient_ptr.dtype.element_ty), mask=here)


def nearest_level(latent: Tensor, scales: levels.Scales, W: Tensor) -> Tensor:
    """As `levels.nearest_level`; arguments contiguous."""
    _launch(nearest_kernel, scales, latent, *scales, W)
    return W


def descend(
    gradient: Tensor,
    latent: Tensor,
    moments: tuple[Tensor, Tensor],
    scales: levels.Scales,
    at_scales: tuple[Tensor, Tensor],
    numbers: Tensor,
) -> None:
    """As `levels.descend`; arguments contiguous. Parts of sums are added in a fixed order."""
    (rows, columns), planes = latent.shape, len(scales.r)
    r_part = numbers.new_empty(planes, triton.cdiv(columns, _COLUMNS), rows)
    c_part = numbers.new_empty(planes, triton.cdiv(rows, _ROWS), columns)
    _launch(
        descend_kernel, scales, gradient, latent, *moments, *scales, numbers, r_part, c_part,
        AT_RANDOM=latent.dtype == torch.bfloat16,
    )  # fmt: skip
    torch.sum(r_part, 1, out=at_scales[0])
    torch.sum(c_part, 1, out=at_scales[1])


def _launch(
    kernel: triton.JITFunction, scales: levels.Scales, matrix: Tensor, *operands: Tensor, **options: bool
) -> None:
    rows, columns = matrix.shape
    with torch.cuda.device_of(matrix):  # Triton launches on the current device
        kernel[(triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))](
            matrix, *operands, rows, columns, PLANES=len(scales.r), ROWS=_ROWS, COLUMNS=_COLUMNS, **options
        )
