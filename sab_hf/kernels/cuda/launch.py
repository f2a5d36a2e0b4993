"""`sab::linear` by Triton kernels: plans their launches. Tensors may lie on any device that Triton or its interpreter runs on."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.language.extra import cuda

from ..decoding import NORMS, Around, plain
from . import tiles as cuda_tiles
from .bits import bits_kernel
from .dot import dot_kernel
from .fragments import fragments_kernel
from .fused import add_kernel, expand_kernel, fused_kernel
from .int8 import int8_kernel
from .joined import joined_bits_kernel, joined_cut_kernel, joined_single_kernel
from .planes import Planes, expansion, negated_scales, spread_scales
from .prepare import arrange_kernel, cut_kernel, quantize_kernel, scale_kernel
from .single import single_kernel
from .unpack import unpack_kernel

# Triton 3.4 has a `gdc_wait`, which its own compiler cannot call.
_CAN_WAIT = hasattr(cuda, "gdc_wait") and "_semantic" in inspect.signature(cuda.gdc_wait).parameters
DENSE_BYTES = 512 * 2**20
"""Most bytes of unpacked weights at a time, in whole tiles of the library's product:"""
DENSE_ROWS = 128


def linear(x: Tensor, planes: Planes, exact: bool) -> Tensor:
    """Return x Wᵀ for x [batch ≥ 1, m] float16, bfloat16 or float32, by the kernel that suits the batch and the device."""
    return PRODUCTS[_kernel(x, planes, exact)](x, planes)


def linears(x: Tensor, matrices: Sequence[Planes], exact: bool, around: Around | None = None) -> list[Tensor]:
    """Return the results of `linear` for several matrices, which share launches where `joined.py` or `fused.py` can.

    Args:
        around: what stands before and after the products, which these kernels do too.
    """
    if len(matrices) == 1 and around is None:
        return [linear(x, matrices[0], exact)]
    results: dict[int, Tensor] = {}
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, planes in enumerate(matrices):
        name = _kernel(x, planes, exact)
        if name == "single":
            groups[joined_single_products, _single_tiles(x, planes).warps].append(i)
        elif name == "bits":
            groups[joined_bits_products, _bits_tiles(x, planes).warps].append(i)
    for (products, _), members in groups.items():
        if len(members) > 1 or around is not None:
            some = None if around is None else around.of(members)
            results |= zip(members, products(x, [matrices[i] for i in members], some), strict=True)
    left = [i for i in range(len(matrices)) if i not in results]
    if left:
        given, others = x if around is None else around.before(x), [matrices[i] for i in left]
        products = fused_products(given, others) if _joins(x, others) else [linear(given, one, exact) for one in others]
        results |= zip(left, products if around is None else around.of(left).after(products), strict=True)
    return [results[i] for i in range(len(matrices))]


def _joins(x: Tensor, matrices: Sequence[Planes]) -> bool:
    """Tell whether one launch of `fused.py` multiplies an input by these matrices, and does it sooner than one by one."""
    forms = {(planes.num_planes, planes.num_words, planes.words.shape[-1]) for planes in matrices}
    if len(matrices) < 2 or len(forms) > 1 or x.element_size() != 2 or _capability(x)[0] != 9:
        return False
    rows, residual = sum(planes.rows for planes in matrices), min(planes.num_residual_words for planes in matrices)
    return cuda_tiles.joins(x.shape[0], matrices[0].num_planes, rows, matrices[0].num_words, residual)


def folds(x: Tensor, matrices: Sequence[Planes], exact: bool) -> bool:
    """Tell whether the kernels of all the matrices do what stands around products; tensors may be fake ones."""
    return all(_kernel(x, planes, exact) in ("single", "bits") for planes in matrices)


def _kernel(x: Tensor, planes: Planes, exact: bool) -> str:
    """Return which kernel multiplies, one of `PRODUCTS`."""
    sizes = x.shape[0], planes.num_planes, planes.rows, planes.num_words, planes.num_residual_words
    return cuda_tiles.kernel(*sizes, x.element_size(), exact, _capability(x))


def single_product(x: Tensor, planes: Planes, tiles: cuda_tiles.SingleTiles | None = None) -> Tensor:
    """Multiply one input, x [1, m], rounded to int8 with a scale for each 32 columns; see `single.py`."""
    tiles = tiles or _single_tiles(x, planes)
    programs, steps = _single_programs(planes, tiles)
    y = x.new_empty(1, planes.rows)
    x_, _, stride_column, *activation_arguments = _activation_arguments(x, planes)
    _launch(
        single_kernel, (programs,), x_, stride_column, *activation_arguments, *_weight_arguments(planes), y,
        planes.in_features, planes.num_significant, planes.rows, steps, **_weight_sizes(planes),
        ROWS=tiles.rows, WORDS=tiles.words, RESIDUAL=tiles.residual, PDL=_pdl(x), num_warps=tiles.warps,
    )  # fmt: skip
    return y


