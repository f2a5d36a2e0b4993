"""What the tests of the Triton kernels share: whether this process interprets them, and packed matrices."""

from __future__ import annotations

import functools

import pytest
import triton
from helpers import operands, random_planes

INTERPRETED = triton.knobs.runtime.interpret

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the first test of this file starts")


def kernels():
    from sab_hf.kernels.cuda import launch as module

    return module


@functools.cache
def problem(size: tuple[int, int, int, int], device: str):
    from sab_hf.kernels.cuda.planes import planes

    random = random_planes(*size, seed=sum(size))
    return planes(*operands(random, device)), random.dense().double()
