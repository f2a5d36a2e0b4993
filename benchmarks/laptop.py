"""What fits on which laptop: sizes of published models, packed, and the memory that binarizing them takes.

    python benchmarks/laptop.py

Nothing is downloaded and no weight is made: models are built from their configs without storage, `report` counts what a
checkpoint of them stores, and `sab_hf.estimate` predicts the peak. The configs are those of the published checkpoints. The
laptops multiply bfloat16 in software, as most do, and so hold the model in float32 while they work if that fits.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from unittest import mock

import shapes
import torch
from torch import nn

import sab_hf
from sab_hf import SABQuantizationConfig
from sab_hf.make.plan import make_plan
from sab_hf.make.preflight import Estimate
from sab_hf.make.settings import IMAGE_TOKENS_CPU
from sab_hf.packed.swap import swap_in_empty
from sab_hf.publish.inspect import empty_model

GIB = 2**30
LAPTOPS = (8, 16, 24)  # GiB of RAM
SYSTEM = 2 * GIB  # for the operating system, Python and PyTorch
SAMPLES, TEXT_TOKENS = 512, 160
IMAGE_TOKENS = {"SmolVLM": 64, "Qwen2.5-VL": IMAGE_TOKENS_CPU}
"""Of a calibration picture on a CPU: one view of all of it, and as many as are allowed."""
NAMES = "SmolVLM-256M", "SmolVLM-500M", "Qwen2.5-VL-3B", "Qwen2.5-VL-7B"


def build(name: str) -> nn.Module:
    """Return a model without storage, in bfloat16."""
    config = shapes.PUBLISHED[name]()
    config.dtype = torch.bfloat16
    return empty_model(config, name)


def batches(model: nn.Module, image_tokens: int) -> list[dict[str, torch.Tensor]]:
    """Return processed batches of a picture and text a sample; all of them are views of one number."""
    length = image_tokens + TEXT_TOKENS
    ids = torch.ones(1, length, dtype=torch.long)
    ids[0, 8 : 8 + image_tokens] = model.config.image_token_id
    one = {"input_ids": ids.expand(8, length), "attention_mask": torch.ones(1, 1, dtype=torch.long).expand(8, length)}
    return [one] * (SAMPLES // 8)


def packed_bytes(name: str, **fields: int) -> int:
    """Return the bytes of a packed checkpoint."""
    model = build(name)
    config = SABQuantizationConfig(budget="uniform", **fields)
    plan = make_plan(model, config, None, batches(model, IMAGE_TOKENS[name.rpartition("-")[0]])[:1])
    modules = plan.modules | {inner: [planes, 0] for inner, planes in plan.rest.items()}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.device("meta"):
        swap_in_empty(model, modules, tied and bool(plan.rest), [])
    return sab_hf.report(model).total_bytes


def predicted(name: str, ram: int, **fields: int) -> Estimate:
    """Predict a run on a machine with `ram` bytes and no GPU.

    A run adapts to what is free: it holds the model in float32 if that fits, trains fewer blocks together, and keeps
    hidden states on disk. Weights do not lower what is free before they are read: `from_pretrained` maps the file into memory.
    """
    model = build(name)
    config = SABQuantizationConfig(compute_device="cpu", **fields)
    free = SimpleNamespace(total=ram, available=ram - SYSTEM)
    slow_halves = mock.patch("sab_hf.make.preflight.faster_dtype", return_value=torch.float32)
    with mock.patch("psutil.virtual_memory", return_value=free), slow_halves:
        return sab_hf.estimate(model, None, batches(model, IMAGE_TOKENS[name.rpartition("-")[0]]), config)


def where_it_fits(name: str, **fields: int) -> str:
    """Return the smallest of the laptops that binarizes the model, with the predicted peak there."""
    for ram in LAPTOPS:
        found = predicted(name, ram * GIB, **fields)
        if found.fits:
            return f"{ram} GiB ({found.peak_ram / GIB:.1f})"
    return f"none ({found.peak_ram / GIB:.0f})"


def main() -> None:
    logging.getLogger("sab_hf").setLevel(logging.ERROR)  # the batches hold no pixels, which a run would warn of
    print("| model | weights | 16 bits | packed | packed, `rest_bits=4` | binarizing | without training |")
    print("|---|---|---|---|---|---|---|")
    for name in NAMES:
        model = build(name)
        weights = sum(p.numel() for p in model.parameters())
        sizes = [sum(p.nbytes for p in model.parameters()), packed_bytes(name), packed_bytes(name, rest_bits=4)]
        columns = [f"{weights / 1e6:,.0f} M", *(f"{size / GIB:.2f} GiB" for size in sizes)]
        columns += [where_it_fits(name), where_it_fits(name, refine_steps=0, distil_steps=0)]
        print(f"| {name} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
