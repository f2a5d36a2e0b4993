"""`sab-hf chat`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

from ..spelling import did_you_mean
from ..trust import trusting
from .shared import (
    add_device_map,
    add_dtype,
    add_trust_remote_code,
    check_models,
    device_map,
    load_model,
    positive,
    say,
)

if TYPE_CHECKING:
    from ..dialogue import Chat

SUMMARY = "chat with a model at the terminal, with pictures"
EXAMPLE = (
    'sab-hf chat examples/tiny_vlm-sab --image examples/shapes.png --prompt "What color is the object at the top left?"'
)
ANSWERS_INTERRUPTIONS = True
"""Ctrl-C stops an answer, and the conversation goes on."""
SIGN = "> "
HELP = """\
/image PATH  put a picture (file or URL) beside the next question; several if repeated
/reset       forget the conversation and its pictures
/help        this text
/quit        end, as Ctrl-D does
Ctrl-C stops an answer. Anything else is a question."""
_COMMANDS = ("/image", "/reset", "/help", "/quit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id, packed or dense")
    parser.add_argument(
        "--image", action="append", default=[], help="file or URL of a picture for the first question; may be repeated"
    )
    parser.add_argument("--prompt", help="one question: print the answer and end (default: questions line by line)")
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="most tokens of an answer")
    add_dtype(parser, "weights and activations")
    add_device_map(parser)
    add_trust_remote_code(parser)


def check(args: argparse.Namespace) -> None:
    from ..paths import check_image

    check_models(args)
    for image in args.image:
        check_image(image)


def run(args: argparse.Namespace) -> tuple[Any, str]:
    from ..dialogue import Chat

    code = trusting(args.trust_remote_code)
    model = load_model(args.model, args.dtype, device_map(args), **code)
    chat = Chat(model, args.model, args.image, args.max_new_tokens, **code)
    shown = not args.json
    if args.prompt is not None:
        turns = [_turn(chat, args.prompt, shown)]
    elif sys.stdin.isatty():
        turns = _talk(chat, shown)
    else:
        turns = [_turn(chat, line.strip(), shown) for line in sys.stdin if line.strip()]
    return turns, ""


def _turn(chat: Chat, prompt: str, shown: bool) -> dict[str, str]:
    """Ask one question, and show the answer while it comes."""
    from ..publish.form import printable

    def show(text: str) -> None:
        sys.stdout.write(printable(text))
        sys.stdout.flush()

    try:
        return {"prompt": prompt, "answer": chat.ask(prompt, show if shown else None)}
    finally:
        if shown:
            show("\n")


def _talk(chat: Chat, shown: bool) -> list[dict[str, str]]:
    """Ask what is typed, until the end of input."""
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 (gives `input` a line that can be edited, and the arrow keys)

    say("Ask something; /help lists the commands, Ctrl-D ends.")
    turns: list[dict[str, str]] = []
    while True:
        try:
            line = input(SIGN).strip()
        except EOFError:
            sys.stdout.write("\n")
            return turns
        except KeyboardInterrupt:
            say("\nCtrl-D or /quit ends.")
            continue
        if line == "/quit":
            return turns
        try:
            if line.startswith("/"):
                _obey(chat, line)
            elif line:
                turns.append(_turn(chat, line, shown))
        except KeyboardInterrupt:
            say("(stopped)")
        except (ValueError, OSError) as error:
            say(f"error: {error}", "error:")


def _obey(chat: Chat, line: str) -> None:
    """Do what a line that begins with a slash says."""
    command, _, rest = line.partition(" ")
    if command == "/image" and rest.strip():
        image = os.path.expanduser(rest.strip().strip("'\""))
        chat.show(image)
        say(f"The next question is about {image}.")
    elif command == "/reset":
        chat.reset()
        say("Forgotten.")
    elif command == "/help":
        say(HELP)
    else:
        meant = did_you_mean(command, [name for name in _COMMANDS if name != command])
        say(f"error: `{line}` is no command{meant or '; /help lists them'}", "error:")
