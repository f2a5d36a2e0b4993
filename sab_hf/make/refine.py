"""Block refinement: train the planes of one block until the block gives the full-precision block's output."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..calibration import PADDING
from ..machine import distributed
from ..method.trainable import PlanesAdam
from ..passes.capture import BlockInputs
from ..passes.states import BatchState, block_output
from ..planes import SignPlanes
from .settings import RefineSettings
from .trainees import Trainees

logger = logging.getLogger(__name__)

TURNS = 8
"""Batches of so many remainders are drawn in turn."""


class RefineResult(NamedTuple):
    """Relative squared error of the block's output before and after: `Σ‖y − t‖² / Σ‖t‖²`, modalities in equal parts."""

    before: float
    after: float


def refine_block(
    model: nn.Module,
    block: nn.Module,
    index: int,
    planes: dict[str, SignPlanes],
    inputs: BlockInputs,
    settings: RefineSettings,
    gradient: dict[int, Tensor] | None = None,
) -> RefineResult:
    """Train planes, norms and biases of a block to give the full-precision block's output, and pack the planes into it.

    Where training does not lower the error, the block is packed as it was before, and a warning says so. Where it ends with an
    error, the block is as it was given. Matrices that stay dense are not trained.

    Args:
        model: the model; its Linears called as in `planes` become `SABLinear`s.
        block: the block that they are in.
        index: its place among the blocks.
        planes: fitted planes of the block's Linears, by module name.
        inputs: calibration batches, with the block's inputs `hidden` and the wanted outputs `target`; those that the model leaves
            the block out for do not count. Each process of several has its own; gradients and errors are summed over all.
        settings: steps and rates.
        gradient: modality → [hidden_size], weights of the error at each output feature; None: modalities in equal parts, which
            also holds where they are of modalities that do not come.
    Returns:
        The relative output error before and after.
    Raises:
        RuntimeError: out of memory; the message says what to lower.

    Source: block reconstruction (BRECQ, arXiv 2102.05426) with straight-through signs; method §5.
    """
    weights = {name: model.get_submodule(name).weight for name in planes}
    trainees = Trainees(model, [block], dict(planes), weights)
    try:
        result = _train(block, index, trainees, inputs, settings, gradient)
    except BaseException as error:
        trainees.give_back()
        if isinstance(error, torch.OutOfMemoryError):
            raise RuntimeError(
                f"out of memory while refining block {index}; lower `batch_size` (activations) or `max_length`, or set "
                "`refine_steps=0`"
            ) from error
        raise
    if result.after < result.before:  # False also for NaN
        trainees.pack()
        return result
    logger.warning("refining block %d did not lower its error (%.4f, then %.4f); it stays unrefined", index, *result)
    trainees.pack_start()
    return RefineResult(result.before, result.before)


def _train(
    block: nn.Module,
    index: int,
    trainees: Trainees,
    inputs: BlockInputs,
    settings: RefineSettings,
    gradient: dict[int, Tensor] | None,
) -> RefineResult:
    weights = _ErrorWeights(inputs, index, gradient)
    before = _mean_error(block, index, inputs, weights)
    adam = trainees.adam(settings.latent_rate, settings.scale_rate)
    own = {state.number: state for state in inputs.running(index)}
    draws = draw_batches(
        distributed.merge({number: state.rows for number, state in own.items()}),
        settings.samples_per_step,
        settings.seed,
    )
    for step in inputs.workspace.bar.over(range(settings.steps)):
        drawn = [own[number] for number in next(draws) if number in own]
        _accumulate_gradients(block, index, adam, drawn, inputs, weights)
        distributed.sum_gradients(adam.gradients())
        adam.prepare(0.5 * (1 + math.cos(math.pi * step / settings.steps)))
        adam.step()
    return RefineResult(before, _mean_error(block, index, inputs, weights))


