"""The level `Σ_k ±r_k c_k` nearest to each latent weight, and one step of training those.

A choice is the number of a row of `sign_combinations`: its bits are the signs, the first plane's the highest, 1 for minus.
Latent weights are in units of half the distance between two levels, about, where training starts: the smallest `|r_k c_k|` there
that is not 0. The unit is made from the scales wherever it is needed, since it would take as much memory as the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.cuda.linear import can_fit

BETAS = (0.9, 0.95)
"""How much of its moments Adam keeps from one step to the next."""
EPSILON = 1e-8

PIECE = 1 << 16
"""Elements of a piece of a matrix whose elementwise operations a CPU does in turn: a few of them fit into its cache."""


class Scales(NamedTuple):
    """Scales of K planes: as training found them, and now.

    Attributes:
        r_start, r: [K, out_features] float32.
        c_start, c: [K, in_features] float32.
    """

    r_start: Tensor
    c_start: Tensor
    r: Tensor
    c: Tensor


def sign_combinations(K: int, device: torch.device) -> Tensor:
    """Return all sign vectors [2^K, K], all-positive first."""
    return 1.0 - 2.0 * torch.cartesian_prod(*[torch.tensor([0.0, 1.0], device=device)] * K).reshape(-1, K)


def nearest_choice(W: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """Return the number [out_features, in_features] int16 of the level nearest to each weight; the first of equals.

    Args:
        W: [out_features, in_features] float32.
        r, c: [K, out_features] and [K, in_features] float32, scales.
    """
    if len(r) == 1:
        return (W * (r[0][:, None] * c[0]) < 0).to(torch.int16)
    covered = c[-1] != 0  # by the last plane, which may be a residual plane on few columns
    if not covered.all():
        choice = nearest_choice(W, r[:-1], c[:-1]) << 1
        choice[:, covered] = nearest_choice(W[:, covered], r, c[:, covered])
        return choice
    sizes = r[:, :, None] * c[:, None]  # [K, n, m]
    best = torch.full_like(W, float("inf"))
    choice = torch.zeros(W.shape, dtype=torch.int16, device=W.device)
    for i, signs in enumerate(sign_combinations(len(r), W.device).to(W.dtype)):
        distance = (W - torch.tensordot(signs, sizes, 1)).abs_()
        choice.masked_fill_(distance < best, i)
        best = torch.minimum(best, distance)
    return choice


def signs_of(choice: Tensor, k: int, K: int) -> Tensor:
    """Return the signs ±1 of plane `k` of K, float32, in the shape of `choice`."""
    return 1.0 - 2.0 * ((choice >> (K - 1 - k)) & 1).float()


def _columns_of(c: Tensor) -> slice | Tensor:
    """Return the columns that a plane covers, from its column scales [in_features]."""
    covered = c != 0
    return slice(None) if covered.all() else covered.nonzero().flatten()


def unit_of(r: Tensor, c: Tensor) -> Tensor:
    """Return the unit [out_features, in_features] of latent weights for scales r [K, out_features] and c [K, in_features]."""
    unit = torch.full((r.shape[1], c.shape[1]), torch.inf, device=r.device)
    for r_k, c_k in zip(r.abs(), c.abs(), strict=True):
        columns = _columns_of(c_k)
        size = r_k[:, None] * c_k[columns]
        unit[:, columns] = torch.minimum(unit[:, columns], size.masked_fill_(size == 0, torch.inf))
    return unit.masked_fill_(unit.isinf(), 0)


def nearest_level(latent: Tensor, scales: Scales, W: Tensor) -> Tensor:
    """Write the weight into W and return it: for each latent [out_features, in_features] the level that is nearest to it."""
    if can_fit(latent):
        from .kernels import levels as triton_levels

        return triton_levels.nearest_level(latent, scales, W)
    covered, K = [_columns_of(c) for c in scales.c], len(scales.r)
    for rows in _pieces(latent):
        r, own = scales.r[:, rows], latent[rows].float()
        choice = nearest_choice(own * unit_of(scales.r_start[:, rows], scales.c_start), r, scales.c)
        total = torch.zeros_like(own)
        for k, columns in enumerate(covered):
            total[:, columns] += signs_of(choice[:, columns], k, K) * (r[k][:, None] * scales.c[k][columns])
        W[rows] = total
    return W


def descend(
    gradient: Tensor,
    latent: Tensor,
    moments: tuple[Tensor, Tensor],
    scales: Scales,
    at_scales: tuple[Tensor, Tensor],
    numbers: Tensor,
) -> None:
    """Hand the gradient at a weight on: one step of Adam for the latents, in place, and gradients at the scales.

    It goes straight through the choice of levels to the latents, except where they lie outside all levels; to the scales it goes
    for the signs as chosen. The gradient is 0 afterwards. Latents of bfloat16 are rounded at random, so that small steps count
    on average.

    Args:
        gradient: [out_features, in_features] at the weight, any floating-point dtype.
        latent, moments: the same shape, float32 or bfloat16; Adam's first and second moments.
        scales: of the planes.
        at_scales: [K, out_features] and [K, in_features], get the gradients at r and c; at a c of 0, which stays 0, anything.
        numbers: [4] float32: rate, `1 / (1 - β1^t)`, `1 / (1 - β2^t)`, t: the number of the step, from 1.

    Source: straight-through estimator (arXiv 1308.3432), Adam (arXiv 1412.6980).
    """
    if can_fit(latent):
        from .kernels import levels as triton_levels

        triton_levels.descend(gradient, latent, moments, scales, at_scales, numbers)
        return
    covered = [_columns_of(c) for c in scales.c]
    generator = torch.Generator(latent.device).manual_seed(int(numbers[3])) if latent.dtype == torch.bfloat16 else None
    at_scales[1].zero_()
    for rows in _pieces(latent):
        own = Scales(scales.r_start[:, rows], scales.c_start, scales.r[:, rows], scales.c)
        tensors = gradient[rows], latent[rows], (moments[0][rows], moments[1][rows])
        _descend(*tensors, own, covered, (at_scales[0][:, rows], at_scales[1]), numbers, generator)


def _descend(
    gradient: Tensor,
    latent: Tensor,
    moments: tuple[Tensor, Tensor],
    scales: Scales,
    covered: list[slice | Tensor],
    at_scales: tuple[Tensor, Tensor],
    numbers: Tensor,
    generator: torch.Generator | None,
) -> None:
    """Do `descend` for some rows; the gradient at the column scales is added to what is there.

    Args:
        covered: columns of each plane.
        generator: of the bits that are rounded; None: nothing is.
    """
    unit, G, K = unit_of(scales.r_start, scales.c_start), gradient.float(), len(scales.r)
    value, largest = latent.float() * unit, torch.zeros_like(unit)
    choice = nearest_choice(value, scales.r, scales.c)
    for k, columns in enumerate(covered):
        r, c = scales.r[k], scales.c[k]
        signed = G[:, columns] * signs_of(choice[:, columns], k, K)
        at_scales[0][k] = signed @ c[columns]
        at_scales[1][k, columns] += r @ signed
        largest[:, columns] += r.abs()[:, None] * c[columns].abs()
    G = torch.where(value.abs() <= largest, G * unit, 0)
    first, second = (
        moment.float().lerp_(new, 1 - beta) for moment, new, beta in zip(moments, (G, G * G), BETAS, strict=True)
    )
    step = first * numbers[1] / ((second * numbers[2]).sqrt_() + EPSILON)
    moments[0].copy_(first)
    moments[1].copy_(second)
    latent.copy_(_rounded(latent.float() - numbers[0] * step, generator))
    gradient.zero_()


def _pieces(matrix: Tensor) -> Iterator[slice]:
    """Yield slices of rows whose elementwise operations stay in the cache of a CPU core."""
    rows = max(1, PIECE // matrix.shape[1])
    return (slice(start, start + rows) for start in range(0, len(matrix), rows))


def _rounded(value: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return `value` float32 with the bits that bfloat16 holds, rounded up or down at random, without a bias; None: as it is."""
    if generator is None:
        return value
    low = torch.randint(2**16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    return ((value.view(torch.int32) + low) & -(2**16)).view(torch.float32)
