"""Predicted beside measured, and the table of minutes and memory of docs/time_and_memory.md.

    python benchmarks/known.py --measure benchmarks/results/known_cpu.json
    python benchmarks/known.py --table

`--measure` quantizes a few small models on this CPU with one thread, and writes what each stage took and was predicted to take.
Both are processor time, so other work on the machine hardly changes them. `--gpu` prints the same of the GPU runs that
`results/quantize_7b.json` and `quantize_7b_h200.json` hold. `--table` predicts all shapes, from their configs alone, with the
default settings, on an H200 and on a CPU whose rates are measured now. `--gpus` predicts 7B, 32B and 72B on one to eight H200s
(docs/several_gpus.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shapes
import torch
import transformers
from transformers import PretrainedConfig

import sab_hf
from sab_hf import SABQuantizationConfig
from sab_hf.calibration import IMAGE, TEXT, CalibrationBatch, CalibrationSet
from sab_hf.machine import clock, rates
from sab_hf.machine.rates import Machine, Rates
from sab_hf.machine.workspace import Workspace
from sab_hf.make.plan import plan_with
from sab_hf.make.preflight import Estimate, duration, estimate_on
from sab_hf.make.settings import DistilSettings, RefineSettings
from sab_hf.prediction import from_few_samples
from sab_hf.publish.inspect import empty_model

ROOT = Path(__file__).parents[1]
GIB = 2**30
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
H200 = Rates({torch.bfloat16: 700e12, torch.float32: 50e12}, 4.0e12, 1.2e5)
"""An NVIDIA H200: products that cuBLAS reaches in bfloat16 and in float32 without TF32, a copy in its memory, launches."""


NAMES = (
    "SmolVLM-256M",
    "LLaVA-OneVision-0.5B",
    "Qwen2.5-VL-3B",
    "Qwen2.5-VL-7B",
    "Qwen2.5-VL-32B",
    "Qwen2.5-VL-72B",
)
"""Of the table: models in `shapes.PUBLISHED`."""


def predict(
    model_config: PretrainedConfig,
    config: SABQuantizationConfig,
    device: torch.device,
    calibration: CalibrationSet | None = None,
    machine: Machine | None = None,
    gpus: int = 1,
) -> Estimate:
    """Predict a run of a model that exists as a config only.

    Args:
        device: "cuda" is an H200 with 140 GiB free, "cpu" this machine's CPU with 256 GiB of RAM, undisturbed.
        calibration: None: as many samples as `config` says, of assumed lengths, which a user gives.
        gpus: H200s that share the run.
    """
    model_config.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = empty_model(model_config, "config")
    found = calibration or from_few_samples(model, None, config)[0]
    plan = plan_with(model, config, lambda: found)
    settings = DistilSettings.of(config, device, writes=False)
    plan = dataclasses.replace(plan, refine=RefineSettings.of(config, device), distil=settings)
    if machine is None and device.type == "cuda":
        room = {"device": 35.0 * GIB, "ram": 64.0 * GIB}
        machine = Machine(CUDA, "one NVIDIA H200", 140.0 * GIB, 256.0 * GIB, room, H200, processes=gpus)
    elif machine is None:
        largest = max(plan.shapes.values(), key=lambda shape: shape[0] * shape[1])
        here = Machine.here(Workspace.of(model, config)).measured(largest, torch.float32, 0.15)
        machine = dataclasses.replace(here, ram=256.0 * GIB, free=256.0 * GIB, room={"ram": 64.0 * GIB}, crowded=1.0)
    return estimate_on(machine, model, plan, config)


# ---- measured on a CPU


def small_qwen(hidden: int, intermediate: int, layers: int, samples: int, text: int, batch: int, vocabulary: int = 512):
    shape = dataclasses.replace(
        shapes.SHAPES["tiny"], hidden=hidden, intermediate=intermediate, layers=layers, heads=max(2, hidden // 64),
        kv_heads=max(1, hidden // 64), vocabulary=vocabulary,
    )  # fmt: skip
    model = shapes.build(shape, layers, CPU, torch.float32)
    return model, shapes.batches(model, shape, samples, batch, text_tokens=text)


def smolvlm(samples: int, batch: int, text: int = 160):
    """Return SmolVLM-256M's shape with random weights, and batches of which two of three have a picture in one view a sample."""
    config = shapes.PUBLISHED["SmolVLM-256M"]()
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    size, view = config.vision_config.image_size, config.vision_config.image_size // config.vision_config.patch_size
    tokens = view**2 // config.scale_factor**2
    batches = []
    for number in range(samples // batch):
        ids = torch.randint(3, 49000, (batch, text + tokens * (number % 3 < 2)))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if number % 3 < 2:
            ids[:, 8 : 8 + tokens] = config.image_token_id
            inputs |= {"pixel_values": torch.randn(batch, 1, 3, size, size)}
        batches.append(inputs)
    return model, batches


def example(samples: int):
    sys.path.insert(0, str(ROOT / "examples"))
    from tiny_vlm import world

    checkpoint = ROOT / "examples" / "tiny_vlm" / "checkpoint"
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    return model, [sample.messages() for sample in world.samples(samples, seed="calibration")]


CASES: dict[str, tuple[Callable[[], tuple[Any, Any]], dict[str, Any]]] = {
    "Qwen2.5-VL, hidden 128, 2 blocks": (
        lambda: small_qwen(128, 352, 2, 16, 64, 4),
        {"num_samples": 16, "refine_steps": 20, "distil_steps": 0, "refine_batch": 8},
    ),
    "Qwen2.5-VL, hidden 384, 2 blocks": (
        lambda: small_qwen(384, 1056, 2, 16, 64, 4),
        {"num_samples": 16, "refine_steps": 10, "distil_steps": 0, "refine_batch": 4},
    ),
    "Qwen2.5-VL, hidden 192, 4 blocks, 8,000 tokens in the vocabulary": (
        lambda: small_qwen(192, 512, 4, 32, 100, 4, 8000),
        {"num_samples": 32, "distil_steps": 12, "distil_batch": 8, "distil_latent_rate": 1e-3},
    ),
    "the model in the repository": (lambda: example(64), {"num_samples": 64, "distil_steps": 10}),
    "the model in the repository, the rest at 4 planes": (
        lambda: example(32),
        {"num_samples": 32, "distil_steps": 10, "rest_bits": 4, "sensitivity_samples": 16},
    ),
    "SmolVLM-256M's shape, 24 samples": (lambda: smolvlm(24, 8), {"num_samples": 24, "distil_steps": 4}),
}


def measure(name: str) -> dict[str, Any]:
    """Quantize one small model; returns processor seconds by stage, predicted and measured."""
    make, settings = CASES[name]
    model, given = make()
    before, clock.time = clock.time, types.SimpleNamespace(perf_counter=time.process_time)
    try:
        record = sab_hf.quantize(model, None, given, SABQuantizationConfig(calibration=given, **settings))
    finally:
        clock.time = before
    predicted = {stage: s / record.predicted.machine.crowded for stage, s in record.predicted.seconds.items()}
    measured = {stage: entry.seconds for stage, entry in record.stages.stages.items()}
    return {
        "settings": settings,
        "tokens": record.predicted.tokens,
        "predicted": predicted,
        "measured": measured,
        "predicted_all": sum(predicted.values()),
        "measured_all": sum(measured.values()),
        "steps_of_distillation": [result.steps for result in record.distillations],
    }


def measure_all(path: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    rates.QUICK = 0.1
    content = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), one thread, torch {torch.__version__}"
    content |= {"machine": machine, "date": datetime.date.today().isoformat()}
    for name in names:
        rates._measured.cache_clear()
        row = content["rows"][name] = measure(name)
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"{name}: predicted {row['predicted_all']:.1f} s, measured {row['measured_all']:.1f} s", flush=True)


