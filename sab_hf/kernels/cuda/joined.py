"""Triton: several products of one input in one launch, whose programs are dealt to the matrices.

A program does what it would do in a launch of its matrix alone (`single.py`, `bits.py`), bit for bit. Matrices
of the same sizes, a class, share one body, which takes the pointers of the program's matrix; each class has a body of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import bits_program
from .prepare import cut_program
from .single import single_program


@triton.jit
def chosen(matrices, index):
    """Return entry `index` of several tuples of scalars, one for each matrix."""
    found = matrices[0]
    for i in tl.static_range(1, len(matrices)):
        mixed = ()
        for j in tl.static_range(len(found)):
            mixed = mixed + (tl.where(index == i, matrices[i][j], found[j]),)
        found = mixed
    return found


@triton.jit
def joined_single_kernel(
    x_ptr, stride_column, other_ptr, other_stride_column, in_features, classes,
    SIZES: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, EPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Products of one input by the kernel of a single launch; see `single_program`.

    classes: for each class a tuple of its matrices, each the tuple of its arguments, from `col_scale_ptr` to `y_ptr`, then
    `bias_ptr`, `addend_ptr` and `num_significant`. SIZES: for each class its programs a matrix, the sizes from `rows` to
    `RESIDUAL`, BIAS and ADDEND.
    """
    first = 0
    for i in tl.static_range(len(classes)):
        end = first + SIZES[i][0] * len(classes[i])
        if (tl.program_id(0) >= first) & (tl.program_id(0) < end):
            _single_of_class(
                tl.program_id(0) - first, x_ptr, stride_column, other_ptr, other_stride_column, in_features, classes[i],
                SIZES, i, NORM, GATE, EPS, PDL,
            )  # fmt: skip
        first = end


@triton.jit
def _single_of_class(
    program, x_ptr, stride_column, other_ptr, other_stride_column, in_features, matrices,
    SIZES: tl.constexpr, CLASS: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, EPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    PROGRAMS: tl.constexpr = SIZES[CLASS][0]
    NUM_ROWS: tl.constexpr = SIZES[CLASS][1]
    STEPS: tl.constexpr = SIZES[CLASS][2]
    PLANES: tl.constexpr = SIZES[CLASS][3]
    NUM_WORDS: tl.constexpr = SIZES[CLASS][4]
    STRIDE: tl.constexpr = SIZES[CLASS][5]
    RESIDUAL_WORDS: tl.constexpr = SIZES[CLASS][6]
    RESIDUAL_STRIDE: tl.constexpr = SIZES[CLASS][7]
    ROWS: tl.constexpr = SIZES[CLASS][8]
    WORDS: tl.constexpr = SIZES[CLASS][9]
    RESIDUAL: tl.constexpr = SIZES[CLASS][10]
    BIAS: tl.constexpr = SIZES[CLASS][11]
    ADDEND: tl.constexpr = SIZES[CLASS][12]
    mine = chosen(matrices, program // PROGRAMS)
    c, columns, residual_c, signs, r, residual, residual_r, y, bias, addend, num_significant = mine
    single_program(
        program % PROGRAMS, PROGRAMS, x_ptr, stride_column, c, columns, residual_c, signs, r, residual, residual_r, y,
        in_features, num_significant, NUM_ROWS, STEPS, PLANES, NUM_WORDS, STRIDE, RESIDUAL_WORDS, RESIDUAL_STRIDE,
        ROWS, WORDS, RESIDUAL, PDL, other_ptr, other_stride_column, bias, addend, NORM, GATE, EPS, BIAS, ADDEND,
    )  # fmt: skip


@triton.jit
def joined_cut_kernel(
    x_ptr, stride_batch, stride_column, other_ptr, other_stride_batch, other_stride_column,
    bits_ptr, scale_ptr, sum_ptr, in_features, pieces, matrices,
    PLANES: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, EPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Prepare the input for several matrices on bits, one after the other; see `cut_program`.

    matrices: for each its `col_scale_ptr`, `columns_ptr`, `residual_col_scale_ptr`, `num_significant` and number of full
    planes. PLANES: for each its planes, the residual one included.
    """
    place = tl.program_id(1)
    index, plane, first = 0, place, 0
    for i in tl.static_range(1, len(matrices)):
        first += PLANES[i - 1]
        index = tl.where(place >= first, i, index)
        plane = tl.where(place >= first, place - first, plane)
    c, columns, residual_c, num_significant, num_planes = chosen(matrices, index)
    cut_program(
        place, plane, x_ptr, stride_batch, stride_column, c, columns, residual_c, bits_ptr, scale_ptr, sum_ptr,
        in_features, num_significant, pieces, num_planes, PDL,
        other_ptr, other_stride_batch, other_stride_column, NORM, GATE, EPS,
    )  # fmt: skip


@triton.jit
def joined_bits_kernel(
    bits_ptr, scale_ptr, sum_ptr, batch, pieces, classes,
    SIZES: tl.constexpr, INPUTS: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Products of inputs that `joined_cut_kernel` has prepared; see `bits_program`.

    classes: for each class a tuple of its matrices, each the tuple of its arguments, from `signs_ptr` to `y_ptr`,
    `bias_ptr`, `addend_ptr` and the place of its first plane among all. SIZES: for each class its programs a matrix, and
    rows, steps, PLANES, NUM_WORDS, STRIDE, RESIDUAL_WORDS, RESIDUAL_STRIDE, SPLIT, BIAS, ADDEND.
    """
    first = 0
    for i in tl.static_range(len(classes)):
        end = first + SIZES[i][0] * len(classes[i])
        if (tl.program_id(0) >= first) & (tl.program_id(0) < end):
            _bits_of_class(
                tl.program_id(0) - first, bits_ptr, scale_ptr, sum_ptr, batch, pieces, classes[i],
                SIZES, i, INPUTS, WARPS, PDL,
            )  # fmt: skip
        first = end


@triton.jit
def _bits_of_class(
    program, bits_ptr, scale_ptr, sum_ptr, batch, pieces, matrices,
    SIZES: tl.constexpr, CLASS: tl.constexpr, INPUTS: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    PROGRAMS: tl.constexpr = SIZES[CLASS][0]
    NUM_ROWS: tl.constexpr = SIZES[CLASS][1]
    STEPS: tl.constexpr = SIZES[CLASS][2]
    PLANES: tl.constexpr = SIZES[CLASS][3]
    NUM_WORDS: tl.constexpr = SIZES[CLASS][4]
    STRIDE: tl.constexpr = SIZES[CLASS][5]
    RESIDUAL_WORDS: tl.constexpr = SIZES[CLASS][6]
    RESIDUAL_STRIDE: tl.constexpr = SIZES[CLASS][7]
    SPLIT: tl.constexpr = SIZES[CLASS][8]
    BIAS: tl.constexpr = SIZES[CLASS][9]
    ADDEND: tl.constexpr = SIZES[CLASS][10]
    signs, r, residual, residual_r, y, bias, addend, first_plane = chosen(matrices, program // PROGRAMS)
    base = first_plane * batch * pieces
    bits_program(
        program % PROGRAMS, bits_ptr + base * 256, scale_ptr + base, sum_ptr + base, signs, r, residual, residual_r, y,
        batch, NUM_ROWS, pieces, STEPS, PLANES, NUM_WORDS, STRIDE, RESIDUAL_WORDS, RESIDUAL_STRIDE,
        INPUTS, WARPS, SPLIT, PDL, bias, addend, BIAS, ADDEND,
    )  # fmt: skip
