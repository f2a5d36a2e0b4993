"""Keep a GPU busy between the tokens of `generate`, whose host otherwise waits for each token before it prepares the next."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from transformers.generation import utils

logger = logging.getLogger(__name__)


def decode_ahead(enabled: bool = True) -> bool:
    """Have `generate` on CUDA devices queue a token's work before it knows whether the token before ended the text.

    transformers (5.17 and newer) does so on Apple's GPUs only. What `generate` returns is the same; where a text ends before
    `max_new_tokens`, one more token is computed and thrown away, and streamers get their tokens one step later. It holds
    for all models of the process, packed or not, and pays where the host's work for a token, 1 to 2 ms, is not small
    beside the device's.

    Args:
        enabled: False undoes it.
    Returns:
        Whether `generate` now decodes ahead on CUDA devices.
    """
    checks = getattr(utils, "DeferredStopCheck", None)
    if checks is None:
        if enabled:
            logger.warning("`generate` waits for every token in this version of transformers; 5.17 and newer need not")
        return False
    present = checks.is_supported
    original = getattr(present, "__wrapped__", present)
    checks.is_supported = staticmethod(_for_cuda_too(original) if enabled else original)
    return enabled


def _for_cuda_too(is_supported: Callable[..., bool]) -> Callable[..., bool]:
    """Answer for CUDA devices as `is_supported` does for Apple's."""

    @functools.wraps(is_supported)
    def answer(device: torch.device, *args, **kwargs) -> bool:
        return is_supported(torch.device("mps") if device.type == "cuda" else device, *args, **kwargs)

    return answer
