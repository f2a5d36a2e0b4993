"""Triton: the product of packed planes with int8 activations, for a handful of inputs (`dp4a`).

`(word << 4) & 0x10101010` and its neighbours are four weights in four bytes, as {0, 2^i}. Eight dot products of four make
a word, highest bit first, halving in between (Horner), which needs four shifts instead of seven; all of it is exact.
Exactly one program makes one output, in a fixed order: results do not depend on the order of arrival.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dp4a(a, b, c):
    """Return c plus the dot product of the unsigned bytes of `a` and the signed bytes of `b`, elementwise."""
    if INTERPRETED:
        for byte in tl.static_range(4):
            c += ((a >> (8 * byte)) & 0xFF) * ((b << (24 - 8 * byte)) >> 24)
        return c
    else:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _activations(q_ptr, start_ptr, scale_ptr, plane, padded_words, word, inside):
    """Return what `products` needs of the words `word`: eight rows of int8 activations, starts and scales."""
    q_ptr += plane * 8 * padded_words + word
    q0 = tl.load(q_ptr, mask=inside, other=0)
    q1 = tl.load(q_ptr + padded_words, mask=inside, other=0)
    q2 = tl.load(q_ptr + 2 * padded_words, mask=inside, other=0)
    q3 = tl.load(q_ptr + 3 * padded_words, mask=inside, other=0)
    q4 = tl.load(q_ptr + 4 * padded_words, mask=inside, other=0)
    q5 = tl.load(q_ptr + 5 * padded_words, mask=inside, other=0)
    q6 = tl.load(q_ptr + 6 * padded_words, mask=inside, other=0)
    q7 = tl.load(q_ptr + 7 * padded_words, mask=inside, other=0)
    start = tl.load(start_ptr + plane * padded_words + word, mask=inside, other=0)
    scale = tl.load(scale_ptr + plane * padded_words + word, mask=inside, other=0.0)
    return q0, q1, q2, q3, q4, q5, q6, q7, start, scale


@triton.jit
def products(words, activations):
    """Return for each word of a tile [ROWS, WORDS] the product of its 32 signs and activations, float32."""
    q0, q1, q2, q3, q4, q5, q6, q7, start, scale = activations
    low = words << 4
    a = _dp4a(words & -0x7F7F7F80, q7[None, :], start[None, :])
    a = _dp4a(low & -0x7F7F7F80, q3[None, :], a) >> 1
    a = _dp4a(words & 0x40404040, q6[None, :], a)
    a = _dp4a(low & 0x40404040, q2[None, :], a) >> 1
    a = _dp4a(words & 0x20202020, q5[None, :], a)
    a = _dp4a(low & 0x20202020, q1[None, :], a) >> 1
    a = _dp4a(words & 0x10101010, q4[None, :], a)
    a = _dp4a(low & 0x10101010, q0[None, :], a)
    return a.to(tl.float32) * scale[None, :]


@triton.jit
def load_words(start, row, word, rows, inside, STRIDE: tl.constexpr):
    """Return the tile [ROWS, WORDS] of 32-bit words where `inside` [WORDS]; 0 elsewhere."""
    pointers = start + row[:, None] * STRIDE + word[None, :]
    return tl.load(pointers, mask=inside[None, :] & (row < rows)[:, None], other=0)


@triton.jit(do_not_specialize=["steps"])
def int8_kernel(
    q_ptr, start_ptr, scale_ptr, signs_ptr, row_scale_ptr, residual_ptr, residual_row_scale_ptr, y_ptr,
    batch, rows, padded_words, steps,
    PLANES: tl.constexpr, NUM_WORDS: tl.constexpr, STRIDE: tl.constexpr,
    RESIDUAL_WORDS: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    RESIDUAL_TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[b, i] = Σ over planes k of r_k[i] Σ over words of the word's product; each program makes `steps` tiles of ROWS rows.

    signs: [PLANES, rows, STRIDE] int32, of which NUM_WORDS count; residual: [rows, RESIDUAL_STRIDE], RESIDUAL_WORDS.
    Tiles of words are under way one round ahead of their use; the first ones are, before the activations are there. A
    short residual row takes the lanes that the last words of a row leave free.
    """
    lane = tl.arange(0, WORDS)
    tiles: tl.constexpr = (NUM_WORDS + WORDS - 1) // WORDS
    count: tl.constexpr = PLANES * tiles
    rolling: tl.constexpr = count * ROWS <= 24
    merged: tl.constexpr = (
        RESIDUAL_WORDS > 0 and count == 1 and NUM_WORDS % 4 == 0 and NUM_WORDS + RESIDUAL_WORDS <= WORDS
    )
    free = (lane >= NUM_WORDS) & (lane < NUM_WORDS + RESIDUAL_WORDS)
    first_row = tl.program_id(0) * steps * ROWS + tl.arange(0, ROWS)
    ahead = ()
    for t in tl.static_range(count if rolling else 1):
        word = (t % tiles) * WORDS + lane
        start = signs_ptr + tl.full([], t // tiles, tl.int64) * rows * STRIDE
        ahead = ahead + (load_words(start, first_row, word, rows, word < NUM_WORDS, STRIDE),)
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    for b in range(batch):
        q, qstart, qscale = q_ptr + b * 8 * padded_words, start_ptr + b * padded_words, scale_ptr + b * padded_words
        if merged:  # kept in registers, since they are gathered from two places; else loading them anew is faster
            full = _activations(q, qstart, qscale, 0, padded_words, lane, lane < NUM_WORDS)
            extra = _activations(q, qstart, qscale, PLANES * batch, padded_words, lane - NUM_WORDS, free)
            activations = _sums(full, extra)
        for step in range(steps):
            row = first_row + step * ROWS
            here = row < rows
            last = step + 1 == steps
            next_row = tl.where(last, first_row, row + ROWS)
            more = ~last | (b + 1 < batch)
            if RESIDUAL_WORDS:
                lane_r = lane - NUM_WORDS if merged else tl.arange(0, RESIDUAL_TILE)
                inside_r = free if merged else lane_r < RESIDUAL_WORDS
                words_r = load_words(residual_ptr, row, lane_r, rows, inside_r, RESIDUAL_STRIDE)
                r_residual = tl.load(residual_row_scale_ptr + row, mask=here, other=0.0).to(tl.float32)
            acc = tl.zeros([ROWS, WORDS], tl.float32)
            if rolling:
                following = ()
                for t in tl.static_range(count):
                    word = (t % tiles) * WORDS + lane
                    start = signs_ptr + tl.full([], t // tiles, tl.int64) * rows * STRIDE
                    following = following + (
                        load_words(start, next_row, word, rows, (word < NUM_WORDS) & more, STRIDE),
                    )
                    if not merged:
                        activations = _activations(
                            q, qstart, qscale, (t // tiles) * batch, padded_words, word, word < NUM_WORDS
                        )
                    r = tl.load(row_scale_ptr + (t // tiles) * rows + row, mask=here, other=0.0).to(tl.float32)
                    if merged:
                        part = products(ahead[t] | words_r, activations)
                        acc += part * tl.where((lane < NUM_WORDS)[None, :], r[:, None], r_residual[:, None])
                    elif PLANES == 1:
                        acc += products(ahead[t], activations)
                    else:
                        acc += products(ahead[t], activations) * r[:, None]
                ahead = following
            else:
                words = load_words(signs_ptr, row, lane, rows, lane < NUM_WORDS, STRIDE)
                for tile in range(count):
                    word, now = (tile % tiles) * WORDS + lane, words
                    next_word = ((tile + 1) % tiles) * WORDS + lane
                    start = signs_ptr + (tl.full([], 0, tl.int64) + (tile + 1) // tiles) * rows * STRIDE
                    words = load_words(
                        start, row, next_word, rows, (next_word < NUM_WORDS) & (tile + 1 < count), STRIDE
                    )
                    activations = _activations(
                        q, qstart, qscale, (tile // tiles) * batch, padded_words, word, word < NUM_WORDS
                    )
                    r = tl.load(row_scale_ptr + (tile // tiles) * rows + row, mask=here, other=0.0).to(tl.float32)
                    acc += products(now, activations) * r[:, None]
            y = tl.sum(acc, axis=1)
            if rolling and PLANES == 1 and not merged:
                y *= tl.load(row_scale_ptr + row, mask=here, other=0.0).to(tl.float32)
            if RESIDUAL_WORDS and not merged:
                acc_r = tl.zeros([ROWS, RESIDUAL_TILE], tl.float32)
                for tile_r in range((RESIDUAL_WORDS + RESIDUAL_TILE - 1) // RESIDUAL_TILE):
                    word_r, now_r = tile_r * RESIDUAL_TILE + lane_r, words_r
                    next_r = word_r + RESIDUAL_TILE
                    words_r = load_words(residual_ptr, row, next_r, rows, next_r < RESIDUAL_WORDS, RESIDUAL_STRIDE)
                    extra = _activations(
                        q, qstart, qscale, PLANES * batch, padded_words, word_r, word_r < RESIDUAL_WORDS
                    )
                    acc_r += products(now_r, extra)
                y += tl.sum(acc_r, axis=1) * r_residual
            tl.store(y_ptr + b * rows + row, y.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit
def _sums(a, b):
    """Return the sums of two tuples of activations, one of which is zero in each word."""
    return (
        a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6], a[7] + b[7],
        a[8] + b[8], a[9] + b[9],
    )  # fmt: skip