def joined_single_products(x: Tensor, matrices: Sequence[Planes], around: Around | None = None) -> list[Tensor]:
    """Return what `single_product` does for each matrix, in one launch; their tiles must have the same number of warps."""
    around = around or plain(len(matrices))
    results = [x.new_empty(1, planes.rows) for planes in matrices]
    classes = defaultdict(list)
    for i, (planes, y) in enumerate(zip(matrices, results, strict=True)):
        tiles = _single_tiles(x, planes)
        programs, steps = _single_programs(planes, tiles)
        sizes = (programs, planes.rows, steps, *_weight_sizes(planes).values(), tiles.rows, tiles.words, tiles.residual)
        added, has = _added(around, i, y)
        scales = _activation_arguments(x, planes)[3:]
        classes[sizes + has].append((*scales, *_weight_arguments(planes), y, *added, planes.num_significant))
    other, _, other_stride = _other(x, around)
    _launch(
        joined_single_kernel, (_programs(classes),), x, x.stride(1), other, other_stride, matrices[0].in_features,
        tuple(map(tuple, classes.values())), SIZES=tuple(classes), **_forms(around), PDL=_pdl(x),
        num_warps=tiles.warps,
    )  # fmt: skip
    return results


def bits_product(x: Tensor, planes: Planes, tiles: cuda_tiles.BitsTiles | None = None) -> Tensor:
    """Multiply with activations rounded to 16 bits, a scale for each 512 columns; see `bits.py`."""
    batch, tiles = x.shape[0], tiles or _bits_tiles(x, planes)
    total, pieces = _total(planes), _pieces(planes)
    cut = _cut_activations(x, total * pieces)
    _launch(
        cut_kernel, (pieces, total, batch), *_activation_arguments(x, planes), *cut,
        planes.in_features, planes.num_significant, pieces, PLANES=planes.num_planes, PDL=_pdl(x), num_warps=16,
    )  # fmt: skip
    y = x.new_empty(batch, planes.rows)
    _launch(
        bits_kernel, (_bits_programs(planes, tiles),), *cut, *_weight_arguments(planes), y,
        batch, planes.rows, pieces, tiles.steps, **_weight_sizes(planes), INPUTS=_inputs(x), WARPS=tiles.warps,
        SPLIT=tiles.split, PDL=_pdl(x), num_warps=tiles.warps,
    )  # fmt: skip
    return y


def joined_bits_products(x: Tensor, matrices: Sequence[Planes], around: Around | None = None) -> list[Tensor]:
    """Return what `bits_product` does for each matrix, in two launches; their tiles must have the same number of warps."""
    around = around or plain(len(matrices))
    batch, pieces, totals = x.shape[0], _pieces(matrices[0]), tuple(map(_total, matrices))
    results = [x.new_empty(batch, planes.rows) for planes in matrices]
    cut = _cut_activations(x, sum(totals) * pieces)
    to_cut, classes = [], defaultdict(list)
    for i, (planes, y) in enumerate(zip(matrices, results, strict=True)):
        tiles = _bits_tiles(x, planes)
        sizes = (_bits_programs(planes, tiles), planes.rows, tiles.steps, *_weight_sizes(planes).values(), tiles.split)
        added, has = _added(around, i, y)
        classes[sizes + has].append((*_weight_arguments(planes), y, *added, sum(totals[:i])))
        to_cut.append((*_activation_arguments(x, planes)[3:], planes.num_significant, planes.num_planes))
    _launch(
        joined_cut_kernel, (pieces, sum(totals), batch), x, *x.stride(), *_other(x, around), *cut,
        matrices[0].in_features, pieces, tuple(to_cut), PLANES=totals, **_forms(around), PDL=_pdl(x),
        num_warps=16,
    )  # fmt: skip
    _launch(
        joined_bits_kernel, (_programs(classes),), *cut, batch, pieces, tuple(map(tuple, classes.values())),
        SIZES=tuple(classes), INPUTS=_inputs(x), WARPS=tiles.warps, PDL=_pdl(x), num_warps=tiles.warps,
    )  # fmt: skip
    return results


