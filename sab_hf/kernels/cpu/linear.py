"""`sab::linear` and `sab::linears` on CPUs: the compiled kernels, on layouts made from the packed tensors at their first use.

int8 look-up tables by default (`csrc/sab_cpu.h`), float32 ones where `exact` is asked for; without the compiled library,
the PyTorch implementation.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ...packing import unpack_mask
from ..layouts import cached, version_of
from ..ops import Operands, check_operands, linear_reference
from . import library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum sab_dtype
# Beyond this number of tokens exact products are left to PyTorch's matmul on dense rows; measured by benchmarks/speed_cpu.py.
_EXACT_TOKENS = {"avx512": sys.maxsize, "avx2": 16, "neon": 4, "portable": 4}
_FEW_TOKENS = min(_EXACT_TOKENS.values())
_DENSE_BYTES = 16 << 20  # of dense rows at a time


class _Matrices(NamedTuple):
    """What calls of the kernels need: structs of matrices, their sizes as numbers, the type of an array of as many pointers.

    `layouts` are what the structs point to: whoever holds the structs holds them.
    """

    structs: ctypes.Array
    columns: set[int]
    rows: list[int]
    pointers: type[ctypes.Array]
    layouts: list[list[Tensor]]


class Prepared:
    """The matrices of one call, kept for as long as the packed tensors are what they were."""

    def __init__(self):
        self._last: tuple[list, _Matrices, list[StorageWeakRef]] | None = None  # replaced as one: threads may race

    def find(self, identity: list) -> _Matrices | None:
        """Return what was kept for packed tensors of this identity, None if there is nothing."""
        last = self._last
        return last[1] if last is not None and last[0] == identity else None

    def make(self, kernels: ctypes.CDLL, x: Tensor, matrices: list[Operands], identity: list) -> _Matrices:
        """Return `matrices`, contiguous ones, for the kernels, and keep them for tensors of this identity.

        Raises:
            ValueError, RuntimeError: they do not fit together or to the input `x`.
        """
        for operands in matrices:
            _check(x, operands)
        layouts = [layouts_of(kernels, operands) for operands in matrices]
        each = [matrix_of(operands, codes) for operands, codes in zip(matrices, layouts, strict=True)]
        count, columns, rows = len(each), {matrix.columns for matrix in each}, [matrix.rows for matrix in each]
        made = _Matrices((library.Matrix * count)(*each), columns, rows, ctypes.c_void_p * count, layouts)
        # Held weakly: no other storage has the same `_cdata` as long as that is so.
        storages = [StorageWeakRef(t.untyped_storage()) for operands in matrices for t in operands if t is not None]
        self._last = (identity, made, storages)
        return made


def _identity(tensors: list[Tensor | None]) -> list:
    """Return what changes when a packed tensor is another, or when signs, which layouts are made from, were written."""
    identity = []
    for tensor in tensors:
        if tensor is None:
            identity.append(None)
        elif (dtype := tensor.dtype) is torch.uint8:
            identity += (tensor.data_ptr(), tensor.numel(), tensor.untyped_storage()._cdata, version_of(tensor))
        else:
            identity += (tensor.data_ptr(), tensor.numel(), dtype)
    return identity


def products(x: Tensor, matrices: list[Operands], exact: bool) -> list[Tensor]:
    """Compute `sab::linear` and `sab::linears` by the compiled kernels, in one call; each product is bitwise what it is alone.

    Exact results differ by the rounding of float32 sums. Others: each group of 4 inputs has a table of its 16 signed
    sums, rounded to a step of 1/63 of the largest sum of its block of 128 columns, outliers apart; so the error of an
    output is at most `Σ_planes |r| Σ_blocks 32 · largest/126`, and about 1.9e-4 of the output's energy for Gaussian
    inputs. Infinite or NaN inputs never give numbers.

    Raises:
        ValueError: a tensor's dtype, shape or device is not that of the file format, or a mask does not fit.
        RuntimeError: `x` has another number of features than a matrix.
    """
    kernels = library.load()
    if kernels is None or x.dtype not in DTYPES:
        return [linear_reference(x, *operands) for operands in matrices]
    if not matrices:
        return []
    packed = [tensor if tensor is None else tensor.contiguous() for operands in matrices for tensor in operands]
    prepared = cached("cpu call", packed[0], Prepared)
    identity = [*_identity(packed), *[tensor if tensor is None else tensor.shape for tensor in packed]]
    found = prepared.find(identity)
    if found is None:
        size = len(Operands._fields)
        contiguous = [Operands(*packed[i : i + size]) for i in range(0, len(packed), size)]
        found = prepared.make(kernels, x, contiguous, identity)
    return _multiply(kernels, found, x, exact)


class Direct:
    """Products by the packed tensors of one module, past PyTorch's dispatcher, which takes longer than a small product.

    Layouts live as long as the tensors, not as long as the module, whose tensors may move: what is prepared is held weakly.
    A copied or pickled one starts anew.
    """

    def __init__(self):
        self._prepared = weakref.ref(Prepared())  # dead

    def __reduce__(self):
        return type(self), ()

    def __call__(self, x: Tensor, packed: dict[str, Tensor], exact: bool) -> Tensor | None:
        """Return what `sab::linear` does for a plain CPU tensor `x` and the module's tensors, scales as they store them.

        None: nothing can be computed here; call the op.
        """
        kernels = library.load()
        if kernels is None or x.dtype not in DTYPES:
            return None
        tensors = [packed.get(name) for name in Operands._fields]
        identity, prepared = _identity(tensors), self._prepared()
        found = None if prepared is None else prepared.find(identity)
        if found is None:
            if not all(t is None or (t.is_contiguous() and t.device.type == "cpu") for t in tensors):
                return None
            prepared = cached("cpu module", tensors[0], Prepared)
            self._prepared = weakref.ref(prepared)
            found = prepared.make(kernels, x, [Operands(*tensors)], identity)
        return _multiply(kernels, found, x, exact)[0]


def _multiply(kernels: ctypes.CDLL, matrices: _Matrices, x: Tensor, exact: bool) -> list[Tensor]:
    """Return `x Wᵀ` by the compiled kernels for each matrix W.

    Raises:
        RuntimeError: `x` has another number of features than a matrix.
        MemoryError: there is no memory for the look-up tables.
    """
    *batch, columns = x.shape or (0,)
    if matrices.columns != {columns}:
        raise RuntimeError(f"input has {columns} features, not {' or '.join(map(str, matrices.columns - {columns}))}")
    x = x.contiguous()
    outputs = [x.new_empty((*batch, rows)) for rows in matrices.rows]
    tokens = x.numel() // columns
    if tokens > _FEW_TOKENS and _is_for_matmul(kernels, tokens, exact):
        inputs = x.view(tokens, columns)
        return [_dense_matmul(kernels, one, inputs, y) for one, y in zip(matrices.structs, outputs, strict=True)]
    into = matrices.pointers(*[y.data_ptr() for y in outputs])
    failed = kernels.sab_cpu_linears(
        matrices.structs,
        len(outputs),
        x.data_ptr(),
        columns,
        DTYPES[x.dtype],
        tokens,
        into,
        exact,
        torch.get_num_threads(),
    )
    if failed:
        _raise(failed, f"the look-up tables of {tokens} tokens of {columns} features")
    return outputs


def _raise(failed: int, what: str) -> None:
    """Raise for what a kernel returned.

    Raises:
        MemoryError: there is no memory for `what`.
        ValueError: the kernel refused the sizes of a matrix, which `_check` lets nobody hand over.
    """
    if failed == library.NO_MEMORY:
        raise MemoryError(f"no memory for {what}")
    raise ValueError(
        "a packed matrix has impossible sizes: more significant columns than columns, or a negative number"
    )


def _check(x: Tensor, operands: Operands) -> None:
    """Hold the packed tensors against the input and each other, and count the mask: the kernels trust what they are given."""
    check_operands(x, operands)
    if operands.significant_columns is not None:
        unpack_mask(operands.significant_columns, operands.col_scale.shape[1], operands.residual_col_scale.numel())


def layouts_of(kernels: ctypes.CDLL, operands: Operands) -> list[Tensor]:
    """Return the layouts of a matrix's full planes and of its residual plane, if it has one."""
    signs = {"cpu": operands.signs}
    if operands.residual_signs is not None:
        signs["cpu residual"] = operands.residual_signs[None]
    return [cached(name, planes, lambda planes=planes: _lay_out(kernels, planes)) for name, planes in signs.items()]