# ---- measured on a GPU

FASTER_SINCE = {
    "quantize_7b.json": ("sensitivity", "second moments", "fit", "binarized outputs"),
    "quantize_7b_h200.json": (),
}
"""Results of `quantize_7b.py` → stages that took longer in them than they would now; `costs.py` counts them as they are."""


def gpu_runs() -> dict[str, tuple[Estimate, dict[str, Any], tuple[str, ...]]]:
    """Return name → (prediction, measurement, stages that are faster since) of the runs of `quantize_7b.py` on one H200."""
    found = {}
    for file, faster in FASTER_SINCE.items():
        runs = json.loads((ROOT / "benchmarks" / "results" / file).read_text())["runs"]
        # other machines, and several GPUs, are left out
        found |= {name: (*_predicted(name, run), faster) for name, run in runs.items() if run.get("processes") == 1}
    return found


def _predicted(name: str, run: dict[str, Any]) -> tuple[Estimate, dict[str, Any]]:
    """Return what is predicted now for a run, and the run."""
    shape = shapes.SHAPES[name.partition(",")[0]]
    modality = torch.full((run["batch_size"], run["tokens"] // run["samples"]), TEXT, dtype=torch.int8)
    modality[:, : shape.image_tokens] = IMAGE
    batches = [CalibrationBatch({}, modality)] * (run["samples"] // run["batch_size"])
    calibration = CalibrationSet(batches, run["samples"], 0, {TEXT: 1, IMAGE: 1})
    # what a run of now leaves to the preset is None; earlier ones had no distillation
    steps = {"refine_steps": run["refine_steps"], "distil_steps": run.get("distil_steps", 0)}
    given = {name: value for name, value in steps.items() if value is not None}
    config = SABQuantizationConfig(preset=run.get("preset"), num_samples=run["samples"], **given)
    return predict(shapes.config(shape, run["layers"]), config, CUDA, calibration), run


def gpu_rows() -> list[str]:
    """Return these runs as Markdown, by stage."""
    lines = ["| run | stage | predicted | measured |", "|---|---|---|---|"]
    for name, (found, run, _) in gpu_runs().items():
        for stage, seconds in found.seconds.items():
            measured = run["stages"].get(stage, {"seconds": 0.0})["seconds"]
            lines.append(f"| {name} | {stage} | {seconds:.1f} s | {measured:.1f} s |")
        lines.append(f"| {name} | all | {found.all_seconds:.0f} s | {run['seconds']:.0f} s |")
        lines.append(f"| {name} | GPU memory | {gib(found.peak_device)} GiB | {run['peak_gpu_gib']:.1f} GiB |")
    return lines


# ---- the table


def table() -> list[str]:
    """Return the table of all shapes as Markdown."""
    lines = [
        "| shape | file, GiB | H200: fast | balanced | GPU, GiB | RAM, GiB | 2 CPU cores: fast | balanced | RAM, GiB |",
        "|" + "---|" * 9,
    ]
    for name in NAMES:
        cells = [name]
        for device in (CUDA, CPU):
            fast, balanced = (
                predict(shapes.PUBLISHED[name](), SABQuantizationConfig(preset=p), device) for p in ("fast", "balanced")
            )
            if device is CUDA:
                cells.append(f"{balanced.file_bytes / GIB:.2f}")
            cells += [duration(fast.all_seconds), duration(balanced.all_seconds)]
            cells += [gib(balanced.peak_device)] * (device is CUDA) + [gib(balanced.peak_ram)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table_of_gpus() -> list[str]:
    """Return the table of several GPUs as Markdown: how all blocks are distilled, the time of the run, and memory of each GPU."""
    lines = ["| shape | GPUs | windows | all | distillation | GPU, GiB | RAM of each process, GiB |", "|" + "---|" * 7]
    for name in ("Qwen2.5-VL-7B", "Qwen2.5-VL-32B", "Qwen2.5-VL-72B"):
        for gpus in (1, 2, 4, 8):
            found = predict(shapes.PUBLISHED[name](), SABQuantizationConfig(batch_size=8 // gpus), CUDA, gpus=gpus)
            seconds = [duration(size) for size in (found.all_seconds, found.seconds["distillation"])]
            cells = [name, gpus, found.runs["distillation"], *seconds, gib(found.peak_device), gib(found.peak_ram)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size < 10 * GIB else f"{size / GIB:.0f}"


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", type=Path, metavar="FILE", help="quantize small models on this CPU")
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES), help="of these")
    parser.add_argument("--gpu", action="store_true", help="compare with the GPU runs that were made")
    parser.add_argument("--table", action="store_true", help="print the table")
    parser.add_argument("--gpus", action="store_true", help="print the table of several GPUs")
    args = parser.parse_args()
    if args.measure:
        measure_all(args.measure, args.only)
    for wanted, make in ((args.gpu, gpu_rows), (args.table, table), (args.gpus, table_of_gpus)):
        if wanted:
            print("\n".join(make()))


if __name__ == "__main__":
    main()
