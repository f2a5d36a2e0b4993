"""Where a token's time goes on a GPU, before and after: decoding steps of a packed model with `SAB_FOLD=0` and without.

    python benchmarks/speed_gpu_token.py --layers 8 --output token.json

A model of Qwen2.5-VL-7B's shape with random weights and a 4-plane head, of `--layers` blocks; compiling is most of the run.
For each setting: milliseconds of a step, and from a profile the launches of a step and their time, by kind.
"""

import argparse
import json
import os
from collections import defaultdict
from typing import Any

import speed_gpu_model
import torch
from timing import provenance, write_json
from torch._inductor import config

KINDS = {
    "packed products": ("joined_", "single_kernel", "bits_kernel", "dot_kernel", "fragments_kernel", "fused_kernel"),
    "preparation": ("cut_kernel", "quantize_kernel", "scale_kernel", "arrange_kernel"),
    "attention": ("attend_kernel", "add_parts_kernel", "fmha", "flash", "attention", "cudnn"),
    "by the compiler": ("triton_",),
}
"""Beginnings or parts of kernels' names; `joined_cut_kernel` is preparation."""
SETTINGS = {
    "before": {"SAB_FOLD": "0"},
    "after": {"SAB_FOLD": "1"},
    "after, compiler's kernels overlap": {"SAB_FOLD": "1", "pdl": True},
}


def kind_of(name: str) -> str:
    if "cut_kernel" in name:
        return "preparation"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def by_kind(run: Any, tokens: int) -> dict[str, dict[str, float]]:
    """Return launches and microseconds of a step, by kind, from a profile of `tokens` steps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"launches": 0.0, "us": 0.0})
    for event in profile.key_averages():
        if event.self_device_time_total:
            for group in (kind_of(event.key), f"  {event.key[:60]}"):
                found[group]["launches"] += event.count / tokens
                found[group]["us"] += event.self_device_time_total / tokens
    return dict(sorted(found.items(), key=lambda item: -item[1]["us"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--variant", default="packed, 4-plane head", choices=speed_gpu_model.VARIANTS)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=["before", "after"])
    parser.add_argument("--output", default="speed_gpu_token.json")
    options = parser.parse_args()
    speed_gpu_model.TEXT["num_hidden_layers"] = options.layers
    results = provenance("cuda") | {"layers": options.layers, "batch": options.batch, "settings": {}}
    model = speed_gpu_model.build(options.variant)
    for name in options.settings:
        torch.compiler.reset()
        os.environ["SAB_FOLD"] = SETTINGS[name]["SAB_FOLD"]
        if hasattr(config.triton, "enable_pdl"):
            config.triton.enable_pdl = "pdl" in SETTINGS[name]
        row = speed_gpu_model.measure_steps(
            model, options.batch, options.tokens, 3, observe=lambda run: {"parts": by_kind(run, options.tokens)}
        )
        results["settings"][name] = row
        print(f"{name}: {row['step_ms']:.3f} ms a step")
        for kind, one in row["parts"].items():
            if one["us"] >= 1 or not kind.startswith("  "):
                print(f"  {kind:64} {one['launches']:7.1f} launches {one['us']:8.1f} us", flush=True)
        write_json(options.output, results)
    print(json.dumps({name: row["step_ms"] for name, row in results["settings"].items()}))


if __name__ == "__main__":
    main()