def matrix_of(operands: Operands, layouts: list[Tensor]) -> library.Matrix:
    """Return the C struct of the packed tensors and their layouts."""
    num_planes, rows = operands.row_scale.shape
    residual_col_scale = operands.residual_col_scale
    significant = 0 if residual_col_scale is None else residual_col_scale.numel()
    tensors = operands._asdict() | dict(zip(("codes", "residual_codes"), layouts, strict=False))
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}
    return library.Matrix(rows, operands.col_scale.shape[1], num_planes, significant, **addresses)


def _lay_out(kernels: ctypes.CDLL, signs: Tensor) -> Tensor:
    """Return the kernel layouts of planes of signs, [K, n, bytes] uint8, one after the other."""
    num_planes, rows, column_bytes = signs.shape
    plane_bytes = kernels.sab_cpu_layout_bytes(rows, 8 * column_bytes)
    codes = torch.empty(num_planes, plane_bytes, dtype=torch.uint8)
    for plane, into in zip(signs, codes, strict=True):
        kernels.sab_cpu_layout(plane.data_ptr(), rows, 8 * column_bytes, into.data_ptr(), torch.get_num_threads())
    return codes


def _is_for_matmul(kernels: ctypes.CDLL, tokens: int, exact: bool) -> bool:
    """Tell whether products of `tokens` inputs are faster by dense rows than by look-up."""
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
        failed = kernels.sab_cpu_dense(matrix, row, rows, dense.data_ptr(), torch.get_num_threads())
        if failed:
            _raise(failed, f"the scales of {columns} columns")
        into[:, row : row + rows] = inputs @ dense[:rows].T
    return y
