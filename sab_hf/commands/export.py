"""`sab-hf export`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .shared import check_models

SUMMARY = "write a portable checkpoint for other runtimes: gguf for llama.cpp and Ollama"
EXAMPLE = "sab-hf export gguf qwen-sab qwen.gguf"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("format", choices=("gguf",), help="format of the file")
    parser.add_argument("checkpoint", help='packed checkpoint made with portable="gguf": a folder or Hub id')
    parser.add_argument("output", help="the file to write; nothing may be there")
    parser.add_argument(
        "--like", metavar="FILE",
        help="F16, BF16 or F32 GGUF file of the same model: tokenizer, chat template and metadata are taken from it",
    )  # fmt: skip
    parser.add_argument(
        "--embedding", choices=("q8_0", "q4_0", "f16"), default="q8_0",
        help="type of input embedding and output head",
    )  # fmt: skip
    parser.add_argument(
        "--mmproj", metavar="FILE",
        help="write vision tower and projector there, in F16: Gemma 3 and Qwen2.5-VL; others use the original model's file",
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    from ..paths import check_new_file

    check_models(args, packed=True)
    if args.like and not Path(args.like).is_file():
        raise FileNotFoundError(f"--like: there is no file `{args.like}` to take tokenizer and metadata from")
    for file in filter(None, (args.output, args.mmproj)):
        check_new_file(file)


def run(args: argparse.Namespace) -> tuple[Any, str]:
    from ..publish.gguf import export_gguf

    result = export_gguf(args.checkpoint, args.output, like=args.like, embedding=args.embedding, mmproj=args.mmproj)
    return asdict(result), str(result)
