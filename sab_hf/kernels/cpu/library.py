"""The compiled CPU kernels, loaded through ctypes."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

LIBRARY = Path(__file__).with_name("sab_cpu.so")  # what build.py writes; not imported, as it is also run by `-m`
ABI = 6  # SAB_CPU_ABI in csrc/sab_cpu.h
NO_MEMORY = 1  # SAB_NO_MEMORY in csrc/sab_cpu.h
NAMES = ("avx512", "avx2", "neon", "portable")
SWITCH = "SAB_CPU_ISA"
PYTORCH = "torch"  # the value of the switch that turns the kernels off


class Matrix(Structure):
    """`sab_matrix` of csrc/sab_cpu.h: sizes, and addresses of the packed tensors and of their kernel layouts."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "columns", "planes", "significant")),
        *(
            (name, c_void_p)
            for name in (
                *("signs", "row_scale", "col_scale", "significant_columns"),
                *("residual_signs", "residual_row_scale", "residual_col_scale", "codes", "residual_codes"),
            )
        ),
    ]


class Levels(Structure):
    """`sab_levels` of csrc/sab_cpu.h."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "columns", "planes")),
        *((name, c_void_p) for name in ("row_start", "column_start", "row_scale", "column_scale")),
        *((name, c_void_p) for name in ("latent", "weight", "gradient", "first", "second")),
        *((name, c_void_p) for name in ("row_gradient", "column_gradient")),
        *((name, c_float) for name in ("rate", "correction1", "correction2", "beta1", "beta2", "epsilon")),
    ]


_SIGNATURES = {
    "sab_cpu_sources": (c_char_p, []),
    "sab_cpu_isa": (c_char_p, []),
    "sab_cpu_select": (c_int, [c_char_p]),
    "sab_cpu_use_team": (None, [c_void_p]),
    "sab_cpu_layout_bytes": (c_int64, [c_int64, c_int64]),
    "sab_cpu_layout": (None, [c_void_p, c_int64, c_int64, c_void_p, c_int]),
    "sab_cpu_linears": (
        c_int,
        [POINTER(Matrix), c_int64, c_void_p, c_int64, c_int, c_int64, POINTER(c_void_p), c_int, c_int],
    ),
    "sab_cpu_step_bytes": (c_int64, []),
    "sab_cpu_patch": (None, [c_void_p, c_int64, c_void_p, c_int64, c_int64]),
    "sab_cpu_steps": (c_int, [c_void_p, c_int64, c_int]),
    "sab_cpu_levels": (c_int, [POINTER(Levels), c_int]),
    "sab_cpu_dense": (c_int, [POINTER(Matrix), c_int64, c_int64, c_void_p, c_int]),
}


class UnusableLibraryError(RuntimeError):
    """The compiled kernels are missing, of another version, or do not load."""


def open_library(path: Path) -> ctypes.CDLL:
    """Load the kernels at `path` and declare their functions.

    Raises:
        UnusableLibraryError: the file is missing, does not load here, has another ABI version than this package, or was
            built from other C sources than those that lie in the package.
    """
    from .build import sources_digest  # not at module level: `python -m sab_hf.kernels.cpu.build` imports this package

    if not path.exists():
        raise UnusableLibraryError(
            f"{path} is missing: the package was not installed here, or there was no C compiler when it was"
        )
    try:
        library = ctypes.CDLL(str(path))
        found = library.sab_cpu_abi()
    except (OSError, AttributeError) as error:
        raise UnusableLibraryError(f"{path} does not load: {error}") from error
    if found != ABI:
        raise UnusableLibraryError(f"{path} has version {found} of the kernels, this package needs {ABI}")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    sources, built_from = sources_digest(), library.sab_cpu_sources().decode()
    if sources is not None and sources != built_from:
        raise UnusableLibraryError(f"{path} is stale: it was built from other C sources than those in csrc/ beside it")
    return library


def select(library: ctypes.CDLL, name: str | None) -> None:
    """Let `library` use the instruction set `name`, or the best of this machine if None.

    Raises:
        ValueError: it does not exist, or machine or compiler do not have it.
    """
    if library.sab_cpu_select(None if name is None else name.encode()):
        names = ", ".join([*(n for n in NAMES if library.sab_cpu_select(n.encode()) == 0), PYTORCH])
        library.sab_cpu_select(None)
        raise ValueError(f"`{SWITCH}` must be one of {names} on this machine (or unset), got `{name}`")


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the kernels, or None where they cannot be used; why is logged, once.

    Raises:
        ValueError: the environment variable `SAB_CPU_ISA` asks for what this machine does not have.
    """
    asked = os.environ.get(SWITCH) or None
    if asked == PYTORCH:
        logger.info("%s=%s: packed weights run through PyTorch, slowly", SWITCH, PYTORCH)
        return None
    try:
        library = open_library(LIBRARY)
    except UnusableLibraryError as error:
        logger.warning(
            "Packed weights run slowly on this CPU, through PyTorch operations: %s. With a C compiler, `python -m "
            "sab_hf.kernels.cpu.build` or installing sab_hf again builds the fast kernels.",
            error,
        )
        return None
    select(library, asked)
    library.sab_cpu_use_team(_team_of_pytorch())
    return library


def _team_of_pytorch() -> int | None:
    """Return the address of what starts a parallel region in the OpenMP runtime that PyTorch uses, None if it has none."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, c_void_p).value  # found through its dependencies
    except (OSError, AttributeError):
        return None
