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
    """Tiles of the tensor-core kernel: rows, words, inputs; programs that share a row; warps and pipeline stages."""

    rows: int
    words: int
    batch: int
    splits: int
    warps: int
    stages: int


INT8_BATCH = 4
"""Inputs up to which the int8 kernel is the fastest."""
DOT_BATCH = 64
"""Inputs up to which products of packed planes beat unpacking them for a library's product."""
PROGRAMS_PER_PROCESSOR = 16


def power_of_two(number: int, low: int, high: int) -> int:
    """Return the least power of two that is at least `number`, within [low, high]."""
    return min(high, max(low, 1 << max(0, number - 1).bit_length()))


def int8_tiles(rows: int, words: int, residual_words: int, processors: int) -> Int8Tiles:
    """Choose tiles of the int8 kernel for a matrix of `rows` rows of `words` 32-bit words."""
    tile = 4
    steps = max(1, rows // (tile * PROGRAMS_PER_PROCESSOR * processors))
    return Int8Tiles(tile, power_of_two(words, 16, 128), power_of_two(residual_words, 16, 64), steps)


def dot_tiles(rows: int, words: int, batch: int, processors: int) -> DotTiles:
    """Choose tiles of the tensor-core kernel; few rows are shared among several programs to fill the processors."""
    tile = DotTiles(64, power_of_two(words, 16, 32), power_of_two(batch, 16, 64), 1, 4, 3)
    programs = math.ceil(rows / tile.rows) * math.ceil(batch / tile.batch)
    most = math.ceil(words / tile.words)
    return tile._replace(splits=power_of_two(2 * processors // programs, 1, min(8, power_of_two(most, 1, 8))))
