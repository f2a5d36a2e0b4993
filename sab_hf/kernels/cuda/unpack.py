"""Triton: the dense matrix of packed planes in the model's dtype, for a library's matrix product."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _signed(p, bits, i):
    """Return float32 `p` where bit i of the integers `bits` is set, else -p."""
    sign = (~bits << (31 - i)) & -0x80000000
    return (p.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def unpack_kernel(
    signs_ptr, row_scale_ptr, col_scale_ptr, extra_ptr, extra_row_scale_ptr, extra_col_scale_ptr,
    W_ptr, first_row, rows, all_rows, in_features, row_bytes, extra_bytes,
    PLANES: tl.constexpr, EXTRA: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """W[i, j] = Σ_k r_k[i] B_k[i, j] c_k[j], rows first_row to first_row + rows - 1, with the residual plane if EXTRA.

    That one comes as a plane of all columns, of just these rows, whose scales are 0 in columns that it does not have. Sums
    are float32, rounded once. Each program makes STEPS tiles of ROWS rows, one below the other.
    """
    byte = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    column = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    for step in range(STEPS):
        local = (tl.program_id(1) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        row = first_row + local
        here = (local < rows)[:, None] & (byte < row_bytes)[None, :]
        offset = row.to(tl.int64)[:, None] * row_bytes + byte[None, :]
        w = tl.zeros([ROWS, BYTES, 8], tl.float32)
        for k in tl.static_range(PLANES):
            packed = tl.load(signs_ptr + tl.full([], k, tl.int64) * all_rows * row_bytes + offset, mask=here, other=0)
            r = tl.load(row_scale_ptr + k * all_rows + row, mask=local < rows, other=0.0).to(tl.float32)
            c = tl.load(col_scale_ptr + k * in_features + column, mask=column < in_features, other=0.0).to(tl.float32)
            w += _signed(
                c[None, :, :] * r[:, None, None], packed.to(tl.int32)[:, :, None], tl.arange(0, 8)[None, None, :]
            )
        inside = (local < rows)[:, None, None] & (column < in_features)[None, :, :]
        if EXTRA:
            offset = local.to(tl.int64)[:, None] * extra_bytes + byte[None, :]
            packed = tl.load(extra_ptr + offset, mask=here, other=0)
            r = tl.load(extra_row_scale_ptr + row, mask=local < rows, other=0.0).to(tl.float32)
            c = tl.load(extra_col_scale_ptr + column, mask=column < in_features, other=0.0).to(tl.float32)
            w += _signed(
                c[None, :, :] * r[:, None, None], packed.to(tl.int32)[:, :, None], tl.arange(0, 8)[None, None, :]
            )
        pointers = W_ptr + local.to(tl.int64)[:, None, None] * in_features + column[None, :, :]
        tl.store(pointers, w.to(W_ptr.dtype.element_ty), mask=inside)
