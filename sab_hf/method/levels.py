"""The level `Σ_k ±r_k c_k` nearest to each weight, and gradients through that choice.

A choice is the number of a row of `sign_combinations`: its bits are the signs, the first plane's the highest, 1 for minus.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.cuda.linear import can_fit


def sign_combinations(K: int, device: torch.device) -> Tensor:
    """Return all sign vectors [2^K, K], all-positive first."""
    return 1.0 - 2.0 * torch.cartesian_prod(*[torch.tensor([0.0, 1.0], device=device)] * K).reshape(-1, K)


def nearest_choice(W: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """Return the number [out_features, in_features] int16 of the level nearest to each weight; the first of equals.

    Args:
        W: [out_features, in_features] float32.
        r, c: [K, out_features] and [K, in_features] float32, scales.
    """
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


class NearestLevel(torch.autograd.Function):
    """`W = Σ_k B_k r_k c_k` with the signs that come nearest to `latent · unit`.

    Gradients go straight through the choice to the latent, except where it lies outside all levels; to the scales they go
    for the signs as chosen.
    """

    @staticmethod
    def forward(ctx, latent: Tensor, unit: Tensor, r: Tensor, c: Tensor) -> Tensor:
        """Return W [out_features, in_features].

        Args:
            latent, unit: [out_features, in_features] float32; unit takes no gradient.
            r, c: [K, out_features] and [K, in_features] float32.
        """
        if can_fit(latent):
            from .kernels import levels as triton_levels

            W, choice, inside = triton_levels.nearest_level(latent, unit, r, c)
        else:
            W, choice, inside = nearest_level(latent, unit, r, c)
        ctx.save_for_backward(choice, inside, unit, r, c)
        return W

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        choice, inside, unit, r, c = ctx.saved_tensors
        if can_fit(gradient):
            from .kernels import levels as triton_levels

            at_latent, at_r, at_c = triton_levels.gradients(gradient.contiguous(), choice, inside, unit, r, c)
        else:
            at_latent, at_r, at_c = gradients(gradient, choice, inside, unit, r, c)
        return at_latent, None, at_r, at_c


def nearest_level(latent: Tensor, unit: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return W, the choices int16, and bool where the latent lies between the outermost levels, each like `latent`."""
    K, value = len(r), latent * unit
    choice = nearest_choice(value, r, c)
    W, largest = torch.zeros_like(value), torch.zeros_like(value)
    for k in range(K):
        size = r[k][:, None] * c[k]
        W.addcmul_(signs_of(choice, k, K), size)
        largest += size.abs_()
    return W, choice, value.abs_() <= largest


def gradients(
    gradient: Tensor, choice: Tensor, inside: Tensor, unit: Tensor, r: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients at latent, r and c for that at W [out_features, in_features]."""
    K, at_r, at_c = len(r), torch.empty_like(r), torch.empty_like(c)
    for k in range(K):
        signed = gradient * signs_of(choice, k, K)
        at_r[k], at_c[k] = signed @ c[k], r[k] @ signed
    return torch.where(inside, gradient * unit, 0), at_r, at_c
