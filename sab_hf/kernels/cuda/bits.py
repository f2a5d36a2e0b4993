"""Triton: the product of packed planes with 16-bit activations for a few inputs, on tensor cores that multiply bits.

Activations are rounded to 16-bit integers, with one scale for 512 columns, and cut into 16 rows of bits. Then a plane's
words are operands as they lie in memory: `mma.m16n8k256` counts, for 16 rows of weights and 8 rows of activation bits, the
places where both are set. All of it is exact, and nothing is unpacked. Exactly one program makes one output, in a fixed
order: results do not depend on the order of arrival.

The instruction is written for the registers of a thread, so tensors here are [32 WARPS], one element a thread. In a warp,
thread 4g + t holds words of rows g and g + 8 and of bits of weight 2^g and 2^(g + 8).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from .forms import finished

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_COUNT_BITS = tl.constexpr(
    "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)
_REGISTERS = tl.constexpr("=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r")


@triton.jit
def _popcount(x):
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF


@triton.jit
def _count_bits(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, WARPS: tl.constexpr):
    """Add to c the counts of a warp's 16 rows of weights `a`, 256 columns, and 8 rows of activation bits `b`.

    a0, a2 are words of row g, a1, a3 of row g + 8; b0, b1 the words of the activations' row g that meet a0, a2; c0, c1 the
    counts of row g and the activations' rows 2t, 2t + 1, c2, c3 of row g + 8.
    """
    if INTERPRETED:
        b0 = tl.reshape(b0, [WARPS, 1, 8, 4])
        b1 = tl.reshape(b1, [WARPS, 1, 8, 4])
        low = _popcount(tl.reshape(a0, [WARPS, 8, 1, 4]) & b0) + _popcount(tl.reshape(a2, [WARPS, 8, 1, 4]) & b1)
        high = _popcount(tl.reshape(a1, [WARPS, 8, 1, 4]) & b0) + _popcount(tl.reshape(a3, [WARPS, 8, 1, 4]) & b1)
        d0, d1 = tl.split(tl.reshape(tl.sum(low, axis=3), [32 * WARPS, 2]))
        d2, d3 = tl.split(tl.reshape(tl.sum(high, axis=3), [32 * WARPS, 2]))
        return c0 + d0, c1 + d1, c2 + d2, c3 + d3
    else:
        return tl.inline_asm_elementwise(
            _COUNT_BITS, _REGISTERS, [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def four(x, THREADS: tl.constexpr):
    """Return the columns of `x` [THREADS, 4]."""
    even, odd = tl.split(tl.reshape(x, [THREADS, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def rows_words(start, row, word, rows, NUM_WORDS: tl.constexpr, STRIDE: tl.constexpr):
    """Return the words `word` to `word + 3` of the rows `row` and `row + 8`, [THREADS, 4] each; 0 where there are none."""
    words = word[:, None] + tl.arange(0, 4)[None, :]
    pointers = start + row.to(tl.int64)[:, None] * STRIDE + words
    inside = words < NUM_WORDS
    low = tl.load(pointers, mask=inside & (row < rows)[:, None], other=0)
    high = tl.load(pointers + 8 * STRIDE, mask=inside & (row + 8 < rows)[:, None], other=0)
    return low, high


@triton.jit
def _load_tile(
    signs_ptr, residual_ptr, row, rows, all_rows, thread,
    PLANES: tl.constexpr, NUM_WORDS: tl.constexpr, STRIDE: tl.constexpr,
    RESIDUAL_WORDS: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Return the threads' words of a tile of rows, all planes and the residual plane, as a tuple of pairs.

    A piece of a row is 16 words; the SPLIT warps that share rows take pieces in turn, each as many (some do not exist).
    """
    pieces: tl.constexpr = ((NUM_WORDS + 15) // 16 + SPLIT - 1) // SPLIT
    residual_pieces: tl.constexpr = ((RESIDUAL_WORDS + 15) // 16 + SPLIT - 1) // SPLIT
    word = thread // 32 % SPLIT * 16 + thread % 4 * 4
    tile = ()
    for i in tl.static_range(PLANES * pieces):
        start = signs_ptr + tl.full([], i // pieces, tl.int64) * all_rows * STRIDE
        tile = tile + (rows_words(start, row, word + i % pieces * SPLIT * 16, rows, NUM_WORDS, STRIDE),)
    for i in tl.static_range(residual_pieces):
        tile = tile + (rows_words(residual_ptr, row, word + i * SPLIT * 16, rows, RESIDUAL_WORDS, RESIDUAL_STRIDE),)
    return tile


@triton.jit
def _piece_products(words, bits_ptr, scale_ptr, sum_ptr, piece, pieces, thread, low_sum, high_sum, WARPS: tl.constexpr):
    """Add the products of 16 words of rows g and g + 8 to the threads' sums, which the four threads of a g share."""
    t = thread % 4
    here = piece < pieces
    pointers = bits_ptr + (piece * 256 + thread % 32 * 8)[:, None] + tl.arange(0, 4)[None, :]
    x0, x1, x2, x3 = four(tl.load(pointers, mask=here[:, None], other=0), 32 * WARPS)
    z0, z1, z2, z3 = four(tl.load(pointers + 4, mask=here[:, None], other=0), 32 * WARPS)
    l0, l1, l2, l3 = four(words[0], 32 * WARPS)
    h0, h1, h2, h3 = four(words[1], 32 * WARPS)
    zero = tl.zeros([32 * WARPS], tl.int32)
    c0, c1, c2, c3 = _count_bits(l0, h0, l1, h1, x0, x1, zero, zero, zero, zero, WARPS)
    d0, d1, d2, d3 = _count_bits(l0, h0, l1, h1, z0, z1, zero, zero, zero, zero, WARPS)
    c0, c1, c2, c3 = _count_bits(l2, h2, l3, h3, x2, x3, c0, c1, c2, c3, WARPS)
    d0, d1, d2, d3 = _count_bits(l2, h2, l3, h3, z2, z3, d0, d1, d2, d3, WARPS)
    # ±1 is twice the bit less one; the common factor of bits 2t, 2t + 1 goes into the scale; bit 15 is the sign
    last = tl.where(t == 3, -1024, 1024)
    all_set = tl.load(sum_ptr + piece, mask=here & (t == 0), other=0)
    scale = tl.load(scale_ptr + piece, mask=here, other=0.0) * (1 << (2 * t)).to(tl.float32)
    low_sum += (2 * c0 + 4 * c1 + 512 * d0 + last * d1 - all_set).to(tl.float32) * scale
    high_sum += (2 * c2 + 4 * c3 + 512 * d2 + last * d3 - all_set).to(tl.float32) * scale
    return low_sum, high_sum


@triton.jit
def _store_sums(
    y_ptr, sums, first_row, rows, bias_ptr, addend_ptr,
    WARPS: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, ADDEND: tl.constexpr,
):  # fmt: skip
    """Write the rows' sums over the four threads of a g and over the SPLIT warps that share the rows."""
    y = tl.sum(tl.sum(tl.reshape(sums, [WARPS // SPLIT, SPLIT, 8, 4]), axis=3), axis=1)
    row = first_row + tl.arange(0, WARPS // SPLIT)[:, None] * 16 + tl.arange(0, 8)[None, :]
    y = finished(y, row, row < rows, y_ptr, bias_ptr, addend_ptr, BIAS, ADDEND)
    tl.store(y_ptr + row, y, mask=row < rows)


@triton.jit
def bits_program(
    program, bits_ptr, scale_ptr, sum_ptr, signs_ptr, row_scale_ptr, residual_ptr, residual_row_scale_ptr, y_ptr,
    batch, rows, pieces, steps,
    PLANES: tl.constexpr, NUM_WORDS: tl.constexpr, STRIDE: tl.constexpr,
    RESIDUAL_WORDS: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr,
    INPUTS: tl.constexpr, WARPS: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
    bias_ptr=None, addend_ptr=None, BIAS: tl.constexpr = False, ADDEND: tl.constexpr = False,
):  # fmt: skip
    """Do the work of one program: y[b, i] = Σ over planes k of r_k[i] (B_k u_k)[i, b], `steps` tiles of 16 WARPS / SPLIT rows.

    Activations: see `prepare.cut_kernel`. signs: [PLANES, rows, STRIDE] int32, of which NUM_WORDS count; residual:
    [rows, RESIDUAL_STRIDE], RESIDUAL_WORDS. A tile of words is under way while the one before is computed; the first one
    is, before the activations are there. INPUTS inputs are computed side by side. BIAS and ADDEND: see `forms.py`.
    """
    height: tl.constexpr = 16 * (WARPS // SPLIT)
    mine: tl.constexpr = ((NUM_WORDS + 15) // 16 + SPLIT - 1) // SPLIT
    mine_residual: tl.constexpr = ((RESIDUAL_WORDS + 15) // 16 + SPLIT - 1) // SPLIT
    thread = tl.arange(0, 32 * WARPS)
    first_row = program * height * steps
    row = first_row + thread // (32 * SPLIT) * 16 + thread % 32 // 4
    ahead = _load_tile(
        signs_ptr, residual_ptr, row, rows, rows, thread,
        PLANES, NUM_WORDS, STRIDE, RESIDUAL_WORDS, RESIDUAL_STRIDE, SPLIT,
    )  # fmt: skip
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    for step in range(steps):
        now = ahead
        ahead = _load_tile(
            signs_ptr, residual_ptr, row + height, tl.where(step + 1 < steps, rows, 0), rows, thread,
            PLANES, NUM_WORDS, STRIDE, RESIDUAL_WORDS, RESIDUAL_STRIDE, SPLIT,
        )  # fmt: skip
        for index in range((batch + INPUTS - 1) // INPUTS):
            for j in tl.static_range(INPUTS):
                b = index * INPUTS + j
                limit = tl.where(b < batch, pieces, 0)
                low = tl.zeros([32 * WARPS], tl.float32)
                high = tl.zeros([32 * WARPS], tl.float32)
                for k in tl.static_range(PLANES + (RESIDUAL_WORDS > 0)):
                    low_sum = tl.zeros([32 * WARPS], tl.float32)
                    high_sum = tl.zeros([32 * WARPS], tl.float32)
                    base = (k * batch + b) * pieces
                    for i in tl.static_range(mine if k < PLANES else mine_residual):
                        low_sum, high_sum = _piece_products(
                            now[k * mine + i], bits_ptr + base * 256, scale_ptr + base, sum_ptr + base,
                            i * SPLIT + thread // 32 % SPLIT, limit, thread, low_sum, high_sum, WARPS,
                        )  # fmt: skip
                    r_ptr = row_scale_ptr + k * rows if k < PLANES else residual_row_scale_ptr
                    low += low_sum * tl.load(r_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
                    high += high_sum * tl.load(r_ptr + row + 8, mask=row + 8 < rows, other=0.0).to(tl.float32)
                end = tl.where(b < batch, rows, 0)
                addends = addend_ptr
                if ADDEND:
                    addends += b * rows
                _store_sums(y_ptr + b * rows, low, first_row, end, bias_ptr, addends, WARPS, SPLIT, BIAS, ADDEND)
                _store_sums(y_ptr + b * rows, high, first_row + 8, end, bias_ptr, addends, WARPS, SPLIT, BIAS, ADDEND)
        row += height
        first_row += height


@triton.jit
def bits_kernel(
    bits_ptr, scale_ptr, sum_ptr, signs_ptr, row_scale_ptr, residual_ptr, residual_row_scale_ptr, y_ptr,
    batch, rows, pieces, steps,
    PLANES: tl.constexpr, NUM_WORDS: tl.constexpr, STRIDE: tl.constexpr,
    RESIDUAL_WORDS: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr,
    INPUTS: tl.constexpr, WARPS: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The product of one matrix; see `bits_program`."""
    bits_program(
        tl.program_id(0), bits_ptr, scale_ptr, sum_ptr, signs_ptr, row_scale_ptr, residual_ptr, residual_row_scale_ptr, y_ptr,
        batch, rows, pieces, steps,
        PLANES, NUM_WORDS, STRIDE, RESIDUAL_WORDS, RESIDUAL_STRIDE, INPUTS, WARPS, SPLIT, PDL,
    )  # fmt: skip
