"""Do one job: load the model, compress it by the job's method, measure it."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from baselines import BASELINES, Moments
from measure import calibration_samples, load, measure, stored_dtype_bits
from runner import Job, NotRunError, Settings
from tables import FULL_PRECISION
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import sab_hf
from sab_hf.anatomy.roles import find_roles
from sab_hf.anatomy.selection import language_linears
from sab_hf.calibration import IMAGE, TEXT, prepare_calibration
from sab_hf.method.budget import average_bits
from sab_hf.passes.capture import BlockInputs

OURS = "sab_hf"


def do(job: Job, settings: Settings) -> dict[str, Any]:
    """Return the measures of one job; see `measure.measure`, and `bits`, the stored bits/weight."""
    model, processor = load(settings.model, settings.device)
    row = compress(model, processor, job, settings, calibration_samples)
    return row | measure(model, processor, settings.questions, settings.eval_batch)


def compress(
    model: torch.nn.Module, processor: Any, job: Job, settings: Settings, samples_of: Callable[[int, int], list]
) -> dict[str, Any]:
    """Compress the language Linears of `model` in place; return the stored bits, the seconds, and what else the method tells.

    samples_of: from a number and a seed to calibration samples, conversations or processed batches
    """
    start = time.perf_counter()
    if job.method == FULL_PRECISION:
        row = {"bits": stored_dtype_bits(settings.model)}
    else:
        row = _compress_with(model, processor, samples_of(job.samples or settings.samples, job.seed), job, settings)
    return row | {"quantize_seconds": round(time.perf_counter() - start, 1)}


def _compress_with(
    model: torch.nn.Module, processor: Any, samples: list, job: Job, settings: Settings
) -> dict[str, Any]:
    if job.method == OURS:
        return quantize_ours(model, processor, samples, job, settings)
    if job.method in BASELINES:
        return {"bits": quantize_baseline(model, processor, samples, job, settings)}
    from packages import PACKAGES

    return {"bits": PACKAGES[job.method](model, processor, samples, settings)}


def quantize_ours(
    model: torch.nn.Module, processor: Any, samples: list, job: Job, settings: Settings
) -> dict[str, Any]:
    """Binarize with `sab_hf.quantize`, as a user would."""
    known = {f.name for f in dataclasses.fields(sab_hf.SABQuantizationConfig)}
    if missing := sorted(job.options.keys() - known):
        raise NotRunError(f"SABQuantizationConfig has no field {', '.join(missing)}")
    common = {"num_samples": num_rows(samples), "batch_size": settings.batch_size, "seed": job.seed}
    bits = None if job.bits is None else max(job.bits, floor_bits(settings.model))
    config = sab_hf.SABQuantizationConfig(bits=bits, **common | job.options)
    logging.getLogger("sab_hf").setLevel(logging.WARNING)
    record = sab_hf.quantize(model, processor, samples, config)
    return {
        "bits": sab_hf.report(model).bits,
        "fit_error": sum(fit.error for fit in record.fits) / len(record.fits),
        "block_errors": [list(refinement) for refinement in record.refinements],
        "distillations": [result._asdict() for result in record.distillations],
        "stages": {name: round(stage.seconds, 1) for name, stage in record.stages.stages.items()},
        "peak_gpu_gib": max((stage.peak_gpu_mib or 0.0 for stage in record.stages.stages.values()), default=0.0) / 1024,
    }


@torch.no_grad()
def quantize_baseline(model: torch.nn.Module, processor: Any, samples: list, job: Job, settings: Settings) -> float:
    """Replace each language Linear's weight by the method's dense approximation; return the mean stored bits/weight.

    Blocks go in order and see the outputs of the compressed blocks before them, as with our own method.
    """
    roles = find_roles(model)
    linears = language_linears(model, roles, [])
    calibration = prepare_calibration(
        samples, processor, model.config, num_samples=num_rows(samples), seed=job.seed, batch_size=settings.batch_size
    )
    inputs = BlockInputs(model, roles.blocks, calibration.batches)
    stored = 0.0
    for index, block_name in enumerate(roles.blocks):
        block = model.get_submodule(block_name)
        own = {name: linear for name, linear in linears.items() if name.startswith(f"{block_name}.")}
        moments = inputs.second_moments(block, index, own)
        for name, linear in own.items():
            by_modality = moments[name].matrices()
            result = BASELINES[job.method](linear.weight, Moments(by_modality.get(TEXT), by_modality.get(IMAGE)))
            linear.weight.copy_(result.weight)
            stored += result.stored_bits * linear.weight.numel()
        inputs.advance(block, index)
    return stored / sum(linear.weight.numel() for linear in linears.values())


def num_rows(samples: list) -> int:
    """Return the number of samples in a list of conversations or of processed batches."""
    return sum(len(sample["input_ids"]) if isinstance(sample, Mapping) else 1 for sample in samples)


def language_shapes(folder: str) -> dict[str, tuple[int, int]]:
    """Return (out_features, in_features) of the Linears that all methods compress, without reading weights."""
    config = AutoConfig.from_pretrained(folder)
    takes_images = type(config) in AutoModelForImageTextToText._model_mapping
    with torch.device("meta"):
        model = (AutoModelForImageTextToText if takes_images else AutoModelForCausalLM).from_config(config)
    linears = language_linears(model, find_roles(model), [])
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}


def floor_bits(folder: str) -> float:
    """Return the least stored bits/weight of the model in `folder`: one sign plane and its scales, rounded up to 1e-4."""
    return bits_with_residual_columns(folder, 0.0)


def bits_with_residual_columns(folder: str, fraction: float) -> float:
    """Return the stored bits/weight of one plane and a residual plane on `fraction` of the columns, rounded up to 1e-4."""
    shapes = language_shapes(folder)
    sizes = {name: [1, int(fraction * in_features) // 8 * 8] for name, (_, in_features) in shapes.items()}
    return math.ceil(average_bits(shapes, sizes) * 1e4) / 1e4
