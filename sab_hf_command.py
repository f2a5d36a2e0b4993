"""The console script `sab-hf`: parses and checks the command line before torch and transformers are imported: that takes seconds.

Importing any module of `sab_hf` executes the package first, which registers it with transformers. What parses needs none of that.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

INTERRUPTED = 130


def main() -> int:
    """Run `sab-hf` on the arguments of the process, and return the exit code.

    Raises:
        SystemExit: with code 2 for wrong usage, 0 for `--help` and `--version`.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is ignored, as a shell has it for jobs in the background
        signal.signal(signal.SIGINT, end_at_once)
    with parsing_part() as cli:
        parser = cli.make_parser()
        args = parser.parse_args()
        refused = cli.refused(args, parser)
    if refused is not None:
        return refused
    wait_asleep_where_busy()
    from sab_hf.cli import execute

    signal.signal(signal.SIGINT, before)
    code = execute(args, parser, checked=True)
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C does not disturb the end of the process
    return code


def end_at_once(*args: object) -> None:
    """Answer Ctrl-C while modules are imported: nothing was begun, and a traceback of torch helps nobody."""
    os.write(2, b"\nsab-hf: interrupted\n")
    os._exit(INTERRUPTED)


def wait_asleep_where_busy() -> None:
    """Have threads that wait for each other sleep, where other processes want the cores: awake they take cores from all.

    The OpenMP runtime reads this when torch is imported. What the environment says already stays.
    """
    if hasattr(os, "getloadavg") and os.getloadavg()[0] >= (os.cpu_count() or 1):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def parsing_part() -> Iterator[ModuleType]:
    """Give `sab_hf.cli`, imported without executing `sab_hf`, and forgotten at the end: the next import is a whole one."""
    if "sab_hf" in sys.modules:
        yield importlib.import_module("sab_hf.cli")
        return
    sys.modules["sab_hf"] = importlib.util.module_from_spec(importlib.util.find_spec("sab_hf"))
    try:
        yield importlib.import_module("sab_hf.cli")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "sab_hf"]:
            del sys.modules[name]


if __name__ == "__main__":
    sys.exit(main())
