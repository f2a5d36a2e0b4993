"""Triton: scale the activations by the planes' column scales, in the order in which packed words hold the columns.

Bit b of the 32-bit word w of a row is column 32w + b (`packing.py`, read as little-endian words). So the activations of
one word are 32 neighbours, and only their order within the word has to fit what the products want.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from .forms import gated, normed, row_factor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _scaled(
    x_ptr, stride_batch, stride_column, col_scale_ptr, columns_ptr, residual_col_scale_ptr,
    in_features, num_significant, column, plane, batch, PLANES, PDL: tl.constexpr,
    other_ptr=None, other_stride_batch=0, other_stride_column=0,
    NORM: tl.constexpr = None, GATE: tl.constexpr = None, EPS: tl.constexpr = 0.0,
):  # fmt: skip
    """Return c ⊙ x of a plane's columns `column` and the input `batch`, float32 in the shape of `column`.

    NORM, GATE: what x is made of, see `forms.py`; `other_ptr` has the weight of a norm, or what a gate multiplies. The plane
    after the full ones is the residual. What runs next may load weights meanwhile: it waits for this kernel before it reads
    activations, as this one waits for what ran before.
    """
    if PDL:
        cuda.gdc_launch_dependents()
    if plane < PLANES:
        inside = column < in_features
        source = column
        c = tl.load(col_scale_ptr + plane * in_features + column, mask=inside, other=0.0)
    else:
        inside = column < num_significant
        source = tl.load(columns_ptr + column, mask=inside, other=0)
        c = tl.load(residual_col_scale_ptr + column, mask=inside, other=0.0)
    if PDL:
        cuda.gdc_wait()
    x_ptr += batch * stride_batch
    x = tl.load(x_ptr + source * stride_column, mask=inside, other=0.0).to(tl.float32)
    if NORM is not None or GATE is not None:
        other_ptr += batch * other_stride_batch + source * other_stride_column
        other = tl.load(other_ptr, mask=inside, other=0.0).to(tl.float32)
        if NORM is not None:
            x = normed(x, row_factor(x_ptr, stride_column, in_features, EPS, 4096), other, x_ptr, NORM)
        else:
            x = gated(x, other, x_ptr, GATE)
    return x * c.to(tl.float32)


@triton.jit
def quantized(u):
    """Round `u` [WORDS, 32] float32 to int8, with one scale for the 32 columns of a word.

    Returns:
        packed: [WORDS, 8] int32; byte i of (w, j) is column 32w + j + 8i, the order of `(word >> j) & 0x01010101`.
        start: [WORDS] int32, -64 times the sum of the word's 32 integers: turns sums over set bits into sums over ±1.
        scale: [WORDS] float32, an eighth of the step; NaN where the inputs are not finite.
    """
    step = tl.max(tl.abs(u), axis=1) / 127 + tl.sum(u * 0, axis=1)
    inverse = tl.where(step > 0, 1 / step, 0.0)
    q = tl.floor(u * inverse[:, None] + 0.5).to(tl.int32)
    shift = tl.arange(0, 4) * 8
    bytes_ = (tl.reshape(q, [q.shape[0], 4, 8]) & 0xFF) << shift[None, :, None]
    packed = tl.sum(bytes_, axis=1).to(tl.int32)  # the bytes do not overlap
    return packed, -64 * tl.sum(q, axis=1), step / 8


@triton.jit
def quantize_kernel(
    x_ptr, stride_batch, stride_column, col_scale_ptr, columns_ptr, residual_col_scale_ptr,
    q_ptr, start_ptr, scale_ptr, in_features, num_significant, padded_words,
    PLANES: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write c ⊙ x as `quantized` gives it, for each plane and input: q [8, P] int32, start [P] and scale [P], P padded words."""
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    plane, batch = tl.program_id(1), tl.program_id(2)
    u = _scaled(
        x_ptr, stride_batch, stride_column, col_scale_ptr, columns_ptr, residual_col_scale_ptr,
        in_features, num_significant, word[:, None] * 32 + tl.arange(0, 32)[None, :], plane, batch, PLANES, PDL,
    )  # fmt: skip
    packed, start, scale = quantized(u)
    base = plane * tl.num_programs(2) + batch
    inside = word < padded_words
    pointers = q_ptr + (base * 8 + tl.arange(0, 8)[None, :]) * padded_words + word[:, None]
    tl.store(pointers, packed, mask=inside[:, None])
    tl.store(start_ptr + base * padded_words + word, start, mask=inside)
    tl.store(scale_ptr + base * padded_words + word, scale, mask=inside)


