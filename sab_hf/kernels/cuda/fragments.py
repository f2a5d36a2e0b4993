"""Triton: the product of packed planes with 16-bit floating-point activations for a few inputs, on tensor cores, by `mma.sync`.

A thread's words become its part of the tensor cores' left operand where they are: a shift and a logical operation make a
pair of weights ±1. Activations come in the order in which the threads need them (`prepare.arrange_kernel`), so nothing goes
through shared memory but the sums of warps that share rows. Exactly one program makes one output, in a fixed order.

The instruction is written for the registers of a thread, so tensors here are [32 WARPS], one element a thread. In a warp,
thread 4g + t holds the words 4t to 4t + 3 of a piece of 16 words, of rows g and g + 8, and the activations of input g there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from .bits import four, rows_words
from .dot import sign_pairs

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_TWICE = """
mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32 {$0, $1, $2, $3}, {$4, $8, $5, $9}, {$12, $13}, {$16, $17, $18, $19};
mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32 {$0, $1, $2, $3}, {$6, $10, $7, $11}, {$14, $15}, {$0, $1, $2, $3};
"""
_BFLOAT16 = tl.constexpr(_TWICE.replace("TYPE", "bf16"))
_FLOAT16 = tl.constexpr(_TWICE.replace("TYPE", "f16"))
_REGISTERS = tl.constexpr("=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f")


@triton.jit
def _numbers(x, dtype: tl.constexpr, SHAPE: tl.constexpr):
    """Return the numbers in the lower and in the upper halves of four tensors of words, float32, reshaped."""
    pair = tl.reshape(tl.join(tl.join(x[0], x[1]), tl.join(x[2], x[3])), SHAPE)
    low = pair.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return low, (pair >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _multiply(low, high, b, c, dtype: tl.constexpr, WARPS: tl.constexpr):
    """Return c plus the products of a warp's 16 rows and 8 inputs over 32 columns.

    low, high are four pairs of weights each, of row g and of row g + 8; b the pairs of input g that meet them; c the sums of
    row g and inputs 2t, 2t + 1, then those of row g + 8.
    """
    if INTERPRETED:
        b0, b1 = _numbers(b, dtype, [WARPS, 1, 8, 16])
        l0, l1 = _numbers(low, dtype, [WARPS, 8, 1, 16])
        h0, h1 = _numbers(high, dtype, [WARPS, 8, 1, 16])
        d0, d1 = tl.split(tl.reshape(tl.sum(l0 * b0 + l1 * b1, axis=3), [32 * WARPS, 2]))
        d2, d3 = tl.split(tl.reshape(tl.sum(h0 * b0 + h1 * b1, axis=3), [32 * WARPS, 2]))
        return c[0] + d0, c[1] + d1, c[2] + d2, c[3] + d3
    else:
        return tl.inline_asm_elementwise(
            _BFLOAT16 if dtype == tl.bfloat16 else _FLOAT16, _REGISTERS,
            [low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _four_pairs(word, PLACE: tl.constexpr, dtype: tl.constexpr):
    """Return ±1 of the bits 4 PLACE to 4 PLACE + 3 of the words, each in a pair with the bit 16 places above."""
    return (
        sign_pairs(word << (15 - 4 * PLACE), dtype), sign_pairs(word << (14 - 4 * PLACE), dtype),
        sign_pairs(word << (13 - 4 * PLACE), dtype), sign_pairs(word << (12 - 4 * PLACE), dtype),
    )  # fmt: skip


@triton.jit
def _sums(sums, NUMBER: tl.constexpr):
    """Return the four sums of block NUMBER, of 16 rows and 8 inputs."""
    return sums[4 * NUMBER], sums[4 * NUMBER + 1], sums[4 * NUMBER + 2], sums[4 * NUMBER + 3]


@triton.jit
def _load_piece(
    signs_ptr, residual_ptr, row, rows, thread, piece,
    PLANES: tl.constexpr, NUM_WORDS: tl.constexpr, STRIDE: tl.constexpr,
    RESIDUAL_WORDS: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Return the threads' words of a piece, of TILES times 16 rows, as a tuple of pairs.

    Pieces are those of the first plane, of the second, and so on, then of the residual plane; 0 from there on.
    """
    pieces: tl.constexpr = (NUM_WORDS + 15) // 16
    plane = piece // pieces
    word = piece % pieces * 16 + thread % 4 * 4
    start = signs_ptr + plane.to(tl.int64)[:, None] * rows * STRIDE
    loaded = ()
    for i in tl.static_range(TILES):
        here = row + 16 * i
        low, high = rows_words(start, here, word, tl.where(plane < PLANES, rows, 0), NUM_WORDS, STRIDE)
        if RESIDUAL_WORDS:
            residual_word = (piece - PLANES * pieces) * 16 + thread % 4 * 4
            end = tl.where(plane < PLANES, 0, rows)
            more_low, more_high = rows_words(residual_ptr, here, residual_word, end, RESIDUAL_WORDS, RESIDUAL_STRIDE)
            low, high = low | more_low, high | more_high
        loaded = loaded + ((low, high),)
    return loaded


@triton.jit
def _load_inputs(
    u_ptr, piece, total, first_group, groups, PLACE: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr
):
    """Return for each group of 8 inputs the threads' four pairs of place PLACE of their pieces; zeros where there are none."""
    loaded = ()
    for n in tl.static_range(GROUPS):
        block = ((piece * groups + first_group + n) * 16 + PLACE) * 128
        inside = (piece < total) & (first_group + n < groups)
        loaded = loaded + (four(tl.load(u_ptr + block[:, None], mask=inside[:, None], other=0), 32 * WARPS),)
    return loaded


