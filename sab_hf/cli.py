"""The command `sab-hf`: quantize, inspect, evaluate, export and publish from a shell. `optimum-cli sab` is the same.

Exit codes: 0 done, 1 the task failed (the reason is on stderr), 2 wrong usage. With `--json`, stdout holds one JSON document and
nothing else; progress bars and warnings go to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from .version import __version__

DONE, FAILED, USAGE = 0, 1, 2

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; None: those of the process.
    Returns:
        The exit code.
    Raises:
        SystemExit: with code 2 for wrong usage, 0 for `--help` and `--version`.
    """
    parser = argparse.ArgumentParser(prog="sab-hf", description="Binarized vision-language models for transformers.")
    parser.add_argument("--version", action="version", version=f"sab_hf {__version__}")
    add_commands(parser)
    return execute(parser.parse_args(argv), parser)


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands to a parser."""
    commands = parser.add_subparsers(dest="sab_command", metavar="COMMAND")
    for name, (text, add_arguments, _) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        add_arguments(command)
        if name != "run":
            command.add_argument("--json", action="store_true", help="print the result as one JSON document")


def execute(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the subcommand that was parsed, and return the exit code."""
    if args.sab_command is None:
        parser.print_help(sys.stderr)
        return USAGE
    try:
        result = _COMMANDS[args.sab_command][2](args)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.stderr.write(f"sab-hf {args.sab_command}: error: {error}\n")
        return FAILED
    if args.sab_command == "run":
        return _exit_code(result)
    plain, text = result
    sys.stdout.write((json.dumps(plain, indent=1) if args.json else text) + "\n")
    return DONE


def _exit_code(result: Any) -> int:
    """Return the exit code that `sys.exit(result)` stands for."""
    if result is None:
        return DONE
    if isinstance(result, int):
        return result
    sys.stderr.write(f"{result}\n")
    return FAILED


# ---- quantize


def _quantize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="dense checkpoint: a folder or Hub id")
    parser.add_argument("output", help="folder to write, or with --push a Hub repository")
    parser.add_argument("--bits", type=float, help="stored bits per language weight; default: one plane and a tenth")
    parser.add_argument("--calibration", help='"builtin" (default), a Hub dataset, a folder, or a JSONL file')
    parser.add_argument("--num-samples", type=int, help="calibration samples")
    parser.add_argument("--refine-steps", type=int, help="steps of block refinement; 0 turns it off")
    parser.add_argument("--seed", type=int, help="of the calibration set")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE",
        help="any other field of SABQuantizationConfig, value as JSON or text; may be repeated",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the parts left dense (default: as stored)")
    parser.add_argument("--device-map", help="for example auto, cuda or cpu; default: a GPU if there is one")
    parser.add_argument("--revision", help="of the dense checkpoint on the Hub")
    parser.add_argument("--max-shard-size", default="5GB", help="of one weights file (default 5GB)")
    parser.add_argument("--license", help="for the card; default: that in the card of the original")
    _add_push(parser)


def _quantize(args: argparse.Namespace) -> tuple[Any, str]:
    from transformers import AutoConfig, AutoProcessor

    from .hub import save
    from .inspection import saved_class
    from .report import report

    config = _quantization_config(args)
    kind = saved_class(AutoConfig.from_pretrained(args.model, revision=args.revision))
    processor = AutoProcessor.from_pretrained(args.model, revision=args.revision)
    config.processor = processor
    model = kind.from_pretrained(
        args.model, revision=args.revision, quantization_config=config, dtype=args.dtype, device_map=_device_map(args)
    )
    where = save(
        model,
        processor,
        args.output,
        push=args.push,
        private=args.private or None,
        base_model=args.model,
        license=args.license,
        max_shard_size=args.max_shard_size,
    )
    sizes = report(model)
    return {"saved": where, **sizes.to_dict()}, f"{sizes}\nsaved: {where}"


def _quantization_config(args: argparse.Namespace) -> Any:
    from .config import SABQuantizationConfig

    fields = {name: getattr(args, name) for name in ("bits", "calibration", "num_samples", "refine_steps", "seed")}
    fields = {name: value for name, value in fields.items() if value is not None}
    known = {field.name for field in dataclasses.fields(SABQuantizationConfig) if field.init}
    for entry in args.set:
        name, _, value = entry.partition("=")
        if name not in known - {"modules", "checksums", "format_version", "processor"}:
            raise ValueError(f"--set {entry}: `{name}` is no field of SABQuantizationConfig that can be set")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return SABQuantizationConfig(**fields)


# ---- inspect


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="packed checkpoint: a folder or Hub id; only headers are read")
    parser.add_argument("--verify", action="store_true", help="read everything and check the checksums")
    parser.add_argument("--revision", help="of the repository")


def _inspect(args: argparse.Namespace) -> tuple[Any, str]:
    from .inspection import inspect

    found = inspect(args.checkpoint, verify=args.verify, revision=args.revision)
    return found.to_dict(), str(found)


# ---- eval


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id, packed or dense")
    parser.add_argument("--original", help="folder or Hub id to compare with: agreement and KL")
    parser.add_argument(
        "--data", default="builtin", help='questions: "builtin", a Hub dataset, a folder, or a JSONL file'
    )
    parser.add_argument("--num-samples", type=int, default=200, help="most samples (default 200)")
    parser.add_argument("--seed", type=int, default=1, help="of their order and of the built-in set (default 1)")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a forward pass (default 8)")
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="auto", help="of weights and activations (default: as stored)"
    )
    parser.add_argument("--device-map", help="for example auto, cuda or cpu; default: a GPU if there is one")
    parser.add_argument("--output", help="file for the result as JSON, for `sab-hf card --evaluation`")


