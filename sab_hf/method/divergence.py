"""How far one next-token distribution is from another, and the gradient of that, for many logits in little memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.cuda.linear import can_fit


def divergence(given: Tensor, wanted: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Return `Σ_i counted_i KL(wanted_i ‖ given_i)`, nats, float32, and its gradient [..., vocabulary] at `given`.

    Args:
        given, wanted: [..., vocabulary] logits; what was in `wanted` may be overwritten.
        counted: [...] weights.
    """
    if can_fit(given):
        from .kernels import divergence as triton_divergence

        return triton_divergence.divergence(given, wanted, counted)
    log_p, log_q = wanted.float().log_softmax(-1), given.float().log_softmax(-1)
    rows = nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    gradient = (log_q.exp_() - log_p.exp_()).mul_(counted[..., None])
    return (rows * counted).sum(dtype=torch.float32), gradient.to(given.dtype)
