"""Where the bits go: planes and significant columns of every matrix for a number of stored bits per weight."""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import MAX_PLANES
from ..packing import stored_bytes

DEFAULT_FRACTION = 0.1
"""Share of columns with a residual plane when no budget is given (published methods: 5 to 10 % salient weights)."""

REMAINING_ERROR = (1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 6.4e-4, 1.6e-4, 4.1e-5, 1e-5)
"""Share of a column's energy that is left after K planes: the distortion of the best quantizer of a Gaussian with 2^K levels.
Source: Max, Quantizing for minimum distortion (1960), table II; from 6 planes on a quarter each."""

STEP = 8
"""Columns are bought by whole bytes of a packed row; a part byte costs as much."""

Sizes = dict[str, list[int]]
"""Module name → [full planes, significant columns]."""


def allocate(shapes: dict[str, tuple[int, int]], bits: float | None, scores: dict[str, Tensor] | None = None) -> Sizes:
    """Spend a budget over all matrices: full planes and columns with a residual plane.

    Args:
        shapes: name → (out_features, in_features).
        bits: stored bits per weight, averaged over all matrices; met from below. None: as many as one plane and a tenth of
            the columns of every matrix take.
        scores: name → [in_features], the loss at stake in each column (`LinearSensitivity.column_scores`, summed): bits
            then go where they lower the loss most. None, or a matrix without scores: the same share of columns everywhere.
    Raises:
        ValueError: the budget is below one plane everywhere or above the most planes; the message states floor and ceiling.
    """
    if bits is None:
        bits = average_bits(shapes, _uniform(shapes, 1, DEFAULT_FRACTION))
    check_budget(shapes, bits)
    if scores is None or scores.keys() != shapes.keys() or not any(bool(s.any()) for s in scores.values()):
        return _allocate_evenly(shapes, bits)
    menus = {name: _menu(shape, scores[name]) for name, shape in shapes.items()}
    return _buy(shapes, menus, bits * sum(n * m for n, m in shapes.values()) / 8)


def check_budget(shapes: dict[str, tuple[int, int]], bits: float) -> None:
    """Raise a ValueError, with floor and ceiling, if no allocation meets `bits`."""
    floor = average_bits(shapes, _uniform(shapes, 1, 0.0))
    ceiling = average_bits(shapes, _uniform(shapes, MAX_PLANES, 0.0))
    if bits < floor:
        raise ValueError(
            f"`bits` must be at least {math.ceil(floor * 1000) / 1000} for this model (one sign plane and its scales), got "
            f"{bits}; raise it, or add small layers, whose scales take most of their bits, to `modules_to_not_convert`"
        )
    if bits > ceiling:
        raise ValueError(
            f"`bits` must be at most {math.floor(ceiling * 1000) / 1000} for this model ({MAX_PLANES} sign planes everywhere), "
            f"got {bits}; lower it, or leave the model dense"
        )


def average_bits(shapes: dict[str, tuple[int, int]], sizes: Sizes) -> float:
    """Return stored bits per weight over all matrices, everything counted."""
    return 8 * _total_bytes(shapes, sizes) / sum(n * m for n, m in shapes.values())


def _total_bytes(shapes: dict[str, tuple[int, int]], sizes: Sizes) -> int:
    return sum(stored_bytes(n, m, *sizes[name]) for name, (n, m) in shapes.items())


