"""What is known of a packed model, as plain data: the one source of its JSON report, its card and its pictures."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections import defaultdict
from typing import Any

import torch
import transformers
from torch import nn

from ..config import without_path
from ..packed.names import tied
from ..packing import unpack_bits
from ..version import __version__
from .open import remote_auto_class
from .report import finite, report

NUM_BINS = 64
"""Places into which the input features of a layer are put for the picture of its significant columns."""
NOT_SHOWN = ("modules", "checksums", "quant_method", "format_version")


def summarize(
    model: nn.Module, record: Any = None, evaluation: Any = None, base_model: str | None = None
) -> dict[str, Any]:
    """Collect what is known of a packed model.

    Args:
        model: the packed model.
        record: what `sab_hf.quantize` returned; None: the one that the model carries since it was quantized, if any.
        evaluation: what `sab_hf.evaluate.evaluate` or `evaluate_tasks` returned, or its `to_dict()`; None: no evaluation was
            run.
        base_model: Hub id or path of the original; None: where the model came from, if it was quantized in this process.
    Returns:
        JSON data: strings, numbers, lists and dicts, None where something is not known.
    """
    if getattr(model, "quantization_method", None) != "sab":
        raise ValueError(f"{type(model).__name__} is not binarized by sab_hf; quantize it first")
    record = record or getattr(getattr(model, "hf_quantizer", None), "record", None)
    if base_model is None and record is not None:
        base_model = model.config._name_or_path or None
    sizes = report(model)
    config = model.config.quantization_config.to_dict()
    summary = {
        "created": datetime.date.today().isoformat(),
        "versions": {"sab_hf": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "device": device_of(model),
        "model_class": type(model).__name__,
        "opens_with": _opens_with(model),
        "pipeline_tag": _pipeline_tag(model),
        "base_model": base_model,
        "format_version": config["format_version"],
        "config": {name: value for name, value in config.items() if name not in NOT_SHOWN},
        "bits": finite(sizes.bits),
        "total_bytes": sizes.total_bytes,
        "bytes_at_16_bits": 2 * _num_parameters(model, sizes),
        "roles": {name: dataclasses.asdict(role) | {"bits": role.bits} for name, role in sizes.roles.items()},
        "modules": _modules(model, sizes, record),
        "record": _record(record),
        "evaluation": None,
        "tasks": None,
    }
    return summary if evaluation is None else with_evaluation(summary, evaluation)


def with_evaluation(summary: dict[str, Any], evaluation: Any) -> dict[str, Any]:
    """Return a summary with an evaluation, or scores of tasks, in place of those that it has; the others stay.

    Args:
        summary: as `summarize` returns it.
        evaluation: what `sab_hf.evaluate.evaluate` or `evaluate_tasks` returned, or its `to_dict()`.
    """
    plain = finite(evaluation.to_dict() if hasattr(evaluation, "to_dict") else evaluation)
    if "scores" in plain:
        scores = [score | {"dataset": without_path(score["dataset"])} for score in plain["scores"]]
        return summary | {"tasks": plain | {"scores": scores}}
    return summary | {"evaluation": plain | {"data": without_path(plain["data"])}}


def spent(summary: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return role → kind of packed tensor → bytes: where the bits of the quantized weights went."""
    total: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for module in summary["modules"]:
        for kind, size in module["stored"].items():
            total[module["role"]][kind] += size
    return {role: dict(kinds) for role, kinds in total.items()}


def _modules(model: nn.Module, sizes: Any, record: Any) -> list[dict[str, Any]]:
    fits = {fit.name: finite(dataclasses.asdict(fit)) for fit in getattr(record, "fits", ())}
    entries = []
    for module in sizes.modules:
        tensors = model.get_submodule(module.name).packed_tensors()
        entry = dataclasses.asdict(module) | {"bits": module.bits, "stored": _stored(tensors)}
        entry["significant_columns"] = _column_density(tensors, module.in_features)
        fit = fits.get(module.name, {})
        entries.append(entry | {name: fit.get(name) for name in ("error", "tokens", "unimodal_share", "column_share")})
    return entries


def _stored(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return bytes by what they are for."""
    kinds = {
        "signs": ("signs",),
        "scales": ("row_scale", "col_scale"),
        "residual signs": ("residual_signs",),
        "residual scales": ("residual_row_scale", "residual_col_scale"),
        "significance mask": ("significant_columns",),
    }
    return {kind: sum(tensors[name].nbytes for name in names if name in tensors) for kind, names in kinds.items()}


def _column_density(tensors: dict[str, torch.Tensor], in_features: int) -> list[float]:
    """Return the share of significant columns in up to `NUM_BINS` equal parts of the input features."""
    mask = tensors.get("significant_columns")
    count = min(NUM_BINS, in_features)
    if mask is None or mask.is_meta:
        return [0.0] * count
    chunks = unpack_bits(mask.cpu(), in_features).float().tensor_split(count)
    return [round(float(chunk.mean()), 4) for chunk in chunks]


def _record(record: Any) -> dict[str, Any] | None:
    if record is None:
        return None
    stages = getattr(getattr(record, "stages", None), "stages", {})
    return {
        "calibration": record.calibration,
        "seconds": record.seconds,
        "refinements": finite(record.refinements),
        "distillations": [finite(result._asdict()) for result in getattr(record, "distillations", [])],
        "stages": {name: finite(dataclasses.asdict(stage)) for name, stage in stages.items()},
        "predicted": finite(record.predicted.to_dict()) if getattr(record, "predicted", None) else None,
    }


def _num_parameters(model: nn.Module, sizes: Any) -> int:
    """Count the weights that the packed ones stand for, and the dense ones (tied ones once)."""
    packed = {
        id(tensor) for module in sizes.modules for tensor in model.get_submodule(module.name).packed_tensors().values()
    }
    state = model.state_dict(keep_vars=True)
    again = tied(state)
    dense = [tensor.numel() for name, tensor in state.items() if id(tensor) not in packed and name not in again]
    return sum(module.num_weights for module in sizes.modules) + sum(dense)


def _opens_with(model: nn.Module) -> dict[str, Any]:
    """Return the class of transformers that opens the checkpoint, and whether it needs code that the checkpoint brings."""
    name = type(model).__name__
    own = getattr(type(model), "_auto_class", None) or remote_auto_class(model.config)
    native = getattr(transformers, name, None) is type(model)
    return {"class": name if native or own is None else own, "remote_code": not native and own is not None}


def device_of(model: nn.Module) -> str:
    """Return what a model runs on, in words."""
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    if model.device.type != "cpu":
        return str(model.device)
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    return f"CPU, {cores} cores" if threads >= cores else f"CPU, {threads} of {cores} cores"


def _pipeline_tag(model: nn.Module) -> str | None:
    """Return the Hub's name of what the model does; None, which leaves it to the Hub, for audio and other models."""
    if type(model.config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return "image-text-to-text"
    return "text-generation" if type(model.config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING else None
