"""The level `Σ_k ±r_k c_k` nearest to each latent weight, and one step of training those.

A choice is the number of a row of `sign_combinations`: its bits are the signs, the first plane's the highest, 1 for minus.
Latent weights are in units of half the distance between two levels, about, where training starts: the smallest `|r_k c_k|` there
that is not 0. The unit is made from the scales wherever it is needed, since it would take as much memory as the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.cpu import levels as cpu_levels
from ..kernels.cuda.linear import can_fit

BETAS = (0.9, 0.95)
"""How much of its moments Adam keeps from one step to the next."""
EPSILON = 1e-8


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
    places = torch.arange(K - 1, -1, -1, device=device)
    return 1.0 - 2.0 * (torch.arange(2**K, device=device)[:, None] >> places & 1).float()


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
    if cpu_levels.can_fit(latent, W):
        return cpu_levels.nearest_level(latent, scales, W)
    choice = nearest_choice(latent.float() * unit_of(scales.r_start, scales.c_start), scales.r, scales.c)
    K, total = len(scales.r), torch.zeros(latent.shape, device=latent.device)
    for k in range(K):
        columns = _columns_of(scales.c[k])
        total[:, columns] += signs_of(choice[:, columns], k, K) * (scales.r[k][:, None] * scales.c[k][columns])
    return W.copy_(total)


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
    if cpu_levels.can_fit(latent, gradient, *moments, *at_scales):
        cpu_levels.descend(gradient, latent, moments, scales, at_scales, numbers, BETAS, EPSILON)
        return
    unit, G, K = unit_of(scales.r_start, scales.c_start), gradient.float(), len(scales.r)
    value, largest = latent.float() * unit, torch.zeros_like(unit)
    choice = nearest_choice(value, scales.r, scales.c)
    for k in range(K):
        columns, r, c = _columns_of(scales.c[k]), scales.r[k], scales.c[k]
        signed = G[:, columns] * signs_of(choice[:, columns], k, K)
        at_scales[0][k] = signed @ c[columns]
        at_scales[1][k] = 0  # where a plane has no scale it needs no gradient
        at_scales[1][k, columns] = r @ signed
        largest[:, columns] += r.abs()[:, None] * c[columns].abs()
    G = torch.where(value.abs() <= largest, G * unit, 0)
    first, second = (
        moment.float().lerp_(new, 1 - beta) for moment, new, beta in zip(moments, (G, G * G), BETAS, strict=True)
    )
    step = first * numbers[1] / ((second * numbers[2]).sqrt_() + EPSILON)
    moments[0].copy_(first)
    moments[1].copy_(second)
    latent.copy_(_rounded(latent.float() - numbers[0] * step, latent.dtype, int(numbers[3])))
    gradient.zero_()


def _rounded(value: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Return `value` float32 with the bits that `dtype` holds: bfloat16 is rounded up or down at random, without a bias."""
    if dtype != torch.bfloat16:
        return value
    generator = torch.Generator(value.device).manual_seed(seed)
    low = torch.randint(2**16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    return ((value.view(torch.int32) + low) & -(2**16)).view(torch.float32)
