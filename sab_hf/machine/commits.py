"""Resume: what a run has finished, committed step by step into a folder.

A step (a block, or what comes before or after the blocks) is one safetensors file: its tensors, and in the metadata a record as
JSON, the step's name, which run it is of, and a digest of all of that: a file that was renamed, or comes from another run, is not
taken for what its name says. It is written beside its place, flushed to the disk and renamed, so that it is either there and
whole, or not there.
Hidden states are not stored: a run that resumes passes them through the finished blocks again, dense and packed, which is
cheap beside fitting and gives the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .fingerprint import Fingerprint, differences

logger = logging.getLogger(__name__)

_FINGERPRINT = "fingerprint.json"
_LOCK = "lock"


class Commit(NamedTuple):
    """What one finished step left behind: tensors by name (on the CPU), and plain data."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


class RunFolder:
    """The finished steps of one run in one folder.

    Args:
        folder: is made if it is not there.
        fingerprint: of model, data and config; a folder of another run is refused.
    Raises:
        ValueError: the folder belongs to another run; the message says what differs.
        RuntimeError: another process is using the folder.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, fingerprint: Fingerprint):
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder / _LOCK)
        try:
            self._run = _run_of(self._check_fingerprint(fingerprint))
        except BaseException:
            self.close()
            raise
        for kind in ("*.safetensors", _FINGERPRINT):
            for unfinished in self.folder.glob(f"{kind}.tmp"):  # of a run that was killed while it wrote
                unfinished.unlink()

    def load(self, step: str) -> Commit | None:
        """Return a finished step, or None if it is not finished.

        Raises:
            ValueError: its file is damaged; the message says how to go on.
        """
        path = self._path(step)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as reader:
                metadata = reader.metadata() or {}
                tensors = {name: reader.get_tensor(name).clone() for name in reader.keys()}  # noqa: SIM118 (no dict)
        except (SafetensorError, OSError) as error:
            raise ValueError(_damaged(path, str(error))) from error
        record = metadata.get("record", "null")
        named = [metadata[key] for key in ("step", "run") if key in metadata]  # none in files of early versions
        if metadata.get("digest") != _digest(tensors, record, *named):
            raise ValueError(_damaged(path, "its digest does not fit its content"))
        if named and named != [step, self._run]:
            other = f"it is `{named[0]}`" if named[0] != step else f"it is `{step}` of another run"
            raise ValueError(_damaged(path, f"{other}; files were renamed or copied"))
        return Commit(tensors, json.loads(record))

    def save(self, step: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Commit a finished step.

        Raises:
            OSError: it cannot be written, as when the disk is full; steps committed before are kept.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(record)
        named = {"step": step, "run": self._run}
        digest = _digest(tensors, text, *named.values())
        content = save(tensors, metadata={"record": text, "digest": digest} | named)
        self._write(self._path(step), content)
        logger.debug("committed %s: %.1f MiB", step, len(content) / 2**20)

    def forget(self, step: str) -> None:
        """Delete what was committed under this name, if anything."""
        self._path(step).unlink(missing_ok=True)

    def steps(self) -> list[str]:
        """Return the names of the finished steps, sorted."""
        return sorted(path.stem for path in self.folder.glob("*.safetensors"))

    def close(self) -> None:
        """Let other processes use the folder."""
        self._lock.close()

    def _path(self, step: str) -> Path:
        return self.folder / f"{step}.safetensors"

    def _check_fingerprint(self, fingerprint: Fingerprint) -> Fingerprint:
        """Return the fingerprint of the run that the folder belongs to."""
        path = self.folder / _FINGERPRINT
        if not path.exists():
            if self.steps():
                raise ValueError(
                    f"{self.folder} holds finished steps but no {_FINGERPRINT}; name another `checkpoint_dir`"
                )
            self._write(path, json.dumps(fingerprint.to_dict(), indent=2).encode())
            return fingerprint
        try:
            stored = Fingerprint(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); name another `checkpoint_dir`") from error
        refused, noted = differences(stored, fingerprint)
        if refused:
            raise ValueError(
                f"`checkpoint_dir` {self.folder} belongs to another run: {'; '.join(refused)}. Name another folder, or delete "
                f"this one ({len(self.steps())} finished steps) to start over"
            )
        if noted:
            logger.warning("resuming elsewhere, so the result may differ by rounding: %s", "; ".join(noted))
        if self.steps():
            logger.info("resuming from %s: %d steps are finished", self.folder, len(self.steps()))
        return stored

    def _write(self, path: Path, content: bytes) -> None:
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _flush_folder(self.folder)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise OSError(
                error.errno,
                f"cannot commit {path.stem} ({len(content) / 2**20:.1f} MiB) to `checkpoint_dir` {self.folder}: "
                f"{error.strerror}. The {len(self.steps())} steps before it are kept; "
                + ("free space there" if full else "make the folder writable")
                + " and start again to continue after them",
            ) from error


def _run_of(fingerprint: Fingerprint) -> str:
    """Return a digest of what makes a run another run; of software, by which a run may go on, nothing."""
    parts = {key: value for key, value in fingerprint.to_dict().items() if key != "software"}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digest(tensors: dict[str, Tensor], record: str, *named: str) -> str:
    digest = hashlib.sha256(record.encode())
    for text in named:
        digest.update(f"\n{len(text)} {text}".encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _damaged(path: Path, reason: str) -> str:
    return f"{path} is damaged ({reason}); delete it, and the next run makes this step again and keeps the others"


def _flush_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(path: Path) -> Any:
    """Open and lock a file until it is closed or the process ends, however it ends."""
    file = path.open("a")
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            logger.warning("%s cannot be locked (%s); take care that only one run uses it", path, error.strerror)
            return path.open("a")
        raise RuntimeError(
            f"another process is using `checkpoint_dir` {path.parent}; wait for it, or name another folder"
        ) from error
    return file
