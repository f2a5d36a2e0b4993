"""Where the bits go: planes and significant columns for a number of stored bits per weight."""

from __future__ import annotations

import math
from typing import NamedTuple

from .config import MAX_PLANES
from .packing import stored_bytes

DEFAULT_FRACTION = 0.1
"""Share of columns with a residual plane when no budget is given (published methods: 5 to 10 % salient weights)."""


class Allocation(NamedTuple):
    """Full planes of every matrix, and significant columns of each matrix by name."""

    num_planes: int
    num_significant: dict[str, int]


def allocate(shapes: dict[str, tuple[int, int]], bits: float | None) -> Allocation:
    """Choose as many full planes as the budget holds, and spend the rest on the same share of columns everywhere.

    Args:
        shapes: name → (out_features, in_features).
        bits: stored bits per weight, averaged over all matrices; None for one plane and a tenth of the columns.
    Raises:
        ValueError: the budget is below one plane everywhere; the message states that floor.
    """
    if bits is None:
        return Allocation(1, _columns(shapes, DEFAULT_FRACTION))
    floor = average_bits(shapes, Allocation(1, dict.fromkeys(shapes, 0)))
    if bits < floor:
        raise ValueError(
            f"`bits` must be at least {math.ceil(floor * 1000) / 1000} for this model (one sign plane and its scales), got "
            f"{bits}; raise it, or add small layers, whose scales are dear, to `modules_to_not_convert`"
        )
    num_planes = max(
        K for K in range(1, MAX_PLANES + 1) if average_bits(shapes, Allocation(K, dict.fromkeys(shapes, 0))) <= bits
    )
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        fits = average_bits(shapes, Allocation(num_planes, _columns(shapes, middle))) <= bits
        low, high = (middle, high) if fits else (low, middle)
    return Allocation(num_planes, _columns(shapes, low))


def average_bits(shapes: dict[str, tuple[int, int]], allocation: Allocation) -> float:
    """Return stored bits per weight over all matrices, everything counted."""
    total = sum(
        stored_bytes(n, m, allocation.num_planes, allocation.num_significant[name]) for name, (n, m) in shapes.items()
    )
    return 8 * total / sum(n * m for n, m in shapes.values())


def _columns(shapes: dict[str, tuple[int, int]], fraction: float) -> dict[str, int]:
    """Return `fraction` of the columns of each matrix, in whole bytes of a packed row (a part byte costs as much)."""
    return {name: int(fraction * m) // 8 * 8 for name, (_, m) in shapes.items()}
