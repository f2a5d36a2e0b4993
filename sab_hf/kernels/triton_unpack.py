"""Triton: the dense matrix of packed planes in the model's dtype, for a library's matrix product."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bits_as_signs(bits):
    return (bits & 1).to(tl.float32) * 2 - 1


@triton.jit
def unpack_kernel(
    signs_ptr, row_scale_ptr, col_scale_ptr, rank_ptr, residual_ptr, residual_row_scale_ptr, residual_col_scale_ptr,
    W_ptr, first_row, rows, all_rows, in_features, row_bytes, residual_bytes,
    PLANES: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """W[i, j] = Σ_k r_k[i] B_k[i, j] c_k[j] (+ the residual plane where rank[j] ≥ 0), rows first_row to first_row + rows - 1.

    Sums are float32, rounded once. rank: [in_features] int32, the column's place among the significant ones, or -1.
    """
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = first_row + local
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    column = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    here = (local < rows)[:, None] & (byte < row_bytes)[None, :]
    w = tl.zeros([ROWS, BYTES, 8], tl.float32)
    for k in tl.static_range(PLANES):
        start = signs_ptr + tl.full([], k, tl.int64) * all_rows * row_bytes
        packed = tl.load(start + row.to(tl.int64)[:, None] * row_bytes + byte[None, :], mask=here, other=0)
        r = tl.load(row_scale_ptr + k * all_rows + row, mask=local < rows, other=0.0).to(tl.float32)
        c = tl.load(col_scale_ptr + k * in_features + column, mask=column < in_features, other=0.0).to(tl.float32)
        bits = packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
        w += _bits_as_signs(bits) * c[None, :, :] * r[:, None, None]
    inside = (local < rows)[:, None, None] & (column < in_features)[None, :, :]
    if RESIDUAL:
        rank = tl.load(rank_ptr + column, mask=column < in_features, other=-1)
        marked = rank >= 0
        c = tl.load(residual_col_scale_ptr + rank, mask=marked, other=0.0).to(tl.float32)
        r = tl.load(residual_row_scale_ptr + row, mask=local < rows, other=0.0).to(tl.float32)
        pointers = residual_ptr + row.to(tl.int64)[:, None, None] * residual_bytes + (rank >> 3)[None, :, :]
        packed = tl.load(pointers, mask=inside & marked[None, :, :], other=0)
        bits = packed.to(tl.int32) >> (rank & 7)[None, :, :]
        w += _bits_as_signs(bits) * c[None, :, :] * r[:, None, None]
    pointers = W_ptr + local.to(tl.int64)[:, None, None] * in_features + column[None, :, :]
    tl.store(pointers, w.to(W_ptr.dtype.element_ty), mask=inside)
