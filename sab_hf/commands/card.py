"""`sab-hf card`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .shared import add_push

SUMMARY = "rewrite card, report and charts of a packed checkpoint, with an evaluation"
EXAMPLE = "sab-hf card smolvlm-sab --evaluation evaluation.json --push --repo-id me/smolvlm-sab"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        metavar="checkpoint",
        help="folder of a packed checkpoint; its card, report and charts are replaced",
    )
    parser.add_argument("--evaluation", help="JSON file from `sab-hf eval --output`")
    parser.add_argument("--repo-id", help="name that the loading snippet loads; default: the folder's name")
    parser.add_argument("--base-model", help="Hub id of the original; default: that of the present report")
    parser.add_argument("--license", help="license for the metadata; default: that of the present card")
    add_push(parser)


def check(args: argparse.Namespace) -> None:
    from ..publish.form import read_evaluation

    if not Path(args.folder).is_dir():
        raise FileNotFoundError(
            f"there is no folder `{args.folder}`; the card is written into the folder of a checkpoint"
        )
    if args.evaluation:
        read_evaluation(Path(args.evaluation))


def run(args: argparse.Namespace) -> tuple[Any, str]:
    from ..publish.card import find_license
    from ..publish.form import read_evaluation
    from ..publish.save import check_login, publish_folder, read_summary, write_pages
    from ..publish.summary import with_evaluation

    folder = Path(args.folder)
    repo_id = args.repo_id or folder.resolve().name
    if args.push:
        repo_id = check_login(repo_id)
    evaluation = read_evaluation(Path(args.evaluation)) if args.evaluation else None
    summary = read_summary(folder)
    if args.base_model:
        summary["base_model"] = args.base_model
    if evaluation:
        summary = with_evaluation(summary, evaluation)
    license = args.license or find_license(str(folder)) or find_license(summary["base_model"])
    write_pages(folder, summary, repo_id, license)
    plain = {"card": str(folder / "README.md"), "report": str(folder / "report.html")}
    if args.push:
        plain["published"] = publish_folder(folder, repo_id, private=args.private or None)
    return plain, "\n".join(f"{what}: {where}" for what, where in plain.items())
