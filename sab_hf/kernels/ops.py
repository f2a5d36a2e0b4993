"""The custom ops `sab::linear` and `sab::linears`: schema, fake and the PyTorch implementation, which specifies every kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.autograd import forward_ad

from ..packing import unpack_bits
from ..planes import signs_to


def linear_reference(
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
    """Multiply inputs by a matrix of sign planes, `y = x Wᵀ`, reading the packed planes one at a time.

    Each plane contributes `r ⊙ (B (c ⊙ x))`; sums are float32 and the result is rounded to the dtype of `x` once.

    Args:
        x: [..., in_features] floating point.
        signs: [K, out_features, ⌈in_features/8⌉] uint8, row_scale: [K, out_features] float16,
            col_scale: [K, in_features] float16: the full planes, as in `packing.py`. Scales may also be int16, the
            bits of float16 numbers, as modules store them; kernels on CUDA devices take float16 only.
        significant_columns: [⌈in_features/8⌉] uint8, residual_signs: [out_features, ⌈k/8⌉] uint8,
            residual_row_scale: [out_features] float16, residual_col_scale: [k] float16: the residual plane, or None.
        exact: compute in the dtype of `x`; otherwise a device's kernel may round the scaled activations to integers (with
            a scale per small group of columns) where that is faster. This implementation is exact either way.
    Returns:
        [..., out_features], dtype of `x`; a fresh tensor, never a view, which callers may write into.
    """
    in_features = check_width(x, col_scale)
    inputs = x.reshape(-1, in_features).float()
    y = torch.zeros(*x.shape[:-1], signs.shape[1], dtype=torch.float32, device=x.device)
    sums = y.view(inputs.shape[0], signs.shape[1])
    for packed, r, c in zip(signs, row_scale, col_scale, strict=True):
        sums += _plane_matmul(inputs, packed, r, c)
    if significant_columns is not None:
        mask = unpack_bits(significant_columns, in_features)
        columns = torch.nonzero_static(mask, size=residual_col_scale.numel()).squeeze(1)  # no wait for the device
        sums += _plane_matmul(inputs[:, columns], residual_signs, residual_row_scale, residual_col_scale)
    return y.to(x.dtype)


# Not `torch.library.custom_op`, whose wrappers cost 10 µs a call, as much as a small product takes; the op is the same.
_NAME = "sab::linear"
torch.library.define(
    _NAME, torch.library.infer_schema(linear_reference, mutates_args=()), tags=torch.Tag.pt2_compliant_tag
)
torch.library.impl(_NAME, "default", linear_reference)
sab_linear = torch.ops.sab.linear.default


def check_width(x: Tensor, col_scale: Tensor) -> int:
    in_features = col_scale.shape[1]
    torch._check(x.shape[-1] == in_features, lambda: f"input has {x.shape[-1]} features, not {in_features}")
    return in_features


def _plane_matmul(x: Tensor, packed: Tensor, row_scale: Tensor, col_scale: Tensor) -> Tensor:
    B = signs_to(torch.float32, unpack_bits(packed, col_scale.numel()))
    return (x * _numbers(col_scale)) @ B.T * _numbers(row_scale)


def _numbers(scale: Tensor) -> Tensor:
    """Return scales in float32, whether they are float16 or the bits of it."""
    return (scale.view(torch.float16) if scale.dtype == torch.int16 else scale).float()


@torch.library.register_fake(_NAME)
def _(
    x,
    signs,
    row_scale,
    col_scale,
    significant_columns,
    residual_signs,
    residual_row_scale,
    residual_col_scale,
    exact=False,
) -> Tensor:
    check_width(x, col_scale)
    # PyTorch also comes here with weights on meta and an input that is elsewhere, and would return what this allocates.
    torch._check(
        x.device == signs.device, lambda: f"the weight must be on {x.device}, as the input, got {signs.device}"
    )
    if TracingContext.try_get() is not None:  # a compiler looks at the model: let it join products of one input
        with contextlib.suppress(ImportError):  # a torch whose compiler takes no passes
            from .joining import register

            register()
    return x.new_empty(*x.shape[:-1], signs.shape[1])


def linears_reference(
    x: Tensor,
    signs: list[Tensor],
    row_scale: list[Tensor],
    col_scale: list[Tensor],
    significant_columns: list[Tensor | None],
    residual_signs: list[Tensor | None],
    residual_row_scale: list[Tensor | None],
    residual_col_scale: list[Tensor | None],
    exact: bool = False,
) -> list[Tensor]:
    """Multiply one input by several matrices of sign planes: the results of `sab::linear`, one after the other.

    `joining.py` puts the op into compiled graphs, after gradients are laid out: it records none itself.

    Args:
        x: [..., in_features] floating point.
        signs, row_scale, col_scale, significant_columns, residual_signs, residual_row_scale, residual_col_scale: for each
            matrix what `linear_reference` takes, lists of one length.
        exact: as in `linear_reference`.
    Returns:
        For each matrix [..., out_features], dtype of `x`, a fresh tensor.
    Raises:
        ValueError: the lists differ in length.
    """
    residual = (significant_columns, residual_signs, residual_row_scale, residual_col_scale)
    return [sab_linear(x, *one, exact) for one in zip(signs, row_scale, col_scale, *residual, strict=True)]


_NAME_OF_SEVERAL = "sab::linears"
torch.library.define(
    _NAME_OF_SEVERAL,
    "(Tensor x, Tensor[] signs, Tensor[] row_scale, Tensor[] col_scale, Tensor?[] significant_columns, "
    "Tensor?[] residual_signs, Tensor?[] residual_row_scale, Tensor?[] residual_col_scale, bool exact=False) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl(_NAME_OF_SEVERAL, "default", linears_reference)
torch.library.register_fake(_NAME_OF_SEVERAL, linears_reference)
sab_linears = torch.ops.sab.linears.default


def implement(device: str, products: Callable[[Tensor, list[tuple[Tensor | None, ...]], bool], list[Tensor]]) -> None:
    """Have both ops computed by `products` on devices of a type.

    Args:
        device: "cpu" or "cuda".
        products: from `x`, the matrices, each the arguments of `linear_reference` after `x`, and `exact`, to the product of each.
    """

    def linear(x: Tensor, *arguments) -> Tensor:
        matrix, exact = _without_exact(arguments)
        return products(x, [matrix], exact)[0]

    def linears(x: Tensor, *arguments) -> list[Tensor]:
        lists, exact = _without_exact(arguments)
        return products(x, list(zip(*lists, strict=True)), exact)

    torch.library.impl(_NAME, device, linear)
    torch.library.impl(_NAME_OF_SEVERAL, device, linears)


def _without_exact(arguments: tuple) -> tuple[tuple, bool]:
    """Take the arguments after `x` apart; the dispatcher leaves `exact` out where it is the default."""
    return arguments[:_NUM_PLANE_TENSORS], arguments[_NUM_PLANE_TENSORS:] == (True,)


def _keep_planes(ctx, inputs, output) -> None:
    x, *planes = inputs
    ctx.dtype, ctx.num_options = x.dtype, len(planes) - _NUM_PLANE_TENSORS
    ctx.save_for_backward(*planes[:_NUM_PLANE_TENSORS])


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient of `x`; planes and scales are stored numbers and get none."""
    grad_x = input_gradient(grad, *ctx.saved_tensors).to(ctx.dtype) if ctx.needs_input_grad[0] else None
    return grad_x, *[None] * (_NUM_PLANE_TENSORS + ctx.num_options)


