"""Which kernel and which tiles, by device and shape: measured ones, and a rule for the rest. Nothing is tuned at run time."""

from __future__ import annotations

import math
from typing import NamedTuple


class BitsTiles(NamedTuple):
    """Tiles of the kernel on bits: warps of a program, warps that share rows, and tiles of rows that a program makes."""

    warps: int
    split: int
    steps: int


class Int8Tiles(NamedTuple):
    """Tiles of the int8 kernel (one warp a program): rows, words, and tiles of rows that a program makes."""

    rows: int
    words: int
    residual_words: int
    steps: int


class DotTiles(NamedTuple):
    """Tiles of the tensor-core kernel: rows, words, inputs; programs that share a row; warps, stages."""

    rows: int
    words: int
    batch: int
    splits: int
    warps: int
    stages: int


BITS_BATCH = 16
"""Inputs up to which the kernel on bits is the fastest; INT8_BATCH: the int8 kernel, on devices that only emulate the former."""
INT8_BATCH = 4
PROGRAMS_PER_PROCESSOR = 20
PIECES_PER_WARP = 8
"""Pieces of 16 words that a warp of the kernel on bits holds at a time, for lack of registers."""


def kernel(batch: int, planes: int, itemsize: int, exact: bool, capability: tuple[int, int]) -> str:
    """Return which kernel multiplies: bits, int8, dot or dense.

    Args:
        itemsize: bytes of an activation.
        capability: of the device; tensor cores multiply bits on 8.x and 9.x.
    """
    if not exact:
        if batch <= BITS_BATCH and (8, 0) <= capability < (10, 0):
            return "bits"
        if batch <= INT8_BATCH:
            return "int8"
    most = 128 if itemsize == 4 or planes > 1 else 4096
    return "dot" if batch <= most else "dense"


def power_of_two(number: int, low: int, high: int) -> int:
    """Return the least power of two that is at least `number`, within [low, high]."""
    return min(high, max(low, 1 << max(0, number - 1).bit_length()))


def bits_tiles(planes: int, rows: int, words: int, residual_words: int, processors: int) -> BitsTiles:
    """Choose tiles of the kernel on bits for `planes` planes of `rows` rows of `words` 32-bit words, and a residual plane."""
    pieces = planes * math.ceil(words / 16) + math.ceil(residual_words / 16)
    split = power_of_two(math.ceil(pieces / PIECES_PER_WARP), 1, 16)
    return BitsTiles(split, split, 1)


def int8_tiles(planes: int, rows: int, words: int, residual_words: int, processors: int) -> Int8Tiles:
    """Choose tiles of the int8 kernel for `planes` planes of `rows` rows of `words` 32-bit words, and a residual plane."""
    tile = 4
    steps = min(8, max(1, round(rows / (tile * PROGRAMS_PER_PROCESSOR * processors))))
    return Int8Tiles(tile, power_of_two(words, 16, 128), power_of_two(residual_words, 16, 64), steps)


def dot_tiles(rows: int, words: int, batch: int, processors: int, itemsize: int) -> DotTiles:
    """Choose tiles of the tensor-core kernel; few rows are shared among several programs to fill the processors.

    Args:
        itemsize: bytes of an activation; float32 is not for tensor cores, and its tiles have to be smaller.
    """
    if itemsize == 4:
        tile = DotTiles(64, 1, power_of_two(batch, 16, 32), splits=1, warps=4, stages=3)
    elif batch <= 16:
        tile = DotTiles(64, 8, 16, splits=1, warps=4, stages=4)
    elif batch <= 64:
        tile = DotTiles(64, 4, power_of_two(batch, 16, 64), splits=1, warps=4, stages=4)
    elif batch <= 512:
        tile = DotTiles(128, 4, 128, splits=1, warps=4, stages=3)
    else:
        tile = DotTiles(128, 2, 256, splits=1, warps=8, stages=3)
    programs = math.ceil(rows / tile.rows) * math.ceil(batch / tile.batch)
    most = math.ceil(words / tile.words)
    return tile._replace(splits=power_of_two(2 * processors // programs, 1, power_of_two(most, 1, 8)))
