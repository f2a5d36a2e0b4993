"""`sab::linear` on CUDA devices: Triton kernels where they run, else PyTorch's operations, and a word in the log."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor

from ..attention import attend_reference, check_attention
from ..decoding import Around
from ..ops import Operands, check_operands, linear_reference

logger = logging.getLogger(__name__)
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST_CAPABILITY = (7, 5)


def products(x: Tensor, matrices: list[Operands], exact: bool) -> list[Tensor]:
    """Compute `sab::linear` and `sab::linears` on the device of `x`; without a kernel for it, as PyTorch does, after one warning.

    Several matrices take fewer launches than one by one; the same bits come out.
    """
    for operands in matrices:
        check_operands(x, operands)
    reason = why_no_kernel(x.device.index, x.dtype)
    if reason is not None:
        warn_once(reason)
        return [linear_reference(x, *operands) for operands in matrices]
    inputs = x.reshape(-1, x.shape[-1])
    empty = [0 in inputs.shape or 0 in operands.signs.shape for operands in matrices]
    if any(empty):  # no kernel is launched for nothing
        return [
            linear_reference(x, *operands) if nothing else products(x, [operands], exact)[0]
            for operands, nothing in zip(matrices, empty, strict=True)
        ]
    from . import launch as kernels
    from .planes import planes

    with torch.cuda.device(x.device):
        results = kernels.linears(inputs, [planes(*operands) for operands in matrices], exact)
    # not `reshape`: writing into a view that a custom op returns is an error where gradients are recorded
    return [torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1])) for y in results]


def folded_products(x: Tensor, matrices: list[Operands], around: Around, exact: bool) -> list[Tensor]:
    """Compute `sab::folded_linears` on the device of `x`; where no kernel does all of it, step by step."""
    for operands in matrices:
        check_operands(x, operands)
    empty = not x.numel() or any(not operands.signs.numel() for operands in matrices)
    if empty or why_no_kernel(x.device.index, x.dtype) is not None:
        return around.after(products(around.before(x), matrices, exact))
    from . import launch as kernels
    from .planes import planes

    rows = [None if addend is None else addend.reshape(-1, addend.shape[-1]) for addend in around.addends]
    other = around.other if around.other is None or around.other.ndim == 1 else around.other.reshape(-1, x.shape[-1])
    flat = around._replace(other=other, addends=rows)
    with torch.cuda.device(x.device):
        results = kernels.linears(x.reshape(-1, x.shape[-1]), [planes(*one) for one in matrices], exact, flat)
    return [torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1])) for y in results]


def folds(x: Tensor, matrices: list[Operands], exact: bool) -> bool:
    """Tell whether kernels do what stands around the products of an input; tensors may be those of a compiler, without memory."""
    if not x.is_cuda or why_no_kernel(x.device.index, x.dtype) is not None:
        return False
    from . import launch as kernels
    from .planes import sizes

    return kernels.folds(x.reshape(-1, x.shape[-1]), [sizes(operands) for operands in matrices], exact)


@cache
def why_no_kernel(device: int, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot run for inputs of this dtype on this device, or None if they can."""
    if dtype not in KERNEL_DTYPES:
        return f"no kernel computes in {dtype} (they do in float16, bfloat16 and float32)"
    if torch.version.cuda is None:
        return "the kernels are for NVIDIA devices, and this PyTorch is not a CUDA build"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return (
            f"compute capability {capability[0]}.{capability[1]} is below {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
        )
    if dtype == torch.bfloat16 and capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} has no bfloat16; load the model with dtype float16"
    return triton_problem()


def triton_problem() -> str | None:
    """Return why this installation's Triton cannot compile the kernels, or None; features tell, not version numbers."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (`pip install triton`)"
    import triton

    if not hasattr(triton, "knobs"):
        return (
            f"Triton {triton.__version__} is too old; the kernels need 3.4 or newer, which PyTorch 2.8 and newer bring"
        )
    return None


@cache
def warn_once(reason: str, what: str = "sab::linear") -> None:
    """Say once for each reason that the slow path is taken."""
    logger.warning("%s runs on PyTorch's operations, slowly: %s", what, reason)


def can_fit(tensor: Tensor) -> bool:
    """Tell whether fitting and refinement of matrices like `tensor` have kernels; on a GPU that has none, say so once."""
    if not tensor.is_cuda:
        return False
    reason = why_no_kernel(tensor.device.index, tensor.dtype)
    if reason is not None:
        warn_once(reason, "quantizing")
    return reason is None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Compute `sab::attend` on the device of `q`."""
    check_attention(q, k, v)
    if 0 in k.shape or 0 in q.shape or not attends(q, k, v):
        return attend_reference(q, k, v, mask, scale)
    from .attention import attend as kernels

    with torch.cuda.device(q.device):
        return kernels(q, k, v, mask, scale)


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether a kernel attends with such tensors, which may be those of a compiler, without memory."""
    if not (q.is_cuda and k.is_cuda and v.is_cuda) or why_no_kernel(q.device.index, q.dtype) is not None:
        return False
    from .attention import fits

    return fits(q, k)
