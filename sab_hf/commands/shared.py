"""Options and steps that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..trust import trusting

logger = logging.getLogger(__name__)
DTYPES = ("auto", "float32", "bfloat16", "float16")
_MODELS = ("model", "checkpoint", "original")
"""Arguments that name a folder or a Hub repository."""


class UsageError(Exception):
    """Wrong usage that shows after parsing: the command ends with code 2."""


def positive(text: str) -> int:
    """Return the number that an option of at least 1 was given."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"an integer of at least 1 is required, got {text!r}")
    return int(text)


def add_push(parser: argparse.ArgumentParser) -> None:
    """Add the options for publishing."""
    parser.add_argument(
        "--push", "--push-to-hub", action="store_true", help="publish to the Hub (log in first: `hf auth login`)"
    )
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
        "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="most bytes of one weights file"
    )


def _size(text: str) -> str:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)? *[KMGT]B", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"a size such as 5GB or 200MB is required, got {text!r}")
    return text


def add_dtype(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the option for the dtype of `what`."""
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help=f"dtype of {what}; auto: as stored")


def add_trust_remote_code(parser: argparse.ArgumentParser) -> None:
    """Add the option that lets a model bring code of its own."""
    parser.add_argument(
        "--trust-remote-code", action="store_true",
        help="run the code that the model brings; only for repositories that you trust",
    )  # fmt: skip


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


def load_model(
    name: str, dtype: str, device_map: str | None, *, trust_remote_code: bool = False, packed: bool = False
) -> Any:
    """Load a checkpoint, packed or dense, with the class that saved it, in evaluation mode.

    Raises:
        ValueError: the checkpoint is damaged, or `packed` is asked for and it is not packed by this package.
        OSError: there is no such checkpoint.
    """
    from ..publish.inspect import empty_model
    from ..publish.locate import quantization_method, read_config, require_packed
    from ..publish.open import opening_class

    code = trusting(trust_remote_code)
    config = read_config(name, **code)
    if packed:
        require_packed(config, name)
    if quantization_method(config) == "sab":
        empty_model(config, name, **code)  # what is wrong with the config is said here
    return opening_class(config).from_pretrained(name, dtype=dtype, device_map=device_map, **code).eval()


def check_models(args: argparse.Namespace, packed: bool | None = None) -> None:
    """Check, without a network, the names of the checkpoints that a command reads.

    Args:
        packed: whether those in folders here must be packed by this package, or dense; None: they may be either.
    Raises:
        ValueError, FileNotFoundError: one cannot be that of a checkpoint, or is not of this kind.
    """
    from ..publish.locate import check_name, config_here, require_dense, require_packed

    for name in (name for argument in _MODELS if (name := getattr(args, argument, None)) is not None):
        check_name(name)
        config = config_here(name)
        if packed is not None and config is not None:
            (require_packed if packed else require_dense)(config, name)


def say(text: str, alarming: str | None = None) -> None:
    """Write a line for the user to stderr; on a terminal with colours, `alarming` in red (NO_COLOR is respected)."""
    from rich.console import Console
    from rich.text import Text

    from ..publish.form import printable

    line = Text(printable(text))
    if alarming:
        line.highlight_words([alarming], "red")  # bold would stay with NO_COLOR
    Console(stderr=True, soft_wrap=True).print(line)


@contextlib.contextmanager
def once_without_hub(args: argparse.Namespace) -> Iterator[None]:
    """Ask the Hub once whether it answers, if `args` name a model that is no folder here; if not, work offline.

    Otherwise each file is asked for five times, with a pause after each.
    """
    import huggingface_hub

    from ..publish.locate import check_name

    def is_remote(name: str | None) -> bool:
        if not name:
            return False
        try:
            check_name(name)
        except (ValueError, OSError):  # the command says so
            return False
        return not Path(name).is_dir()

    constants = huggingface_hub.constants
    if constants.HF_HUB_OFFLINE or not any(is_remote(getattr(args, name, None)) for name in _MODELS):
        yield
        return
    errors = (OSError, *huggingface_hub.errors.HfHubHTTPError.__bases__)  # of whichever HTTP client there is
    forget = getattr(huggingface_hub.utils, "reset_sessions", lambda: None)  # old clients' sessions remember
    try:
        huggingface_hub.utils.get_session().head(constants.ENDPOINT, timeout=10)
    except errors as error:
        logger.warning("%s does not answer (%s): only what is on this machine is looked at", constants.ENDPOINT, error)
        constants.HF_HUB_OFFLINE = True
        forget()
    try:
        with _environment(**({"HF_HUB_OFFLINE": "1"} if constants.HF_HUB_OFFLINE else {})):  # for child processes
            yield
    finally:
        if constants.HF_HUB_OFFLINE:
            constants.HF_HUB_OFFLINE = False
            forget()


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def logging_to_stderr(quiet: bool = False, verbose: bool = False) -> Iterator[None]:
    """Show the package's log on stderr, above progress bars: calibration set, memory estimate, stages.

    Args:
        quiet: errors only, and no progress bars.
        verbose: everything, of transformers too.
    """
    silent = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} if quiet else {}
    with _environment(**silent):  # read when tqdm and huggingface_hub are imported
        from tqdm import tqdm
        from transformers.utils import logging as of_transformers

    from ..publish.form import printable

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(printable(self.format(record)), file=sys.stderr)

    theirs = of_transformers.get_verbosity()
    if quiet:
        of_transformers.disable_progress_bar()
        of_transformers.set_verbosity_error()
    elif verbose:
        of_transformers.set_verbosity_info()
    logger, handler = logging.getLogger(__package__.partition(".")[0]), Handler()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        of_transformers.set_verbosity(theirs)
        if quiet:
            of_transformers.enable_progress_bar()
