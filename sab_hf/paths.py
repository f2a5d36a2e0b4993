"""Files and folders that a user names, checked before anything heavy is imported: the command line does so as it starts."""

from __future__ import annotations

import os
from pathlib import Path

from .brief import shortened

BUILTIN = "builtin"
"""Name of the samples that the package draws and writes itself."""


def check_image(image: str) -> None:
    """Check that `image` is a URL, or a file that is a picture.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture.
    """
    if "://" in image:
        return
    if not Path(image).is_file():
        raise FileNotFoundError(f"there is no picture `{image}`; name a file or a URL")
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(image) as opened:
            opened.verify()
    except (UnidentifiedImageError, SyntaxError) as error:  # of a damaged PNG Pillow says the second
        raise ValueError(f"`{image}` is no picture that Pillow can read ({error}); name another file") from error


def check_samples(name: str, field: str = "calibration") -> None:
    """Check that `name` can be that of samples: the built-in set, a folder, a JSONL file, or a data set of the Hub.

    Args:
        name: what the user wrote.
        field: that it is the value of, for the error.
    Raises:
        ValueError: it can not.
    """
    path = Path(name).expanduser()
    if name == BUILTIN or os.path.isdir(path):  # unlike `Path.is_dir`, also for what is too long for a name
        return
    if os.path.isfile(path):
        if path.suffix != ".jsonl":
            raise ValueError(f"`{field}` must be a .jsonl file or a folder, got the file {path}")
        return
    repository = name.partition(":")[0]
    if repository.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".jsonl"):
        raise ValueError(
            f"`{field}` must be {BUILTIN!r}, a Hub dataset id ('org/name', 'org/name:config' or 'org/name:config:split'), an "
            f"existing folder or .jsonl file, or a list of samples; got {shortened(name)}"
        )


def check_new_file(path: str | os.PathLike) -> None:
    """Check that a file can be written at `path`, where nothing may be.

    Raises:
        ValueError: something is there.
        OSError: its folder is not there, or cannot be written.
    """
    path = Path(path).absolute()
    if os.path.lexists(path):
        raise ValueError(f"`{path}` exists, and an export replaces nothing; choose another name or remove it")
    above = path.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise OSError(f"`{path}` cannot be made: `{above}` is no folder that can be written")
