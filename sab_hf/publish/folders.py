"""Folders of checkpoints: complete or not there, and nothing in them is lost that is not the checkpoint's own.

A new folder is written beside its place, hidden, and renamed. In a folder that is there, files are exchanged: the new ones are
written into a hidden folder inside it, the checkpoint's old ones are moved into another, the new ones take their places, and the
old ones are removed. `config.json` leaves first and comes last, so that what is in between is no checkpoint to any loader. A list
in the folder of the old files says what goes where; a save that was killed in between is undone by the next one.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from .locate import quantization_method

logger = logging.getLogger(__name__)

HIDDEN = ".sab_hf."
"""What the names of our hidden folders in a checkpoint start with."""
OWN = (
    *("config.json", "generation_config.json", "README.md", "report.json", "report.html"),
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
    *(f"plots/{kind}_*.svg" for kind in ("bits", "budget", "error", "loss", "scores", "significance", "time")),
    *(f"plots/example_*.{ending}" for ending in ("png", "jpeg")),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
"""Files of a checkpoint, as patterns: what a save replaces or removes. Everything else in a folder stays."""

_PARTIAL, _OLD, _COMPLETE = ".partial", ".old", ".complete"
_NAMES = "names.json"
_CONFIG = "config.json"
_RANDOM = "????????"  # what `tempfile` puts into a name
_FRESH = 1.0  # s; a hidden folder that another process has just made may not be locked yet


def check_target(path: str | os.PathLike, replace: bool = True) -> None:
    """Check that a checkpoint may be written to `path`, and try it; what saves that were killed have left there is cleaned up.

    Args:
        path: where to write. It must be new, empty, or with `replace` hold a packed checkpoint.
        replace: whether a packed checkpoint may be replaced.

    Raises:
        ValueError: something is there that is not replaced.
        OSError: the folder cannot be written.
    """
    path = Path(path).absolute()
    _clean_up(path)
    if os.path.lexists(path) and not (path.is_dir() and not _content(path)):
        if not replace:
            raise ValueError(
                f"`{path}` exists and is not empty, and a dense checkpoint replaces nothing; choose another folder"
            )
        if not (path / _CONFIG).is_file():
            old = cut_off(path)
            hint = f"; a save to it was cut off, and the old model is in `{old}`" if old else ""
            raise ValueError(
                f"`{path}` exists and is no checkpoint, so it is not replaced; choose another folder or remove it{hint}"
            )
        if _method(path / _CONFIG) != "sab":
            raise ValueError(
                f"`{path}` holds a checkpoint that sab_hf did not pack, so it is not replaced; choose another folder or remove it"
            )
    above = next(folder for folder in (path, *path.parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise OSError(f"`{path}` cannot be made: `{above}` is no folder that can be written")
    try:
        _try(path, above)
    except OSError as error:
        raise OSError(f"`{path}` cannot be written ({error}); choose another folder") from error


@contextmanager
def atomic_folder(path: str | os.PathLike, replace: bool = True) -> Iterator[Path]:
    """Give an empty folder whose files become those of `path` at the end; on an error it is removed and `path` is as before.

    Args:
        path, replace: as for `check_target`.

    Raises:
        ValueError, OSError: see `check_target`. If only the last step fails, the message says where the complete folder is.
    """
    check_target(path, replace)
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _hidden_folder(*_place(path), _PARTIAL) as partial:
        try:
            partial.chmod(0o777 & ~_umask())
            yield partial
        except SafetensorError as error:  # says neither where, nor that it is the disk's fault
            raise OSError(f"`{path}` could not be written, and nothing was left there: {error}") from error
        for file in partial.glob("*.safetensors"):  # written readable for the owner alone
            file.chmod(0o666 & ~_umask())
        try:
            if path.is_dir():
                _exchange(path, partial)
            else:
                partial.rename(path)
        except OSError as error:
            kept = partial.with_suffix(_COMPLETE)
            partial.rename(kept)
            raise OSError(
                f"`{path}` could not be written, and is as before ({error}); the new checkpoint is complete in `{kept}`"
            ) from error


def cut_off(path: Path) -> Path | None:
    """Return the folder with the old files of a checkpoint, if a save was killed while it exchanged them; else None."""
    if os.path.lexists(path / _CONFIG):
        return None
    return next((file.parent for file in sorted(path.glob(f"{HIDDEN}{_RANDOM}{_OLD}/{_NAMES}"))), None)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file in one step; a link in its place is replaced, not followed.

    Raises:
        OSError: it cannot be written, or its folder is a link, which may lead anywhere.
    """
    if path.parent.is_symlink():
        raise OSError(f"`{path.parent}` is a link, and files are not written through it; remove it")
    temporary = path.with_name(f"{HIDDEN}{path.name}")
    temporary.unlink(missing_ok=True)
    temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    temporary.replace(path)


def _method(config: Path) -> str | None:
    try:
        return quantization_method(json.loads(config.read_text(encoding="utf-8")))
    except ValueError:  # no JSON, or no config: not ours
        return None


