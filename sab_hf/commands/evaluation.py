"""`sab-hf eval`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..trust import trusting
from .shared import (
    UsageError,
    add_allow_urls,
    add_device_map,
    add_dtype,
    add_trust_remote_code,
    check_models,
    device_map,
    positive,
)

SUMMARY = "score a model, and compare it with its original"
EXAMPLE = "sab-hf eval smolvlm-sab --original HuggingFaceTB/SmolVLM-256M-Instruct --data my_questions.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id, packed or dense")
    parser.add_argument("--original", help="folder or Hub id to compare with: agreement and KL")
    parser.add_argument(
        "--tasks",
        type=_names,
        metavar="NAME[,NAME…]",
        help="public tasks of lmms-eval in place of questions, for example chartqa,docvqa,textvqa,mmstar,ocrbench",
    )
    parser.add_argument(
        "--data",
        help='questions: "builtin" (default), a Hub dataset, a folder, or a JSONL file; with --tasks: a folder with copies of '
        "their data sets' repositories (default: download them)",
    )
    parser.add_argument("--include-path", metavar="FOLDER", help="with --tasks: a folder with further tasks, as YAML")
    add_allow_urls(parser)
    parser.add_argument(
        "--num-samples", type=positive, help="at most so many samples, of each task too (default 200; with --tasks all)"
    )
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="at most so many questions with pictures are shown on card and report, which publish them (default 4 of the "
        "built-in set, 0 of your data)",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of their order and of the built-in set")
    parser.add_argument("--batch-size", type=positive, default=8, help="samples of a forward pass")
    add_dtype(parser, "weights and activations")
    add_device_map(parser)
    add_trust_remote_code(parser)
    parser.add_argument("--no-speed", action="store_true", help="do not time an answer of each model")
    parser.add_argument("--output", help="file for the result as JSON, for `sab-hf card --evaluation`")
    parser.add_argument("--picture", metavar="FILE.svg", help="file for a picture of model and original side by side")


def check(args: argparse.Namespace) -> None:
    from ..paths import check_samples

    if args.include_path and not args.tasks:
        raise UsageError("--include-path: it is for --tasks, which names none")
    if args.include_path and not Path(args.include_path).is_dir():
        raise FileNotFoundError(f"--include-path: there is no folder `{args.include_path}`; name one with tasks")
    check_models(args)
    if args.data and not args.tasks:
        check_samples(args.data, "data")
    if args.output:
        check_output(args.output)
    if args.picture:
        check_picture(args.picture)


def run(args: argparse.Namespace) -> tuple[Any, str]:
    from ..publish.html import scores_picture

    result = _tasks(args) if args.tasks else _questions(args)
    plain = result.to_dict()
    if args.output:
        Path(args.output).write_text(result.to_json(), encoding="utf-8")
    if args.picture:
        Path(args.picture).write_text(scores_picture(plain), encoding="utf-8")
    return plain, str(result)


def _questions(args: argparse.Namespace) -> Any:
    from ..evaluate.compare import evaluate

    data = args.data or "builtin"
    return evaluate(
        args.model,
        data=data,
        original=args.original,
        num_samples=200 if args.num_samples is None else args.num_samples,
        seed=args.seed,
        batch_size=args.batch_size,
        allow_urls=args.allow_urls,
        num_examples=(4 if data == "builtin" else 0) if args.examples is None else args.examples,
        speed=not args.no_speed,
        **_loading(args),
    )


def _tasks(args: argparse.Namespace) -> Any:
    from ..evaluate.tasks import evaluate_tasks

    return evaluate_tasks(
        args.model,
        args.tasks,
        original=args.original,
        data=args.data,
        include_path=args.include_path,
        num_samples=args.num_samples,
        seed=args.seed,
        batch_size=args.batch_size,
        **_loading(args),
    )


def _loading(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that models are loaded with."""
    code = trusting(args.trust_remote_code)
    return {"dtype": args.dtype, "device_map": device_map(args), **code}


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("names of tasks with commas between them are required, got none")
    return names


def check_picture(file: str) -> None:
    """Check that a picture may be written to `file`: it is new, empty, or an SVG picture.

    Raises:
        ValueError: the file holds something else, which is not replaced.
        OSError: there is no such folder.
    """
    path = Path(file)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--picture {file}: there is no folder `{path.parent}`; make it first")
    if path.is_dir() or (path.exists() and path.read_bytes()[:4] not in (b"", b"<svg")):
        raise ValueError(f"--picture {file}: that is no SVG picture, so it is not replaced; name another file")


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
