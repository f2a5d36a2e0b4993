"""`sab-hf run`."""

from __future__ import annotations

import argparse
from typing import Any

SUMMARY = "start another Python program in which packed checkpoints load"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("program", help="a .py file, a command of an installed package, or -m and a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")


def run(args: argparse.Namespace) -> Any:
    from ..run import main

    return main([args.program, *args.arguments])
