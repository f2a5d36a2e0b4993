"""`sab-hf demo`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .shared import add_device_map, device_map, load_packed

SUMMARY = "ask a packed model about a picture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="packed checkpoint: a folder or Hub id")
    parser.add_argument("--image", help="file or URL of a picture to talk about")
    parser.add_argument("--prompt", help="one question; without it, each line of stdin is one")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="most tokens of an answer (default 128)")
    add_device_map(parser)


def run(args: argparse.Namespace) -> tuple[Any, str]:
    from ..dialogue import Chat, check_image
    from ..publish.form import printable

    if args.image:
        check_image(args.image)
    model = load_packed(args.checkpoint, "auto", device_map(args))
    chat = Chat(model, args.checkpoint, args.image, args.max_new_tokens)
    prompts = [args.prompt] if args.prompt is not None else (line.strip() for line in sys.stdin)
    turns = []
    for prompt in prompts:
        if not prompt:
            continue
        turns.append({"prompt": prompt, "answer": chat.ask(prompt)})
        if args.prompt is None and not args.json:
            sys.stdout.write(f"{printable(turns[-1]['answer'])}\n")
            sys.stdout.flush()
    return turns, turns[-1]["answer"] if args.prompt is not None and turns else f"{len(turns)} questions answered"
