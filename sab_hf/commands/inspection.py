"""`sab-hf inspect`."""

from __future__ import annotations

import argparse
from typing import Any

from .shared import add_trust_remote_code, check_models

SUMMARY = "show bits by role, format version and sizes of a packed checkpoint"
EXAMPLE = "sab-hf inspect smolvlm-sab --verify"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="packed checkpoint: a folder or Hub id; only headers are read")
    parser.add_argument("--verify", action="store_true", help="read everything and check the checksums")
    parser.add_argument("--revision", help="revision of the repository (default: main)")
    add_trust_remote_code(parser)


def check(args: argparse.Namespace) -> None:
    check_models(args, packed=True)


def run(args: argparse.Namespace) -> tuple[Any, str]:
    from ..publish.inspect import inspect

    found = inspect(
        args.checkpoint, verify=args.verify, revision=args.revision, trust_remote_code=args.trust_remote_code
    )
    return found.to_dict(), str(found)
