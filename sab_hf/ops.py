"""The custom op `sab::linear`: schema, fake and the PyTorch implementation, which specifies every kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import unpack_bits
from .planes import signs_to


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
            col_scale: [K, in_features] float16: the full planes, as in `packing.py`.
        significant_columns: [⌈in_features/8⌉] uint8, residual_signs: [out_features, ⌈k/8⌉] uint8,
            residual_row_scale: [out_features] float16, residual_col_scale: [k] float16: the residual plane, or None.
        exact: compute in the dtype of `x`; otherwise a device's kernel may round the scaled activations to integers (with
            a scale per small group of columns) where that is faster. This implementation is exact either way.
    Returns:
        [..., out_features], dtype of `x`.
    """
    in_features = check_width(x, col_scale)
    inputs = x.reshape(-1, in_features).float()
    y = torch.zeros(inputs.shape[0], signs.shape[1], dtype=torch.float32, device=x.device)
    for packed, r, c in zip(signs, row_scale, col_scale, strict=True):
        y += _plane_matmul(inputs, packed, r, c)
    if significant_columns is not None:
        mask = unpack_bits(significant_columns, in_features)
        columns = torch.nonzero_static(mask, size=residual_col_scale.numel()).squeeze(1)  # no wait for the device
        y += _plane_matmul(inputs[:, columns], residual_signs, residual_row_scale, residual_col_scale)
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


sab_linear = torch.library.custom_op("sab::linear", linear_reference, mutates_args=())


def check_width(x: Tensor, col_scale: Tensor) -> int:
    in_features = col_scale.shape[1]
    torch._check(x.shape[-1] == in_features, lambda: f"input has {x.shape[-1]} features, not {in_features}")
    return in_features


def _plane_matmul(x: Tensor, packed: Tensor, row_scale: Tensor, col_scale: Tensor) -> Tensor:
    B = signs_to(torch.float32, unpack_bits(packed, col_scale.numel()))
    return (x * col_scale.float()) @ B.T * row_scale.float()


@sab_linear.register_fake
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
    return x.new_empty(*x.shape[:-1], signs.shape[1])


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
    return (grad * row_scale.float()) @ B * col_scale.float()


_NUM_PLANE_TENSORS = 7
sab_linear.register_autograd(_backward, setup_context=_keep_planes)
