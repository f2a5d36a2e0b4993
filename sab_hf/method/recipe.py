"""The fit of one Linear: second moments → significance map → significant columns → planes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration import MODALITY_NAMES
from ..config import SABQuantizationConfig
from ..planes import SignPlanes
from .fit import fit_planes, fit_planes_elementwise
from .hessian import InputFactors, inverse_diagonal
from .sensitivity import LinearSensitivity
from .significance import significance_map, significant_columns


@dataclass
class FitRecord:
    """How the fit of one Linear went.

    Attributes:
        name: the module.
        error: `tr(EHEᵀ) / tr(WHWᵀ)`, the relative squared error of its output under the modality-balanced H_Λ.
        tokens: calibration tokens by modality name.
        unimodal_share: r of the significance map.
        column_share: by modality name, the share of the significant columns' score that the modality has; empty without
            significant columns or scores.
        seconds: fitting time.
        fallback: whether this is an expert that saw too few tokens, fitted to those of all experts of its layer.
    """

    name: str
    error: float
    tokens: dict[str, int]
    unimodal_share: float
    column_share: dict[str, float]
    seconds: float
    fallback: bool = False


def fit_linear(
    name: str,
    linear: nn.Linear,
    factors: InputFactors,
    sensitivity: LinearSensitivity | None,
    sizes: list[int],
    config: SABQuantizationConfig,
) -> tuple[SignPlanes, FitRecord]:
    """Fit one Linear.

    Args:
        name: name of the Linear, for the record.
        linear: the Linear with its dense weight.
        factors: of the second moments of its inputs; Linears with the same inputs share them.
        sensitivity: sensitivity of the loss to it; None where it was not measured.
        sizes: [full planes, significant columns].
        config: the method's numbers.
    """
    start = time.perf_counter()
    W = linear.weight.detach().float()
    moments, gradient = factors.moments, None
    if sensitivity and config.significance == "gradient":
        gradient = {m: g.to(W.device) for m, g in sensitivity.gradient.items()}
    significance = significance_map(
        W,
        factors.variances,
        gradient=gradient,
        salient_top_p=config.salient_top_p,
        diff_quantile=config.diff_quantile,
        sparsity_threshold=config.sparsity_threshold,
    )
    H, U, row_weight = factors.mixed, factors.feedback, None
    if config.significance != "none":
        Lambda = significance.column_weight
        H, U = Lambda[:, None] * H * Lambda, U / Lambda  # still the feedback factor of H
    if gradient:
        row_weight = significance.row_weight * torch.stack([_relative(g) for g in gradient.values()]).mean(0)
    weighted = W if row_weight is None else W * row_weight.sqrt()[:, None]
    columns = significant_columns(weighted, 1 / inverse_diagonal(U), sizes[1])
    if config.fit == "elementwise":
        v = torch.ones_like(W) if config.significance == "none" else significance.Lambda.square()
        fit = fit_planes_elementwise(
            W, v, sizes[0], columns, unit_columns=config.portable is not None, alternations=config.alternations
        )
    else:
        fit = fit_planes(
            W,
            H,
            sizes[0],
            columns,
            row_weight=row_weight,
            unit_columns=config.portable is not None,
            alternations=config.alternations,
            block_size=config.block_size,
            U=U,
        )
    return fit.planes, FitRecord(
        name,
        fit.error,
        {MODALITY_NAMES[m]: count for m, count in moments.counts.items()} if moments else {},
        float(significance.unimodal_share),
        _column_share(W, sensitivity, columns) if sizes[1] else {},
        time.perf_counter() - start,
    )


def _relative(gradient: Tensor) -> Tensor:
    """Return a gradient divided by its mean; one that is zero everywhere tells nothing, and counts as even."""
    mean = gradient.mean()
    return torch.where(mean > 0, gradient / mean, 1)


def _column_share(W: Tensor, sensitivity: LinearSensitivity | None, columns: Tensor) -> dict[str, float]:
    """Return, by modality name, its share of the loss at stake in the significant columns."""
    scores = sensitivity.column_scores(W) if sensitivity else {}
    if not scores:
        return {}
    sums = torch.stack([s[columns].sum() for s in scores.values()]).tolist()
    return {MODALITY_NAMES[m]: s / sum(sums) for m, s in zip(scores, sums, strict=True)} if sum(sums) else {}
