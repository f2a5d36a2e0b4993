"""Pictures of samples, opened: from files, URLs, base64 and bytes, always as 8-bit RGB."""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import re
import stat
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from ..brief import LONGEST_SHOWN, brief, brief_error, shortened
from .urls import fetch

REMOTE = ("http://", "https://")

_DATA, _FILE = "data:", "file://"
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{60,}={0,2}\s*")


def open_picture(value: Any, folder: Path | None, max_pixels: int | None, allow_urls: bool) -> Any:
    """Open a picture as RGB; arrays pass as they are, those of 16 bits scaled to 8.

    Args:
        value: a PIL image, an array, a path, a URL (http, file or data), base64, the bytes of a file, or an undecoded
            `datasets.Image`.
        folder: where relative paths start; None: the working directory.
        max_pixels: larger pictures are shrunk to this many pixels, keeping their shape; None keeps them.
        allow_urls: whether pictures are fetched.

    Raises:
        ValueError: the picture cannot be read; says what it is, shortened, and the reason.
    """
    from PIL import Image, ImageOps

    if isinstance(value, Mapping) and (value.get("bytes") or value.get("path")):  # an undecoded `datasets.Image`
        value = value.get("bytes") or value["path"]
    if hasattr(value, "shape"):
        return _eight_bits(value)
    if not isinstance(value, (str, bytes, Path, Image.Image)):
        raise ValueError(f"an image must be a PIL image, an array, a path or a URL, got {brief(value)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = value if isinstance(value, Image.Image) else Image.open(_source(value, folder, allow_urls))
            _check_size(image)
            image = _as_rgb(ImageOps.exif_transpose(image), image.format)
    except Exception as error:  # of damaged files, decoders raise what they like: SyntaxError, struct.error, IndexError
        raise ValueError(f"cannot read the image {shortened(_named(value, folder))} ({brief_error(error)})") from error
    if max_pixels is not None and image.width * image.height > max_pixels:
        scale = math.sqrt(max_pixels / (image.width * image.height))
        image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    return image


def resolve(value: Any, folder: Path | None) -> Any:
    """Return a local path, given as such or as a file URL, as seen from `folder`; anything else as it is."""
    if isinstance(value, str) and value.startswith(_FILE):
        parts = urlsplit(value)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"a file URL must name a file of this machine, got the host {brief(parts.netloc)}")
        value = url2pathname(parts.path)
    if isinstance(value, Path) or (isinstance(value, str) and not value.startswith((*REMOTE, _DATA))):
        path = Path(value).expanduser()
        return str(folder / path if folder else path)
    return value


def check_regular(path: str | os.PathLike) -> None:
    """Raise an OSError unless `path` is a file, and no pipe, device or folder, which could be read without end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is no regular file")


def _named(value: Any, folder: Path | None) -> Any:
    """Return what a message calls a picture: the path that was opened, or else what was given."""
    if isinstance(value, (str, Path)) and len(str(value)) < LONGEST_SHOWN:
        with suppress(ValueError):
            return resolve(value, folder)
    return value


def _source(value: str | bytes | Path, folder: Path | None, allow_urls: bool) -> str | io.BytesIO:
    """Return what `Image.open` takes: the path of a file that is there, or what is in memory."""
    if isinstance(value, bytes):
        return io.BytesIO(value)
    if isinstance(value, str) and value.startswith(REMOTE):
        return io.BytesIO(fetch(require_allowed(value, allow_urls)))
    if isinstance(value, str) and value.startswith(_DATA):
        return io.BytesIO(_decode_data_url(value))
    path = resolve(value, folder)
    if isinstance(value, str) and not os.path.exists(path) and _BASE64.fullmatch(value):
        return io.BytesIO(_decode_base64(value))  # base64 may look like a path: that of every JPEG starts with "/9j/"
    check_regular(path)
    return path


def require_allowed(url: str, allow_urls: bool) -> str:
    """Return a URL, or raise a ValueError if the user has not allowed to fetch any."""
    if not allow_urls:
        raise ValueError(
            "URLs are not fetched unless you allow it, since data may come from elsewhere: set `allow_urls=True` "
            "(`--allow-urls` on the command line), or name files"
        )
    return url


def _decode_data_url(url: str) -> bytes:
    """Return the content of `data:[type][;base64],content`."""
    head, comma, content = url.partition(",")
    if not comma:
        raise ValueError("a data URL must have a comma before its content")
    return _decode_base64(content) if head.lower().endswith(";base64") else unquote_to_bytes(content)


def _decode_base64(text: str) -> bytes:
    text = "".join(text.split()).rstrip("=")
    try:
        return base64.b64decode(
            text + "=" * (-len(text) % 4), altchars="-_" if {"-", "_"} & set(text) else None, validate=True
        )
    except binascii.Error as error:
        raise ValueError(f"its base64 is damaged: {error}") from error


def _check_size(image: Any) -> None:
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"it has {image.width * image.height:,} pixels, and at most {limit:,} are read; shrink it, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS"
        )


def _as_rgb(image: Any, file_format: str | None) -> Any:
    """Return an image as RGB; what has more than 8 bits a channel is scaled, where `convert` would cut it off at 255."""
    import numpy as np
    from PIL import Image

    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image.convert("RGB")
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        scale = 255.0 if high <= 1 else 1.0  # 0 to 1, or 0 to 255
    else:  # Pillow opens PNG files of 16 bits as "I;16", before version 11 as "I"
        scale = 1 / 257 if image.mode != "I" or file_format == "PNG" or high > 255 else 1.0
    if not (low >= 0 and scale * high <= 255):
        raise ValueError(
            f"its values go from {low:g} to {high:g}, which is neither 8 nor 16 bits; scale them to 0 to 255"
        )
    return Image.fromarray((scale * values + 0.5).astype(np.uint8)).convert("RGB")


def _eight_bits(array: Any) -> Any:
    """Return an array of numbers or a tensor as it is, or with its 16 bits scaled to 8."""
    import numpy as np

    values = np.asarray(array)
    if values.dtype == np.uint16:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if values.dtype.kind in "iu" and values.size and not 0 <= int(values.min()) <= int(values.max()) <= 255:
        raise ValueError(
            f"an image of integers must have values from 0 to 255, got {values.min()} to {values.max()}; scale it, or pass uint16"
        )
    return array
