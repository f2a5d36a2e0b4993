"""Block refinement: train the planes of one block until the block gives the full-precision block's output."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .calibration import PADDING
from .capture import BatchState, block_output
from .linear import SABLinear, replace_module
from .planes import SignPlanes, signs_to

logger = logging.getLogger(__name__)

LATENT_START = 0.5
"""Magnitude that the latent weight behind each sign starts with; the sign flips when training carries it past 0."""


@dataclass(frozen=True)
class RefineSettings:
    """Numbers of block refinement; see `SABQuantizationConfig`."""

    steps: int
    samples_per_step: int
    scale_rate: float
    latent_rate: float
    seed: int


class RefineResult(NamedTuple):
    """Relative squared error of the block's output before and after: `Σ‖y − t‖² / Σ‖t‖²`, modalities in equal parts."""

    before: float
    after: float


class TrainablePlanes(nn.Module):
    """A Linear whose weight is made of sign planes that can be trained.

    Signs are those of a latent weight, with a straight-through gradient where |latent| ≤ 1. Scales are trained relative to
    where they start, so that one learning rate suits all.

    Args:
        planes: where to start.
        bias: [out_features] or None.
    """

    def __init__(self, planes: SignPlanes, bias: Tensor | None):
        super().__init__()
        self.latent = nn.Parameter(signs_to(torch.float32, planes.signs) * LATENT_START)
        self.register_buffer("row_start", planes.row_scale.float())
        self.register_buffer("col_start", planes.col_scale.float())
        self.row_change = nn.Parameter(torch.zeros_like(self.row_start))
        self.col_change = nn.Parameter(torch.zeros_like(self.col_start))
        self.significant_columns = planes.significant_columns
        self.residual: TrainablePlanes | None = None
        if planes.num_significant:
            residual = SignPlanes(
                planes.residual_signs[None], planes.residual_row_scale[None], planes.residual_col_scale[None]
            )
            self.residual = TrainablePlanes(residual, None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        self._built: Tensor | None = None
        self._leaf: Tensor | None = None

    def scales(self) -> tuple[Tensor, Tensor]:
        """Return the row scales [K, out_features] and column scales [K, in_features]."""
        return self.row_start * (1 + self.row_change), self.col_start * (1 + self.col_change)

    def weight(self) -> Tensor:
        """Return the dense weight [out_features, in_features] with gradients to signs and scales."""
        r, c = self.scales()
        W = torch.einsum("kn,knm,km->nm", r, _StraightThroughSign.apply(self.latent), c)
        if self.residual is not None:
            W = W.index_add(1, self.significant_columns.nonzero()[:, 0], self.residual.weight())
        return W

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

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._leaf, self.bias)

    @torch.no_grad()
    def planes(self) -> SignPlanes:
        """Return the trained planes."""
        r, c = self.scales()
        residual = {}
        if self.residual is not None:
            inner = self.residual.planes()
            residual = {
                "significant_columns": self.significant_columns,
                "residual_signs": inner.signs[0],
                "residual_row_scale": inner.row_scale[0],
                "residual_col_scale": inner.col_scale[0],
            }
        return SignPlanes(self.latent >= 0, r.detach(), c.detach(), **residual)


class _StraightThroughSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latent: Tensor) -> Tensor:
        ctx.save_for_backward(latent)
        return signs_to(latent.dtype, latent >= 0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (latent,) = ctx.saved_tensors
        return gradient * (latent.abs() <= 1)


def refine_block(
    model: nn.Module,
    block: nn.Module,
    index: int,
    planes: dict[str, SignPlanes],
    states: list[BatchState],
    settings: RefineSettings,
) -> RefineResult:
    """Train planes, norms and biases of a block to give the full-precision block's output, and pack the planes into it.

    Where training does not lower the error, the block is packed as it was before, and a warning says so.

    Args:
        model: the model; its Linears called as in `planes` become `SABLinear`s.
        block: the block that they are in.
        index: its place among the blocks.
        planes: fitted planes of the block's Linears, by module name.
        states: calibration batches, with the block's inputs `hidden` and the wanted outputs `target`.
        settings: steps and rates.
    Returns:
        The relative output error before and after.
    Raises:
        RuntimeError: out of memory; the message says what to lower.

    Source: block reconstruction (BRECQ, arXiv 2102.05426) with straight-through signs; method §5.
    """
    trainable = {name: TrainablePlanes(planes[name], model.get_submodule(name).bias) for name in planes}
    biases = {name: model.get_submodule(name).bias for name in planes}
    for name, module in trainable.items():
        replace_module(model, name, module)
    others = {name: p for name, p in block.named_parameters() if not name.startswith(_prefixes(block, trainable))}
    start = {name: (p.detach().clone(), p.requires_grad) for name, p in others.items()}
    for p in others.values():
        p.data = p.data.float()
        p.requires_grad_(True)
    try:
        result = _train(block, index, trainable, list(others.values()), states, settings)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"out of memory while refining block {index}; lower `batch_size` (activations) or `max_length`, or set "
            "`refine_steps=0`"
        ) from error
    refined = result.after < result.before  # False also for NaN
    if not refined:
        logger.warning(
            "refining block %d did not lower its error (%.4f, then %.4f); it stays unrefined", index, *result
        )
        result = RefineResult(result.before, result.before)
    for name, p in others.items():
        value, requires_grad = start[name]
        p.data = p.data.to(value.dtype) if refined else value
        p.requires_grad_(requires_grad)
    for name, module in trainable.items():
        bias = biases[name]
        if refined and bias is not None:
            bias = module.bias.detach().to(bias.dtype)
        replace_module(model, name, SABLinear.from_planes(module.planes() if refined else planes[name], bias))
    return result


