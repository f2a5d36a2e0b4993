"""The dtype that a run computes in: float32 on a CPU that multiplies half precision in software.

Most CPUs do: a checkpoint in bfloat16 then takes some times as long to run as the same in float32, which is no less exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor, nn

from ..packed.linear import SABModule
from .placement import is_hooked
from .rates import product_rate

HALVES = (torch.bfloat16, torch.float16)

_GAIN = 1.5
"""How many times as fast float32 must be: its hidden states take twice the memory."""

_SECONDS, _SIDE = 0.02, 512  # of the look at each dtype, and of its square product


def may_be_widened(model: nn.Module, device: torch.device) -> bool:
    """Tell whether a run may hold a model in float32: it is of half precision, in memory, and a CPU computes.

    What accelerate's hooks bring from elsewhere stays as it is there.
    """
    return device.type == "cpu" and model.dtype in HALVES and not any(is_hooked(module) for module in model.modules())


def faster_dtype(model: nn.Module, device: torch.device) -> torch.dtype:
    """Return float32 where a device runs a model's half precision much slower, else the model's dtype."""
    if not may_be_widened(model, device):
        return model.dtype
    return torch.float32 if _gain(model.dtype, torch.get_num_threads()) > _GAIN else model.dtype


@lru_cache(maxsize=16)
def _gain(dtype: torch.dtype, threads: int) -> float:
    """Return how many times as fast products of float32 are; looked at once, so that all runs of a process compute alike."""
    wide, own = (
        product_rate(torch.device("cpu"), _SIDE, _SIDE, one, _SECONDS, threads) for one in (torch.float32, dtype)
    )
    return wide / own


@contextmanager
def held_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold the half-precision tensors of a model in another dtype for the time of a `with` statement.

    Afterwards they have the dtypes that they had, and what came in their place (packed Linears, trained norms) has too.

    Args:
        model: with its weights in memory.
        dtype: the model's own: nothing is done.
    """
    own = model.dtype
    if dtype == own:
        yield
        return
    before = {name: tensor.dtype for name, tensor in _floats(model)}
    for _, tensor in _floats(model):
        if tensor.dtype in HALVES:
            tensor.data = tensor.data.to(dtype)
    try:
        yield
    finally:
        for name, tensor in _floats(model):
            tensor.data = tensor.data.to(before.get(name, own))
        for name, module in model.named_modules():
            if isinstance(module, SABModule):
                module.dtype = before.get(f"{name}.weight", own)


def _floats(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the floating-point parameters and buffers of a model, tied ones once."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point():
            yield name, tensor
