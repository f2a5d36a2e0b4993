"""`sab::linear` on CPUs: the compiled kernels, on layouts made from the packed tensors at their first use.

int8 look-up tables by default (`csrc/sab_cpu.h`), float32 ones where `exact` is asked for; without the compiled library,
the PyTorch implementation.
"""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..ops import linear_reference
from ..packing import tensor_specs
from . import library
from .layouts import cached

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum sab_dtype
_NAMES = tuple(name for name, _ in library.Matrix._fields_)[4:11]  # the op's arguments after `x`
# Beyond so many tokens exact products are left to PyTorch's matmul on dense rows; measured by benchmarks/speed_cpu.py.
_EXACT_TOKENS = {"avx512": sys.maxsize, "avx2": 16, "neon": 4, "portable": 4}
_FEW_TOKENS = min(_EXACT_TOKENS.values())
_DENSE_BYTES = 16 << 20  # of dense rows at a time


class _Entry:
    """The layout of one matrix's full planes, and the C struct of the tensors it was last called with, by address."""

    def __init__(self, codes: Tensor):
        self.codes = codes
        self.last: tuple[tuple[int, ...], library.Matrix] | None = None  # replaced as one: threads may race


def linear(
    x: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor,
    significant_columns: Tensor | None,
    residual_signs: Tensor | None,
    residual_row_scale: Tensor | None,
    residual_col_scale: Tensor | None,
    exact: bool = False,
) -> Tensor:
    """Compute `ops.reference` (arguments there) by the compiled kernels.

    Exact results differ by the rounding of float32 sums. Others: each group of 4 inputs has a table of its 16 signed
    sums, rounded to a step of 1/63 of the largest sum of its block of 128 columns, outliers apart; so the error of an
    output is at most `Σ_planes |r| Σ_blocks 32 · largest/126`, and about 1.9e-4 of the output's energy for Gaussian
    inputs. Infinite or NaN inputs never give numbers.

    Raises:
        ValueError: a tensor's dtype, shape or device is not that of the file format.
    """
    kernels = library.load()
    packed = (signs, row_scale, col_scale)
    if significant_columns is not None and residual_col_scale.numel():
        packed = (*packed, significant_columns, residual_signs, residual_row_scale, residual_col_scale)
    if kernels is None or x.dtype not in _DTYPES:
        return linear_reference(x, *packed, *(None,) * (len(_NAMES) - len(packed)))
    packed = tuple([tensor.contiguous() for tensor in packed])
    return _multiply(kernels, _matrix(kernels, packed), x, exact)


torch.library.impl("sab::linear", "cpu", linear)


class Direct:
    """Products by the packed tensors of one module, past PyTorch's dispatcher, which takes longer than a small product.

    A copied or pickled one starts anew.
    """

    def __init__(self):
        self._last: tuple[list[int], library.Matrix, list[StorageWeakRef]] | None = None  # replaced as one, as above

    def __reduce__(self):
        return Direct, ()

    def __call__(self, x: Tensor, packed: dict[str, Tensor], exact: bool) -> Tensor | None:
        """Return what `linear` returns for a plain CPU tensor `x` and the module's tensors, scales as they store them.

        None: nothing can be computed here; call the op.
        """
        kernels = library.load()
        if kernels is None or x.dtype not in _DTYPES:
            return None
        identity = _identity(packed)
        last = self._last
        if last is None or last[0] != identity:
            tensors = tuple([packed[name] for name in _NAMES if name in packed])
            if not all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors):
                return None
            half = [tensor.view(torch.float16) if tensor.dtype == torch.int16 else tensor for tensor in tensors]
            matrix = _matrix(kernels, tuple(half))
            # Held weakly: no other storage has the same `_cdata` as long as that is so.
            last = self._last = (identity, matrix, [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors])
        return _multiply(kernels, last[1], x, exact)


def _identity(packed: dict[str, Tensor]) -> list[int]:
    """Return numbers that change when a packed tensor is another, or when signs, which layouts are made from, were written."""
    identity = []
    for name, tensor in packed.items():
        if name != "bias":
            identity += (tensor.untyped_storage()._cdata, tensor.data_ptr(), tensor.numel())
            identity.append(tensor._version if not tensor.is_inference() else 0)
    return identity


