"""The command `sab-hf`: quantize, inspect, evaluate, export and publish from a shell. `optimum-cli sab` is the same.

Exit codes: 0 done, 1 the task failed (the reason is on stderr), 2 wrong usage, 130 interrupted, 143 terminated. With `--json`,
stdout holds one JSON document and nothing else; progress bars and warnings go to stderr, less of it with `--quiet`, more with
`--verbose`. Each command is a file in `commands/`.
This module and those import nothing heavy until a command runs: the console script (`sab_hf_command.py`) parses and checks the
command line with them before it imports the package.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from .commands import COMMANDS
from .commands.parsing import Parser, PrintCompletion
from .commands.shared import UsageError, logging_to_stderr, once_without_hub, say
from .version import __version__

DONE, FAILED, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; None: those of the process.
    Returns:
        The exit code.
    Raises:
        SystemExit: with code 2 for wrong usage, 0 for `--help` and `--version`.
    """
    parser = make_parser()
    return execute(parser.parse_args(argv), parser)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = Parser(
        prog="sab-hf",
        description="Binarized vision-language models for transformers.",
        epilog=f"example: {COMMANDS['chat'].EXAMPLE}\n`sab-hf COMMAND --help` describes a command.",
    )
    parser.add_argument("--version", action="version", version=f"sab_hf {__version__}")
    parser.add_argument("--print-completion", action=PrintCompletion)
    add_commands(parser)
    return parser


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands to a parser."""
    commands = parser.add_subparsers(dest="sab_command", metavar="COMMAND", parser_class=Parser)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, help=module.SUMMARY, description=module.SUMMARY, epilog=f"example: {module.EXAMPLE}"
        )
        module.add_arguments(command)
        if name == "run":  # what follows is another program's
            continue
        if name != "serve":
            command.add_argument("--json", action="store_true", help="print the result as one JSON document")
        told = command.add_mutually_exclusive_group()
        told.add_argument("--quiet", action="store_true", help="no log and no progress bars, errors only")
        told.add_argument("--verbose", action="store_true", help="log more, and errors with their traceback")


def refused(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int | None:
    """Say what is wrong with the subcommand that was parsed, as far as nothing heavy is needed to know it.

    Returns:
        The exit code; None: nothing is wrong so far.
    """
    if args.sab_command is None:
        parser.print_help(sys.stderr)
        return USAGE
    try:
        COMMANDS[args.sab_command].check(args)
    except UsageError as error:
        return _report(args, error, USAGE)
    except (ValueError, OSError, ImportError) as error:
        return _report(args, error, FAILED)
    return None


def execute(args: argparse.Namespace, parser: argparse.ArgumentParser, checked: bool = False) -> int:
    """Run the subcommand that was parsed, and return the exit code; `checked`: `refused` has found nothing wrong."""
    code = None if checked else refused(args, parser)
    if code is not None:
        return code
    if args.sab_command == "run":  # another program: its errors and its exit code are its own
        return _exit_code(COMMANDS["run"].run(args))
    command = COMMANDS[args.sab_command]
    with _Stops(each=getattr(command, "ANSWERS_INTERRUPTIONS", False)) as stops:
        return _execute(args, command, stops)


def _execute(args: argparse.Namespace, command: Any, stops: _Stops) -> int:
    try:
        with logging_to_stderr(args.quiet, args.verbose):
            if hasattr(command, "check_values"):
                command.check_values(args)
            with once_without_hub(args):
                plain, text = command.run(args)
        if getattr(args, "json", False):
            sys.stdout.write(_json(plain) + "\n")
        elif text:
            sys.stdout.write(_printable(text) + "\n")
        sys.stdout.flush()
    except (KeyboardInterrupt, _TerminatedError) as stop:
        stops.each = False
        terminated = isinstance(stop, _TerminatedError)
        say(f"\nsab-hf {args.sab_command}: {'terminated' if terminated else 'interrupted'}")
        if hasattr(command, "kept"):
            say(command.kept(args))
        return TERMINATED if terminated else INTERRUPTED
    except BrokenPipeError:  # the reader of stdout, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except UsageError as error:
        return _report(args, error, USAGE)
    except _expected_errors() as error:
        return _report(args, error, FAILED)
    return DONE


def _report(args: argparse.Namespace, error: Exception, code: int) -> int:
    """Say on stderr what went wrong, and return the exit code."""
    if getattr(args, "verbose", False):
        traceback.print_exc()
    say(f"sab-hf {args.sab_command}: error: {str(error) or type(error).__name__}", "error:")
    return code


def _json(plain: Any) -> str:
    from .publish.report import finite

    return json.dumps(finite(plain), indent=1)


def _printable(text: str) -> str:
    from .publish.form import printable

    return printable(text)


class _TerminatedError(BaseException):
    """SIGTERM, which schedulers send: the command ends as after Ctrl-C, and what is half written is removed."""


class _Stops:
    """While entered: Ctrl-C and SIGTERM end the command, and further ones do not disturb what removes half-written files.

    Args:
        each: every Ctrl-C raises, for commands that answer it and go on.
    """

    def __init__(self, each: bool):
        self.each = each
        self._count, self._process = 0, os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stops:
        if threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, or a program's own
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._stop)
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._stop)
        return self

    def __exit__(self, *raised: Any) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _stop(self, number: int, *frame: Any) -> None:
        self._count += 1
        if self._count == 1 or self.each or os.getpid() != self._process:
            raise KeyboardInterrupt if number == signal.SIGINT else _TerminatedError
        if self._count > 2:
            os._exit(INTERRUPTED if number == signal.SIGINT else TERMINATED)
        os.write(2, b"\nending; once more ends at once, and may leave files half written\n")


def _expected_errors() -> tuple[type[Exception], ...]:
    """Return what wrong input and a failing machine or network raise. Anything else is a defect and keeps its traceback."""
    from huggingface_hub.errors import HfHubHTTPError
    from safetensors import SafetensorError

    network = HfHubHTTPError.__bases__  # the HTTP client's own error, whichever client this huggingface_hub uses
    return (ValueError, OSError, RuntimeError, ImportError, SafetensorError, *network)


def _exit_code(result: Any) -> int:
    """Return the exit code that `sys.exit(result)` stands for."""
    if result is None:
        return DONE
    if isinstance(result, int):
        return result
    sys.stderr.write(f"{result}\n")
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
