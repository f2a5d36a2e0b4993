"""`sab-hf dequantize`."""

from __future__ import annotations

import argparse
from typing import Any

from .shared import add_dtype, add_shard_size, add_trust_remote_code, check_models, load_model

SUMMARY = "write a dense checkpoint that needs no plugin"
EXAMPLE = "sab-hf dequantize smolvlm-sab smolvlm-dense"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="packed checkpoint: a folder or Hub id")
    parser.add_argument("output", help="folder for the dense checkpoint")
    add_dtype(parser, "the dense weights")
    add_shard_size(parser)
    add_trust_remote_code(parser)


def check(args: argparse.Namespace) -> None:
    from ..publish.folders import check_target

    check_models(args, packed=True)
    check_target(args.output, replace=False)


def run(args: argparse.Namespace) -> tuple[Any, str]:
    from ..publish.folders import atomic_folder
    from ..publish.save import fresh_processor

    model = load_model(args.checkpoint, args.dtype, "cpu", trust_remote_code=args.trust_remote_code, packed=True)
    processor = fresh_processor(model, args.checkpoint)
    model = model.dequantize()
    with atomic_folder(args.output, replace=False) as folder:
        model.save_pretrained(folder, max_shard_size=args.max_shard_size)
        processor.save_pretrained(folder)
    size = 2**-20 * sum(parameter.nbytes for parameter in model.parameters())
    return {"saved": args.output, "dtype": str(model.dtype)}, f"saved: {args.output}, {size:.2f} MiB of dense weights"
