"""`sab-hf quantize`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from .shared import DTYPES, add_allow_urls, add_device_map, add_push, add_shard_size, device_map, log_to_stderr

SUMMARY = "binarize a checkpoint and save it packed, with card and report"
_WITH_OPTIONS = ("bits", "calibration", "num_samples", "refine_steps", "seed")
_NOT_SET = {"modules", "tied_head", "tied_embeddings", "checksums", "format_version", "processor"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="dense checkpoint: a folder or Hub id")
    parser.add_argument("output", help="folder to write, or with --push a Hub repository")
    parser.add_argument(
        "--bits",
        type=float,
        help="stored bits per language weight; default: what one plane and a tenth of the columns take",
    )
    parser.add_argument("--calibration", help='"builtin" (default), a Hub dataset, a folder, or a JSONL file')
    add_allow_urls(parser)
    parser.add_argument("--num-samples", type=int, help="calibration samples")
    parser.add_argument("--refine-steps", type=int, help="steps of block refinement; 0 turns it off")
    parser.add_argument("--seed", type=int, help="seed of the calibration set")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE",
        help="any other field of SABQuantizationConfig, value as JSON or text; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of the parts left dense (default: as stored)"
    )
    add_device_map(parser)
    parser.add_argument("--revision", help="revision of the dense checkpoint on the Hub")
    add_shard_size(parser)
    parser.add_argument("--license", help="license for the card; default: that in the card of the original")
    add_push(parser)


def run(args: argparse.Namespace) -> tuple[Any, str]:
    from ..processors import processor_of
    from ..publish.folders import check_target
    from ..publish.inspect import empty_model
    from ..publish.locate import quantization_method, read_config
    from ..publish.open import opening_class
    from ..publish.report import report
    from ..publish.save import check_login, save

    config, where_to = quantization_config(args), device_map(args)
    output = args.output
    if args.push:
        output = check_login(output)  # mistakes show before hours are spent
    else:
        check_target(output)
    model_config = read_config(args.model, revision=args.revision)
    method = quantization_method(model_config)
    if method is not None:
        raise ValueError(f"`{args.model}` is quantized already, with {method!r}; name the dense original")
    remedy = "save it beside the weights: `AutoProcessor.from_pretrained(ORIGINAL).save_pretrained(FOLDER)`"
    config.processor = processor = processor_of(args.model, None, "calibration needs", remedy, revision=args.revision)
    with log_to_stderr():
        empty_model(model_config, args.model)  # what is wrong with the config is said here
        model = opening_class(model_config).from_pretrained(
            args.model,
            revision=args.revision,
            quantization_config=config,
            dtype=args.dtype,
            device_map=where_to,
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


def quantization_config(args: argparse.Namespace) -> Any:
    """Return the `SABQuantizationConfig` that the options ask for.

    Raises:
        ValueError: a field does not exist, or its value is not accepted.
    """
    from ..config import SABQuantizationConfig

    fields = {name: getattr(args, name) for name in _WITH_OPTIONS if getattr(args, name) is not None}
    if args.allow_urls:
        fields["allow_urls"] = True
    known = {field.name for field in dataclasses.fields(SABQuantizationConfig) if field.init} - _NOT_SET
    for entry in args.set:
        name, _, value = entry.partition("=")
        if name not in known:
            raise ValueError(
                f"--set {entry}: `{name}` is no field of SABQuantizationConfig that can be set; those are {sorted(known)}"
            )
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return SABQuantizationConfig(**fields)
