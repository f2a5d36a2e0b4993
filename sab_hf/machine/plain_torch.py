"""The settings of PyTorch under which quantization computes, whatever the caller's are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def plain_torch() -> Iterator[None]:
    """Leave the caller's `torch.no_grad`, default dtype and default device aside for a while: all change what is computed."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        # only where it is needed: such a context costs time in every call of PyTorch
        on_cpu = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
        with torch.enable_grad(), on_cpu:
            yield
    finally:
        torch.set_default_dtype(dtype)
