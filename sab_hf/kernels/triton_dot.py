"""Triton: the product of packed planes with activations in the model's dtype, on tensor cores.

For one bit of a tile of words the weights ±1 are a matrix [rows, words]; 32 such products make a tile. Two neighbouring
words are cut into pairs of 16-bit halves once, so that a shift and one logical operation give a pair of weights.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from .triton_int8 import load_words

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_BFLOAT16_PAIR = tl.constexpr("{ .reg .b32 t; shl.b32 t, $1, %d; lop3.b32 $0, t, 0x80008000, 0xBF80BF80, 0x6A; }")
_FLOAT16_PAIR = tl.constexpr("{ .reg .b32 t; shl.b32 t, $1, %d; lop3.b32 $0, t, 0x80008000, 0xBC00BC00, 0x6A; }")


@triton.jit
def _signs(half, bit: tl.constexpr, u_ptr):
    """Return bit `bit` of the 16-bit integers `half` as ±1 of the dtype of `u_ptr`."""
    if INTERPRETED or u_ptr.dtype.element_ty == tl.float32:
        return (((half.to(tl.int32) >> bit) & 1) * 2 - 1).to(u_ptr.dtype.element_ty)
    else:
        asm: tl.constexpr = _BFLOAT16_PAIR if u_ptr.dtype.element_ty == tl.bfloat16 else _FLOAT16_PAIR
        return tl.inline_asm_elementwise(
            asm % (15 - bit), "=r,r", [half], dtype=u_ptr.dtype.element_ty, is_pure=True, pack=2
        )


@triton.jit
def _plane_products(
    acc, u_ptr, start, row, rows, column, batch, padded_words, first, last,
    STRIDE: tl.constexpr, NUM_WORDS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Add to `acc` [ROWS, BATCH] the products of one plane's tiles of words `first` to `last` - 1."""
    for t in range(first, last):
        word = t * WORDS + tl.arange(0, WORDS)
        words = load_words(start, row, word, rows, True, STRIDE, NUM_WORDS)
        low, high = words.to(tl.int16), (words >> 16).to(tl.int16)
        inside = (word < NUM_WORDS)[:, None] & (column < batch)[None, :]
        u = u_ptr + column[None, :] * padded_words + word[:, None]
        for bit in tl.static_range(16):
            u_low = tl.load(u + bit * batch * padded_words, mask=inside, other=0.0)
            u_high = tl.load(u + (bit + 16) * batch * padded_words, mask=inside, other=0.0)
            acc = tl.dot(_signs(low, bit, u_ptr), u_low, acc, input_precision="ieee")
            acc = tl.dot(_signs(high, bit, u_ptr), u_high, acc, input_precision="ieee")
    return acc


@triton.jit
def dot_kernel(
    u_ptr, signs_ptr, row_scale_ptr, residual_ptr, residual_row_scale_ptr, y_ptr, partial_ptr, counter_ptr,
    batch, rows, padded_words,
    PLANES: tl.constexpr, NUM_WORDS: tl.constexpr, STRIDE: tl.constexpr,
    RESIDUAL_WORDS: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, BATCH: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[b, i] = Σ over planes k of r_k[i] (B_k u_k)[i, b], the words of each plane shared among SPLITS programs.

    The last program of a tile to arrive adds the partial sums [SPLITS, batch, rows] float32 in the order of the splits:
    the order of arrival decides who adds, not what.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    split = tl.program_id(2)
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    total = tl.zeros([ROWS, BATCH], tl.float32)
    tiles: tl.constexpr = (NUM_WORDS + WORDS - 1) // WORDS
    for plane in tl.static_range(PLANES):
        acc = _plane_products(
            tl.zeros([ROWS, BATCH], tl.float32), u_ptr + plane * 32 * batch * padded_words,
            signs_ptr + tl.full([], plane, tl.int64) * rows * STRIDE, row, rows, column, batch, padded_words,
            split * tiles // SPLITS, (split + 1) * tiles // SPLITS, STRIDE, NUM_WORDS, WORDS,
        )  # fmt: skip
        total += acc * tl.load(row_scale_ptr + plane * rows + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    if RESIDUAL_WORDS:
        residual_tiles: tl.constexpr = (RESIDUAL_WORDS + WORDS - 1) // WORDS
        acc = _plane_products(
            tl.zeros([ROWS, BATCH], tl.float32), u_ptr + PLANES * 32 * batch * padded_words, residual_ptr,
            row, rows, column, batch, padded_words,
            split * residual_tiles // SPLITS, (split + 1) * residual_tiles // SPLITS,
            RESIDUAL_STRIDE, RESIDUAL_WORDS, WORDS,
        )  # fmt: skip
        total += acc * tl.load(residual_row_scale_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    inside = (row < rows)[:, None] & (column < batch)[None, :]
    target = column.to(tl.int64)[None, :] * rows + row[:, None]
    if SPLITS == 1:
        tl.store(y_ptr + target, total.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        size = batch.to(tl.int64) * rows
        tl.store(partial_ptr + split * size + target, total, mask=inside)
        tl.debug_barrier()  # all of this program's sums are written before it is counted
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            y = tl.zeros([ROWS, BATCH], tl.float32)
            for s in range(SPLITS):
                y += tl.load(partial_ptr + s * size + target, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(y_ptr + target, y.to(y_ptr.dtype.element_ty), mask=inside)
