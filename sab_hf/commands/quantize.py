"""`sab-hf quantize`."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from ..spelling import did_you_mean
from ..trust import trusting
from .shared import (
    UsageError,
    add_allow_urls,
    add_device_map,
    add_dtype,
    add_push,
    add_shard_size,
    add_trust_remote_code,
    check_models,
    device_map,
    positive,
)

SUMMARY = "binarize a checkpoint and save it packed, with card and report"
EXAMPLE = "sab-hf quantize HuggingFaceTB/SmolVLM-256M-Instruct smolvlm-sab"
_WITH_OPTIONS = (
    "bits",
    "preset",
    "calibration",
    "num_samples",
    "image_tokens",
    "rest_bits",
    "refine_steps",
    "distil_steps",
    "seed",
)
DEFAULTS = """other fields, by --set FIELD=VALUE, and their defaults:
  portable=null max_length=2048 batch_size=8 written_samples=null allow_text_only=false allow_urls=false vision_bits=null
  projector_bits=null embedding_bits=null head_bits=null modules_to_not_convert=null allow_low_coverage=false
  language_blocks=null fit="hessian" modality_balance="equal" significance="gradient" budget="sensitivity"
  sensitivity_samples=64 alternations=15 damping=0.01 block_size=128 salient_top_p=0.05 diff_quantile=0.5
  sparsity_threshold=0.005 refine_batch=32 refine_loss="balanced" refine_scale_rate=0.005 refine_latent_rate=0.02
  distil_batch=8 distil_scale_rate=null distil_latent_rate=null compute_device=null checkpoint_dir=null
  offload_dir=null cache_device_gib=null cache_ram_gib=null process_timeout=1800.0
null: decided by the model or the machine; what each field means: help(sab_hf.SABQuantizationConfig)."""
"""Written out, since `--help` imports nothing heavy; held to the config by a test."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"{DEFAULTS}\n\nexample: {EXAMPLE}"
    parser.add_argument("model", help="dense checkpoint: a folder or Hub id")
    parser.add_argument("output", nargs="?", help="folder to write, or with --push a Hub repository")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="only predict what the run needs: file size, memory, minutes, disk; reads config and processor, no weights",
    )  # fmt: skip
    parser.add_argument(
        "--bits",
        type=float,
        help="stored bits per language weight; default: what one plane and a tenth of the columns take",
    )
    parser.add_argument(
        "--preset", choices=("fast", "balanced", "best"),
        help="fast: the fit alone, 128 samples (give it --bits 2.1 or more); balanced: the defaults; best: 1024 samples and 4096 "
        "that the model writes, 100 steps of refinement, 4000 of distillation. Other options and fields override the preset",
    )  # fmt: skip
    parser.add_argument("--calibration", help="builtin (default), a Hub dataset, a folder, or a JSONL file")
    add_allow_urls(parser)
    parser.add_argument("--num-samples", type=positive, help="calibration samples (default 512)")
    parser.add_argument(
        "--image-tokens", type=positive,
        help="most tokens of a calibration picture (default: three quarters of max_length, on a CPU at most 256)",
    )  # fmt: skip
    parser.add_argument(
        "--rest-bits", type=int,
        help="sign planes of towers, projector, embedding and head: 1 to 8, or 16 to leave them dense (default 16)",
    )  # fmt: skip
    parser.add_argument(
        "--refine-steps", type=int,
        help="steps of block refinement; 0 turns it off (default: 0 where blocks are distilled, else 400, on a CPU 50)",
    )  # fmt: skip
    parser.add_argument(
        "--distil-steps", type=int, help="steps of distillation; 0 turns it off (default 1000, on a CPU 150)"
    )
    parser.add_argument("--seed", type=int, help="seed of the calibration set (default 0)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE",
        help="any other field of SABQuantizationConfig, value as JSON or text; may be repeated",
    )  # fmt: skip
    add_dtype(parser, "the parts left dense")
    add_device_map(parser)
    parser.add_argument("--revision", help="revision of the dense checkpoint on the Hub (default: main)")
    add_shard_size(parser)
    parser.add_argument("--license", help="license for the card; default: that in the card of the original")
    add_trust_remote_code(parser)
    add_push(parser)


