"""`sab-hf inspect`."""

from __future__ import annotations

import argparse
from typing import Any

SUMMARY = "show bits by role, format version and sizes of a packed checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="packed checkpoint: a folder or Hub id; only headers are read")
    parser.add_argument("--verify", action="store_true", help="read everything and check the checksums")
    parser.add_argument("--revision", help="revision of the repository")


def run(args: argparse.Namespace) -> tuple[Any, str]:
    from ..publish.inspect import inspect

    found = inspect(args.checkpoint, verify=args.verify, revision=args.revision)
    return found.to_dict(), str(found)
