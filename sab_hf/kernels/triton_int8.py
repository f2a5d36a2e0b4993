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
def _word_products(words, q_ptr, start_ptr, scale_ptr, padded_words, word, inside):
    """Return for each word of a tile [ROWS, WORDS] the product of its 32 signs and activations, float32."""
    a = tl.load(start_ptr + word, mask=inside, other=0)[None, :]
    low = words << 4
    for i in tl.static_range(4):
        mask = -0x7F7F7F80 if i == 0 else 0x80808080 >> i
        high_q = tl.load(q_ptr + (7 - i) * padded_words + word, mask=inside, other=0)[None, :]
        low_q = tl.load(q_ptr + (3 - i) * padded_words + word, mask=inside, other=0)[None, :]
        a = _dp4a(words & mask, high_q, a)
        a = _dp4a(low & mask, low_q, a)
        if i < 3:
            a = a >> 1
    scale = tl.load(scale_ptr + word, mask=inside, other=0.0)[None, :]
    return a.to(tl.float32) * scale


@triton.jit
def load_words(start, row, word, rows, here, STRIDE: tl.constexpr, NUM_WORDS: tl.constexpr):
    """Return the tile [ROWS, WORDS] of 32-bit words; 0 outside, and everywhere unless `here`."""
    inside = (word < NUM_WORDS)[None, :] & (row < rows)[:, None] & here
    return tl.load(start + row[:, None] * STRIDE + word[None, :], mask=inside, other=0)


@triton.jit(do_not_specialize=["steps"])
def int8_kernel(
    q_ptr, start_ptr, scale_ptr, signs_ptr, row_scale_ptr, residual_ptr, residual_row_scale_ptr, y_ptr,
    batch, rows, padded_words, steps,
    PLANES: tl.constexpr, NUM_WORDS: tl.constexpr, STRIDE: tl.constexpr,
    RESIDUAL_WORDS: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, RESIDUAL_TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[b, i] = Σ over planes k of r_k[i] Σ over words of the word's product; each program makes `steps` tiles of ROWS rows.

    signs: [PLANES, rows, STRIDE] int32, of which NUM_WORDS count; residual: [rows, RESIDUAL_STRIDE], RESIDUAL_WORDS.
    The next tile of words is under way while one is computed; the first is, before the activations are there.
    """
    tiles: tl.constexpr = (NUM_WORDS + WORDS - 1) // WORDS
    lane = tl.arange(0, WORDS)
    row = tl.program_id(0) * steps * ROWS + tl.arange(0, ROWS)
    words = load_words(signs_ptr, row, lane, rows, True, STRIDE, NUM_WORDS)
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    for step in range(steps):
        for b in range(batch):
            if RESIDUAL_WORDS:
                lane_r = tl.arange(0, RESIDUAL_TILE)
                words_r = load_words(residual_ptr, row, lane_r, rows, True, RESIDUAL_STRIDE, RESIDUAL_WORDS)
            acc = tl.zeros([ROWS, WORDS], tl.float32)
            for t in range(PLANES * tiles):
                now, plane, word = words, t // tiles, (t % tiles) * WORDS + lane
                following = tl.where(t + 1 < PLANES * tiles, t + 1, 0)
                advance = (t + 1 == PLANES * tiles) & (b + 1 == batch)
                words = load_words(
                    signs_ptr + (following // tiles).to(tl.int64) * rows * STRIDE,
                    row + tl.where(advance, ROWS, 0), (following % tiles) * WORDS + lane,
                    rows, (step + 1 < steps) | ~advance, STRIDE, NUM_WORDS,
                )  # fmt: skip
                base = (plane * batch + b) * padded_words
                part = _word_products(
                    now, q_ptr + base * 8, start_ptr + base, scale_ptr + base, padded_words, word, word < NUM_WORDS
                )
                if PLANES > 1:
                    r = tl.load(row_scale_ptr + plane * rows + row, mask=row < rows, other=0.0)
                    part = part * r.to(tl.float32)[:, None]
                acc += part
            y = tl.sum(acc, axis=1)
            if PLANES == 1:
                y *= tl.load(row_scale_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
            if RESIDUAL_WORDS:
                base = (PLANES * batch + b) * padded_words
                y += _residual_products(
                    words_r, residual_ptr, row, rows, q_ptr + base * 8, start_ptr + base, scale_ptr + base, padded_words,
                    RESIDUAL_WORDS, RESIDUAL_STRIDE, ROWS, RESIDUAL_TILE,
                ) * tl.load(residual_row_scale_ptr + row, mask=row < rows, other=0.0).to(tl.float32)  # fmt: skip
            tl.store(y_ptr + b * rows + row, y.to(y_ptr.dtype.element_ty), mask=row < rows)
        row += ROWS


@triton.jit
def _residual_products(
    words, residual_ptr, row, rows, q_ptr, start_ptr, scale_ptr, padded_words,
    NUM_WORDS: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Return the sums over the residual plane's words, [ROWS]; `words` is its first tile."""
    acc = tl.zeros([ROWS, WORDS], tl.float32)
    for t in range((NUM_WORDS + WORDS - 1) // WORDS):
        word, now = t * WORDS + tl.arange(0, WORDS), words
        words = load_words(residual_ptr, row, word + WORDS, rows, True, STRIDE, NUM_WORDS)
        acc += _word_products(now, q_ptr, start_ptr, scale_ptr, padded_words, word, word < NUM_WORDS)
    return tl.sum(acc, axis=1)
