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

from ...packing import tensor_specs
from ..layouts import cached
from ..ops import implement, linear_reference
from . import library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum sab_dtype
_NAMES = tuple(name for name, _ in library.Matrix._fields_)[4:11]  # the op's arguments after `x`
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
        self._last: tuple[list[int], _Matrices, list[StorageWeakRef]] | None = None  # replaced as one: threads may race

    def find(self, identity: list[int]) -> _Matrices | None:
        """Return what was kept for packed tensors of this identity, None if there is nothing."""
        last = self._last
        return last[1] if last is not None and last[0] == identity else None

    def make(self, kernels: ctypes.CDLL, matrices: list[tuple[Tensor, ...]], identity: list[int]) -> _Matrices:
        """Return `matrices` for the kernels, and keep them for tensors of this identity."""
        layouts = [_layouts(kernels, packed) for packed in matrices]
        each = [_matrix(packed, codes) for packed, codes in zip(matrices, layouts, strict=True)]
        count, columns, rows = len(each), {matrix.columns for matrix in each}, [matrix.rows for matrix in each]
        made = _Matrices((library.Matrix * count)(*each), columns, rows, ctypes.c_void_p * count, layouts)
        # Held weakly: no other storage has the same `_cdata` as long as that is so.
        storages = [StorageWeakRef(tensor.untyped_storage()) for packed in matrices for tensor in packed]
        self._last = (identity, made, storages)
        return made


def _identity(tensors: list[Tensor]) -> list[int]:
    """Return numbers that change when a packed tensor is another, or when signs, which layouts are made from, were written."""
    identity = []
    for tensor in tensors:
        identity += (tensor.data_ptr(), tensor.numel())
        if tensor.dtype == torch.uint8:
            identity += (tensor.untyped_storage()._cdata, 0 if tensor.is_inference() else tensor._version)
    return identity


def products(x: Tensor, matrices: list[tuple[Tensor | None, ...]], exact: bool) -> list[Tensor]:
    """Compute `sab::linear` and `sab::linears` by the compiled kernels, in one call; each product is bitwise what it is alone.

    Exact results differ by the rounding of float32 sums. Others: each group of 4 inputs has a table of its 16 signed
    sums, rounded to a step of 1/63 of the largest sum of its block of 128 columns, outliers apart; so the error of an
    output is at most `Σ_planes |r| Σ_blocks 32 · largest/126`, and about 1.9e-4 of the output's energy for Gaussian
    inputs. Infinite or NaN inputs never give numbers.

    Raises:
        ValueError: a tensor's dtype, shape or device is not that of the file format.
    """
    kernels = library.load()
    if kernels is None or x.dtype not in _DTYPES:
        return [linear_reference(x, *one) for one in matrices]
    packed = []
    for one in matrices:
        given = one if one[3] is not None and one[6].numel() else one[:3]
        packed.append(tuple([tensor.contiguous() for tensor in given]))
    if not packed:
        return []
    prepared = cached("cpu call", packed[0][0], Prepared)
    identity = _identity([tensor for one in packed for tensor in one])
    return _multiply(kernels, prepared.find(identity) or prepared.make(kernels, packed, identity), x, exact)


implement("cpu", products)


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
        if kernels is None or x.dtype not in _DTYPES:
            return None
        tensors = [packed[name] for name in _NAMES if name in packed]
        identity, prepared = _identity(tensors), self._prepared()
        found = None if prepared is None else prepared.find(identity)
        if found is None:
            if not all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors):
                return None
            prepared = cached("cpu module", tensors[0], Prepared)
            self._prepared = weakref.ref(prepared)
            found = prepared.make(kernels, [tuple(tensors)], identity)
        return _multiply(kernels, found, x, exact)[0]


def _multiply(kernels: ctypes.CDLL, matrices: _Matrices, x: Tensor, exact: bool) -> list[Tensor]:
    """Return `x Wᵀ` by the compiled kernels for each matrix W.

    Raises:
        RuntimeError: `x` has another number of features than a matrix.
        MemoryError: there is no memory for the look-up tables.
    """
    *batch, columns = x.shape
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
        _DTYPES[x.dtype],
        tokens,
        into,
        exact,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for the look-up tables of {tokens} tokens of {columns} features")
    return outputs


def _layouts(kernels: ctypes.CDLL, packed: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the layouts of a matrix's full planes and of its residual plane, if it has one."""
    signs = {"cpu": packed[0]} if len(packed) == 3 else {"cpu": packed[0], "cpu residual": packed[4][None]}
    return [cached(name, planes, lambda planes=planes: _lay_out(kernels, planes)) for name, planes in signs.items()]


def _matrix(packed: tuple[Tensor, ...], layouts: list[Tensor]) -> library.Matrix:
    """Return the C struct of the packed tensors and their layouts."""
    _check(packed)
    sizes = (packed[0].shape[1], packed[2].shape[1], packed[0].shape[0], packed[6].numel() if len(packed) > 3 else 0)
    tensors = dict(zip((*_NAMES[: len(packed)], "codes", "residual_codes"), (*packed, *layouts), strict=False))
    return library.Matrix(*sizes, **{name: tensor.data_ptr() for name, tensor in tensors.items()})


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
        stored, dtype = dtype, torch.float16 if dtype == torch.int16 else dtype  # scales may be either
        if tensor.dtype not in (stored, dtype) or tensor.shape != shape or tensor.device.type != "cpu":
            raise ValueError(f"`{name}` must be {dtype} {list(shape)} on the CPU, got {_describe(tensor)}")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device.type}"


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
        if kernels.sab_cpu_dense(matrix, row, rows, dense.data_ptr(), torch.get_num_threads()):
            raise MemoryError(f"no memory for the scales of {columns} columns")
        into[:, row : row + rows] = inputs @ dense[:rows].T
    return y
