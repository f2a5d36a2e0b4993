"""Triton: the product of packed planes with activations in the model's dtype, on tensor cores.

A tile of words [rows, words] is unpacked in registers, straight into the order of the tensor cores' left operand: one
shift and one logical operation make a pair of weights ±1. Each weight is unpacked once for all inputs of a tile.

On compute capability 9.x tensor cores read the weights from registers while the program goes on (`wgmma`). Triton before 3.9
does not wait for them when it writes the weights of the next step to those registers, so that some products are of the wrong
weights (triton-lang/triton#9433); `after_products` waits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from .int8 import load_words

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_BFLOAT16_SIGNS = tl.constexpr("lop3.b32 $0, $1, 0x80008000, 0xBF80BF80, 0x6A;")
_FLOAT16_SIGNS = tl.constexpr("lop3.b32 $0, $1, 0x80008000, 0xBC00BC00, 0x6A;")
_FINISH_PRODUCTS = tl.constexpr("wgmma.wait_group.sync.aligned 0; mov.b32 $0, 0;")


@triton.jit
def sign_pairs(bits, dtype: tl.constexpr):
    """Return -1 in each half of the words `bits`, with the halves' highest bits exclusive-ored to the signs."""
    if INTERPRETED:
        return (bits & -0x7FFF8000) ^ (-0x407F4080 if dtype == tl.bfloat16 else -0x43FF4400)
    else:  # one instruction; the compiler makes two
        asm: tl.constexpr = _BFLOAT16_SIGNS if dtype == tl.bfloat16 else _FLOAT16_SIGNS
        return tl.inline_asm_elementwise(asm, "=r,r", [bits], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def after_products(words, WAIT: tl.constexpr):
    """Return `words`, if WAIT once no product that was begun reads registers any more.

    Weights that are made of the result are written to registers after that.
    """
    if WAIT and not INTERPRETED:
        zero = tl.inline_asm_elementwise(_FINISH_PRODUCTS, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        return words | zero
    else:
        return words


@triton.jit
def _weights(words, dtype: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Return the bits of `words` [ROWS, WORDS] as ±1, [ROWS, 32 WORDS]; place 2i + s of a word is its bit i + 16s."""
    i = tl.arange(0, 16)[None, None, :]
    if dtype == tl.float32:
        low = ((words[:, :, None] >> i) & 1) * 2 - 1
        high = ((words[:, :, None] >> (i + 16)) & 1) * 2 - 1
        return tl.reshape(tl.join(low, high), [ROWS, 32 * WORDS]).to(dtype)
    else:
        pair = sign_pairs(words[:, :, None] << (15 - i), dtype)
        low = pair.to(tl.int16).to(dtype, bitcast=True)
        high = (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
        return tl.reshape(tl.join(low, high), [ROWS, 32 * WORDS])


@triton.jit
def _plane_products(
    u_ptr, start, row, rows, column, batch, padded_words, first, last,
    STRIDE: tl.constexpr, NUM_WORDS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, BATCH: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """Return the products [ROWS, BATCH] of one plane's tiles of words `first` to `last` - 1."""
    place = tl.arange(0, 32 * WORDS)
    u = u_ptr + column[None, :] * (padded_words * 32) + place[:, None]
    acc = tl.zeros([ROWS, BATCH], tl.float32)
    for tile in range(first, last):
        word = tile * WORDS + tl.arange(0, WORDS)
        words = after_products(load_words(start, row, word, rows, word < NUM_WORDS, STRIDE), WAIT)
        inputs = tl.load(u + tile * (32 * WORDS), mask=(column < batch)[None, :], other=0.0)
        acc = tl.dot(_weights(words, u_ptr.dtype.element_ty, ROWS, WORDS), inputs, acc, input_precision="ieee")
    return acc


@triton.jit
def dot_kernel(
    u_ptr, signs_ptr, row_scale_ptr, residual_ptr, residual_row_scale_ptr, y_ptr, partial_ptr, counter_ptr,
    batch, rows, padded_words,
    PLANES: tl.constexpr, NUM_WORDS: tl.constexpr, STRIDE: tl.constexpr,
    RESIDUAL_WORDS: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, BATCH: tl.constexpr, SPLITS: tl.constexpr, WAIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y[b, i] = Σ over planes k of r_k[i] (B_k u_k)[i, b], the words of each plane shared among SPLITS programs.

    The last program of a tile to arrive adds the partial sums [SPLITS, batch, rows] float32 in the order of the splits:
    the order of arrival decides who adds, not what. `padded_words` is a multiple of WORDS, and words that do not exist
    meet zeros there.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    split = tl.program_id(2)
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    tiles: tl.constexpr = (NUM_WORDS + WORDS - 1) // WORDS
    total = tl.zeros([ROWS, BATCH], tl.float32)
    for plane in tl.static_range(PLANES):
        acc = _plane_products(
            u_ptr + plane * 32 * batch * padded_words, signs_ptr + tl.full([], plane, tl.int64) * rows * STRIDE,
            row, rows, column, batch, padded_words, split * tiles // SPLITS, (split + 1) * tiles // SPLITS,
            STRIDE, NUM_WORDS, ROWS, WORDS, BATCH, WAIT,
        )  # fmt: skip
        total += acc * tl.load(row_scale_ptr + plane * rows + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    if RESIDUAL_WORDS:
        residual_tiles: tl.constexpr = (RESIDUAL_WORDS + WORDS - 1) // WORDS
        acc = _plane_products(
            u_ptr + PLANES * 32 * batch * padded_words, residual_ptr, row, rows, column, batch, padded_words,
            split * residual_tiles // SPLITS, (split + 1) * residual_tiles // SPLITS,
            RESIDUAL_STRIDE, RESIDUAL_WORDS, ROWS, WORDS, BATCH, WAIT,
        )  # fmt: skip
        total += acc * tl.load(residual_row_scale_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    inside = (row < rows)[:, None] & (column < batch)[None, :]
    target = column.to(tl.int64)[None, :] * rows + row[:, None]
    if SPLITS == 1:
        tl.store(y_ptr + target, total.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        size = tl.full([], 1, tl.int64) * batch * rows
        tl.store(partial_ptr + split * size + target, total, mask=inside)
        tl.debug_barrier()  # all of this program's sums are written before it is counted
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            y = tl.zeros([ROWS, BATCH], tl.float32)
            for s in range(SPLITS):
                y += tl.load(partial_ptr + s * size + target, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(y_ptr + target, y.to(y_ptr.dtype.element_ty), mask=inside)
