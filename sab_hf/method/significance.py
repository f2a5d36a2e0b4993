"""The significance-aware binarization map: which weights matter to one modality, which to several."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class SignificanceMap(NamedTuple):
    """The map of one weight matrix.

    Attributes:
        rho: [out_features, in_features] spatial significance, the Hoyer sparsity across modalities; 1 where a single
            modality uses the weight, 0 where all use it alike.
        unimodal, crossmodal: [out_features, in_features] bool, the partition of the significant weights.
        unimodal_share: r, the share of the total saliency that lies in unimodal weights; a number on the device of the rest.
        Lambda: [out_features, in_features] weight of each entry in the objective `‖Λ ⊙ (W − Ŵ)‖²`; its mean is 1.
    """

    rho: Tensor
    unimodal: Tensor
    crossmodal: Tensor
    unimodal_share: Tensor
    Lambda: Tensor

    @property
    def column_weight(self) -> Tensor:
        """Λ of each input feature [in_features] (root mean square down the column), for `H_Λ = diag(Λ) H diag(Λ)`."""
        return self.Lambda.square().mean(0).sqrt()

    @property
    def row_weight(self) -> Tensor:
        """Λ² of each output feature [out_features] (mean along the row), what the error of a row counts."""
        return self.Lambda.square().mean(1)


LEAST_WEIGHT = 0.05
"""Λ is raised to this share of its mean where it is below: a column with Λ = 0 would be fitted to nothing."""


def significance_map(
    W: Tensor,
    variances: dict[int, Tensor],
    *,
    gradient: dict[int, Tensor] | None = None,
    salient_top_p: float,
    diff_quantile: float,
    sparsity_threshold: float,
) -> SignificanceMap:
    """Build the significance-aware binarization map of one Linear.

    Args:
        W: [out_features, in_features] float32.
        variances: `own_variance` [in_features] of the inputs, by modality. With fewer than two modalities
            there is nothing to separate: ρ is 0 and Λ is 1 everywhere, and no weight counts as significant.
        gradient: g_m [out_features] by modality, the mean squared gradient of the loss at each output feature; then
            `S_m[i,j] *= g_m[i]`, and ρ and Λ vary over rows too. None: the paper's S, whose ρ and Λ are constant down a column.
        salient_top_p, diff_quantile, sparsity_threshold: see `SABQuantizationConfig`.

    Source: SAB-LVLM, spatial significance map and modality-guided integration (method §3). Deviation: S is normalized
    by its mean before ρ, and ‖s‖₂ = 0 gives ρ = 0, where the published code adds an absolute epsilon; Λ has mean 1 and
    a floor.
    """
    known = [m for m in variances if gradient is None or m in gradient]
    if len(known) < 2:
        none = torch.zeros_like(W, dtype=torch.bool)
        return SignificanceMap(torch.zeros_like(W), none, none, W.new_zeros(()), torch.ones_like(W))
    S = torch.stack([saliency(W, variances[m], None if gradient is None else gradient[m]) for m in known])
    rho = hoyer_sparsity(S)
    top = max(1, round(salient_top_p * W.numel()))
    significant = torch.stack([S_m >= _smallest(S_m, W.numel() - top + 1) for S_m in S]).any(0)
    spread = S.amax(0) - S.amin(0)  # |S_text − S_visual| for two modalities
    threshold = _smallest(spread, max(1, math.ceil(diff_quantile * W.numel())))
    unimodal = significant & (spread >= threshold) & (rho >= sparsity_threshold)
    total = S.sum(0)
    share = (total * unimodal).sum() / _or_one(total.sum())
    Lambda = share * rho + (1 - share) * (1 - rho)
    mean = Lambda.mean()
    Lambda = torch.where(mean > 0, (Lambda / _or_one(mean)).clamp_min(LEAST_WEIGHT), 1)
    return SignificanceMap(rho, unimodal, significant & ~unimodal, share, Lambda / Lambda.mean())


def _or_one(value: Tensor) -> Tensor:
    """Return what to divide by: a value, or 1 where it is 0. A GPU is not waited for."""
    return torch.where(value > 0, value, 1)


def _smallest(values: Tensor, k: int) -> Tensor:
    """Return the k-th smallest value."""
    if values.is_cuda:  # where `kthvalue` leaves all of a vector to one multiprocessor
        return values.flatten().sort().values[k - 1]
    return values.flatten().kthvalue(k).values


def saliency(W: Tensor, variance: Tensor, gradient: Tensor | None = None) -> Tensor:
    """Return `S[i,j] = g[i] W[i,j]² / [(H + λI)⁻¹]_jj`, divided by its mean; [out_features, in_features].

    Args:
        variance: `1 / [(H + λI)⁻¹]_jj` [in_features].
        gradient: g [out_features]; None for 1.

    Source: Optimal Brain Surgeon's saliency, as SAB-LVLM uses it. Deviation: the factor g, where it is given.
    """
    S = W.square() * variance
    S = S if gradient is None else S * gradient[:, None]
    return S / _or_one(S.mean())


def hoyer_sparsity(S: Tensor) -> Tensor:
    """Return `ρ = (√z − ‖s‖₁/‖s‖₂) / (√z − 1)` over the first axis, the z modalities; 0 where s = 0 or z = 1.

    Args:
        S: [z, ...] nonnegative.
    Returns:
        [...] in [0, 1].
    Source: Hoyer (2004), sparseness; SAB-LVLM's spatial significance map.
    """
    z = S.shape[0]
    if z < 2:
        return torch.zeros_like(S[0])
    peak = S.amax(0)
    s = S / torch.where(peak > 0, peak, 1)  # scale first, so that no absolute epsilon is needed
    ratio = s.sum(0) / s.square().sum(0).sqrt()
    return torch.where(peak > 0, (math.sqrt(z) - ratio) / (math.sqrt(z) - 1), 0).clamp(0, 1)


def significant_columns(W: Tensor, variance: Tensor, num_columns: int) -> Tensor:
    """Mark the columns that get a residual plane: the most sensitive ones under H, `‖W[:, j]‖² / [H⁻¹]_jj`.

    Args:
        W: [out_features, in_features] float32.
        variance: [in_features], `1 / [H⁻¹]_jj` for H the damped second moments, Λ folded in.
        num_columns: how many, k.
    Returns:
        [in_features] bool with k entries set.
    """
    mask = torch.zeros(W.shape[1], dtype=torch.bool, device=W.device)
    if num_columns == 0:
        return mask
    score = W.square().sum(0) * variance
    mask[score.argsort(descending=True, stable=True)[:num_columns]] = True
    return mask
