"""Start another Python program in this interpreter with the method `sab` registered, so that packed checkpoints load there.

    python -m sab_hf.run lm_eval --model hf --model_args pretrained=me/qwen-sab --tasks arc_easy
    python -m sab_hf.run transformers serve me/qwen-sab
    python -m sab_hf.run my_script.py --flag
    python -m sab_hf.run -m package.module --flag

The program is a `.py` file, the command of an installed package, or a module; it sees its own `sys.argv`, and its exit
code is this process's. If PEFT is installed, adapters on packed models load too.

Child processes: those that are forked (worker processes of a `DataLoader` on Linux) have the method as well. A fresh Python
that the program starts (`torchrun`, `accelerate launch`, `multiprocessing` with the method "spawn") does not: start the
launcher as usual and this module under it, `torchrun --module sab_hf.run my_script.py`, or `import sab_hf` in the script.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

from .spelling import did_you_mean

logger = logging.getLogger(__name__)

USAGE = """\
usage: sab-hf run [-m] PROGRAM [ARGS ...]    (or python -m sab_hf.run ...)
PROGRAM: a .py file, the command of an installed package, or a module; with -m a module. Packed checkpoints load in it.
example: sab-hf run transformers serve me/qwen-sab"""


def main(argv: Sequence[str] | None = None) -> Any:
    """Run a program as `python -m sab_hf.run` does, in this process.

    Args:
        argv: the program and its arguments; None: those of this process.
    Returns:
        What the program's main function returned, for `sys.exit`; None for files and modules.
    Raises:
        SystemExit: as the program raises it; with code 2 if there is no such program.
    """
    as_module, name, arguments = _parse(sys.argv[1:] if argv is None else argv)
    program = _find_module(name) if as_module else _find_file(name) or _find_command(name) or _find_module(name)
    if program is None:
        _refuse(name)
    _register()
    before = sys.argv, sys.path[:]
    sys.argv = [name, *arguments]
    try:
        return program()
    finally:
        sys.argv, sys.path[:] = before


def check_program(argv: Sequence[str]) -> None:
    """Check that there is such a program, as far as nothing of it need be imported to see that.

    Raises:
        SystemExit: with code 2 if there is none.
    """
    as_module, name, _ = _parse(argv)
    if "." in name or (not as_module and (_find_file(name) or _find_command(name))):
        return  # to look for a dotted name imports what is before the dot
    try:
        found = importlib.util.find_spec(name)
    except ValueError:  # an empty name
        found = None
    if found is None:
        _refuse(name)


def _parse(argv: Sequence[str]) -> tuple[bool, str, list[str]]:
    """Return whether the program is named as a module, its name, and its arguments; asked for help, print it and exit."""
    if not argv or argv[0] in ("-h", "--help"):
        (sys.stdout if argv else sys.stderr).write(f"{USAGE}\n")
        raise SystemExit(0 if argv else 2)
    if argv[0] == "-m":
        return True, argv[1] if len(argv) > 1 else "", list(argv[2:])
    return False, argv[0], list(argv[1:])


def _refuse(name: str) -> NoReturn:
    sys.stderr.write(f"{_why_not(name)}\n{USAGE}\n")
    raise SystemExit(2)


def _why_not(name: str) -> str:
    """Say why `name` is no program."""
    if not name:
        return "-m needs the name of a module"
    if name.isidentifier() and importlib.util.find_spec(name):
        return f"{name!r} is a package that cannot be run: it has no command of that name and no module `__main__`"
    commands = {command.name for command in entry_points(group="console_scripts")}
    return f"{name!r} is no file, no command of an installed package, and no module{did_you_mean(name, commands)}"


def _register() -> None:
    """Register the quantization method with transformers, and adapters on packed models with PEFT if it is there."""
    from . import quantizer  # noqa: F401

    if importlib.util.find_spec("peft"):
        try:
            from . import peft  # noqa: F401
        except ImportError as error:  # the program may need no adapters
            logger.warning("adapters on packed models will not load: %s", error)


def _find_file(name: str) -> Callable[[], Any] | None:
    if not (name.endswith(".py") or os.sep in name) or not Path(name).is_file():
        return None

    def run() -> None:
        sys.path.insert(0, str(Path(name).resolve().parent))  # as Python does for a script
        runpy.run_path(name, run_name="__main__")

    return run


def _find_command(name: str) -> Callable[[], Any] | None:
    commands = entry_points(group="console_scripts", name=name)
    return (lambda: next(iter(commands)).load()()) if commands else None


def _find_module(name: str) -> Callable[[], Any] | None:
    try:
        found = importlib.util.find_spec(name)
        if (
            found and found.submodule_search_locations is not None
        ):  # a package: what runs is the module `__main__` in it
            found = importlib.util.find_spec(f"{name}.__main__")
    except (ImportError, ValueError):  # a dotted name whose parent does not exist, or an empty name
        return None
    return (lambda: runpy.run_module(name, run_name="__main__", alter_sys=True) and None) if found else None


if __name__ == "__main__":
    sys.exit(main())
