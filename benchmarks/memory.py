"""Cost of a block against samples and width, and peak RAM against model size, on a CPU.

python benchmarks/memory.py --output memory.json --plot memory.png

Small Qwen2.5-VL shapes with random weights. Every point is a process of its own; memory is what it had resident at most above
what it had before quantizing (weights included). The table goes to the screen as Markdown.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import datetime
import gc
import json
import multiprocessing
import os
import platform
import time
from pathlib import Path
from typing import Any

import matplotlib
import shapes
import torch

import sab_hf

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MIB = 2**20
BASE = {"hidden": 256, "intermediate": 704, "layers": 2, "samples": 16, "refine_steps": 2}
SERIES = {
    "samples": [{"samples": count} for count in (8, 16, 32, 64, 128)],
    "width": [{"hidden": h, "intermediate": h * 11 // 4} for h in (128, 256, 384, 512, 768)],
    "layers": [{"layers": count} for count in (2, 4, 8, 16)],
}


def point(hidden: int, intermediate: int, layers: int, samples: int, refine_steps: int) -> dict[str, Any]:
    """Quantize one small model in this process; returns seconds, bytes, and what was predicted."""
    torch.set_num_threads(1)
    small = shapes.build(shapes.SHAPES["tiny"], 1, torch.device("cpu"), torch.float32)
    once = shapes.batches(small, shapes.SHAPES["tiny"], 2, 2)
    sab_hf.quantize(small, None, once, sab_hf.SABQuantizationConfig(num_samples=2, refine_steps=1))
    heads = hidden // 64
    shape = dataclasses.replace(
        shapes.SHAPES["tiny"], hidden=hidden, intermediate=intermediate, layers=layers, heads=heads, kv_heads=heads
    )
    model = shapes.build(shape, layers, torch.device("cpu"), torch.float32)
    given = shapes.batches(model, shape, samples, 4, text_tokens=64)
    config = sab_hf.SABQuantizationConfig(
        calibration=given, num_samples=samples, alternations=3, refine_steps=refine_steps, refine_batch=4
    )
    predicted = sab_hf.estimate(model, None, None, config)
    weights = sum(p.nbytes for p in model.parameters())
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _resident("VmRSS") - weights, time.process_time()
    record = sab_hf.quantize(model, None, None, config)
    return {
        "cpu_seconds_per_block": (time.process_time() - start) / layers,
        "fit_seconds_per_block": sum(fit.seconds for fit in record.fits) / layers,
        "peak_ram_mib": (_resident("VmHWM") - before) / MIB,
        "predicted_ram_mib": predicted.peak_ram / MIB,
        "weights_mib": weights / MIB,
    }


def _resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| series | hidden | layers | samples | CPU s a block | of it fit | peak RAM MiB | predicted |",
        "|" + "---|" * 8,
    ]
    lines += [
        f"| {row['series']} | {row['hidden']} | {row['layers']} | {row['samples']} | {row['cpu_seconds_per_block']:.2f} | "
        f"{row['fit_seconds_per_block']:.2f} | {row['peak_ram_mib']:.0f} | {row['predicted_ram_mib']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], title: str) -> plt.Figure:
    """Return the figure: cost over samples, cost over width, memory over layers."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for axes, series, key in ((left, "samples", "samples"), (middle, "width", "hidden")):
        own = [row for row in rows if row["series"] == series]
        x = [row[key] for row in own]
        axes.plot(x, [row["cpu_seconds_per_block"] for row in own], "o-", color="black", label="whole block")
        axes.plot(x, [row["fit_seconds_per_block"] for row in own], "s--", color="0.55", label="fit alone (wall clock)")
        axes.set_xlabel({"samples": "calibration samples", "width": "hidden size"}[series])
        axes.set_ylabel("CPU seconds a block")
        axes.set_ylim(0)
        axes.legend(frameon=False, fontsize=8)
    own = [row for row in rows if row["series"] == "layers"]
    x = [row["weights_mib"] for row in own]
    right.plot(x, [row["peak_ram_mib"] for row in own], "o-", color="black", label="measured")
    right.plot(x, [row["predicted_ram_mib"] for row in own], "s--", color="0.55", label="predicted")
    right.plot(x, x, ":", color="0.7", label="weights alone")
    right.set_xlabel("weights, MiB (2 to 16 blocks)")
    right.set_ylabel("peak RAM, MiB")
    right.set_ylim(0)
    right.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("memory.json"))
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--quick", action="store_true", help="the first two points of each series")
    args = parser.parse_args()
    rows = []
    for series, changes in SERIES.items():
        for change in changes[: 2 if args.quick else None]:
            sizes = BASE | change
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append({"series": series} | sizes | pool.apply(point, kwds=sizes))
            machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), one thread, torch {torch.__version__}"
            args.output.write_text(
                json.dumps({"machine": machine, "date": datetime.date.today().isoformat(), "rows": rows}, indent=1)
            )
    print(table(rows))
    if args.plot:
        draw(rows, f"{machine}, {datetime.date.today().isoformat()}").savefig(args.plot, dpi=150)


if __name__ == "__main__":
    main()
