"""Work in processes that are forked from that of the tests: they have torch and transformers, whose import takes seconds."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from tqdm.std import tqdm

FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None


def begin_forked(limit: int = 300) -> None:
    """Call first in a forked process that may be killed; one that hangs says where after `limit` s, and ends.

    The progress bars of forked processes share a semaphore, which one that is killed while it draws never gives back. A class of
    bars that was used before the one that it comes from has a lock of its own.
    """
    lock = threading.RLock()
    for kind in _kinds_of(tqdm):
        kind.set_lock(lock)
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.alarm(limit)


def _kinds_of(kind: type) -> list[type]:
    """Return a class and all that come from it."""
    return [kind, *(found for child in kind.__subclasses__() for found in _kinds_of(child))]


def forked(work: Callable[[], object], stdout: int | None = None) -> CompletedProcess:
    """Do `work` in a forked process, as a program does it: exceptions and `SystemExit` give its exit code.

    Args:
        work: what is done.
        stdout: a file descriptor for what is printed; None: it is returned.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        files = out.fileno() if stdout is None else stdout, err.fileno()
        process = FORK.Process(target=_with_files, args=(work, *files))
        process.start()
        process.join()
        for file in (out, err):
            file.seek(0)
        return CompletedProcess(work, process.exitcode, out.read().decode(), err.read().decode())


def _with_files(work: Callable[[], object], stdout: int, stderr: int) -> None:
    begin_forked()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    sys.stdout, sys.stderr = (
        os.fdopen(number, "w", closefd=False) for number in (1, 2)
    )  # pytest has put its own there
    logging.root.handlers.clear()  # those of pytest
    work()


def as_main(module: str, *arguments: object, folder: Path) -> Callable[[], object]:
    """Return the work of `python -m MODULE ARGUMENTS` in a folder."""

    def run() -> None:
        os.chdir(folder)
        sys.argv = [module, *map(str, arguments)]
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    return run
