"""Which kernel and which tiles, by device and shape: rules that follow measurements. Nothing is tuned at run time."""

from __future__ import annotations

import math
from typing import NamedTuple


class SingleTiles(NamedTuple):
    """Tiles of the kernel of a single launch: rows, words, of these for the residual plane; warps, programs."""

    rows: int
    words: int
    residual: int
    warps: int
    programs: int


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


class FragmentsTiles(NamedTuple):
    """Tiles of the kernel on fragments: 16 rows each of a warp, 8 inputs each of a program; warps, warps that share rows."""

    tiles: int
    groups: int
    warps: int
    split: int


class FusedTiles(NamedTuple):
    """Tiles of the kernel of one product: rows, words, inputs; warps, stages; programs of a processor, and whether they share
    tiles to have equal work."""

    rows: int
    words: int
    batch: int
    warps: int
    stages: int
    programs: int
    shared: bool


class DenseTiles(NamedTuple):
    """Most MiB of weights that are unpacked at a time for the library's product."""

    mebibytes: int


# Rules for compute capability 9.x follow `python benchmarks/speed_gpu_sweep.py` on one H200, 2026-11-30
# (`benchmarks/results/speed_gpu_sweep_h200.json`). They were chosen on its 195 cells, of a matrix, a scheme and a number of
# inputs each: in 185 their choice is within 5 % of the fastest candidate, and 9 % slower at most.
SINGLE_WORDS, SINGLE_PLANES, SINGLE_ROWS = 128, 2, 4096
"""Words of a row (the residual plane's included), planes and rows up to which a single launch is the fastest for one input."""
SMALL, LARGE = 2**17, 2**20
"""Words of a plane: below the one, unpacking pays early; from the other on there is work for all processors."""
FEW_ROWS, MANY_ROWS = 1024, 16384
"""Rows below which programs have to share tiles for a few inputs; rows from which they need not."""

# Measured on one H100, 2026-11-25 (`benchmarks/results/speed_gpu_sweeps.json`), and used where compute capability is not 9.x:
BITS_BATCH, WIDE_BITS_BATCH, WIDE = 4, 8, 256
"""Inputs up to which the kernel on bits is the fastest; the same for rows of more than WIDE words."""
INT8_BATCH = 4
"""Inputs up to which the int8 kernel is used where tensor cores do not multiply bits."""
PROGRAMS_PER_PROCESSOR = 20
PIECES_PER_WARP = 8
"""Pieces of 16 words that a warp of the kernel on bits holds at a time, for lack of registers."""
BITS_TILES = {(132, 1, 18944, 112, False): BitsTiles(4, 4, 1)}
"""(processors, planes, rows, words, has a residual plane) → tiles of the kernel on bits, where the rule is not the best."""


def kernel(
    batch: int, planes: int, rows: int, words: int, residual_words: int, itemsize: int, exact: bool, capability: tuple[int, int]
) -> str:  # fmt: skip
    """Return which kernel multiplies: one of `launch.PRODUCTS`.

    Args:
        words, residual_words: 32-bit words of a row of a plane and of the residual plane.
        itemsize: bytes of an activation.
        capability: compute capability of the device; tensor cores multiply bits on 8.x and 9.x.
    """
    hopper = capability[0] == 9 and itemsize == 2
    if not exact:
        fits = planes <= SINGLE_PLANES and _single_words(words, residual_words) <= SINGLE_WORDS
        if batch == 1 and fits and rows <= SINGLE_ROWS:
            return "single"
        if (8, 0) <= capability < (10, 0):
            if batch <= (_hopper_bits_batch(rows, words, residual_words) if hopper else _bits_batch(words)):
                return "bits"
        elif batch <= INT8_BATCH:
            return "int8"
    if hopper:
        least, most = _hopper_dot_batches(planes, rows, residual_words)
        if least <= batch <= most:
            return "dot"
        if batch <= _fragments_batch(rows, residual_words):
            return "fragments"
        return "fused" if batch <= _fused_batch(planes, rows, words, residual_words) else "dense"
    most = 128 if itemsize == 4 else _dot_batch(planes, rows, residual_words)
    return "dot" if batch <= most else "dense"


def _bits_batch(words: int) -> int:
    return WIDE_BITS_BATCH if words > WIDE else BITS_BATCH


