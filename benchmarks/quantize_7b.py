"""Time, peak memory and file size of quantizing a model of Qwen2.5-VL's shapes on one GPU, by stage.

    python benchmarks/quantize_7b.py --shape 7b --blocks 2 --output quantize.json
    torchrun --nproc-per-node 2 benchmarks/quantize_7b.py --shape 7b --blocks 2 --output quantize.json

Weights are random with the spread of trained ones: times, memory and sizes are those of the real model, errors are not. With
fewer blocks than the shape has, each of the others is taken to cost what the last one did, and the result is marked so. What no
option says is as a user has it; no samples are written by the model. Runs are added to what the JSON holds; of several processes,
the first one's are.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import shapes
import torch
import transformers

import sab_hf
from sab_hf.machine.clock import peak_ram_mib

GIB = 2**30
FIELDS = "preset", "num_samples", "refine_steps", "distil_steps", "bits"
"""Fields of `SABQuantizationConfig` that are options."""
ONCE = "capture", "sensitivity"
"""Stages that come once for all blocks. The first hardly grows with their number; the second does, see `extrapolate`."""
REFINEMENT = "targets", "refinement"
"""The stages that `refine_steps=0` leaves out."""


def measure(shape: shapes.Shape, layers: int, args: argparse.Namespace) -> dict[str, Any]:
    """Quantize `layers` blocks of `shape` and return what it took, by stage."""
    device, dtype = torch.device(args.device), torch.float32 if args.device == "cpu" else torch.bfloat16
    chosen = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    config = sab_hf.SABQuantizationConfig(compute_device=args.device, **chosen)
    model = shapes.build(shape, layers, device, dtype)
    given = shapes.batches(model, shape, config.num_samples, args.batch_size)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    record = sab_hf.quantize(model, None, given, config)
    report = sab_hf.report(model)
    stages = {name: asdict(stage) for name, stage in record.stages.stages.items()}
    in_blocks = sum(stage["seconds"] for name, stage in stages.items() if name not in ONCE)
    return {
        "layers": layers,
        "of_layers": shape.layers,
        "preset": config.preset,
        "refine_steps": config.refine_steps,
        "distil_steps": config.distil_steps,
        "samples": config.num_samples,
        "batch_size": args.batch_size,
        "tokens": sum(batch["input_ids"].numel() for batch in given),
        "seconds": record.seconds,
        "processes": sab_hf.machine.distributed.size(),
        "seconds_per_block": in_blocks / layers,
        "seconds_of_the_last_block": sum(s["last_seconds"] for name, s in stages.items() if name not in ONCE),
        "seconds_outside_of_blocks": record.seconds - in_blocks,
        "stages": stages,
        "predicted": record.predicted.to_dict(),
        "peak_gpu_gib": max(stage["peak_gpu_mib"] or 0.0 for stage in stages.values()) / 1024,
        "peak_ram_gib_of_the_process_so_far": (peak_ram_mib() or 0.0) / 1024,
        "bits": report.bits,
        "roles": {
            name: {"quantized_bytes": r.quantized_bytes, "dense_bytes": r.dense_bytes}
            for name, r in report.roles.items()
        },
    }


def extrapolate(row: dict[str, Any]) -> dict[str, Any]:
    """Return minutes and GiB by role for all layers; equal to the measurement where all were run.

    "sensitivity" is taken to grow with the blocks as a whole, which its logits and compilation do not: the minutes are an
    upper bound of what such blocks would take.
    """
    rest = row["of_layers"] - row["layers"]
    stages = row["stages"]
    quantized = row["roles"]["language"]["quantized_bytes"]
    sizes = {role: (r["quantized_bytes"] + r["dense_bytes"]) / GIB for role, r in row["roles"].items()}
    sizes["language"] += rest * quantized / row["layers"] / GIB
    per_block = row["seconds_of_the_last_block"] + stages.get("sensitivity", {"seconds": 0})["seconds"] / row["layers"]
    seconds = row["seconds"] + rest * per_block
    refined = [stages[name] for name in REFINEMENT if name in stages]
    refining = sum(stage["seconds"] + rest * stage["last_seconds"] for stage in refined)
    return {
        "extrapolated": rest > 0,
        "minutes": seconds / 60,
        "minutes_without_refinement": (seconds - refining) / 60,
        "gib_by_role": sizes,
        "file_gib": sum(sizes.values()),
    }


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="7b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--blocks", type=int, help="language blocks to build and quantize; all by default")
    parser.add_argument("--preset", choices=sorted(sab_hf.config.PRESETS))
    parser.add_argument("--samples", type=int, dest="num_samples")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--refine-steps", type=int)
    parser.add_argument("--distil-steps", type=int)
    parser.add_argument("--bits", type=float)
    own_gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    parser.add_argument("--device", default=own_gpu if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("quantize_7b.json"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("sab_hf").setLevel(logging.INFO)
    shape = shapes.SHAPES[args.shape]
    blocks = min(args.blocks or shape.layers, shape.layers)
    runs = json.loads(args.output.read_text())["runs"] if args.output.exists() else {}
    row = measure(shape, blocks, args)
    if sab_hf.machine.distributed.rank() > 0:
        return
    row["all_layers"] = extrapolate(row)
    several = f", {row['processes']} processes" if row["processes"] > 1 else ""
    chosen = ", ".join(f"{name} {getattr(args, name)}" for name in FIELDS if getattr(args, name) is not None)
    runs[f"{args.shape}, {blocks} blocks, {chosen or 'defaults'}{several}"] = row | {"machine": machine(args)}
    args.output.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    print(json.dumps(row["all_layers"], indent=1))
    expected = row["predicted"]["stages"]
    for name, stage in row["stages"].items():
        known, memory = expected.get(name, {}), stage["peak_gpu_mib"] or 0
        seconds, size = known.get("seconds") or 0, (known.get("device_bytes") or 0) / 2**20
        print(
            f"{name:20} {stage['seconds']:8.1f} s {memory:8.0f} MiB on the GPU; predicted {seconds:.1f} s, {size:.0f} MiB"
        )


def machine(args: argparse.Namespace) -> dict[str, Any]:
    cuda = args.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(args.device) if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sab_hf": sab_hf.__version__,
        "date": datetime.date.today().isoformat(),
        "arguments": {key: str(value) for key, value in vars(args).items() if key != "output"},
    }


if __name__ == "__main__":
    main()
