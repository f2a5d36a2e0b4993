"""Triton: the product of packed planes with one input in a single launch, for rows that fit a warp's registers.

Each program rounds the whole input to int8 itself, while its first tiles of weights are under way, and keeps it in
registers. That is the fastest where a matrix is so small that a second launch would cost more than its bytes. Products are
those of `int8.py`: a scale for 32 columns, exact sums, one program for an output.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from .forms import finished, gated, norm_factor, normed
from .int8 import load_words, products
from .prepare import quantized


@triton.jit
def _activations(u):
    """Return what `products` needs of `u` [WORDS, 32] float32: eight rows of int8 activations, starts and scales."""
    packed, start, scale = quantized(u)
    even, odd = tl.split(tl.reshape(packed, [packed.shape[0], 4, 2]))
    even0, even1 = tl.split(tl.reshape(even, [packed.shape[0], 2, 2]))
    odd0, odd1 = tl.split(tl.reshape(odd, [packed.shape[0], 2, 2]))
    q0, q4 = tl.split(even0)
    q2, q6 = tl.split(even1)
    q1, q5 = tl.split(odd0)
    q3, q7 = tl.split(odd1)
    return q0, q1, q2, q3, q4, q5, q6, q7, start, scale


@triton.jit
def _joined(main, residual, lane, first, WORDS: tl.constexpr, RESIDUAL: tl.constexpr):
    """Return activations [WORDS] that are `main` before lane `first`, a multiple of RESIDUAL, and `residual` from there on."""
    joined = ()
    for i in tl.static_range(10):
        spread = tl.broadcast_to(residual[i][None, :], [WORDS // RESIDUAL, RESIDUAL])
        joined = joined + (tl.where(lane < first, main[i], tl.reshape(spread, [WORDS])),)
    return joined


@triton.jit
def _load_tile(
    signs_ptr, residual_ptr, row, rows, all_rows, lane, PLANES: tl.constexpr, NUM_WORDS: tl.constexpr, STRIDE: tl.constexpr,
    RESIDUAL_WORDS: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Return the planes' words of some rows, a tuple of [ROWS, WORDS]; the residual plane's are in lanes of the first one."""
    words = load_words(signs_ptr, row, lane, rows, lane < NUM_WORDS, STRIDE)
    if RESIDUAL_WORDS:
        marked = (lane >= FIRST) & (lane < FIRST + RESIDUAL_WORDS)
        words |= load_words(residual_ptr, row, lane - FIRST, rows, marked, RESIDUAL_STRIDE)
    tile = (words,)
    for k in tl.static_range(1, PLANES):
        start = signs_ptr + tl.full([], k, tl.int64) * all_rows * STRIDE
        tile = tile + (load_words(start, row, lane, rows, lane < NUM_WORDS, STRIDE),)
    return tile