def _hopper_bits_batch(rows: int, words: int, residual_words: int) -> int:
    """Return the inputs up to which the kernel on bits is the fastest; the residual plane takes pieces of its own."""
    return 2 if residual_words and rows * words < LARGE else 4


def _hopper_dot_batches(planes: int, rows: int, residual_words: int) -> tuple[int, int]:
    """Return from which to which number of inputs a product for each plane is the fastest; none where the first is larger.

    More than 128 inputs were not measured with a residual plane, nor more than 2,048 without.
    """
    if planes > 1 or rows < MANY_ROWS:
        return 1, 0
    if residual_words:
        return 9, 128
    return 9 if rows >= 2 * MANY_ROWS else 65, 2048


def _fragments_batch(rows: int, residual_words: int) -> int:
    """Return the inputs up to which the kernel on fragments is the fastest; it need not expand a residual plane."""
    if rows < FEW_ROWS:
        return 8 if residual_words else 0
    return 16 if residual_words or rows >= MANY_ROWS else 8


def _fused_batch(planes: int, rows: int, words: int, residual_words: int) -> int:
    """Return the inputs up to which making weights in registers beats unpacking them to memory."""
    if rows * words < SMALL:
        return 64
    if rows * words < LARGE:
        return 256 if residual_words else 128
    return 512 if planes == 1 else 256


def joins(batch: int, planes: int, rows: int, words: int, residual_words: int) -> bool:
    """Tell whether `fused.py` multiplies matrices of one input sooner in one launch for all than one by one, on 9.x.

    Measured with one plane and a residual one of a tenth of the columns, on an H200, 2026-11-30
    (`benchmarks/results/speed_gpu_served.json`): 4,608 rows of 3,584 gain from 16 to 256 inputs, 37,888 rows at 128 and 256.

    Args:
        rows: of all matrices together.
        residual_words: the least of a row of them; 0 where one has no residual plane.
    """
    least = 128 if rows >= MANY_ROWS else 16
    return (
        planes == 1
        and residual_words > 0
        and least <= batch <= min(256, _fused_batch(planes, rows, words, residual_words))
    )