@triton.jit
def _row_scales(row_scale_ptr, residual_row_scale_ptr, row, rows, plane, PLANES: tl.constexpr, RESIDUAL: tl.constexpr):
    """Return the row scales of the threads' planes, float32; 0 for planes that do not exist."""
    r = tl.load(row_scale_ptr + plane * rows + row, mask=(row < rows) & (plane < PLANES), other=0.0).to(tl.float32)
    if RESIDUAL:
        marked = (row < rows) & (plane == PLANES)
        r += tl.load(residual_row_scale_ptr + row, mask=marked, other=0.0).to(tl.float32)
    return r


@triton.jit(do_not_specialize=["batch"])
def fragments_kernel(
    u_ptr, signs_ptr, row_scale_ptr, residual_ptr, residual_row_scale_ptr, y_ptr, batch, rows,
    PLANES: tl.constexpr, NUM_WORDS: tl.constexpr, STRIDE: tl.constexpr,
    RESIDUAL_WORDS: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr,
    TILES: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[b, i] = Σ over planes k of r_k[i] (B_k u_k)[i, b]: 16 TILES rows a warp, 8 GROUPS inputs a program.

    u: see `prepare.arrange_kernel`, pairs of numbers of the dtype of y as int32.
    SPLIT warps share rows and take pieces of 16 words in turn. The words of a piece are under way while the one before is
    computed; the first ones are, before the activations are there.
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    pieces: tl.constexpr = (NUM_WORDS + 15) // 16
    total: tl.constexpr = PLANES * pieces + (RESIDUAL_WORDS + 15) // 16
    turns: tl.constexpr = (total + SPLIT - 1) // SPLIT
    thread = tl.arange(0, 32 * WARPS)
    first_row = tl.program_id(0) * (16 * TILES * (WARPS // SPLIT))
    row = first_row + thread // (32 * SPLIT) * (16 * TILES) + thread % 32 // 4
    piece = thread // 32 % SPLIT
    ahead = _load_piece(
        signs_ptr, residual_ptr, row, rows, thread, piece,
        PLANES, NUM_WORDS, STRIDE, RESIDUAL_WORDS, RESIDUAL_STRIDE, TILES,
    )  # fmt: skip
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    groups = (batch + 7) // 8
    first_group = tl.program_id(1) * GROUPS
    u_ptr += thread[:, None] % 32 * 4 + tl.arange(0, 4)[None, :]
    sums = ()
    for _ in tl.static_range(4 * TILES * GROUPS):
        sums = sums + (tl.zeros([32 * WARPS], tl.float32),)
    for turn in range(turns):
        now = ahead
        ahead = _load_piece(
            signs_ptr, residual_ptr, row, tl.where(turn + 1 < turns, rows, 0), thread, piece + SPLIT,
            PLANES, NUM_WORDS, STRIDE, RESIDUAL_WORDS, RESIDUAL_STRIDE, TILES,
        )  # fmt: skip
        words = ()
        for i in tl.static_range(TILES):
            words = words + (four(now[i][0], 32 * WARPS) + four(now[i][1], 32 * WARPS),)
        acc = ()
        for _ in tl.static_range(4 * TILES * GROUPS):
            acc = acc + (tl.zeros([32 * WARPS], tl.float32),)
        for place in tl.static_range(16):  # four pairs of columns of word 4t + place // 4
            inputs = _load_inputs(u_ptr, piece, total, first_group, groups, place, GROUPS, WARPS)
            following = ()
            for i in tl.static_range(TILES):
                low = _four_pairs(words[i][place // 4], place % 4, dtype)
                high = _four_pairs(words[i][4 + place // 4], place % 4, dtype)
                for n in tl.static_range(GROUPS):
                    following = following + _multiply(low, high, inputs[n], _sums(acc, i * GROUPS + n), dtype, WARPS)
            acc = following
        added = ()
        for i in tl.static_range(TILES):
            here = row + 16 * i
            r = _row_scales(
                row_scale_ptr, residual_row_scale_ptr, here, rows, piece // pieces, PLANES, RESIDUAL_WORDS > 0
            )
            s = _row_scales(
                row_scale_ptr, residual_row_scale_ptr, here + 8, rows, piece // pieces, PLANES, RESIDUAL_WORDS > 0
            )
            for n in tl.static_range(GROUPS):
                t = _sums(sums, i * GROUPS + n)
                c = _sums(acc, i * GROUPS + n)
                added = added + (t[0] + c[0] * r, t[1] + c[1] * r, t[2] + c[2] * s, t[3] + c[3] * s)
        sums = added
        piece += SPLIT
    for i in tl.static_range(2 * TILES * GROUPS):
        store_row = first_row + i // (2 * GROUPS) * 16 + i % 2 * 8
        store_input = (first_group + i // 2 % GROUPS) * 8
        _store_sums(y_ptr, sums[2 * i], sums[2 * i + 1], store_row, rows, store_input, batch, TILES, WARPS, SPLIT)


@triton.jit
def _store_sums(
    y_ptr, even, odd, first_row, rows, first_input, batch, TILES: tl.constexpr, WARPS: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Write 8 rows of each group of SPLIT warps, the sums over these, for 8 inputs, of which threads hold 2t and 2t + 1."""
    y = tl.sum(tl.reshape(tl.join(even, odd), [WARPS // SPLIT, SPLIT, 8, 8]), axis=1)
    row = first_row + tl.arange(0, WARPS // SPLIT)[:, None, None] * (16 * TILES) + tl.arange(0, 8)[None, :, None]
    column = first_input + tl.arange(0, 8)[None, None, :]
    inside = (row < rows) & (column < batch)
    tl.store(y_ptr + column.to(tl.int64) * rows + row, y.to(y_ptr.dtype.element_ty), mask=inside)