def check(args: argparse.Namespace) -> None:
    from ..paths import check_samples
    from ..publish.folders import check_target

    if args.output is None and not args.dry_run:
        raise UsageError("name the folder to write, or add --dry-run for a prediction alone")
    _set_fields(args)
    check_models(args, packed=False)
    if args.calibration:
        check_samples(args.calibration)
    if not args.push and not args.dry_run:
        check_target(args.output)


def check_values(args: argparse.Namespace) -> None:
    quantization_config(args)


def run(args: argparse.Namespace) -> tuple[Any, str]:
    if args.dry_run:
        return _dry_run(args)
    import torch

    from ..machine.disk import Need, check_disk
    from ..prediction import file_bytes
    from ..processors import processor_of
    from ..publish.inspect import empty_model
    from ..publish.locate import read_config, require_dense
    from ..publish.open import opening_class
    from ..publish.report import report
    from ..publish.save import check_login, save

    config, where_to = quantization_config(args), device_map(args)
    output = args.output
    if args.push:
        output = check_login(output)  # mistakes show before hours are spent
    code = trusting(args.trust_remote_code)
    model_config = read_config(args.model, revision=args.revision, **code)
    require_dense(model_config, args.model)
    remedy = "save it beside the weights: `AutoProcessor.from_pretrained(ORIGINAL).save_pretrained(FOLDER)`"
    processor = processor_of(args.model, None, "calibration needs", remedy, revision=args.revision, **code)
    config.processor = processor
    empty = empty_model(model_config, args.model, **code)  # what is wrong with the config is said here
    empty = empty if args.dtype == "auto" else empty.to(getattr(torch, args.dtype))
    check_disk([Need("the output folder", None if args.push else output, file_bytes(empty, config))])
    model = opening_class(model_config).from_pretrained(
        args.model,
        revision=args.revision,
        quantization_config=config,
        dtype=args.dtype,
        device_map=where_to,
        **code,
    )
    where = save(
        model,
        processor,
        output,
        push=args.push,
        private=args.private or None,
        base_model=args.model,
        license=args.license,
        max_shard_size=args.max_shard_size,
    )
    sizes = report(model)
    return {"saved": where, **sizes.to_dict()}, f"{sizes}\nsaved: {where}"


def _dry_run(args: argparse.Namespace) -> tuple[Any, str]:
    """Return what the run would need, as data and as text."""
    from ..prediction import estimate

    found = estimate(
        args.model,
        config=quantization_config(args),
        dtype=args.dtype,
        device_map=device_map(args),
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    return found.to_dict(), found.table()


def quantization_config(args: argparse.Namespace) -> Any:
    """Return the `SABQuantizationConfig` that the options ask for.

    Raises:
        UsageError: a field does not exist, or its value is not accepted.
    """
    from ..config import SABQuantizationConfig

    fields = {name: getattr(args, name) for name in _WITH_OPTIONS if getattr(args, name) is not None}
    if args.allow_urls:
        fields["allow_urls"] = True
    try:
        return SABQuantizationConfig(**fields | _set_fields(args))
    except ValueError as error:
        raise UsageError(str(error)) from error


def _set_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return field → value of what `--set` gives."""
    known, fields = {*re.findall(r"([a-z_]+)=", DEFAULTS), *_WITH_OPTIONS}, {}
    for entry in args.set:
        name, _, value = entry.partition("=")
        if name not in known:
            raise UsageError(
                f"--set {entry}: `{name}` is no field of SABQuantizationConfig that can be set"
                f"{did_you_mean(name, known) or f'; those are {sorted(known)}'}"
            )
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def kept(args: argparse.Namespace) -> str:
    """Say where the work lies that a stopped run has finished."""
    folder = next(
        (entry.partition("=")[2].strip('"') for entry in args.set if entry.startswith("checkpoint_dir=")), None
    )
    if folder is None:
        unless = ", unless a line above says where it is" if args.push else ""
        return f"nothing of it was kept{unless}; with `--set checkpoint_dir=FOLDER` a run continues after its last finished block"
    if not any(Path(folder).glob("*.safetensors")):
        return f"no step was finished that `{folder}` could keep; the same command begins again"
    return f"what is finished is in `{folder}`; the same command continues after it"
