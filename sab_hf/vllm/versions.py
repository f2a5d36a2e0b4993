"""Which versions of vLLM the plugin was tested with."""

from __future__ import annotations

import os
import re

TESTED, BEYOND = (0, 32), (0, 33)
"""The first tested version, and the first that was not."""
ANY_VERSION = "SAB_VLLM_ANY_VERSION"


def check_version(version: str) -> None:
    """Raise unless the plugin was tested with this version of vLLM, whose layers and loaders change from one to the next.

    The environment variable `SAB_VLLM_ANY_VERSION=1` lets any version pass.

    Args:
        version: `vllm.__version__`.
    Raises:
        ValueError: it is older or newer.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if TESTED <= numbers < BEYOND or os.environ.get(ANY_VERSION) == "1":
        return
    first, last = (".".join(map(str, numbers)) for numbers in (TESTED, BEYOND))
    raise ValueError(
        f"packed checkpoints of sab_hf need vLLM {first} or newer and older than {last}, got {version}: `pip install "
        f"'vllm>={first},<{last}'`, or try this one, untested, with {ANY_VERSION}=1"
    )
