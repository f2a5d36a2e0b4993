"""The parser of the command line: argparse, with defaults and an example in every help, and a word on misspelt names.

Nothing heavy is imported here: the console script parses before it imports the package.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from ..spelling import did_you_mean

SHELLS = ("bash", "zsh", "tcsh", "fish")
_FILES = ("model", "checkpoint", "output", "original", "data", "calibration", "image", "evaluation")
"""Arguments for which a shell completes names of files."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Show the default of every option that has one, and the example as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, False, argparse.SUPPRESS) and action.default != []
        return f"{action.help} (default %(default)s)" if shown and action.option_strings else action.help


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that says which name was probably meant. Python 3.14 does the same for commands, not for options."""

    def __init__(self, *args: Any, formatter_class: Any = HelpFormatter, **kwargs: Any):
        super().__init__(*args, formatter_class=formatter_class, **kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """Refuse what is unknown in the command it was given to, whose usage is then shown."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return found, unknown

    def error(self, message: str):
        """Exit with code 2; of an unknown command or choice say what is like it."""
        wrong = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        meant = did_you_mean(wrong[1], re.findall(r"[^\s,']+", wrong[2])) if wrong else ""
        super().error(message + meant)

    def _meant(self, unknown: list[str]) -> str:
        names = [name for action in self._actions for name in action.option_strings]
        for each in unknown:
            meant = did_you_mean(each.partition("=")[0], names) if each.startswith("--") else ""
            if meant:
                return meant
        return ""


class PrintCompletion(argparse.Action):
    """`--print-completion SHELL`: print what makes a shell complete commands, options and names of files."""

    def __init__(self, option_strings: Sequence[str], dest: str):
        help = 'print the completion for a shell, for example: eval "$(sab-hf --print-completion bash)"'
        super().__init__(option_strings, dest, choices=SHELLS, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        shell = args[1]
        try:
            import shtab
        except ImportError:
            parser.error('--print-completion needs shtab: pip install "shtab>=1.13"')
        commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        for each in commands.choices.values():
            for action in each._actions:
                if action.dest in _FILES:
                    action.complete = shtab.FILE
        sys.stdout.write(shtab.complete(parser, shell) + "\n")
        parser.exit()