def _multiply(kernels: ctypes.CDLL, matrix: library.Matrix, x: Tensor, exact: bool) -> Tensor:
    """Return `x Wᵀ` by the compiled kernels.

    Raises:
        RuntimeError: `x` has another number of features than the matrix.
        MemoryError: there is no memory for the look-up tables.
    """
    columns, rows = matrix.columns, matrix.rows
    shape = x.shape
    if shape[-1] != columns:
        raise RuntimeError(f"input has {shape[-1]} features, not {columns}")
    x = x.contiguous()
    y = x.new_empty((*shape[:-1], rows))
    tokens = x.numel() // columns
    if tokens > _FEW_TOKENS and _is_for_matmul(kernels, tokens, exact):
        return _dense_matmul(kernels, matrix, x.view(tokens, columns), y)
    failed = kernels.sab_cpu_linear(
        matrix, x.data_ptr(), columns, _DTYPES[x.dtype], tokens, y.data_ptr(), exact, torch.get_num_threads()
    )
    if failed:
        raise MemoryError(f"no memory for the look-up tables of {tokens} tokens of {columns} features")
    return y


def _matrix(kernels: ctypes.CDLL, packed: tuple[Tensor, ...]) -> library.Matrix:
    """Return the C struct of the packed tensors, the one of the last call where they still are what they were."""
    signs = packed[0]
    entry = cached("cpu", signs, lambda: _Entry(_lay_out(kernels, signs)))
    identity = [tensor.data_ptr() for tensor in packed]
    identity += [tensor.numel() for tensor in packed]
    residual_codes = None
    if len(packed) > 3:
        residual_codes = cached("cpu residual", packed[4], lambda: _lay_out(kernels, packed[4][None])).data_ptr()
        identity.append(residual_codes)
    if entry.last is None or entry.last[0] != identity:
        _check(packed)
        sizes = (signs.shape[1], packed[2].shape[1], signs.shape[0], packed[6].numel() if len(packed) > 3 else 0)
        pointers = dict(zip(_NAMES, [tensor.data_ptr() for tensor in packed], strict=False))
        matrix = library.Matrix(*sizes, codes=entry.codes.data_ptr(), residual_codes=residual_codes, **pointers)
        entry.last = (identity, matrix)
    return entry.last[1]


def _lay_out(kernels: ctypes.CDLL, signs: Tensor) -> Tensor:
    """Return the kernel layouts of planes of signs, [K, n, bytes] uint8, one after the other."""
    if signs.dtype != torch.uint8 or signs.ndim != 3 or signs.device.type != "cpu":
        raise ValueError(f"signs must be uint8 [planes, rows, bytes] on the CPU, got {_describe(signs)}")
    num_planes, rows, column_bytes = signs.shape
    plane_bytes = kernels.sab_cpu_layout_bytes(rows, 8 * column_bytes)
    codes = torch.empty(num_planes, plane_bytes, dtype=torch.uint8)
    for plane, into in zip(signs, codes, strict=True):
        kernels.sab_cpu_layout(plane.data_ptr(), rows, 8 * column_bytes, into.data_ptr(), torch.get_num_threads())
    return codes


def _check(packed: tuple[Tensor, ...]) -> None:
    """Hold the packed tensors against each other: the kernels trust the sizes.

    Raises:
        ValueError: one does not have the dtype, shape or device that the others imply.
    """
    num_planes, rows = packed[0].shape[:2]
    columns, significant = packed[2].shape[-1], packed[-1].numel() if len(packed) > 3 else 0
    expected = tensor_specs(rows, columns, num_planes, significant)
    for name, tensor in zip(_NAMES, packed, strict=False):
        dtype, shape = expected[name]
        dtype = torch.float16 if dtype == torch.int16 else dtype
        if tensor.dtype != dtype or tensor.shape != shape or tensor.device.type != "cpu":
            raise ValueError(f"`{name}` must be {dtype} {list(shape)} on the CPU, got {_describe(tensor)}")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device.type}"


def _is_for_matmul(kernels: ctypes.CDLL, tokens: int, exact: bool) -> bool:
    """Tell whether so many tokens are better multiplied by dense rows than looked up."""
    name = kernels.sab_cpu_isa().decode()
    return (exact or name == "portable") and tokens > _EXACT_TOKENS[name]


def _dense_matmul(kernels: ctypes.CDLL, matrix: library.Matrix, x: Tensor, y: Tensor) -> Tensor:
    """Fill `y` by float32 products of `x` [tokens, columns] with a few dense rows of the matrix at a time."""
    tokens, columns = x.shape
    into = y.view(tokens, matrix.rows)
    inputs = x.float()
    step = max(16, _DENSE_BYTES // (4 * columns))
    dense = torch.empty(min(step, matrix.rows), columns)
    for row in range(0, matrix.rows, step):
        rows = min(step, matrix.rows - row)
        if kernels.sab_cpu_dense(matrix, row, rows, dense.data_ptr(), torch.get_num_threads()):
            raise MemoryError(f"no memory for the scales of {columns} columns")
        into[:, row : row + rows] = inputs @ dense[:rows].T
    return y