def int8_product(x: Tensor, planes: Planes, tiles: cuda_tiles.Int8Tiles | None = None) -> Tensor:
    """Multiply with activations rounded to int8, a scale for each 32 columns; see `int8.py`."""
    batch, total, padded = x.shape[0], _total(planes), _padded(planes)
    tiles = tiles or cuda_tiles.int8_tiles(*_tile_sizes(x, planes))
    work = x.new_empty(10, total * batch * padded, dtype=torch.int32)
    q, start, scale = work[:8], work[8], work[9].view(torch.float32)
    _launch(
        quantize_kernel, (triton.cdiv(padded, 16), total, batch), *_activation_arguments(x, planes), q, start, scale,
        planes.in_features, planes.num_significant, padded, PLANES=planes.num_planes, WORDS=16, PDL=_pdl(x), num_warps=4,
    )  # fmt: skip
    y = x.new_empty(batch, planes.rows)
    _launch(
        int8_kernel, (triton.cdiv(planes.rows, tiles.rows * tiles.steps),), q, start, scale, *_weight_arguments(planes), y,
        batch, planes.rows, padded, tiles.steps, **_weight_sizes(planes), ROWS=tiles.rows,
        WORDS=tiles.words, RESIDUAL_TILE=tiles.residual_words, PDL=_pdl(x), num_warps=1,
    )  # fmt: skip
    return y


def dot_product(x: Tensor, planes: Planes, tiles: cuda_tiles.DotTiles | None = None) -> Tensor:
    """Multiply in the dtype of x, the scaled activations rounded to it once; see `dot.py`."""
    batch, total, padded = x.shape[0], _total(planes), _padded(planes)
    tiles = tiles or cuda_tiles.dot_tiles(planes.rows, planes.num_words, total, batch, _processors(x), x.element_size())
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
        **_weight_sizes(planes), ROWS=tiles.rows, WORDS=tiles.words, BATCH=tiles.batch, SPLITS=tiles.splits,
        WAIT=_waits(x), PDL=_pdl(x), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return y


