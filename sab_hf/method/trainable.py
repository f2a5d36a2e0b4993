"""A Linear whose weight is made of sign planes that can be trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..planes import SignPlanes
from .fit import PlaneState, from_sign_planes, nearest_signs, to_sign_planes
from .levels import NearestLevel

LATENT_START = 0.5
"""How far, at most, a latent weight starts from its level, towards the dense weight, in halves of a level's distance."""


class TrainablePlanes(nn.Module):
    """A Linear whose weight is made of sign planes that can be trained.

    Behind each weight is a latent one; the weight is the level `Σ_k ±r_k c_k` nearest to it, and gradients go straight
    through to the latent, except where it lies outside all levels. With one plane the level is the latent's sign. Scales are
    trained relative to where they start, so that one learning rate suits all.

    Args:
        planes: where to start.
        W: [out_features, in_features], the dense weight that they stand for.
        bias: [out_features] or None.
    """

    def __init__(self, planes: SignPlanes, W: Tensor, bias: Tensor | None):
        super().__init__()
        state = from_sign_planes(planes)
        self.register_buffer("row_start", state.r)
        self.register_buffer("col_start", state.c)
        self.free, self.has_residual = state.free, state.has_residual
        self.row_change = nn.Parameter(torch.zeros_like(state.r))
        self.col_change = nn.Parameter(torch.zeros_like(state.c))
        sizes = (state.r[:, :, None] * state.c[:, None]).abs()  # [K, n, m]
        unit = torch.where(sizes > 0, sizes, torch.inf).amin(0)
        unit[unit.isinf()] = 0
        self.register_buffer("unit", unit)  # half the distance between two levels, about
        level = torch.where(unit > 0, state.dense() / unit, 0)
        self.latent = nn.Parameter(_latent_start(W, level, unit, sizes.sum(0)))
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        self._built: Tensor | None = None
        self._leaf: Tensor | None = None

    def scales(self) -> tuple[Tensor, Tensor]:
        """Return the present r [K, out_features] and c [K, in_features], with gradients to their changes."""
        return self.row_start * (1 + self.row_change), self.col_start * (1 + self.col_change)

    def weight(self) -> Tensor:
        """Return the dense weight [out_features, in_features] with gradients to latent weights and scales."""
        return NearestLevel.apply(self.latent, self.unit, *self.scales())

    @contextmanager
    def step(self) -> Iterator[None]:
        """Build the weight once for all forward and backward passes of a step, and hand their gradient on at its end."""
        self._built = self.weight()
        self._leaf = self._built.detach().requires_grad_(self._built.requires_grad)
        try:
            yield
            if self._leaf.grad is not None:
                self._built.backward(self._leaf.grad)
        finally:
            self._built = self._leaf = None

    def forget_gradient(self) -> None:
        """Drop what the passes of this step have added so far."""
        self._leaf.grad = None

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self._leaf, self.bias)

    @torch.no_grad()
    def planes(self) -> SignPlanes:
        """Return the trained planes."""
        state = PlaneState(torch.empty(0), *self.scales(), self.free, self.has_residual)
        state.B = nearest_signs(self.latent * self.unit, state)
        return to_sign_planes(state)


def _latent_start(W: Tensor, level: Tensor, unit: Tensor, largest: Tensor) -> Tensor:
    """Return where the latent weights start, in units of `unit`: between their level and the dense weight."""
    pull = torch.where(unit > 0, W / unit, 0) - level
    start = level + pull.clamp(-LATENT_START, LATENT_START)
    bound = torch.where(unit > 0, largest / unit, 1)
    return start.clamp(-bound, bound)


@contextmanager
def building(modules: dict[str, TrainablePlanes]) -> Iterator[None]:
    """Build the weights of all modules once for the passes of a step."""
    with ExitStack() as stack:
        for module in modules.values():
            stack.enter_context(module.step())
        yield
