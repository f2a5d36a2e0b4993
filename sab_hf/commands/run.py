"""`sab-hf run`."""

from __future__ import annotations

import argparse
from typing import Any

SUMMARY = "start another Python program in which packed checkpoints load"
EXAMPLE = "sab-hf run lm_eval run --model hf --model_args pretrained=me/smolvlm-sab --tasks arc_easy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", nargs=argparse.REMAINDER, dest="module", help="a module and its arguments")
    parser.add_argument(
        "program", nargs=argparse.REMAINDER,
        help="a .py file, the command of an installed package, or a module; and its arguments",
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    from ..run import check_program

    check_program(_argv(args))


def run(args: argparse.Namespace) -> Any:
    from ..run import main

    return main(_argv(args))


def _argv(args: argparse.Namespace) -> list[str]:
    if args.module is not None:
        return ["-m", *args.module, *args.program]
    return args.program[1:] if args.program[:1] == ["--"] else args.program
