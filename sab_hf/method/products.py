"""Products of sign matrices: on tensor cores where there are any, and no less exact there than in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .hessian import multiplies_wide

LEAST_OPERATIONS = 2**33
"""Multiplications from which tensor cores pay: the operands are taken apart first."""
_DEPTH = 2048
"""Columns of the signs that are multiplied at once; what their operand is taken apart into takes 6 bytes a number."""


def signs_times(B: Tensor, c: Tensor, M: Tensor) -> Tensor:
    """Return `(B ⊙ c) M` [n, p] for signs B ±1.

    Tensor cores multiply bfloat16 exactly and sum in float32. Signs are exact in bfloat16, and each number of `c ⊙ M` is the sum
    of three of them, so that the product is that of float32.

    Args:
        B: [n, m] ±1, floating point.
        c: [m] scales of the columns of B.
        M: [m, p].
    """
    (n, m), p = B.shape, M.shape[1]
    if n * m * p < LEAST_OPERATIONS or M.dtype != torch.float32 or not multiplies_wide(M.device, torch.bfloat16):
        return (B * c) @ M
    total = torch.zeros(n, p, device=M.device)
    for start in range(0, m, _DEPTH):
        part = slice(start, start + _DEPTH)
        signs = B[:, part].bfloat16().repeat(1, 3)
        total += torch.mm(signs, torch.cat(in_three(c[part, None] * M[part])), out_dtype=torch.float32)
    return total


def in_three(values: Tensor) -> list[Tensor]:
    """Return three bfloat16 tensors whose sum is `values` float32, to the last bit where that is not next to underflow."""
    parts, rest = [], values
    for _ in range(3):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1]
    return parts
