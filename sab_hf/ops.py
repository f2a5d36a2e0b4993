"""The custom op `sab::linear`: schema, fake and the PyTorch implementation, which specifies every kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import unpack_bits
from .planes import signs_to


@torch.library.custom_op("sab::linear", mutates_args=())
def sab_linear(
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
        exact: compute in the dtype of `x`; otherwise a device's kernel may round the scaled activations to int8 (with a
            scale per small group of columns) where that is faster. This implementation is exact either way.
    Returns:
        [..., out_features], dtype of `x`.
    """
    residual = (significant_columns, residual_signs, residual_row_scale, residual_col_scale)
    return reference(x, signs, row_scale, col_scale, *residual)


def reference(
    x: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor,
    significant_columns: Tensor | None,
    residual_signs: Tensor | None,
    residual_row_scale: Tensor | None,
    residual_col_scale: Tensor | None,
) -> Tensor:
    """Compute `sab::linear` with PyTorch's own operations, on any device: what every kernel must equal."""
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
