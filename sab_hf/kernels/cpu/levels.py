"""Weights made of trainable signs on a CPU, by the compiled kernels: `method/levels.py` says what is computed."""

from __future__ import annotations

from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from . import library


def can_fit(latent: Tensor, *others: Tensor) -> bool:
    """Tell whether the kernels are there, and take these matrices: float32 ones on the CPU, contiguous."""
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in (latent, *others))
    return plain and latent.numel() > 0 and library.load() is not None


def nearest_level(latent: Tensor, scales: tuple[Tensor, ...], W: Tensor) -> Tensor:
    """Write the level nearest to each latent into W, and return it.

    Args:
        latent, W: [out_features, in_features].
        scales: r and c as training found them, then as they are: [K, out_features] and [K, in_features].
    """
    _run(latent, scales, weight=W)
    return W


def descend(
    gradient: Tensor,
    latent: Tensor,
    moments: tuple[Tensor, Tensor],
    scales: tuple[Tensor, ...],
    at_scales: tuple[Tensor, Tensor],
    numbers: Tensor,
    betas: tuple[float, float],
    epsilon: float,
) -> None:
    """Hand the gradient at a weight on, as `method.levels.descend`. Results do not depend on the number of threads.

    Args:
        gradient, latent, moments: [out_features, in_features].
        scales: as in `nearest_level`.
        at_scales: [K, out_features] and [K, in_features].
        numbers: rate, corrections of the moments, step.
        betas, epsilon: of Adam.
    """
    rate, correction1, correction2, _ = numbers.tolist()
    _run(
        latent, scales, gradient=gradient, first=moments[0], second=moments[1], row_gradient=at_scales[0],
        column_gradient=at_scales[1], rate=rate, correction1=correction1, correction2=correction2, beta1=betas[0],
        beta2=betas[1], epsilon=epsilon,
    )  # fmt: skip


def _run(latent: Tensor, scales: tuple[Tensor, ...], **more: Any) -> None:
    """Call the kernel.

    Raises:
        MemoryError: there is none for its sums.
    """
    scales = [scale.contiguous() for scale in scales]  # alive until the kernel returns
    named = zip(("row_start", "column_start", "row_scale", "column_scale"), scales, strict=True)
    given = {"latent": latent, **dict(named), **more}
    fields = {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in given.items()}
    levels = library.Levels(latent.shape[0], latent.shape[1], len(scales[0]), **fields)
    if library.load().sab_cpu_levels(byref(levels), torch.get_num_threads()):
        raise MemoryError(f"no memory for the sums over a matrix of {latent.shape[0]} by {latent.shape[1]}")
