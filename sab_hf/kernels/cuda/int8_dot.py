"""Triton: the product of packed planes with activations rounded to integers, on tensor cores that multiply int8.

These are twice as fast as for 16-bit numbers. A tile of words [rows, words] becomes weights in registers, as in `dot.py`, but
bits stay 0 or 1: a shift and a logical operation make four of them. Twice such a product less the sum of the activations is
that of ±1. All of it is exact.

Activations have one scale for a whole input, so that sums stay integers to their end. Where one activation is far above the
others, these would be lost. So activations have two int8 digits, q + 64 high (`prepare.round_kernel`). `high` is 0 but for what
stands out. It is multiplied, with bits of weight 64, only for groups of columns and tiles of inputs in which something does.

Weights are the left operand, in registers, and `wgmma` reads them while the program goes on, as in `dot.py`: the same wait.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from .dot import after_products
from .fused import own_work, segment
from .int8 import load_words
from .prepare import GROUP


@triton.jit
def _weights(words, weight: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Return the bits of `words` [ROWS, WORDS] as 0 and `weight`, a power of two: [ROWS, 32 WORDS] int8.

    Place 4j + i of a word is its bit j + 8i.
    """
    four = ((words[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 0x01010101) * weight
    even = tl.join(four.to(tl.int8), (four >> 16).to(tl.int8))
    odd = tl.join((four >> 8).to(tl.int8), (four >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [ROWS, 32 * WORDS])


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _first_bit(x):
    """Return the place of the lowest bit of `x`, which is not 0."""
    low = x & -x
    place = tl.where((low & 0x0000FFFF) != 0, 0, 16)
    place += tl.where((low & 0x00FF00FF) != 0, 0, 8)
    place += tl.where((low & 0x0F0F0F0F) != 0, 0, 4)
    place += tl.where((low & 0x33333333) != 0, 0, 2)
    return place + tl.where((low & 0x55555555) != 0, 0, 1)


@triton.jit
def _plane_sums(
    q_ptr, high_ptr, mask_ptr, sum_ptr, start, row, rows, column, padded_words, masks, first, last,
    STRIDE: tl.constexpr, NUM_WORDS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, BATCH: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """Return the products [ROWS, BATCH] int32 of one plane's tiles of words `first` to `last` - 1, none if there are none.

    The part with a plane's last tile subtracts the sums of all activations.
    """
    u = column.to(tl.int64)[None, :] * (padded_words * 32)
    q = q_ptr + u + tl.arange(0, 32 * WORDS)[:, None]
    acc = tl.zeros([ROWS, BATCH], tl.int32)
    for tile in range(first, last):
        word = tile * WORDS + tl.arange(0, WORDS)
        words = after_products(load_words(start, row, word, rows, word < NUM_WORDS, STRIDE), WAIT)
        acc = tl.dot(_weights(words, 1, ROWS, WORDS), tl.load(q + tile * (32 * WORDS)), acc, out_dtype=tl.int32)
    high = high_ptr + u + tl.arange(0, 32 * GROUP)[:, None]
    for i in range(masks):
        mask = tl.load(mask_ptr + column * masks + i)
        left = tl.reduce(mask, 0, _or)
        while left != 0:
            bit = _first_bit(left)
            left &= left - 1
            word = (i * 32 + bit) * GROUP + tl.arange(0, GROUP)
            mine = (word >= first * WORDS) & (word < tl.minimum(last * WORDS, NUM_WORDS))
            words = after_products(load_words(start, row, word, rows, mine, STRIDE), WAIT)
            digits = tl.load(high + (i * 32 + bit) * (32 * GROUP), mask=((mask >> bit) & 1 != 0)[None, :], other=0)
            acc = tl.dot(_weights(words, 64, ROWS, GROUP), digits, acc, out_dtype=tl.int32)
    complete = (last > first) & (last == (NUM_WORDS + WORDS - 1) // WORDS)
    return 2 * acc - tl.where(complete, tl.load(sum_ptr + column), 0)[None, :]


@triton.jit(do_not_specialize=["batch", "masks", "whole", "row_tiles", "tiles"])
def int8_dot_kernel(
    q_ptr, high_ptr, mask_ptr, sum_ptr, scale_ptr, signs_ptr, row_scale_ptr, residual_ptr, residual_row_scale_ptr,
    y_ptr, partial_ptr, batch, rows, padded_words, masks, whole, row_tiles, tiles,
    PLANES: tl.constexpr, NUM_WORDS: tl.constexpr, STRIDE: tl.constexpr,
    RESIDUAL_WORDS: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, BATCH: tl.constexpr, WAIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[b, i] = Σ over planes k of r_k[i] (B_k u_k)[i, b]; programs share the tiles as those of `fused.fused_kernel` do.

    A tile's steps are those of its planes in turn, and of the residual plane.

    Args:
        q_ptr, high_ptr, mask_ptr, sum_ptr, scale_ptr: see `prepare.round_kernel`; `padded_words` is a multiple of WORDS.
    """
    plane_steps: tl.constexpr = (NUM_WORDS + WORDS - 1) // WORDS
    residual_steps: tl.constexpr = (RESIDUAL_WORDS + WORDS - 1) // WORDS
    steps: tl.constexpr = PLANES * plane_steps + residual_steps
    at, end, parts = own_work(whole, tiles, steps)
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    for number in range(whole + parts):
        tile, first, last = segment(number, whole, row_tiles, tiles, steps, at, end)
        at += tl.where(number < whole, 0, last - first)
        row = tile % row_tiles * ROWS + tl.arange(0, ROWS)
        column = tile // row_tiles * BATCH + tl.arange(0, BATCH)
        # inputs that do not exist repeat the last one, and their results are not stored
        source = tl.minimum(column, batch - 1)
        total = tl.zeros([ROWS, BATCH], tl.float32)
        for k in tl.static_range(PLANES + (RESIDUAL_WORDS > 0)):
            given = k * batch + source
            if k < PLANES:
                acc = _plane_sums(
                    q_ptr, high_ptr, mask_ptr, sum_ptr, signs_ptr + tl.full([], k, tl.int64) * rows * STRIDE, row, rows,
                    given, padded_words, masks, tl.minimum(tl.maximum(first - k * plane_steps, 0), plane_steps),
                    tl.minimum(tl.maximum(last - k * plane_steps, 0), plane_steps),
                    STRIDE, NUM_WORDS, ROWS, WORDS, BATCH, WAIT,
                )  # fmt: skip
                r = tl.load(row_scale_ptr + k * rows + row, mask=row < rows, other=0.0).to(tl.float32)
            else:
                acc = _plane_sums(
                    q_ptr, high_ptr, mask_ptr, sum_ptr, residual_ptr, row, rows, given, padded_words, masks,
                    tl.maximum(first - PLANES * plane_steps, 0), tl.maximum(last - PLANES * plane_steps, 0),
                    RESIDUAL_STRIDE, RESIDUAL_WORDS, ROWS, WORDS, BATCH, WAIT,
                )  # fmt: skip
                r = tl.load(residual_row_scale_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
            total += acc.to(tl.float32) * r[:, None] * tl.load(scale_ptr + given)[None, :]
        if last - first == steps:
            inside = (row < rows)[:, None] & (column < batch)[None, :]
            target = y_ptr + column.to(tl.int64)[None, :] * rows + row[:, None]
            tl.store(target, total.to(y_ptr.dtype.element_ty), mask=inside)
        elif last > first:
            slot = (2 * tl.program_id(0) + (first == 0)) * (ROWS * BATCH)
            target = partial_ptr + slot + tl.arange(0, ROWS)[:, None] * BATCH + tl.arange(0, BATCH)[None, :]
            tl.store(target, total)
