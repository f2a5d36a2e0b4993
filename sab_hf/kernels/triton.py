"""`sab::linear` by Triton kernels: plans their launches. Tensors may lie on any device that Triton or its interpreter runs on."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.language.extra import cuda

from . import cuda_tiles
from .triton_bits import bits_kernel
from .triton_dot import dot_kernel
from .triton_int8 import int8_kernel
from .triton_planes import Planes
from .triton_prepare import cut_kernel, quantize_kernel, scale_kernel
from .triton_single import single_kernel
from .triton_unpack import unpack_kernel

DENSE_BYTES = 512 * 2**20
"""Most bytes of unpacked weights at a time, in whole tiles of the library's product:"""
DENSE_ROWS = 128


def linear(x: Tensor, planes: Planes, exact: bool) -> Tensor:
    """Return x Wᵀ for x [batch ≥ 1, m] float16, bfloat16 or float32, by the kernel that suits the batch and the device."""
    sizes = x.shape[0], planes.num_planes, planes.rows, planes.num_words, planes.num_residual_words
    name = cuda_tiles.kernel(*sizes, x.element_size(), exact, _capability(x))
    products = {
        "single": single_product, "bits": bits_product, "int8": int8_product, "dot": dot_product, "dense": dense_product
    }  # fmt: skip
    return products[name](x, planes)


def single_product(x: Tensor, planes: Planes, tiles: cuda_tiles.SingleTiles | None = None) -> Tensor:
    """Multiply one input, x [1, m], rounded to int8 with a scale for each 32 columns; see `triton_single.py`."""
    _, (stride, num_words, residual) = x.shape, _word_sizes(planes)
    tiles = tiles or cuda_tiles.single_tiles(planes.rows, num_words, residual, _processors(x))
    programs = min(tiles.programs, triton.cdiv(planes.rows, tiles.rows))
    y = x.new_empty(1, planes.rows)
    x_, _, stride_column, *activation_arguments = _activation_arguments(x, planes)
    _launch(
        single_kernel, (programs,), x_, stride_column, *activation_arguments, *_weight_arguments(planes), y,
        planes.in_features, planes.num_significant, planes.rows, triton.cdiv(planes.rows, tiles.rows * programs),
        PLANES=planes.num_planes, NUM_WORDS=num_words, STRIDE=stride, RESIDUAL_WORDS=residual,
        RESIDUAL_STRIDE=planes.residual_words.shape[-1] if residual else 0, ROWS=tiles.rows, WORDS=tiles.words,
        RESIDUAL=tiles.residual, PDL=_pdl(x), num_warps=tiles.warps,
    )  # fmt: skip
    return y


def bits_product(x: Tensor, planes: Planes, tiles: cuda_tiles.BitsTiles | None = None) -> Tensor:
    """Multiply with activations rounded to 16 bits, a scale for each 512 columns; see `triton_bits.py`."""
    batch, (stride, num_words, residual) = x.shape[0], _word_sizes(planes)
    tiles = tiles or cuda_tiles.bits_tiles(planes.num_planes, planes.rows, num_words, residual, _processors(x))
    total, pieces = planes.num_planes + (residual > 0), triton.cdiv(max(num_words, residual), 16)
    count = -(-total * batch * pieces // 4) * 4  # whole 16 bytes
    bits, scale, sums = x.new_empty(count * 258, dtype=torch.int32).split([count * 256, count, count])
    scale = scale.view(torch.float32)
    _launch(
        cut_kernel, (pieces, total, batch), *_activation_arguments(x, planes), bits, scale, sums,
        planes.in_features, planes.num_significant, pieces, PLANES=planes.num_planes, PDL=_pdl(x), num_warps=16,
    )  # fmt: skip
    y = x.new_empty(batch, planes.rows)
    height = 16 * (tiles.warps // tiles.split)
    _launch(
        bits_kernel, (triton.cdiv(planes.rows, height * tiles.steps),), bits, scale, sums, *_weight_arguments(planes), y,
        batch, planes.rows, pieces, tiles.steps, PLANES=planes.num_planes, NUM_WORDS=num_words, STRIDE=stride,
        RESIDUAL_WORDS=residual, RESIDUAL_STRIDE=planes.residual_words.shape[-1] if residual else 0,
        INPUTS=cuda_tiles.power_of_two(batch, 1, 4), WARPS=tiles.warps, SPLIT=tiles.split, PDL=_pdl(x), num_warps=tiles.warps,
    )  # fmt: skip
    return y


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
    total, padded = planes.num_planes + (residual > 0), _padded(planes)
    tiles = tiles or cuda_tiles.dot_tiles(planes.rows, num_words, total, batch, _processors(x), x.element_size())
    grid = (triton.cdiv(planes.rows, tiles.rows), triton.cdiv(batch, tiles.batch), tiles.splits)
    u = x.new_empty(total, batch, padded, 32)
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
        BATCH=tiles.batch, SPLITS=tiles.splits, PDL=_pdl(x),
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
        unpack_kernel, (triton.cdiv(planes.signs.shape[-1], 64), triton.cdiv(end - start, 8)),
        planes.signs, planes.row_scale, planes.col_scale, planes.rank if residual else unused,
        planes.residual_signs if residual else unused, planes.residual_row_scale if residual else unused,
        planes.residual_col_scale if residual else unused, W, start, end - start, planes.rows, planes.in_features,
        planes.signs.shape[-1], planes.residual_signs.shape[-1] if residual else 0,
        PLANES=planes.num_planes, RESIDUAL=residual, ROWS=8, BYTES=64, STEPS=1, num_warps=4,
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
    return x.is_cuda and _capability(x) >= (9, 0) and hasattr(cuda, "gdc_wait")  # Triton 3.4 lacks it


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
