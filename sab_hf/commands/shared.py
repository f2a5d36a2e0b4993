"""Options and steps that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_push(parser: argparse.ArgumentParser) -> None:
    """Add the options for publishing."""
    parser.add_argument("--push", action="store_true", help="publish to the Hub (log in first: `hf auth login`)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")


def add_allow_urls(parser: argparse.ArgumentParser) -> None:
    """Add the option that lets samples name files by URL."""
    parser.add_argument(
        "--allow-urls", action="store_true",
        help="fetch pictures that samples name by http(s) URL, from public addresses; without it such a sample is an error",
    )  # fmt: skip


def add_shard_size(parser: argparse.ArgumentParser) -> None:
    """Add the option for the size of weights files; what is no size is wrong usage, and not found out after hours."""
    parser.add_argument(
        "--max-shard-size", type=_size, default="5GB", help="most bytes of one weights file (default 5GB)"
    )


def _size(text: str) -> str:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)? *[KMGT]B", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"a size such as 5GB or 200MB is required, got {text!r}")
    return text


def add_device_map(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where a model is loaded."""
    parser.add_argument(
        "--device-map", help="device map, for example auto, cuda or cpu; default: a GPU if there is one"
    )


def device_map(args: argparse.Namespace) -> str | None:
    """Return where to load a model: as asked, else an accelerator if there is one.

    Raises:
        ValueError: CUDA is asked for and not there.
    """
    import torch

    if (args.device_map or "").startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device-map {args.device_map}: PyTorch {torch.__version__} sees no CUDA device here")
    return args.device_map or ("auto" if torch.cuda.is_available() else None)


def load_packed(checkpoint: str, dtype: str, device_map: str | None) -> Any:
    """Load a packed checkpoint with the class that saved it, in evaluation mode.

    Raises:
        ValueError: the checkpoint is not packed by this package, or is damaged.
        OSError: there is no such checkpoint.
    """
    from ..publish.inspect import empty_model
    from ..publish.locate import read_config, require_packed
    from ..publish.open import opening_class

    config = read_config(checkpoint)
    require_packed(config, checkpoint)
    empty_model(config, checkpoint)  # what is wrong with the config is said here
    return opening_class(config).from_pretrained(checkpoint, dtype=dtype, device_map=device_map).eval()


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Show the package's log on stderr, above progress bars: calibration set, memory estimate, stages."""

    from ..publish.form import printable

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(printable(self.format(record)), file=sys.stderr)

    logger, handler = logging.getLogger(__package__.partition(".")[0]), Handler()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
