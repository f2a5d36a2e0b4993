"""Time, peak memory and file size of quantizing a Qwen2.5-VL-7B-shaped model on one GPU, and two blocks of the 72B shape.

python benchmarks/quantize_7b.py --budget 3000 --output quantize_7b.json

Weights are random with the spread of trained ones: times, memory and sizes are those of the real model, errors are not.
Two blocks are quantized first, with and without refinement; from their times follows how many of the 28 blocks fit into the
budget, and what was not run is extrapolated block by block and marked so. The JSON is rewritten after every run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import shapes
import torch
import transformers

import sab_hf
from sab_hf.stages import peak_ram_mib

GIB = 2**30
ONCE = "capture"
"""The stage that does not grow with the number of blocks."""


def measure(shape: shapes.Shape, layers: int, args: argparse.Namespace, refine_steps: int) -> dict[str, Any]:
    """Quantize `layers` blocks of `shape` and return what it took, by stage."""
    device, dtype = torch.device(args.device), torch.float32 if args.device == "cpu" else torch.bfloat16
    model = shapes.build(shape, layers, device, dtype)
    given = shapes.batches(model, shape, args.samples, args.batch_size)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    config = sab_hf.SABQuantizationConfig(
        calibration=given,
        num_samples=args.samples,
        refine_steps=refine_steps,
        compute_device=args.device,
        bits=args.bits,
    )
    record = sab_hf.quantize(model, None, given, config)
    report = sab_hf.report(model)
    stages = {name: asdict(stage) for name, stage in record.stages.stages.items()}
    in_blocks = sum(stage["seconds"] for name, stage in stages.items() if name != ONCE)
    return {
        "layers": layers,
        "of_layers": shape.layers,
        "refine_steps": refine_steps,
        "samples": args.samples,
        "batch_size": args.batch_size,
        "tokens": sum(batch["input_ids"].numel() for batch in given),
        "seconds": record.seconds,
        "seconds_per_block": in_blocks / layers,
        "seconds_outside_of_blocks": record.seconds - in_blocks,
        "stages": stages,
        "peak_gpu_gib": max(stage["peak_gpu_mib"] or 0.0 for stage in stages.values()) / 1024,
        "peak_ram_gib_of_the_process_so_far": (peak_ram_mib() or 0.0) / 1024,
        "bits": report.bits,
        "roles": {
            name: {"quantized_bytes": r.quantized_bytes, "dense_bytes": r.dense_bytes}
            for name, r in report.roles.items()
        },
    }


def extrapolate(row: dict[str, Any]) -> dict[str, Any]:
    """Return minutes and GiB by role for all layers; equal to the measurement where all were run."""
    rest = row["of_layers"] - row["layers"]
    per_block = {
        role: row["roles"][role]["quantized_bytes"] / row["layers"] for role in ("language",) if role in row["roles"]
    }
    sizes = {
        role: (r["quantized_bytes"] + r["dense_bytes"] + rest * per_block.get(role, 0.0)) / GIB
        for role, r in row["roles"].items()
    }
    return {
        "extrapolated": rest > 0,
        "minutes": (row["seconds"] + rest * row["seconds_per_block"]) / 60,
        "gib_by_role": sizes,
        "file_gib": sum(sizes.values()),
    }


def layers_within(row: dict[str, Any], seconds: float) -> int:
    """Return how many blocks fit into `seconds`, at least none and at most all."""
    left = seconds - 1.2 * row["seconds_outside_of_blocks"]  # a larger model takes longer to build and to check
    return max(0, min(row["of_layers"], int(left / max(row["seconds_per_block"], 1e-9))))


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--budget", type=float, default=3000, help="seconds for everything; the two-block runs always run"
    )
    parser.add_argument("--shape", default="7b", choices=sorted(shapes.SHAPES))
    parser.add_argument(
        "--large", default="72b", choices=[*sorted(shapes.SHAPES), "none"], help="two blocks of this shape"
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--refine-steps", type=int, default=400)
    parser.add_argument("--bits", type=float, default=None)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("quantize_7b.json"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("sab_hf").setLevel(logging.INFO)
    begin, runs = time.perf_counter(), {}

    def add(name: str, shape: str, layers: int, refine_steps: int) -> dict[str, Any]:
        try:
            row = measure(shapes.SHAPES[shape], layers, args, refine_steps)
            row["all_layers"] = extrapolate(row)
        except Exception as error:  # the other runs are worth having
            logging.exception("%s failed", name)
            row = {"error": f"{type(error).__name__}: {error}"}
        runs[name] = {"shape": shape} | row
        args.output.write_text(json.dumps({"machine": machine(args), "runs": runs}, indent=1))
        print(name, json.dumps(row.get("all_layers", row)), flush=True)
        return row

    trials = {
        "fit": add(f"{args.shape}, 2 blocks, fit only", args.shape, 2, 0),
        "refined": add(f"{args.shape}, 2 blocks, refined", args.shape, 2, args.refine_steps),
    }
    if args.large != "none":
        add(f"{args.large}, 2 blocks, fit only", args.large, 2, 0)
        add(f"{args.large}, 2 blocks, refined", args.large, 2, args.refine_steps)
    for kind, steps in (("refined", args.refine_steps), ("fit", 0)):
        left = args.budget - (time.perf_counter() - begin)
        layers = layers_within(trials[kind], left) if "error" not in trials[kind] else 0
        if layers > 2:
            add(f"{args.shape}, {layers} blocks, {'refined' if steps else 'fit only'}", args.shape, layers, steps)


def machine(args: argparse.Namespace) -> dict[str, Any]:
    cuda = args.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(args.device) if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sab_hf": sab_hf.__version__,
        "date": datetime.date.today().isoformat(),
        "arguments": {key: str(value) for key, value in vars(args).items()},
    }


if __name__ == "__main__":
    main()