@triton.jit
def _ballot(bit, thread):
    """Return in every thread the word of its warp's bits, [512] int32; `bit` is 0 or 1."""
    if INTERPRETED:
        words = tl.sum(tl.reshape(bit << thread % 32, [16, 32]), axis=1)
        return tl.reshape(tl.broadcast_to(words[:, None], [16, 32]), [512])
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }",
            "=r,r", [bit], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def cut_program(
    place, plane, x_ptr, stride_batch, stride_column, col_scale_ptr, columns_ptr, residual_col_scale_ptr,
    bits_ptr, scale_ptr, sum_ptr, in_features, num_significant, pieces, PLANES, PDL: tl.constexpr,
    other_ptr=None, other_stride_batch=0, other_stride_column=0,
    NORM: tl.constexpr = None, GATE: tl.constexpr = None, EPS: tl.constexpr = 0.0,
):  # fmt: skip
    """Round c ⊙ x to 16 bits with one scale for 16 words, a piece, and cut the integers into rows of bits.

    A program makes a piece with 16 warps: a warp is a word, a thread a column. `plane` is its place among the planes of the
    matrix, `place` that among all that are written. Writes for each plane, input and piece:
        bits: [8, 4, 2, 4] int32; (g, t, i, j) are the bits of weight 2^(8i + g) of the columns of the piece's word 4t + j.
        scale: float32, the step; NaN where the inputs are not finite.
        sum: int32, the sum of the integers.
    """
    thread = tl.arange(0, 512)
    batch = tl.program_id(2)
    u = _scaled(
        x_ptr, stride_batch, stride_column, col_scale_ptr, columns_ptr, residual_col_scale_ptr,
        in_features, num_significant, tl.program_id(0) * 512 + thread, plane, batch, PLANES, PDL,
        other_ptr, other_stride_batch, other_stride_column, NORM, GATE, EPS,
    )  # fmt: skip
    finite = tl.abs(u) < float("inf")
    step = tl.max(tl.where(finite, tl.abs(u), float("inf")), axis=0) / 32767
    inverse = tl.where((step > 0) & (step < float("inf")), 1 / step, 0.0)
    q = tl.where(finite, tl.floor(u * inverse + 0.5), 0.0).to(tl.int32)
    packed = tl.zeros([512], tl.int32)
    for weight in tl.static_range(16):  # thread `weight` of a warp keeps its word's bits of that weight
        packed = tl.where(thread % 32 == weight, _ballot(q >> weight & 1, thread), packed)
    base = (place * tl.num_programs(2) + batch) * pieces + tl.program_id(0)
    word, weight = thread // 32, thread % 32
    inside = weight % 8 * 32 + word // 4 * 8 + weight // 8 * 4 + word % 4
    tl.store(bits_ptr + base * 256 + inside, packed, mask=weight < 16)
    tl.store(scale_ptr + base, tl.where(step < float("inf"), step, float("nan")))
    tl.store(sum_ptr + base, tl.sum(q, axis=0))


@triton.jit
def cut_kernel(
    x_ptr, stride_batch, stride_column, col_scale_ptr, columns_ptr, residual_col_scale_ptr,
    bits_ptr, scale_ptr, sum_ptr, in_features, num_significant, pieces, PLANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The planes of one matrix; see `cut_program`."""
    plane = tl.program_id(1)
    cut_program(
        plane, plane, x_ptr, stride_batch, stride_column, col_scale_ptr, columns_ptr, residual_col_scale_ptr,
        bits_ptr, scale_ptr, sum_ptr, in_features, num_significant, pieces, PLANES, PDL,
    )  # fmt: skip


@triton.jit
def scale_kernel(
    x_ptr, stride_batch, stride_column, col_scale_ptr, columns_ptr, residual_col_scale_ptr,
    u_ptr, counter_ptr, in_features, num_significant, padded_words, num_counters,
    PLANES: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write c ⊙ x in the dtype of u: [plane, input, word, 32], and set the counters of the product's splits to zero.

    Place 2i + s of a word is its bit i + 16s, the order in which `dot.py` takes weights out of it.
    """
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    plane, batch = tl.program_id(1), tl.program_id(2)
    u = _scaled(
        x_ptr, stride_batch, stride_column, col_scale_ptr, columns_ptr, residual_col_scale_ptr,
        in_features, num_significant, word[:, None] * 32 + tl.arange(0, 32)[None, :], plane, batch, PLANES, PDL,
    )  # fmt: skip
    bit = tl.arange(0, 32)
    place = bit % 16 * 2 + bit // 16
    first = (plane * tl.num_programs(2) + batch) * padded_words
    target = u_ptr + (first + word[:, None]) * 32 + place[None, :]
    tl.store(target, u.to(u_ptr.dtype.element_ty), mask=word[:, None] < padded_words)
    if (plane == 0) & (batch == 0):
        counter = tl.program_id(0) * 32 + tl.arange(0, 32)
        while tl.min(counter) < num_counters:
            tl.store(counter_ptr + counter, 0, mask=counter < num_counters)
            counter += tl.num_programs(0) * 32


@triton.jit(do_not_specialize=["num_inputs"])
def arrange_kernel(
    x_ptr, stride_batch, stride_column, col_scale_ptr, columns_ptr, residual_col_scale_ptr,
    u_ptr, in_features, num_significant, num_inputs,
    PLANES: tl.constexpr, NUM_WORDS: tl.constexpr, RESIDUAL_WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write c ⊙ x in the dtype of u, in the order in which the threads of `fragments.py` need it.

    A program makes a piece of 16 words for 8 inputs, zeros where there are none: u is [piece, inputs / 8, 4, 4, 8, 4, 4, 2];
    (j, q, b, t, i, s) is input b and, of the piece's word 4t + j, the column 16s + 4q + i. Pieces are those of all planes
    in turn.
    """
    pieces: tl.constexpr = (NUM_WORDS + 15) // 16
    residual_pieces: tl.constexpr = (RESIDUAL_WORDS + 15) // 16
    piece, plane, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b = (group * 8 + tl.arange(0, 8))[:, None]
    u = _scaled(
        x_ptr, stride_batch, stride_column, col_scale_ptr, columns_ptr, residual_col_scale_ptr, in_features,
        num_significant, (piece * 512 + tl.arange(0, 512))[None, :], plane, tl.minimum(b, num_inputs - 1), PLANES, PDL,
    )  # fmt: skip
    u = tl.where(b < num_inputs, u, 0.0).to(u_ptr.dtype.element_ty)
    ordered = tl.reshape(tl.permute(tl.reshape(u, [8, 4, 4, 2, 4, 4]), (2, 4, 0, 1, 5, 3)), [4096])
    place = (plane * pieces + piece) * tl.num_programs(2) + group
    exists = piece < tl.where(plane < PLANES, pieces, residual_pieces)
    tl.store(u_ptr + place.to(tl.int64) * 4096 + tl.arange(0, 4096), ordered, mask=exists)
