"""`sab-hf eval`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from .shared import DTYPES, add_allow_urls, add_device_map, device_map

SUMMARY = "score a model, and compare it with its original"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id, packed or dense")
    parser.add_argument("--original", help="folder or Hub id to compare with: agreement and KL")
    parser.add_argument(
        "--data", default="builtin", help='questions: "builtin", a Hub dataset, a folder, or a JSONL file'
    )
    add_allow_urls(parser)
    parser.add_argument("--num-samples", type=int, default=200, help="most samples (default 200)")
    parser.add_argument("--seed", type=int, default=1, help="seed of their order and of the built-in set (default 1)")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a forward pass (default 8)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of weights and activations (default: as stored)"
    )
    add_device_map(parser)
    parser.add_argument("--output", help="file for the result as JSON, for `sab-hf card --evaluation`")


def run(args: argparse.Namespace) -> tuple[Any, str]:
    from ..evaluate.compare import evaluate

    if args.output:
        check_output(args.output)
    result = evaluate(
        args.model,
        data=args.data,
        original=args.original,
        num_samples=args.num_samples,
        seed=args.seed,
        batch_size=args.batch_size,
        allow_urls=args.allow_urls,
        dtype=args.dtype,
        device_map=device_map(args),
    )
    if args.output:
        Path(args.output).write_text(result.to_json(), encoding="utf-8")
    return result.to_dict(), str(result)


def check_output(file: str) -> None:
    """Check that an evaluation may be written to `file`: it is new, empty, or holds an evaluation.

    Raises:
        ValueError: the file holds something else, which is not replaced.
        OSError: there is no such folder, or it cannot be written.
    """
    from ..publish.form import read_evaluation

    path = Path(file)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--output {file}: there is no folder `{path.parent}`; make it first")
    if path.is_file() and path.stat().st_size:
        try:
            read_evaluation(path)
        except ValueError as error:
            raise ValueError(
                f"--output {file}: the file is no evaluation, so it is not replaced; name another"
            ) from error
    elif path.is_dir():
        raise ValueError(f"--output {file} is a folder; name another")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise PermissionError(f"--output {file} cannot be written; name another")
