"""Room on disks, looked at before hours are spent."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .store import GIB


class Need(NamedTuple):
    """What will be written to a folder.

    Attributes:
        setting: that names the folder, for messages.
        folder: which need not exist yet; None: the system's folder for temporary files.
        size: bytes.
        resumes: whether what lies there already, of a run that was interrupted, is not written again.
    """

    setting: str
    folder: str | os.PathLike | None
    size: float
    resumes: bool = False


def check_disk(needs: Iterable[Need]) -> None:
    """Check that there is room for all of what will be written; needs on one disk add up.

    Raises:
        OSError: a disk has too little; the message says which settings name it.
    """
    by_disk: dict[int, list[tuple[Need, Path]]] = {}
    for need in needs:
        place = _existing(need.folder)
        by_disk.setdefault(place.stat().st_dev, []).append((need, place))
    for own in by_disk.values():
        total, free = sum(need.size - _held(need) for need, _ in own), shutil.disk_usage(own[0][1]).free
        if total > free:
            wanted = ", ".join(
                f"`{need.setting}` ({need.folder or tempfile.gettempdir()}) {need.size / GIB:.2f} GiB"
                for need, _ in own
                if need.size
            )
            raise OSError(
                errno.ENOSPC,
                f"{total / GIB:.2f} GiB will be written to a disk that has {free / GIB:.2f} GiB free: {wanted}; free space "
                "there, or name a folder on another disk",
            )


def _existing(folder: str | os.PathLike | None) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    path = Path(tempfile.gettempdir() if folder is None else folder).expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _held(need: Need) -> float:
    """Return the bytes in the folder that need not be written again."""
    if not need.resumes:
        return 0.0
    files = [file for file in Path(need.folder).expanduser().glob("*.safetensors") if file.is_file()]
    return min(need.size, float(sum(file.stat().st_size for file in files)))