def _content(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if not entry.name.startswith(HIDDEN)]


def _try(path: Path, above: Path) -> None:
    """Make and rename what a save makes and renames."""
    prefix = HIDDEN if above == path else f".{path.name}."
    with _hidden_folder(above, prefix, _PARTIAL) as partial:
        if above == path:
            (partial / "try").touch()
            (partial / "try").replace(path / f"{HIDDEN}try")
            (path / f"{HIDDEN}try").unlink()
        else:
            to = path if above == path.parent else partial.with_suffix(".try")
            partial.rename(to)
            to.rmdir()


def _exchange(path: Path, partial: Path) -> None:
    """Put the files of `partial` into the places of the checkpoint's own ones in `path`; on an error all is as before."""
    new = [file.relative_to(partial).as_posix() for file in partial.rglob("*") if not file.is_dir()]
    for name in new:
        if (path / name).is_dir() or _behind_link(path, name):
            raise OSError(f"`{path / name}` is a folder, or behind a link")
    own = {file.relative_to(path).as_posix() for kind in OWN for file in path.glob(kind) if not file.is_dir()}
    own = {name for name in own if not _behind_link(path, name)}
    old = sorted(own | {name for name in new if os.path.lexists(path / name)})
    names = {"old": sorted(old, key=lambda name: name != _CONFIG), "new": sorted(new, key=lambda name: name == _CONFIG)}
    with _hidden_folder(path, HIDDEN, _OLD) as aside:
        (aside / _NAMES).write_text(json.dumps(names), encoding="utf-8")
        try:
            for name in names["old"]:
                _move(path / name, aside / name)
            for name in names["new"]:
                _move(partial / name, path / name)
        except BaseException:
            _put_back(path, aside, names, partial)
            raise


def _behind_link(path: Path, name: str) -> bool:
    """Whether a folder between `path` and its file `name` is a link."""
    return any((path / above).is_symlink() for above in PurePosixPath(name).parents[:-1])


def _put_back(path: Path, aside: Path, names: dict[str, list[str]], partial: Path | None) -> None:
    """Undo an exchange that stopped anywhere: new files go back to `partial` (None: are removed), old ones to their places."""
    for name in names["new"]:
        still_old = name in names["old"] and not os.path.lexists(aside / name)
        if os.path.lexists(path / name) and not still_old:
            if partial is None:
                (path / name).unlink()
            else:
                _move(path / name, partial / name)
    for name in names["old"]:
        if os.path.lexists(aside / name):
            _move(aside / name, path / name)


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def _clean_up(path: Path) -> None:
    """Remove the hidden folders of saves to `path` that were killed; an exchange that was cut off is undone first."""
    for folder in _left_behind(path, _OLD):
        with _locked(folder) as stale:
            if stale and cut_off(path) == folder:
                _put_back(path, folder, _read_names(folder / _NAMES), None)
                logger.warning("a save to `%s` was cut off; the model that was there before is put back", path)
            _remove(folder, stale)
    for folder in _left_behind(path, _PARTIAL):
        with _locked(folder) as stale:
            _remove(folder, stale)


def _left_behind(path: Path, suffix: str) -> list[Path]:
    """Return the hidden folders for `path`, in it and beside it, that are not quite new."""
    places = ((path, HIDDEN), (path.parent, f".{path.name}."))
    found = [
        folder
        for above, prefix in places
        if above.is_dir()
        for folder in above.glob(f"{glob.escape(prefix)}{_RANDOM}{suffix}")
    ]
    latest = time.time() - _FRESH
    return [
        folder for folder in found if folder.is_dir() and not folder.is_symlink() and folder.stat().st_mtime < latest
    ]


def _remove(folder: Path, stale: bool) -> None:
    if stale:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        logger.warning(
            "`%s` is in use, or left from a save that was killed; remove it if no program is saving there", folder
        )


def _read_names(file: Path) -> dict[str, list[str]]:
    """Return what an exchange has written; names lead nowhere but into the folder, whoever wrote them.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        names: Any = json.loads(file.read_text(encoding="utf-8"))
        parts = [PurePosixPath(name) for kind in ("old", "new") for name in names[kind]]
        if any(name.is_absolute() or ".." in name.parts or "\\" in str(name) for name in parts):
            raise ValueError("a name leads out of the folder")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}); move the files beside it to where you want them") from error
    return names


def _place(path: Path) -> tuple[Path, str]:
    """Return where the new files of `path` are written, and how that hidden folder's name starts: in it, or beside it."""
    return (path, HIDDEN) if path.is_dir() else (path.parent, f".{path.name}.")


@contextmanager
def _hidden_folder(above: Path, prefix: str, suffix: str) -> Iterator[Path]:
    """Give a new locked folder in `above`, and remove it in the end."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=above))
    try:
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder, and say whether that was possible: no other process has it, and the system has such locks."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError:
            free = False
        yield free
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
