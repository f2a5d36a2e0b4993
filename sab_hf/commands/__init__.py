"""The commands of `sab-hf`, one a file: `SUMMARY`, `add_arguments(parser)` and `run(args)`.

`run` returns the result as plain data, for `--json`, and as text. What a command needs is imported when it runs, so that
`--help` is quick.
"""

from __future__ import annotations

from . import card, demo, dequantize, evaluation, export, inspection, quantize, run

COMMANDS = {
    "quantize": quantize,
    "inspect": inspection,
    "eval": evaluation,
    "dequantize": dequantize,
    "export": export,
    "card": card,
    "demo": demo,
    "run": run,
}
"""Name on the command line → module."""