def input_gradient(
    grad: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor,
    significant_columns: Tensor | None,
    residual_signs: Tensor | None,
    residual_row_scale: Tensor | None,
    residual_col_scale: Tensor | None,
) -> Tensor:
    """Multiply an output's gradient by the matrix of sign planes, `grad_x = grad W`, one plane at a time.

    Args:
        grad: [..., out_features] floating point; the planes as in `sab_linear`.
    Returns:
        [..., in_features] float32.
    """
    rows = grad.reshape(-1, grad.shape[-1]).float()
    grad_x = torch.zeros(rows.shape[0], col_scale.shape[1], dtype=torch.float32, device=grad.device)
    for packed, r, c in zip(signs, row_scale, col_scale, strict=True):
        grad_x += _plane_transposed(rows, packed, r, c)
    if significant_columns is not None:
        mask = unpack_bits(significant_columns, col_scale.shape[1])
        columns = torch.nonzero_static(mask, size=residual_col_scale.numel()).squeeze(1)
        residual = _plane_transposed(rows, residual_signs, residual_row_scale, residual_col_scale)
        grad_x.index_add_(1, columns, residual)
    return grad_x.reshape(*grad.shape[:-1], -1)


def _plane_transposed(grad: Tensor, packed: Tensor, row_scale: Tensor, col_scale: Tensor) -> Tensor:
    B = signs_to(torch.float32, unpack_bits(packed, col_scale.numel()))
    return (grad * _numbers(row_scale)) @ B * _numbers(col_scale)


_NUM_PLANE_TENSORS = 7
torch.library.register_autograd(_NAME, _backward, setup_context=_keep_planes)


def is_plain_cpu(x: Tensor) -> bool:
    """Tell whether an operation on `x` would do nothing but compute on the CPU: no tracing, mode, transform or subclass.

    Where that is so, and no gradient of `x` is recorded, a kernel may be called as a function instead of through the op.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._dispatch_keys(x).raw_repr() in _PLAIN_KEYS
        and torch._C._dispatch_tls_local_include_set().raw_repr() in _PLAIN_MODES
        and forward_ad._current_level < 0
    )


def _plain_keys() -> tuple[set[int], set[int]]:
    """Return what the dispatcher adds to a plain tensor and to a plain thread, in and out of `torch.inference_mode`."""
    keys, modes = set(), set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            keys.add(torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr())
            modes.add(torch._C._dispatch_tls_local_include_set().raw_repr())
    return keys, modes


_PLAIN_KEYS, _PLAIN_MODES = _plain_keys()
