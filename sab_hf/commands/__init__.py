"""The commands of `sab-hf`, one a file: `SUMMARY`, `EXAMPLE`, `add_arguments(parser)` and `run(args)`.

`run` returns the result as plain data, for `--json`, and as text. `check(args)` is called before it, and before anything heavy
is imported: it finds wrong options and files that are not there. `check_values(args)`, where a command has it, finds what takes
the package to see, before the Hub is asked. `kept(args)`, where a command has it, says after an interruption where the finished
work lies. What a command needs is imported when it runs, so that `--help` is quick.
"""

from __future__ import annotations

from . import card, chat, dequantize, evaluation, export, inspection, quantize, run, serve

COMMANDS = {
    "chat": chat,
    "quantize": quantize,
    "inspect": inspection,
    "eval": evaluation,
    "serve": serve,
    "dequantize": dequantize,
    "export": export,
    "card": card,
    "run": run,
}
"""Name on the command line → module."""
