"""Packed checkpoints in vLLM: the function that vLLM calls in each of its processes, through an entry point of the package.

`shards.py` cuts packed tensors for one rank of several, `parts.py` collects those of one layer as vLLM's loaders hand them over,
`checkpoint.py` checks a folder before anything is loaded: these three need no vLLM. `config.py` is the quantization method as
vLLM knows it, `methods.py` what its layers do with packed weights, `experts.py` its mixtures of experts. The products are those
of `kernels/`, as in transformers.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Register the quantization method `sab` with vLLM; once is enough, more often does no harm.

    vLLM calls it for every model. So it raises nothing: a vLLM that is too different is refused when a packed checkpoint is
    loaded, or leaves a word in the log here.
    """
    try:
        from . import config  # noqa: F401
    except ImportError as error:
        logger.warning("packed checkpoints of sab_hf will not load in this vLLM: %s", error)