@triton.jit
def single_program(
    program, programs, x_ptr, stride_column, col_scale_ptr, columns_ptr, residual_col_scale_ptr,
    signs_ptr, row_scale_ptr, residual_ptr, residual_row_scale_ptr, y_ptr,
    in_features, num_significant, rows, steps,
    PLANES: tl.constexpr, NUM_WORDS: tl.constexpr, STRIDE: tl.constexpr,
    RESIDUAL_WORDS: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
    other_ptr=None, other_stride_column=0, bias_ptr=None, addend_ptr=None,
    NORM: tl.constexpr = None, GATE: tl.constexpr = None, EPS: tl.constexpr = 0.0,
    BIAS: tl.constexpr = False, ADDEND: tl.constexpr = False,
):  # fmt: skip
    """Do the work of one of the programs of a matrix: y[i] = Σ over planes k of r_k[i] (B_k u_k)[i], tiles of ROWS rows in turn.

    signs: [PLANES, rows, STRIDE] int32, of which NUM_WORDS count; residual: [rows, RESIDUAL_STRIDE], RESIDUAL_WORDS, which
    take the last RESIDUAL of the WORDS lanes. A tile is under way while the one before is computed; `steps` tiles a program.
    NORM, GATE, BIAS and ADDEND: see `forms.py`.
    """
    FIRST: tl.constexpr = WORDS - RESIDUAL
    lane = tl.arange(0, WORDS)
    advance = ROWS * programs
    row = program * ROWS + tl.arange(0, ROWS)
    ahead = _load_tile(
        signs_ptr, residual_ptr, row, rows, rows, lane,
        PLANES, NUM_WORDS, STRIDE, RESIDUAL_WORDS, RESIDUAL_STRIDE, FIRST,
    )  # fmt: skip
    column = lane[:, None] * 32 + tl.arange(0, 32)[None, :]
    scales = ()
    for k in tl.static_range(PLANES):
        scales = scales + (tl.load(col_scale_ptr + k * in_features + column, mask=column < in_features, other=0.0),)
    if RESIDUAL_WORDS:
        place = tl.arange(0, RESIDUAL)[:, None] * 32 + tl.arange(0, 32)[None, :]
        source = tl.load(columns_ptr + place, mask=place < num_significant, other=0)
        residual_c = tl.load(residual_col_scale_ptr + place, mask=place < num_significant, other=0.0).to(tl.float32)
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    x = tl.load(x_ptr + column * stride_column, mask=column < in_features, other=0.0).to(tl.float32)
    if NORM is not None or GATE is not None:
        other_inside = column < in_features
        other = tl.load(other_ptr + column * other_stride_column, mask=other_inside, other=0.0).to(tl.float32)
        if NORM is not None:
            factor = norm_factor(tl.sum(tl.sum(x * x, axis=1), axis=0), in_features, EPS)
            x = normed(x, factor, other, x_ptr, NORM)
        else:
            x = gated(x, other, x_ptr, GATE)
    activations = ()
    for k in tl.static_range(PLANES):
        activations = activations + (_activations(x * scales[k].to(tl.float32)),)
    if RESIDUAL_WORDS:
        picked = tl.load(x_ptr + source * stride_column, mask=place < num_significant, other=0.0).to(tl.float32)
        if NORM is not None or GATE is not None:
            other_ptr += source * other_stride_column
            picked_other = tl.load(other_ptr, mask=place < num_significant, other=0.0).to(tl.float32)
            if NORM is not None:
                picked = normed(picked, factor, picked_other, x_ptr, NORM)
            else:
                picked = gated(picked, picked_other, x_ptr, GATE)
        joined = _joined(activations[0], _activations(picked * residual_c), lane, FIRST, WORDS, RESIDUAL)
    for step in range(steps):
        here = row < rows
        tile = ahead
        ahead = _load_tile(
            signs_ptr, residual_ptr, row + advance, tl.where(step + 1 < steps, rows, 0), rows, lane,
            PLANES, NUM_WORDS, STRIDE, RESIDUAL_WORDS, RESIDUAL_STRIDE, FIRST,
        )  # fmt: skip
        acc = tl.zeros([ROWS, WORDS], tl.float32)
        for k in tl.static_range(PLANES):
            r = tl.load(row_scale_ptr + k * rows + row, mask=here, other=0.0).to(tl.float32)[:, None]
            if RESIDUAL_WORDS and k == 0:
                r_residual = tl.load(residual_row_scale_ptr + row, mask=here, other=0.0).to(tl.float32)
                acc += products(tile[k], joined) * tl.where((lane < FIRST)[None, :], r, r_residual[:, None])
            else:
                acc += products(tile[k], activations[k]) * r
        y = finished(tl.sum(acc, axis=1), row, here, y_ptr, bias_ptr, addend_ptr, BIAS, ADDEND)
        tl.store(y_ptr + row, y, mask=here)
        row += advance


@triton.jit
def single_kernel(
    x_ptr, stride_column, col_scale_ptr, columns_ptr, residual_col_scale_ptr,
    signs_ptr, row_scale_ptr, residual_ptr, residual_row_scale_ptr, y_ptr,
    in_features, num_significant, rows, steps,
    PLANES: tl.constexpr, NUM_WORDS: tl.constexpr, STRIDE: tl.constexpr,
    RESIDUAL_WORDS: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The product of one matrix; see `single_program`."""
    single_program(
        tl.program_id(0), tl.num_programs(0), x_ptr, stride_column, col_scale_ptr, columns_ptr, residual_col_scale_ptr,
        signs_ptr, row_scale_ptr, residual_ptr, residual_row_scale_ptr, y_ptr, in_features, num_significant, rows, steps,
        PLANES, NUM_WORDS, STRIDE, RESIDUAL_WORDS, RESIDUAL_STRIDE, ROWS, WORDS, RESIDUAL, PDL,
    )  # fmt: skip
