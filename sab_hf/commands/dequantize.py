"""`sab-hf dequantize`."""

from __future__ import annotations

import argparse
from typing import Any

from .shared import DTYPES, add_shard_size, load_packed

SUMMARY = "write a dense checkpoint that needs no plugin"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="packed checkpoint: a folder or Hub id")
    parser.add_argument("output", help="folder for the dense checkpoint")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of the dense weights (default: as stored)"
    )
    add_shard_size(parser)


def run(args: argparse.Namespace) -> tuple[Any, str]:
    from ..publish.folders import atomic_folder, check_target
    from ..publish.save import fresh_processor

    check_target(args.output, replace=False)
    model = load_packed(args.checkpoint, args.dtype, "cpu")
    processor = fresh_processor(model, args.checkpoint)
    model = model.dequantize()
    with atomic_folder(args.output, replace=False) as folder:
        model.save_pretrained(folder, max_shard_size=args.max_shard_size)
        processor.save_pretrained(folder)
    size = 2**-20 * sum(parameter.nbytes for parameter in model.parameters())
    return {"saved": args.output, "dtype": str(model.dtype)}, f"saved: {args.output}, {size:.2f} MiB of dense weights"
