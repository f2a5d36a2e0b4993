"""Which kernel and which tiles, by device and shape: measured ones, and a rule for the rest. Nothing is tuned at run time."""

from __future__ import annotations

import math
from typing import NamedTuple


class Int8Tiles(NamedTuple):
    """Tiles of the int8 kernel (one warp a program): rows, words, and tiles of rows that a program makes."""

    rows: int
    words: int
    residual_words: int
    steps: int


class DotTiles(NamedTuple):
    """Tiles of the tensor-core kernel: rows, words, inputs; programs that share a row; warps, stages, bits a round."""

    rows: int
    words: int
    batch: int
    splits: int
    warps: int
    stages: int
    bits: int


INT8_BATCH = 4
"""Inputs up to which the int8 kernel is the fastest."""
DOT_BATCH = 128
"""Inputs up to which products of packed planes beat unpacking them for a library's product."""
PROGRAMS_PER_PROCESSOR = 20

# Measured on one H100 (132 processors), 2026-11-25: (processors, planes, rows, words, has a residual plane) → steps.
INT8_STEPS = {
    (132, 1, 37888, 112, False): 4,
    (132, 1, 37888, 112, True): 3,
    (132, 2, 37888, 112, False): 3,
    (132, 1, 18944, 112, False): 2,
    (132, 1, 18944, 112, True): 3,
    (132, 2, 18944, 112, False): 2,
    (132, 4, 152064, 112, False): 9,
}


def power_of_two(number: int, low: int, high: int) -> int:
    """Return the least power of two that is at least `number`, within [low, high]."""
    return min(high, max(low, 1 << max(0, number - 1).bit_length()))


def int8_tiles(planes: int, rows: int, words: int, residual_words: int, processors: int) -> Int8Tiles:
    """Choose tiles of the int8 kernel for `planes` planes of `rows` rows of `words` 32-bit words, and a residual plane."""
    tile = 4
    steps = INT8_STEPS.get((processors, planes, rows, words, residual_words > 0))
    if steps is None:
        steps = min(8, max(1, round(rows / (tile * PROGRAMS_PER_PROCESSOR * processors))))
    return Int8Tiles(tile, power_of_two(words, 16, 128), power_of_two(residual_words, 16, 64), steps)


def dot_tiles(rows: int, words: int, batch: int, processors: int, itemsize: int) -> DotTiles:
    """Choose tiles of the tensor-core kernel; few rows are shared among several programs to fill the processors.

    Args:
        itemsize: bytes of an activation; tiles of float32 have to be smaller.
    """
    word_tile = power_of_two(words, 16, 32)
    if itemsize == 4 or batch > 16:
        tile = DotTiles(64, word_tile, power_of_two(batch, 16, 64), splits=1, warps=4, stages=3, bits=1)
    else:
        tile = DotTiles(64, word_tile, 16, splits=1, warps=4, stages=3, bits=16)
    programs = math.ceil(rows / tile.rows) * math.ceil(batch / tile.batch)
    most = math.ceil(words / tile.words)
    return tile._replace(splits=power_of_two(2 * processors // programs, 1, power_of_two(most, 1, 8)))
