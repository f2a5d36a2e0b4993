"""`sab::linear` by Triton kernels: plans their launches. Tensors may lie on any device that Triton or its interpreter runs on.

The kernels read the canonical planes in place, as 32-bit words; what is derived from them (`layouts.py`) is a padded copy
where the rows are not whole words, and two small index tables of the significant columns.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..packing import unpack_bits
from . import cuda_tiles, layouts
from .triton_dot import dot_kernel
from .triton_int8 import int8_kernel
from .triton_prepare import quantize_kernel, scale_kernel
from .triton_unpack import unpack_kernel

DENSE_BYTES = 512 * 2**20
"""Most bytes of unpacked weights at a time, in whole tiles of the library's product:"""
DENSE_ROWS = 128
INTERPRETED = triton.knobs.runtime.interpret


class Planes(NamedTuple):
    """The op's tensors and what is derived from them.

    words: [K, n, ≥⌈m/32⌉] int32, the planes. residual_words: [n, ≥⌈k/32⌉] int32; columns: [k] int32, the significant
    columns; rank: [m] int32, a column's place among them or -1. Without a residual plane those are None.
    """

    signs: Tensor
    row_scale: Tensor
    col_scale: Tensor
    residual_signs: Tensor | None
    residual_row_scale: Tensor | None
    residual_col_scale: Tensor | None
    words: Tensor
    residual_words: Tensor | None
    columns: Tensor | None
    rank: Tensor | None

    @property
    def num_planes(self) -> int:
        return self.row_scale.shape[0]

    @property
    def rows(self) -> int:
        return self.row_scale.shape[1]

    @property
    def in_features(self) -> int:
        return self.col_scale.shape[1]

    @property
    def num_significant(self) -> int:
        return 0 if self.residual_col_scale is None else self.residual_col_scale.numel()

    @property
    def num_words(self) -> int:
        return -(-self.in_features // 32)

    @property
    def num_residual_words(self) -> int:
        return -(-self.num_significant // 32)


def planes(
    signs: Tensor, row_scale: Tensor, col_scale: Tensor, significant_columns: Tensor | None, residual_signs: Tensor | None,
    residual_row_scale: Tensor | None, residual_col_scale: Tensor | None,
) -> Planes:  # fmt: skip
    """Collect the op's tensors; derive what the kernels need at the first call."""
    words, residual_words, columns, rank = _words(signs), None, None, None
    if significant_columns is not None:
        residual_words = _words(residual_signs)
        count, length = residual_col_scale.numel(), col_scale.shape[1]

        def index() -> tuple[Tensor, Tensor]:
            mask = unpack_bits(significant_columns, length)
            columns = torch.nonzero_static(mask, size=count).squeeze(1).int()
            rank = torch.where(mask, mask.cumsum(0).int() - 1, -1).int()
            return columns, rank

        columns, rank = _derived(f"columns {length} {count}", significant_columns, index)
    return Planes(
        signs.contiguous(), row_scale.contiguous(), col_scale.contiguous(), residual_signs, residual_row_scale,
        residual_col_scale, words, residual_words, columns, rank,
    )  # fmt: skip


def _words(packed: Tensor) -> Tensor:
    """Return rows of bytes as rows of 32-bit words: a view where that can be, else a copy padded to 16 bytes."""
    if packed.is_contiguous() and packed.shape[-1] % 4 == 0 and packed.storage_offset() % 4 == 0:
        return packed.view(torch.int32)
    pad = -packed.shape[-1] % 16
    return _derived("words", packed, lambda: torch.nn.functional.pad(packed, (0, pad)).contiguous().view(torch.int32))


def _derived(name, source, make):
    """Return a cached layout.

    It is made in a thread of its own, on the default stream, and waited for: in this thread, allocations may be going to
    the memory pool of a CUDA graph, which forgets them. While this very stream is being captured nothing is kept.
    """
    if not source.is_cuda:
        return layouts.cached(name, source, make)
    if torch.cuda.is_current_stream_capturing():
        return layouts.cached(name, source, make, keep=False)

    def apart():
        torch.cuda.current_stream(source.device).synchronize()
        result = []

        def work():
            with torch.cuda.device(source.device), torch.no_grad():
                result.append(make())
                torch.cuda.current_stream().synchronize()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return result[0]

    return layouts.cached(name, source, apart)


def linear(x: Tensor, planes: Planes, exact: bool) -> Tensor:
    """Return x Wᵀ for x [batch ≥ 1, m] float16, bfloat16 or float32, by the kernel that suits the batch."""
    if not exact and x.shape[0] <= cuda_tiles.INT8_BATCH:
        return int8_product(x, planes)
    if x.shape[0] <= cuda_tiles.DOT_BATCH:
        return dot_product(x, planes)
    return dense_product(x, planes)


def int8_product(x: Tensor, planes: Planes, tiles: cuda_tiles.Int8Tiles | None = None) -> Tensor:
    """Multiply with activations rounded to int8, a scale for each 32 columns; see `triton_int8.py`."""
    batch, (stride, num_words, residual) = x.shape[0], _word_sizes(planes)
    tiles = tiles or cuda_tiles.int8_tiles(planes.num_planes, planes.rows, num_words, residual, _processors(x))
    total, padded = planes.num_planes + (residual > 0), _padded(planes)
    work = x.new_empty(10, total * batch * padded, dtype=torch.int32)
    q, start, scale = work[:8], work[8], work[9].view(torch.float32)
    _launch(
        quantize_kernel, (triton.cdiv(padded, 16), total, batch), *_activation_arguments(x, planes), q, start, scale,
        planes.in_features, planes.num_significant, padded, PLANES=planes.num_planes, WORDS=16, PDL=_pdl(x), num_warps=4,
    )  # fmt: skip
    y = x.new_empty(batch, planes.rows)
    _launch(
        int8_kernel, (triton.cdiv(planes.rows, tiles.rows * tiles.steps),), q, start, scale, *_weight_arguments(planes), y,
        batch, planes.rows, padded, tiles.steps, PLANES=planes.num_planes, NUM_WORDS=num_words, STRIDE=stride,
        RESIDUAL_WORDS=residual, RESIDUAL_STRIDE=planes.residual_words.shape[-1] if residual else 0,
        ROWS=tiles.rows, WORDS=tiles.words, RESIDUAL_TILE=tiles.residual_words, PDL=_pdl(x), num_warps=1,
    )  # fmt: skip
    return y


def dot_product(x: Tensor, planes: Planes, tiles: cuda_tiles.DotTiles | None = None) -> Tensor:
    """Multiply in the dtype of x, the scaled activations rounded to it once; see `triton_dot.py`."""
    batch, (stride, num_words, residual) = x.shape[0], _word_sizes(planes)
    tiles = tiles or cuda_tiles.dot_tiles(planes.rows, num_words, batch, _processors(x), x.element_size())
    total, padded = planes.num_planes + (residual > 0), _padded(planes)
    grid = (triton.cdiv(planes.rows, tiles.rows), triton.cdiv(batch, tiles.batch), tiles.splits)
    u = x.new_empty(total, 32, batch, padded)
    counters = x.new_empty(grid[0] * grid[1], dtype=torch.int32)
    _launch(
        scale_kernel, (triton.cdiv(padded, 16), total, batch), *_activation_arguments(x, planes), u, counters,
        planes.in_features, planes.num_significant, padded, counters.numel() if tiles.splits > 1 else 0,
        PLANES=planes.num_planes, WORDS=16, PDL=_pdl(x), num_warps=4,
    )  # fmt: skip
    y = x.new_empty(batch, planes.rows)
    partial = x.new_empty((tiles.splits, batch, planes.rows) if tiles.splits > 1 else 1, dtype=torch.float32)
    _launch(
        dot_kernel, grid, u, *_weight_arguments(planes), y, partial, counters, batch, planes.rows, padded,
        PLANES=planes.num_planes, NUM_WORDS=num_words, STRIDE=stride, RESIDUAL_WORDS=residual,
        RESIDUAL_STRIDE=planes.residual_words.shape[-1] if residual else 0, ROWS=tiles.rows, WORDS=tiles.words,
        BATCH=tiles.batch, SPLITS=tiles.splits, BITS=tiles.bits, PDL=_pdl(x),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return y


def dense_product(x: Tensor, planes: Planes) -> Tensor:
    """Unpack the weights in the dtype of x, at most `DENSE_BYTES` at a time, and multiply with the library."""
    chunks = -(-planes.rows * planes.in_features * x.element_size() // DENSE_BYTES)
    size = -(-planes.rows // chunks // DENSE_ROWS) * DENSE_ROWS
    if size >= planes.rows:
        return x @ unpack(planes, x.dtype, 0, planes.rows).T
    y = x.new_empty(x.shape[0], planes.rows)
    for start in range(0, planes.rows, size):
        end = min(start + size, planes.rows)
        y[:, start:end] = x @ unpack(planes, x.dtype, start, end).T
    return y


def unpack(planes: Planes, dtype: torch.dtype, start: int, end: int) -> Tensor:
    """Return rows start to end - 1 of the dense matrix, [end - start, m]."""
    W = planes.row_scale.new_empty(end - start, planes.in_features, dtype=dtype)
    residual = planes.num_significant > 0
    unused = planes.signs
    _launch(
        unpack_kernel, (triton.cdiv(end - start, 8), triton.cdiv(planes.signs.shape[-1], 64)),
        planes.signs, planes.row_scale, planes.col_scale, planes.rank if residual else unused,
        planes.residual_signs if residual else unused, planes.residual_row_scale if residual else unused,
        planes.residual_col_scale if residual else unused, W, start, end - start, planes.rows, planes.in_features,
        planes.signs.shape[-1], planes.residual_signs.shape[-1] if residual else 0,
        PLANES=planes.num_planes, RESIDUAL=residual, ROWS=8, BYTES=64, num_warps=4,
    )  # fmt: skip
    return W


def _word_sizes(planes: Planes) -> tuple[int, int, int]:
    """Return words from row to row, words of a row, and words of a row of the residual plane."""
    return planes.words.shape[-1], planes.num_words, planes.num_residual_words


def _padded(planes: Planes) -> int:
    return -(-max(planes.num_words, planes.num_residual_words) // 16) * 16


def _activation_arguments(x: Tensor, planes: Planes) -> tuple:
    residual = planes.num_significant > 0
    return (
        x, x.stride(0), x.stride(1), planes.col_scale, planes.columns if residual else planes.words,
        planes.residual_col_scale if residual else planes.col_scale,
    )  # fmt: skip


def _weight_arguments(planes: Planes) -> tuple[Tensor, ...]:
    if planes.num_significant:
        return planes.words, planes.row_scale, planes.residual_words, planes.residual_row_scale
    return planes.words, planes.row_scale, planes.words, planes.row_scale


def _launch(kernel, grid, *args, **options) -> None:
    """Launch `kernel`, next to the one before it (programmatic dependent launch) where it waits for it itself."""
    if options.get("PDL"):
        options["launch_pdl"] = True
    kernel[grid](*args, **options)


def _pdl(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
