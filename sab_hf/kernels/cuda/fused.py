"""Triton: the product of packed planes with activations as they are, on tensor cores, from a few inputs to long prefill.

A tile of words [rows, words] becomes weights in registers, in the order of the tensor cores' left operand, and in the model's
dtype: w = c_0 ⊙ B_0 + Σ_k (r_k / r_0) c_k ⊙ B_k. So all planes cost one product, activations need no preparation, and the
row scales r_0 come in at the end. Each weight is made once for all inputs of a tile.

Several matrices of one input take one launch, as if their tiles of rows were those of one matrix.

The residual plane comes as a plane of all columns, whose scales are 0 in those that it does not have (`expand_kernel`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from .dot import after_products
from .int8 import load_words
from .joined import chosen

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _half(pair, dtype: tl.constexpr):
    """Return the lower half of each word of `pair` as a number of `dtype`."""
    return pair.to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _pair(low, high):
    """Return words whose lower halves are the 16-bit numbers `low` and whose upper halves are `high`."""
    return (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _signed(bits, negated):
    """Return the pairs `negated` with the sign of each half turned where its highest bit is set in `bits`."""
    if INTERPRETED:
        return (bits & -0x7FFF8000) ^ negated
    else:  # one instruction; the compiler makes two
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x80008000, $2, 0x6A;", "=r,r,r", [bits, negated], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _add_scaled(a, b, scale, dtype: tl.constexpr):
    """Return a + b ⊙ scale of pairs of numbers of `dtype`, each rounded once."""
    if INTERPRETED:
        low = _half(a, dtype).to(tl.float32) + _half(b, dtype).to(tl.float32) * _half(scale, dtype).to(tl.float32)
        a, b, scale = a >> 16, b >> 16, scale >> 16
        high = _half(a, dtype).to(tl.float32) + _half(b, dtype).to(tl.float32) * _half(scale, dtype).to(tl.float32)
        return _pair(low.to(dtype), high.to(dtype))
    else:
        asm: tl.constexpr = "fma.rn.bf16x2 $0, $2, $3, $1;" if dtype == tl.bfloat16 else "fma.rn.f16x2 $0, $2, $3, $1;"
        return tl.inline_asm_elementwise(asm, "=r,r,r,r", [a, b, scale], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _plane_pairs(words, scale_ptr, word):
    """Return the weights of a plane's words [ROWS, WORDS]: four tensors of pairs [ROWS, WORDS, 4].

    Place t of tensor m is the columns 8m + 2t and 8m + 2t + 1 of a word: the order in which threads hold them.

    Args:
        scale_ptr: pairs of negated column scales, 16 a word.
        word: [WORDS], which words of the row.
    """
    t = tl.arange(0, 4)
    low = words[:, :, None] >> (2 * t)[None, None, :]
    low, high = low & 0x0303, (low >> 16) & 0x0303  # the columns of m = 0 and 1, and of 2 and 3
    scale_ptr += word[:, None] * 16 + t[None, :]
    # the multiplications take the first bit to place 15 and the second one to place 31, where no other bit comes
    return (
        _signed(low * 0x40008000, tl.load(scale_ptr)[None, :, :]),
        _signed(low * 0x00400080, tl.load(scale_ptr + 4)[None, :, :]),
        _signed(high * 0x40008000, tl.load(scale_ptr + 8)[None, :, :]),
        _signed(high * 0x00400080, tl.load(scale_ptr + 12)[None, :, :]),
    )


@triton.jit
def _relative_scales(r_ptr, base, row, rows, dtype: tl.constexpr):
    """Return r / base of the rows as pairs of equal numbers, [ROWS, 1, 1]; 0 where base is 0."""
    r = tl.load(r_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    ratio = tl.where(base != 0, r / tl.where(base != 0, base, 1.0), 0.0).to(dtype)
    return _pair(ratio, ratio)[:, None, None]


@triton.jit
def _base_scales(row_scale_ptr, extra_row_scale_ptr, row, rows, PLANES: tl.constexpr, EXTRA: tl.constexpr, dtype):
    """Return r_0 of the rows, or a small part of the largest r where r_0 is less: the others are divided by it."""
    base = tl.load(row_scale_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    most = tl.abs(base)
    for k in tl.static_range(1, PLANES):
        most = tl.maximum(
            most, tl.abs(tl.load(row_scale_ptr + k * rows + row, mask=row < rows, other=0.0).to(tl.float32))
        )
    if EXTRA:
        most = tl.maximum(most, tl.abs(tl.load(extra_row_scale_ptr + row, mask=row < rows, other=0.0).to(tl.float32)))
    least = most * (2.0**-60 if dtype == tl.bfloat16 else 2.0**-11)
    return tl.where(tl.abs(base) < least, least, base)


@triton.jit
def _segment(number, whole, row_tiles, tiles, steps, at, end):
    """Return tile, first and last step, of a program's part `number` of the work; see `fused_kernel`."""
    shared = number >= whole
    programs = tl.num_programs(0)
    tile = tl.where(shared, whole * programs + at // steps, number * programs + tl.program_id(0))
    first = tl.where(shared, at % steps, 0)
    last = tl.where(shared, tl.minimum(steps, first + end - at), tl.where(tile < tiles, steps, 0))
    return tile, first, last


@triton.jit
def _matrix_of(row_tile, matrices, ROWS: tl.constexpr):
    """Return the matrix that a tile among those of all rows is of, and its place in it; a matrix begins with its rows."""
    index, first, begin = 0, 0, 0
    for i in tl.static_range(1, len(matrices)):
        begin += (matrices[i - 1][0] + ROWS - 1) // ROWS
        index = tl.where(row_tile >= begin, i, index)
        first = tl.where(row_tile >= begin, begin, first)
    return chosen(matrices, index), row_tile - first


@triton.jit(do_not_specialize=["batch", "whole", "row_tiles", "tiles"])
def fused_kernel(
    x_ptr, stride_batch, stride_column, matrices, partial_ptr, batch, in_features, whole, row_tiles, tiles,
    PLANES: tl.constexpr, EXTRA: tl.constexpr, NUM_WORDS: tl.constexpr, STRIDE: tl.constexpr, EXTRA_STRIDE: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, BATCH: tl.constexpr, WAIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y[b, i] = Σ_j r_0[i] w[i, j] x[b, j] for each matrix; see above.

    A tile is ROWS rows of a matrix and BATCH inputs, all rows of all matrices for the first BATCH inputs first. Each program
    makes `whole` tiles, in turn. The rest of the tiles is cut into as many equal parts as there are programs, of steps of WORDS
    words; a part of a tile goes to `partial`, [2 programs, ROWS, BATCH] float32, and `add_kernel` adds them up.

    Args:
        matrices: of each
            its rows, and y;
            pairs of negated column scales in the dtype of x, [planes, words rounded up to 8, 16] int32, signs and row scales;
            if EXTRA, the same of one more plane, [rows, EXTRA_STRIDE] int32.
        row_tiles: of all matrices.
        EVEN: the columns are a multiple of a step's.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    PADDED: tl.constexpr = (NUM_WORDS + 7) // 8 * 128
    steps: tl.constexpr = (NUM_WORDS + WORDS - 1) // WORDS
    programs = tl.num_programs(0)
    work = (tiles - tl.minimum(whole * programs, tiles)) * steps
    at = tl.program_id(0) * work // programs
    end = (tl.program_id(0) + 1) * work // programs
    parts = tl.where(end > at, (end - 1) // steps - at // steps + 1, 0)
    place = tl.arange(0, 32 * WORDS)
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    for number in range(whole + parts):
        tile, first, last = _segment(number, whole, row_tiles, tiles, steps, at, end)
        at += tl.where(number < whole, 0, last - first)
        matrix, row_tile = _matrix_of(tile % row_tiles, matrices, ROWS)
        rows, y_ptr, scale_ptr, signs_ptr, row_scale_ptr, extra_scale_ptr, extra_ptr, extra_row_scale_ptr = matrix
        row = row_tile * ROWS + tl.arange(0, ROWS)
        column = tile // row_tiles * BATCH + tl.arange(0, BATCH)
        base = _base_scales(row_scale_ptr, extra_row_scale_ptr, row, rows, PLANES, EXTRA, dtype)
        ratios = ()
        for k in tl.static_range(1, PLANES):
            ratios = ratios + (_relative_scales(row_scale_ptr + k * rows, base, row, rows, dtype),)
        if EXTRA:
            ratios = ratios + (_relative_scales(extra_row_scale_ptr, base, row, rows, dtype),)
        # inputs that do not exist repeat the last one, and their results are not stored
        x = x_ptr + tl.minimum(column, batch - 1).to(tl.int64)[None, :] * stride_batch + place[:, None] * stride_column
        acc = tl.zeros([ROWS, BATCH], tl.float32)
        for step in range(first, last):
            word = step * WORDS + tl.arange(0, WORDS)
            words = after_products(load_words(signs_ptr, row, word, rows, word < NUM_WORDS, STRIDE), WAIT)
            p0, p1, p2, p3 = _plane_pairs(words, scale_ptr, word)
            for k in tl.static_range(1, PLANES + EXTRA):
                if k < PLANES:
                    start = signs_ptr + tl.full([], k, tl.int64) * rows * STRIDE
                    words = load_words(start, row, word, rows, word < NUM_WORDS, STRIDE)
                    q0, q1, q2, q3 = _plane_pairs(words, scale_ptr + k * PADDED, word)
                else:
                    words = load_words(extra_ptr, row, word, rows, word < NUM_WORDS, EXTRA_STRIDE)
                    q0, q1, q2, q3 = _plane_pairs(words, extra_scale_ptr, word)
                p0, p1 = _add_scaled(p0, q0, ratios[k - 1], dtype), _add_scaled(p1, q1, ratios[k - 1], dtype)
                p2, p3 = _add_scaled(p2, q2, ratios[k - 1], dtype), _add_scaled(p3, q3, ratios[k - 1], dtype)
            pairs = tl.permute(tl.join(tl.join(p0, p2), tl.join(p1, p3)), (0, 1, 3, 4, 2))  # [ROWS, WORDS, 2, 2, 4]
            pairs = tl.reshape(pairs, [ROWS, 16 * WORDS])
            w = tl.reshape(tl.join(_half(pairs, dtype), _half(pairs >> 16, dtype)), [ROWS, 32 * WORDS])
            source = x + step * (32 * WORDS) * stride_column
            if EVEN:
                inputs = tl.load(source)
            else:
                inputs = tl.load(source, mask=(step * (32 * WORDS) + place < in_features)[:, None], other=0.0)
            acc = tl.dot(w, inputs, acc)
        acc *= base[:, None]
        if last - first == steps:
            inside = (row < rows)[:, None] & (column < batch)[None, :]
            tl.store(y_ptr + column.to(tl.int64)[None, :] * rows + row[:, None], acc.to(dtype), mask=inside)
        elif last > first:
            slot = (2 * tl.program_id(0) + (first == 0)) * (ROWS * BATCH)
            target = partial_ptr + slot + tl.arange(0, ROWS)[:, None] * BATCH + tl.arange(0, BATCH)[None, :]
            tl.store(target, acc)


@triton.jit(do_not_specialize=["batch", "whole", "row_tiles", "tiles", "programs", "steps"])
def add_kernel(
    partial_ptr, matrices, batch, whole, row_tiles, tiles, programs, steps,
    ROWS: tl.constexpr, BATCH: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the tiles that several programs of `fused_kernel` share: the sums of their parts, in the order of the steps.

    Each program writes PART of a tile's ROWS rows. `matrices`: of each its rows, and y.
    """
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    work = (tiles - whole * programs) * steps
    first = ((tile * steps + 1) * programs - 1) // work
    last = ((tile + 1) * steps * programs - 1) // work
    if last > first:
        local = tl.program_id(1) * PART + tl.arange(0, PART)
        inputs = tl.arange(0, BATCH)
        source = partial_ptr + local[:, None] * BATCH + inputs[None, :]
        total = tl.load(source + (2 * first + 1) * (ROWS * BATCH))
        for program in range(first + 1, last + 1):
            total += tl.load(source + 2 * program * (ROWS * BATCH))
        tile += whole * programs
        matrix, row_tile = _matrix_of(tile % row_tiles, matrices, ROWS)
        rows, y_ptr = matrix
        row = row_tile * ROWS + local
        column = tile // row_tiles * BATCH + inputs
        inside = (row < rows)[:, None] & (column < batch)[None, :]
        target = y_ptr + column.to(tl.int64)[None, :] * rows + row[:, None]
        tl.store(target, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def expand_kernel(
    residual_ptr, moves_ptr, out_ptr, rows,
    RESIDUAL_WORDS: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr, NUM_WORDS: tl.constexpr, STRIDE: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the residual plane's bits to the places of their columns, 0 elsewhere: [rows, STRIDE] int32; NUM_WORDS count.

    The bits of a word's columns are neighbours in the residual plane. They are spread to their places in five steps, each
    of which moves some of them by a power of two (`planes.expansion` says which).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    exists = word < NUM_WORDS
    first = tl.load(moves_ptr + 6 * NUM_WORDS + word, mask=exists, other=0)
    source = first >> 5
    low = load_words(residual_ptr, row, source, rows, exists & (source < RESIDUAL_WORDS), RESIDUAL_STRIDE)
    high = load_words(residual_ptr, row, source + 1, rows, exists & (source + 1 < RESIDUAL_WORDS), RESIDUAL_STRIDE)
    shift = (first & 31)[None, :]
    bits = (low.to(tl.uint32) >> shift.to(tl.uint32)).to(tl.int32) | (high << 1) << (31 - shift)
    for step in tl.static_range(5):
        moved = tl.load(moves_ptr + step * NUM_WORDS + word, mask=exists, other=0)[None, :]
        bits = (bits & ~moved) | ((bits << (16 >> step)) & moved)
    bits &= tl.load(moves_ptr + 5 * NUM_WORDS + word, mask=exists, other=0)[None, :]
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    tl.store(out_ptr + row[:, None] * STRIDE + word[None, :], bits, mask=(row < rows)[:, None] & exists[None, :])