def _accumulate_gradients(
    block: nn.Module,
    index: int,
    adam: PlanesAdam,
    drawn: list[BatchState],
    inputs: BlockInputs,
    weights: _ErrorWeights,
) -> None:
    """Add up the gradients of the drawn batches, in parts where memory asks for it."""

    def run() -> None:
        for state in drawn:
            for piece in state.pieces(index):
                _error(block, index, piece, weights).backward()

    largest = max((state.rows for state in drawn), default=1)
    inputs.workspace.limit.retry(f"refining block {index}", largest, run, adam.clear)


class _ErrorWeights:
    """Weights that make the summed squared errors of a whole set a relative error, `Σ w (y − t)² / Σ w t²`.

    Args:
        inputs: the set, with targets; of several processes, each has its part.
        index: of the block.
        gradient: modality → [hidden_size], the weight w of each feature; None: w is 1 and modalities have equal parts.
    """

    def __init__(self, inputs: BlockInputs, index: int, gradient: dict[int, Tensor] | None):
        power: dict[int, Tensor] = {}
        for state in inputs.running(index):
            squares = state.target.to(inputs.workspace.device).float().square()
            modality = state.modality.to(squares.device)
            for m in modality.unique().tolist():
                if m != PADDING:
                    power[m] = power.get(m, 0) + squares[..., modality == m, :].flatten(0, -2).sum(0)
        power = distributed.sum_tensors(power, inputs.workspace.device)
        if gradient is None or not gradient.keys() & power.keys():
            self.by_modality = {
                m: torch.ones_like(p) / (len(power) * p.sum().clamp_min(1e-30)) for m, p in power.items()
            }
        else:
            gradient = {m: g.to(inputs.workspace.device) for m, g in gradient.items()}
            total = sum((gradient[m] * power[m]).sum() for m in power if m in gradient)
            self.by_modality = {m: gradient[m] / total.clamp_min(1e-30) for m in power if m in gradient}

    def error(self, output: Tensor, state: BatchState) -> Tensor:
        """Return the weighted squared error of a batch's output [..., batch, length, hidden_size]."""
        squares = (output.float() - state.target.float()).square()
        return sum((squares @ weight)[..., state.modality == m].sum() for m, weight in self.by_modality.items())


def _error(block: nn.Module, index: int, state: BatchState, weights: _ErrorWeights) -> Tensor:
    device = state.hidden.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        output = block_output(block, index, state, state.hidden.float())
    return weights.error(output, state)


@torch.no_grad()
def _mean_error(block: nn.Module, index: int, inputs: BlockInputs, weights: _ErrorWeights) -> float:
    def run(state: BatchState) -> float:
        return sum(float(_error(block, index, piece, weights)) for piece in state.pieces(index))

    limit, what = inputs.workspace.limit, f"measuring block {index}"
    own = sum(limit.retry(what, state.rows, lambda state=state: run(state)) for state in inputs.running(index))
    return distributed.sum_numbers({"error": own})["error"]


def draw_batches(sizes: dict[int, int], samples_per_step: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of at least `samples_per_step` samples (all, if there are fewer), epoch after epoch, shuffled.

    Numbers with the same remainder by `TURNS` come in turn. Batches are dealt out to processes by number, so two, four or eight
    of them have equal parts of the steps, and the batches of a step are those of one process.

    Args:
        sizes: batch number → samples, of all processes.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers, total = list(sizes), sum(sizes.values())
    drawn: list[int] = []
    while True:
        for number in _in_turn([numbers[i] for i in torch.randperm(len(numbers), generator=generator).tolist()]):
            drawn.append(number)
            if sum(sizes[number] for number in drawn) >= min(samples_per_step, total):
                yield drawn
                drawn = []


def _in_turn(numbers: list[int]) -> list[int]:
    """Return shuffled numbers with those of each remainder by `TURNS` in turn; the order among equal ones stays."""
    seen: Counter[int] = Counter()
    places = {}
    for number in numbers:
        remainder = number % TURNS
        places[number] = seen[remainder], remainder
        seen[remainder] += 1
    return sorted(numbers, key=places.get)
