"""Triton: scale the activations by the planes' column scales, in the order in which packed words hold the columns.

Bit b of the 32-bit word w of a row is column 32w + b (`packing.py`, read as little-endian words). So the activations of
one word are 32 neighbours, and only their order within the word has to fit what the products want.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def _scaled(
    x_ptr, stride_batch, stride_column, col_scale_ptr, columns_ptr, residual_col_scale_ptr,
    plane, batch, word, in_features, num_significant, PLANES: tl.constexpr,
):  # fmt: skip
    """Return c ⊙ x of the columns of words `word`, [WORDS, 32] float32; the plane after the full ones is the residual."""
    column = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    if plane < PLANES:
        inside = column < in_features
        source = column
        c = tl.load(col_scale_ptr + plane * in_features + column, mask=inside, other=0.0)
    else:
        inside = column < num_significant
        source = tl.load(columns_ptr + column, mask=inside, other=0)
        c = tl.load(residual_col_scale_ptr + column, mask=inside, other=0.0)
    x = tl.load(x_ptr + batch * stride_batch + source * stride_column, mask=inside, other=0.0)
    return x.to(tl.float32) * c.to(tl.float32)


@triton.jit
def quantize_kernel(
    x_ptr, stride_batch, stride_column, col_scale_ptr, columns_ptr, residual_col_scale_ptr,
    q_ptr, start_ptr, scale_ptr, in_features, num_significant, padded_words,
    PLANES: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Round c ⊙ x to int8 with one scale for the 32 columns of a word.

    Writes for each plane and input, with padded_words = P:
        q: [8, P] int32; byte i of (j, w) is column 32w + j + 8i, the order of `(word >> j) & 0x01010101`.
        start: [P] int32, -64 times the sum of the word's 32 integers: turns sums over set bits into sums over ±1.
        scale: [P] float32, an eighth of the step; NaN where the inputs are not finite.
    """
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    plane, batch = tl.program_id(1), tl.program_id(2)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    u = _scaled(
        x_ptr, stride_batch, stride_column, col_scale_ptr, columns_ptr, residual_col_scale_ptr,
        plane, batch, word, in_features, num_significant, PLANES,
    )  # fmt: skip
    step = tl.max(tl.abs(u), axis=1) / 127 + tl.sum(u * 0, axis=1)
    inverse = tl.where(step > 0, 1 / step, 0.0)
    q = tl.floor(u * inverse[:, None] + 0.5).to(tl.int32)
    shift = tl.arange(0, 4) * 8
    bytes_ = (tl.reshape(q, [WORDS, 4, 8]) & 0xFF) << shift[None, :, None]
    packed = tl.sum(bytes_, axis=1).to(tl.int32)  # [WORDS, 8]; the bytes do not overlap
    base = plane * tl.num_programs(2) + batch
    tl.store(
        q_ptr + (base * 8 + tl.arange(0, 8)[None, :]) * padded_words + word[:, None],
        packed,
        mask=word[:, None] < padded_words,
    )
    tl.store(start_ptr + base * padded_words + word, -64 * tl.sum(q, axis=1), mask=word < padded_words)
    tl.store(scale_ptr + base * padded_words + word, step / 8, mask=word < padded_words)


@triton.jit
def scale_kernel(
    x_ptr, stride_batch, stride_column, col_scale_ptr, columns_ptr, residual_col_scale_ptr,
    u_ptr, counter_ptr, in_features, num_significant, padded_words, num_counters,
    PLANES: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write c ⊙ x in the dtype of u: [plane, bit, input, word], and set the counters of the product's splits to zero."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    plane, batch = tl.program_id(1), tl.program_id(2)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    u = _scaled(
        x_ptr, stride_batch, stride_column, col_scale_ptr, columns_ptr, residual_col_scale_ptr,
        plane, batch, word, in_features, num_significant, PLANES,
    )  # fmt: skip
    bit = plane * 32 + tl.arange(0, 32)
    target = u_ptr + (bit[None, :] * tl.num_programs(2) + batch) * padded_words + word[:, None]
    tl.store(target, u.to(u_ptr.dtype.element_ty), mask=word[:, None] < padded_words)
    if (plane == 0) & (batch == 0):
        counter = tl.program_id(0) * 32 + tl.arange(0, 32)
        while tl.min(counter) < num_counters:
            tl.store(counter_ptr + counter, 0, mask=counter < num_counters)
            counter += tl.num_programs(0) * 32