def _uniform(shapes: dict[str, tuple[int, int]], num_planes: int, fraction: float) -> Sizes:
    return {name: [num_planes, int(fraction * m) // STEP * STEP] for name, (_, m) in shapes.items()}


def _allocate_evenly(shapes: dict[str, tuple[int, int]], bits: float) -> Sizes:
    """Choose as many full planes as the budget holds, and spend the rest on the same share of columns everywhere."""
    num_planes = max(K for K in range(1, MAX_PLANES + 1) if average_bits(shapes, _uniform(shapes, K, 0.0)) <= bits)
    low, high = 0.0, 1.0 if num_planes < MAX_PLANES else 0.0
    for _ in range(30):
        middle = (low + high) / 2
        fits = average_bits(shapes, _uniform(shapes, num_planes, middle)) <= bits
        low, high = (middle, high) if fits else (low, middle)
    return _uniform(shapes, num_planes, low)


class _Menu(NamedTuple):
    """What can be bought for one matrix, [options]: its full planes, significant columns, bytes, and the loss left.

    Each takes more bytes than the one before it, and leaves less loss.
    """

    num_planes: Tensor
    num_significant: Tensor
    num_bytes: Tensor
    loss: Tensor

    def best(self, price: float) -> int:
        """Return the option with the least loss + price × bytes."""
        return int((self.loss + price * self.num_bytes).argmin())


def _menu(shape: tuple[int, int], scores: Tensor) -> _Menu:
    n, m = shape
    ranked = scores.double().cpu().sort(descending=True).values
    gained = torch.cat([ranked.new_zeros(1), ranked.cumsum(0)])
    options = []
    for K in range(1, MAX_PLANES + 1):
        k = torch.arange(0, m if K < MAX_PLANES else 1, STEP)
        with_residual = (k > 0) * (math.ceil(m / 8) + 2 * n) + k // 8 * n + 2 * k
        num_bytes = stored_bytes(n, m, K, 0) + with_residual
        loss = REMAINING_ERROR[K] * (gained[-1] - gained[k]) + REMAINING_ERROR[K + 1] * gained[k]
        options.append((torch.full_like(k, K), k, num_bytes.double(), loss))
    columns = [torch.cat(column) for column in zip(*options, strict=True)]
    # where rows are few, a plane takes fewer bytes than a residual plane on most columns, which nobody should buy
    least_from = columns[2].flip(0).cummin(0).values.flip(0)
    worth = torch.cat([columns[2][:-1] < least_from[1:], torch.ones(1, dtype=torch.bool)])
    return _Menu(*(column[worth] for column in columns))


def _buy(shapes: dict[str, tuple[int, int]], menus: dict[str, _Menu], budget: float) -> Sizes:
    """Find the lowest price of a byte at which the best buys fit the budget, and spend what is left on single steps."""
    cheapest = dict.fromkeys(menus, 0)  # one plane, no residual columns
    low, high = 0.0, max(float(menu.loss.max()) for menu in menus.values())  # at `high` a byte is worth no loss
    chosen = cheapest
    for _ in range(100):
        price = (low * high) ** 0.5 if low else high * 1e-3
        buys = {name: menu.best(price) for name, menu in menus.items()}
        if _bytes(menus, buys) <= budget:
            chosen, high = buys, price
        else:
            low = price
        if low and high / low < 1 + 1e-9:
            break
    chosen = _spend_rest(menus, chosen, budget)
    return {name: [int(menus[name].num_planes[i]), int(menus[name].num_significant[i])] for name, i in chosen.items()}


def _bytes(menus: dict[str, _Menu], chosen: dict[str, int]) -> float:
    return sum(float(menus[name].num_bytes[i]) for name, i in chosen.items())


def _spend_rest(menus: dict[str, _Menu], chosen: dict[str, int], budget: float) -> dict[str, int]:
    """Go on to the next option of a matrix, the most gain for a byte first, as long as one fits the budget.

    Of steps that gain as much (nothing, where no token came) the one of the matrix with the fewest bits a weight comes first.
    """
    chosen, left, steps = dict(chosen), budget - _bytes(menus, chosen), []

    def offer(place: int, name: str) -> None:
        menu, i = menus[name], chosen[name]
        if i + 1 < len(menu.loss):
            cost = float(menu.num_bytes[i + 1] - menu.num_bytes[i])
            gain = float(menu.loss[i] - menu.loss[i + 1]) / max(cost, 1.0)
            share = float(menu.num_bytes[i] / menu.num_bytes[0])
            heapq.heappush(steps, (-gain, share, place, name, cost))

    for place, name in enumerate(chosen):
        offer(place, name)
    while steps:
        _, _, place, name, cost = heapq.heappop(steps)
        if cost <= left:  # else it never will: less and less is left
            chosen[name] += 1
            left -= cost
            offer(place, name)
    return chosen