def _train(
    block: nn.Module,
    index: int,
    modules: dict[str, TrainablePlanes],
    others: list[nn.Parameter],
    states: list[BatchState],
    settings: RefineSettings,
) -> RefineResult:
    scale = _TokenWeights(states)
    before = _mean_error(block, index, modules, states, scale)
    optimizer = _optimizer(modules, others, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    )
    draws = _draw_batches(states, settings)
    for _ in range(settings.steps):
        optimizer.zero_grad(set_to_none=True)
        with _building(modules):
            for state in next(draws):
                _error(block, index, state, scale).backward()
        optimizer.step()
        schedule.step()
    return RefineResult(before, _mean_error(block, index, modules, states, scale))


def _prefixes(block: nn.Module, modules: dict[str, TrainablePlanes]) -> tuple[str, ...]:
    """Return the beginnings of the names that the modules' parameters have within the block."""
    inside = {module: name for name, module in block.named_modules()}
    return tuple(f"{inside[module]}." for module in modules.values())


class _TokenWeights:
    """Weights that make the summed squared errors of a whole set `Σ‖y − t‖² / Σ‖t‖²`, modalities in equal parts."""

    def __init__(self, states: list[BatchState]):
        power: dict[int, float] = {}
        for state in states:
            squares = state.target.float().square().sum(-1)
            for m in state.modality.unique().tolist():
                if m != PADDING:
                    power[m] = power.get(m, 0.0) + float(squares[..., state.modality == m].sum())
        self.by_modality = {m: 1 / (len(power) * max(total, 1e-30)) for m, total in power.items()}

    def of(self, modality: Tensor) -> Tensor:
        weights = torch.zeros(modality.shape, device=modality.device)
        for m, weight in self.by_modality.items():
            weights[modality == m] = weight
        return weights


def _error(block: nn.Module, index: int, state: BatchState, scale: _TokenWeights) -> Tensor:
    device = state.hidden.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        output = block_output(block, index, state, state.hidden.float())
    squares = (output.float() - state.target.float()).square().sum(-1)
    return (squares * scale.of(state.modality)).sum()


@torch.no_grad()
def _mean_error(
    block: nn.Module, index: int, modules: dict[str, TrainablePlanes], states: list[BatchState], scale: _TokenWeights
) -> float:
    with _building(modules):
        return sum(float(_error(block, index, state, scale)) for state in states)


@contextmanager
def _building(modules: dict[str, TrainablePlanes]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules.values():
            stack.enter_context(module.step())
        yield


def _optimizer(
    modules: dict[str, TrainablePlanes], others: list[nn.Parameter], settings: RefineSettings
) -> torch.optim.Optimizer:
    named = [item for module in modules.values() for item in module.named_parameters()]
    latents = [p for name, p in named if name.endswith("latent")]
    scales = [p for name, p in named if not name.endswith("latent")]
    groups = [{"params": latents, "lr": settings.latent_rate}, {"params": scales + others, "lr": settings.scale_rate}]
    return torch.optim.Adam(groups, betas=(0.9, 0.95))


def _draw_batches(states: list[BatchState], settings: RefineSettings) -> Iterator[list[BatchState]]:
    """Yield batches of at least `samples_per_step` samples (all, if there are fewer), epoch after epoch, shuffled."""
    generator = torch.Generator().manual_seed(settings.seed)
    total = sum(state.modality.shape[0] for state in states)
    drawn: list[BatchState] = []
    while True:
        for i in torch.randperm(len(states), generator=generator).tolist():
            drawn.append(states[i])
            if sum(state.modality.shape[0] for state in drawn) >= min(settings.samples_per_step, total):
                yield drawn
                drawn = []