def shares(tiles: int, steps: int, programs: int, shared: bool) -> tuple[int, int]:
    """Return how many programs `fused.py` has, at most `programs`, and how many whole tiles each makes; the rest is shared.

    Args:
        tiles: tiles of the result, of `steps` steps each.
        shared: whether tiles may be shared. At least one tile a program is left for that, so that parts are not short.
    """
    if not shared or tiles % programs == 0:
        programs = min(programs, tiles)
        return programs, -(-tiles // programs)
    programs = min(programs, tiles * steps)
    return programs, max(0, tiles // programs - 1)


def _dot_batch(planes: int, rows: int, residual_words: int) -> int:
    """Return the inputs up to which products of packed planes beat unpacking: each plane costs a product of its own."""
    if planes > 1:
        return 128
    if rows < MANY_ROWS:
        return 256
    return 512 if residual_words else 4096


def _single_words(words: int, residual_words: int) -> int:
    """Return the words of a row of the kernel of a single launch: powers of two, the residual plane's at the end."""
    return power_of_two(words + (power_of_two(residual_words, 1, 1 << 20) if residual_words else 0), 16, 1 << 20)


def power_of_two(number: int, low: int, high: int) -> int:
    """Return the least power of two that is at least `number`, within [low, high]."""
    return min(high, max(low, 1 << max(0, number - 1).bit_length()))


def single_tiles(rows: int, words: int, residual_words: int, processors: int) -> SingleTiles:
    """Choose tiles of the kernel of a single launch."""
    lanes = _single_words(words, residual_words)
    residual = power_of_two(residual_words, 1, lanes) if residual_words else 0
    return SingleTiles(16 if rows <= 2048 else 32, lanes, residual, 8, 2 * processors)


def bits_tiles(planes: int, rows: int, words: int, residual_words: int, processors: int) -> BitsTiles:
    """Choose tiles of the kernel on bits for `planes` planes of `rows` rows of `words` 32-bit words, and a residual plane."""
    measured = BITS_TILES.get((processors, planes, rows, words, residual_words > 0))
    if measured is not None:
        return measured
    pieces = planes * math.ceil(words / 16) + math.ceil(residual_words / 16)
    if pieces <= PIECES_PER_WARP and math.ceil(rows / 16) >= 4 * processors:
        return BitsTiles(1, 1, 1)
    split = max(power_of_two(pieces, 1, 8), power_of_two(math.ceil(pieces / PIECES_PER_WARP / 2), 1, 16))
    return BitsTiles(split, split, 1)


def int8_tiles(planes: int, rows: int, words: int, residual_words: int, processors: int) -> Int8Tiles:
    """Choose tiles of the int8 kernel for `planes` planes of `rows` rows of `words` 32-bit words, and a residual plane."""
    tile = 4
    steps = min(8, max(1, round(rows / (tile * PROGRAMS_PER_PROCESSOR * processors))))
    return Int8Tiles(tile, power_of_two(words, 16, 128), power_of_two(residual_words, 16, 64), steps)


def dot_tiles(rows: int, words: int, sums: int, batch: int, processors: int, itemsize: int) -> DotTiles:
    """Choose tiles of the tensor-core kernel; few rows are shared among several programs to fill the processors.

    Args:
        sums: full planes and the residual one; several need registers for two sums.
        itemsize: bytes of an activation; float32 is not for tensor cores, and its tiles have to be smaller.
    """
    if itemsize == 4:
        tile = DotTiles(64, 1, power_of_two(batch, 16, 32), splits=1, warps=4, stages=3)
    elif batch <= 16:
        tile = DotTiles(64, 8, 16, splits=1, warps=4, stages=4)
    elif batch <= 32:
        tile = DotTiles(64, 8, 32, splits=1, warps=4, stages=3)
    elif batch <= 64:
        tile = DotTiles(64, 4, 64, splits=1, warps=4, stages=3)
    elif batch <= 512 or sums > 1:
        tile = DotTiles(64, 4, 128, splits=1, warps=4, stages=3)
    else:
        tile = DotTiles(128, 2, 256, splits=1, warps=8, stages=3)
    programs = math.ceil(rows / tile.rows) * math.ceil(batch / tile.batch)
    most = math.ceil(words / tile.words)
    return tile._replace(splits=power_of_two(2 * processors // programs, 1, power_of_two(most, 1, 8)))


def fragments_tiles(
    planes: int, rows: int, words: int, residual_words: int, processors: int, batch: int
) -> FragmentsTiles:  # fmt: skip
    """Choose tiles of the kernel on fragments: warps share rows until there are enough of them, each with a piece at least."""
    pieces = planes * math.ceil(words / 16) + math.ceil(residual_words / 16)
    few = rows < 32 * processors and (batch <= 8 or words <= WIDE)
    if words > WIDE and rows < 64 * processors:
        most = 16
    elif residual_words and few and batch <= 8:
        most = 4
    else:
        most = 8 if rows < (256 if batch <= 8 else 64) * processors else 4
    split = power_of_two(pieces, 1, most)
    return FragmentsTiles(1 if few else 2, power_of_two(math.ceil(batch / 8), 1, 4), max(4, split), split)


def fused_tiles(
    planes: int, rows: int, words: int, residual_words: int, processors: int, batch: int
) -> FusedTiles:  # fmt: skip
    """Choose tiles of the kernel of one product: high ones, since they need the fewest loads of activations."""
    large = rows * words >= LARGE
    if batch <= 16:
        return FusedTiles(64, 8, 16, warps=4, stages=4, programs=2, shared=True)
    if batch <= 32:
        tile = FusedTiles(128, 4, 32, warps=4, stages=4, programs=2, shared=True)
        return tile if large else tile._replace(rows=64, words=8)
    if batch <= 64:
        tile = FusedTiles(128, 4, 64, warps=4, stages=4, programs=2 if large else 1, shared=True)
        return tile if rows >= FEW_ROWS else tile._replace(rows=64)
    if batch <= 128:
        return FusedTiles(64, 4, 128, warps=4, stages=3, programs=2 if large else 1, shared=True)
    if not large:
        return FusedTiles(64, 2, 256, warps=4, stages=3, programs=1, shared=True)
    return FusedTiles(128, 2, 256, warps=8, stages=4, programs=1, shared=True)