def _eval(args: argparse.Namespace) -> tuple[Any, str]:
    from .evaluate import evaluate

    result = evaluate(
        args.model,
        data=args.data,
        original=args.original,
        num_samples=args.num_samples,
        seed=args.seed,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device_map=_device_map(args),
    )
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            file.write(result.to_json())
    return result.to_dict(), str(result)


# ---- dequantize


def _dequantize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="packed checkpoint: a folder or Hub id")
    parser.add_argument("output", help="folder for the dense checkpoint")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the dense weights (default: as stored)")
    parser.add_argument("--max-shard-size", default="5GB", help="of one weights file (default 5GB)")


def _dequantize(args: argparse.Namespace) -> tuple[Any, str]:
    from .hub import atomic_folder, fresh_processor

    model = _load_packed(args.checkpoint, args.dtype, "cpu")
    processor = fresh_processor(model, args.checkpoint)
    model = model.dequantize()
    with atomic_folder(args.output) as folder:
        model.save_pretrained(folder, max_shard_size=args.max_shard_size)
        processor.save_pretrained(folder)
    size = 2**-20 * sum(parameter.nbytes for parameter in model.parameters())
    return {"saved": args.output, "dtype": str(model.dtype)}, f"saved: {args.output}, {size:.2f} MiB of dense weights"


# ---- card


def _card_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", help="folder of a packed checkpoint; card, report and pictures in it are written anew"
    )
    parser.add_argument("--evaluation", help="JSON file from `sab-hf eval --output`")
    parser.add_argument("--repo-id", help="what the loading snippet loads; default: the folder's name")
    parser.add_argument("--base-model", help="Hub id of the original; default: as in the report that is there")
    parser.add_argument("--license", help="for the metadata; default: as in the card that is there")
    _add_push(parser)


def _card(args: argparse.Namespace) -> tuple[Any, str]:
    from pathlib import Path

    from .card import find_license
    from .hub import publish_folder, read_summary, write_pages
    from .summary import plain_evaluation

    folder = Path(args.checkpoint)
    summary = read_summary(folder)
    if args.base_model:
        summary["base_model"] = args.base_model
    if args.evaluation:
        summary["evaluation"] = plain_evaluation(json.loads(Path(args.evaluation).read_text(encoding="utf-8")))
    license = args.license or find_license(str(folder)) or find_license(summary["base_model"])
    repo_id = args.repo_id or folder.resolve().name
    write_pages(folder, summary, repo_id, license)
    plain = {"card": str(folder / "README.md"), "report": str(folder / "report.html")}
    if args.push:
        plain["published"] = publish_folder(folder, repo_id, private=args.private or None)
    return plain, "\n".join(f"{what}: {where}" for what, where in plain.items())


# ---- demo


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="packed checkpoint: a folder or Hub id")
    parser.add_argument("--image", help="file or URL of a picture to talk about")
    parser.add_argument("--prompt", help="one question; without it, each line of stdin is one")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of an answer (default 128)")
    parser.add_argument("--device-map", help="for example auto, cuda or cpu; default: a GPU if there is one")


def _demo(args: argparse.Namespace) -> tuple[Any, str]:
    from .demo import Chat

    model = _load_packed(args.checkpoint, "auto", _device_map(args))
    chat = Chat(model, args.checkpoint, args.image, args.max_new_tokens)
    prompts = [args.prompt] if args.prompt is not None else (line.strip() for line in sys.stdin)
    turns = []
    for prompt in prompts:
        if not prompt:
            continue
        turns.append({"prompt": prompt, "answer": chat.ask(prompt)})
        if args.prompt is None and not args.json:
            sys.stdout.write(f"{turns[-1]['answer']}\n")
            sys.stdout.flush()
    return turns, turns[-1]["answer"] if args.prompt is not None and turns else f"{len(turns)} questions answered"


# ---- run


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("program", help="a .py file, a command of an installed package, or -m and a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")


def _run(args: argparse.Namespace) -> Any:
    from .run import main as run

    return run([args.program, *args.arguments])


# ---- shared


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--push", action="store_true", help="publish to the Hub (log in first: `hf auth login`)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")


def _device_map(args: argparse.Namespace) -> str | None:
    import torch

    return args.device_map or ("auto" if torch.cuda.is_available() else None)


def _load_packed(checkpoint: str, dtype: str, device_map: str | None) -> Any:
    from transformers import AutoConfig

    from . import quantizer  # noqa: F401 (registers the method)
    from .inspection import saved_class

    config = AutoConfig.from_pretrained(checkpoint)
    method = getattr(config, "quantization_config", None) or {}
    if method.get("quant_method") != "sab":
        raise ValueError(f"`{checkpoint}` is no checkpoint packed by sab_hf")
    return saved_class(config).from_pretrained(checkpoint, dtype=dtype, device_map=device_map).eval()


_COMMANDS = {
    "quantize": ("binarize a checkpoint and save it packed, with card and report", _quantize_arguments, _quantize),
    "inspect": ("show bits by role, format version and sizes of a packed checkpoint", _inspect_arguments, _inspect),
    "eval": ("score a model, and compare it with its original", _eval_arguments, _eval),
    "dequantize": ("write a dense checkpoint that needs no plugin", _dequantize_arguments, _dequantize),
    "card": ("write card, report and pictures of a packed checkpoint anew", _card_arguments, _card),
    "demo": ("ask a packed model about a picture", _demo_arguments, _demo),
    "run": ("start another Python program in which packed checkpoints load", _run_arguments, _run),
}


if __name__ == "__main__":
    sys.exit(main())