def fragments_product(x: Tensor, planes: Planes, tiles: cuda_tiles.FragmentsTiles | None = None) -> Tensor:
    """Multiply in the 16-bit dtype of x, the scaled activations rounded to it once; see `fragments.py`."""
    batch, total, pieces = x.shape[0], _total(planes), _pieces(planes)
    tiles = tiles or cuda_tiles.fragments_tiles(*_tile_sizes(x, planes), batch)
    groups = triton.cdiv(batch, 8)
    all_pieces = planes.num_planes * triton.cdiv(planes.num_words, 16) + triton.cdiv(planes.num_residual_words, 16)
    u = x.new_empty(all_pieces * groups * 4096)
    _launch(
        arrange_kernel, (pieces, total, groups), *_activation_arguments(x, planes), u,
        planes.in_features, planes.num_significant, batch, PLANES=planes.num_planes, NUM_WORDS=planes.num_words,
        RESIDUAL_WORDS=planes.num_residual_words, PDL=_pdl(x), num_warps=4,
    )  # fmt: skip
    y = x.new_empty(batch, planes.rows)
    rows = 16 * tiles.tiles * (tiles.warps // tiles.split)
    _launch(
        fragments_kernel, (triton.cdiv(planes.rows, rows), triton.cdiv(groups, tiles.groups)), u.view(torch.int32),
        *_weight_arguments(planes), y, batch, planes.rows, **_weight_sizes(planes), TILES=tiles.tiles, GROUPS=tiles.groups,
        WARPS=tiles.warps, SPLIT=tiles.split, PDL=_pdl(x), num_warps=tiles.warps,
    )  # fmt: skip
    return y


def fused_product(x: Tensor, planes: Planes, tiles: cuda_tiles.FusedTiles | None = None) -> Tensor:
    """Multiply in the 16-bit dtype of x, the weights rounded to it; see `fused.py`."""
    return fused_products(x, [planes], tiles)[0]


def fused_products(x: Tensor, matrices: Sequence[Planes], tiles: cuda_tiles.FusedTiles | None = None) -> list[Tensor]:
    """Do what `fused_product` does for each matrix, in one launch; only rows and significant columns may differ in number."""
    batch, pdl, one = x.shape[0], _pdl(x), matrices[0]
    sizes, extra = _weight_sizes(one), one.num_significant > 0
    tiles = tiles or cuda_tiles.fused_tiles(
        one.num_planes,
        sum(planes.rows for planes in matrices),
        one.num_words,
        one.num_residual_words,
        _processors(x),
        batch,
    )
    arguments = []
    for planes in matrices:
        scales = negated_scales(planes, x.dtype, residual=False)
        own = more = (scales, planes.words, planes.row_scale)
        if extra:
            spread = negated_scales(planes, x.dtype, residual=True)
            more = (spread, _expanded(planes, 0, planes.rows), planes.residual_row_scale)
        arguments.append((planes.rows, x.new_empty(batch, planes.rows), *own, *more))
    row_tiles = sum(triton.cdiv(planes.rows, tiles.rows) for planes in matrices)
    count, steps = row_tiles * triton.cdiv(batch, tiles.batch), triton.cdiv(one.num_words, tiles.words)
    programs, whole = cuda_tiles.shares(count, steps, tiles.programs * _processors(x), tiles.shared)
    shared = count - min(count, whole * programs)
    partial = x.new_empty((2 * programs, tiles.rows, tiles.batch) if shared else 1, dtype=torch.float32)
    _launch(
        fused_kernel, (programs,), x, *x.stride(), tuple(arguments), partial, batch, one.in_features, whole, row_tiles, count,
        PLANES=sizes["PLANES"], EXTRA=extra, NUM_WORDS=sizes["NUM_WORDS"], STRIDE=sizes["STRIDE"],
        EXTRA_STRIDE=arguments[0][6].shape[-1], EVEN=one.in_features % (32 * tiles.words) == 0, ROWS=tiles.rows,
        WORDS=tiles.words, BATCH=tiles.batch, WAIT=_waits(x), PDL=pdl, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if shared:
        part = min(tiles.rows, 16)
        _launch(
            add_kernel, (shared, tiles.rows // part), partial, tuple(one[:2] for one in arguments), batch, whole, row_tiles,
            count, programs, steps, ROWS=tiles.rows, BATCH=tiles.batch, PART=part, PDL=pdl, num_warps=4,
        )  # fmt: skip
    return [y for _, y, *_ in arguments]


def dense_product(x: Tensor, planes: Planes, tiles: cuda_tiles.DenseTiles | None = None) -> Tensor:
    """Unpack the weights in the dtype of x, at most `DENSE_BYTES` or the tiles' at a time, and multiply with the library."""
    most = DENSE_BYTES if tiles is None else tiles.mebibytes * 2**20
    chunks = -(-planes.rows * planes.in_features * x.element_size() // most)
    size = -(-planes.rows // chunks // DENSE_ROWS) * DENSE_ROWS
    if size >= planes.rows:
        return x @ unpack(planes, x.dtype, 0, planes.rows).T
    y = x.new_empty(x.shape[0], planes.rows)
    for start in range(0, planes.rows, size):
        end = min(start + size, planes.rows)
        torch.mm(x, unpack(planes, x.dtype, start, end).T, out=y[:, start:end])
    return y


PRODUCTS = {
    "single": single_product, "bits": bits_product, "int8": int8_product, "fragments": fragments_product,
    "fused": fused_product, "dot": dot_product, "dense": dense_product,
}  # fmt: skip


def unpack(planes: Planes, dtype: torch.dtype, start: int, end: int) -> Tensor:
    """Return rows start to end - 1 of the dense matrix, [end - start, m]."""
    W = planes.row_scale.new_empty(end - start, planes.in_features, dtype=dtype)
    extra, extra_row_scale, extra_col_scale = planes.signs, planes.row_scale, planes.col_scale
    if planes.num_significant:
        extra, extra_row_scale = _expanded(planes, start, end).view(torch.uint8), planes.residual_row_scale
        extra_col_scale = spread_scales(planes)
    _launch(
        unpack_kernel, (triton.cdiv(planes.signs.shape[-1], 64), triton.cdiv(end - start, 8)),
        planes.signs, planes.row_scale, planes.col_scale, extra, extra_row_scale, extra_col_scale, W, start, end - start,
        planes.rows, planes.in_features, planes.signs.shape[-1], extra.shape[-1],
        PLANES=planes.num_planes, EXTRA=planes.num_significant > 0, ROWS=8, BYTES=64, STEPS=1, num_warps=4,
    )  # fmt: skip
    return W


def _expanded(planes: Planes, start: int, end: int) -> Tensor:
    """Return rows start to end - 1 of the residual plane as words of a plane of all columns, rows of whole 16 bytes."""
    extra = planes.words.new_empty(end - start, triton.cdiv(planes.num_words, 4) * 4)
    _launch(
        expand_kernel, (triton.cdiv(end - start, 16), triton.cdiv(planes.num_words, 128)),
        planes.residual_words[start:end], expansion(planes), extra, end - start, RESIDUAL_WORDS=planes.num_residual_words,
        RESIDUAL_STRIDE=planes.residual_words.shape[-1], NUM_WORDS=planes.num_words, STRIDE=extra.shape[-1],
        ROWS=16, WORDS=128, PDL=_pdl(extra), num_warps=4,
    )  # fmt: skip
    return extra


def _weight_sizes(planes: Planes) -> dict[str, int]:
    """Return the kernels' sizes of a matrix: its planes, words of a row and from row to row, the same of the residual plane."""
    return {
        "PLANES": planes.num_planes, "NUM_WORDS": planes.num_words, "STRIDE": planes.words.shape[-1],
        "RESIDUAL_WORDS": planes.num_residual_words,
        "RESIDUAL_STRIDE": planes.residual_words.shape[-1] if planes.num_significant else 0,
    }  # fmt: skip


def _total(planes: Planes) -> int:
    return planes.num_planes + (planes.num_significant > 0)


def _tile_sizes(x: Tensor, planes: Planes) -> tuple[int, ...]:
    """Return what `cuda_tiles` chooses tiles by."""
    return planes.num_planes, planes.rows, planes.num_words, planes.num_residual_words, _processors(x)


def _single_tiles(x: Tensor, planes: Planes) -> cuda_tiles.SingleTiles:
    return cuda_tiles.single_tiles(*_tile_sizes(x, planes)[1:])


def _single_programs(planes: Planes, tiles: cuda_tiles.SingleTiles) -> tuple[int, int]:
    """Return the programs of the kernel of a single launch, and the tiles of rows that each makes."""
    programs = min(tiles.programs, triton.cdiv(planes.rows, tiles.rows))
    return programs, triton.cdiv(planes.rows, tiles.rows * programs)


def _bits_tiles(x: Tensor, planes: Planes) -> cuda_tiles.BitsTiles:
    return cuda_tiles.bits_tiles(*_tile_sizes(x, planes))


def _bits_programs(planes: Planes, tiles: cuda_tiles.BitsTiles) -> int:
    return triton.cdiv(planes.rows, 16 * (tiles.warps // tiles.split) * tiles.steps)


def _cut_activations(x: Tensor, pieces: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for what `cut_kernel` writes, bits, scales and sums of `pieces` pieces of each input."""
    count = -(-x.shape[0] * pieces // 4) * 4  # whole 16 bytes
    bits, scale, sums = x.new_empty(count * 258, dtype=torch.int32).split([count * 256, count, count])
    return bits, scale.view(torch.float32), sums


def _pieces(planes: Planes) -> int:
    return triton.cdiv(max(planes.num_words, planes.num_residual_words), 16)


def _inputs(x: Tensor) -> int:
    """Return how many inputs the kernel on bits computes side by side."""
    return cuda_tiles.power_of_two(x.shape[0], 1, 4)


def _programs(classes: dict[tuple[int, ...], list[tuple]]) -> int:
    """Return the programs of a launch for all matrices of some classes, whose sizes begin with those of one matrix."""
    return sum(sizes[0] * len(matrices) for sizes, matrices in classes.items())


def _padded(planes: Planes) -> int:
    return _pieces(planes) * 16


def _activation_arguments(x: Tensor, planes: Planes) -> tuple:
    residual = planes.num_significant > 0
    return (
        x, x.stride(0), x.stride(1), planes.col_scale, planes.columns if residual else planes.words,
        planes.residual_col_scale if residual else planes.col_scale,
    )  # fmt: skip


def _other(x: Tensor, around: Around) -> tuple[Tensor, int, int]:
    """Return what an input is made of beside `x`, and its strides by input and column."""
    if around.other is None:
        return x, 0, 0
    return (around.other, 0, around.other.stride(0)) if around.form in NORMS else (around.other, *around.other.stride())


def _forms(around: Around) -> dict[str, str | float | None]:
    """Return what the kernels do to an input."""
    norm = around.form in NORMS
    return {"NORM": around.form if norm else None, "GATE": None if norm else around.form or None, "EPS": around.eps}


def _added(around: Around, index: int, y: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[bool, bool]]:
    """Return bias and addend of a matrix, `y` where there is none, and which of them there are."""
    both = around.biases[index], around.addends[index]
    return tuple(y if one is None else one.contiguous() for one in both), tuple(one is not None for one in both)


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
    return x.is_cuda and _capability(x) >= (9, 0) and _CAN_WAIT


def _waits(x: Tensor) -> bool:
    """Tell whether products of `x` read weights from registers while the program goes on; see `dot.py`."""
    return _capability(x)[0] == 9 and x.element_size() == 2


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
