"""Quantization packages that people use, run as they are where they import; each an optional row.

Each function quantizes the language Linears, puts the dequantized weights in their place, and returns the mean stored
bits/weight: codes, scales and zero points as the package holds them with 16-bit scales. A package that does not import
gives `NotRunError` with the reason. The first two look at weights alone.
"""

import copy
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from runner import NotRunError, Settings
from torch import nn

from sab_hf.anatomy.roles import find_roles
from sab_hf.anatomy.selection import language_linears
from sab_hf.calibration import prepare_calibration

AUTO_ROUND_BITS, AUTO_ROUND_GROUP, AUTO_ROUND_STEPS = 2, 128, 200


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # packages fail to import in many ways: missing needs, another torch, no compiler
        raise NotRunError(f"`{name}` does not import: {type(error).__name__}: {error}"[:300]) from error


@torch.no_grad()
def _each_linear(model: nn.Module, quantize: Callable[[nn.Linear], tuple[torch.Tensor, int]]) -> float:
    """Replace each weight by what `quantize` makes of it, (dequantized weight, bytes); return stored bits/weight."""
    linears = language_linears(model, find_roles(model), []).values()
    stored = 0
    for linear in linears:
        weight, num_bytes = quantize(linear)
        linear.weight.copy_(weight)
        stored += num_bytes
    return 8 * stored / sum(linear.weight.numel() for linear in linears)


def hqq(model: nn.Module, processor: Any, samples: list, settings: Settings, *, bits: int) -> float:
    """HQQ, groups of 64 along the inputs, its defaults else."""
    package = _import("hqq.core.quantize")
    config = package.BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)

    def quantize(linear: nn.Linear) -> tuple[torch.Tensor, int]:
        layer = package.HQQLinear(
            copy.deepcopy(linear), config, compute_dtype=torch.float16, device=settings.device, del_orig=False
        )
        return layer.dequantize().float(), sum(t.nbytes for t in (layer.W_q, layer.meta["scale"], layer.meta["zero"]))

    return _each_linear(model, quantize)


def quanto(model: nn.Module, processor: Any, samples: list, settings: Settings) -> float:
    """optimum-quanto, qint2 weights, its defaults else; from bfloat16 weights, so that its scales have 16 bits."""
    package = _import("optimum.quanto")

    def quantize(linear: nn.Linear) -> tuple[torch.Tensor, int]:
        holder = nn.Sequential(copy.deepcopy(linear).to("cpu", torch.bfloat16))  # no kernels are built for it
        package.quantize(holder, weights=package.qint2)
        package.freeze(holder)
        weight = holder[0].weight
        num_bytes = weight._data._data.nbytes + weight._scale.nbytes + weight._shift.nbytes
        return weight.dequantize().float(), num_bytes

    return _each_linear(model, quantize)


def auto_round(model: nn.Module, processor: Any, samples: list, settings: Settings) -> float:
    """AutoRound, 2 bits, groups of 128, asymmetric, 200 steps a block, on the same calibration samples."""
    package = _import("auto_round")
    # one sample a batch: AutoRound joins samples of one length only, and would train on padding
    samples = [part for sample in samples for part in _one_by_one(sample)]
    calibration = prepare_calibration(samples, processor, model.config, num_samples=len(samples), batch_size=1)
    batches = [{key: value.to(settings.device) for key, value in b.inputs.items()} for b in calibration.batches]
    names = list(language_linears(model, find_roles(model), []))
    before = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    rounding = package.AutoRound(
        model,
        tokenizer=getattr(processor, "tokenizer", processor),
        processor=processor if hasattr(processor, "tokenizer") else None,
        bits=AUTO_ROUND_BITS,
        group_size=AUTO_ROUND_GROUP,
        sym=False,
        iters=AUTO_ROUND_STEPS,
        nsamples=len(samples),
        seqlen=max(batch["input_ids"].shape[-1] for batch in batches),  # shorter texts are left out
        batch_size=1,
        gradient_accumulate_steps=8,
        dataset=batches,
        device_map=0 if settings.device == "cuda" else "cpu",
        enable_torch_compile=False,
    )
    quantized, _ = rounding.quantize()
    unchanged = [
        name for name in names if torch.equal(quantized.get_submodule(name).weight.to(before[name]), before[name])
    ]
    if quantized is not model or unchanged:
        raise RuntimeError(f"AutoRound left {len(unchanged)} of {len(names)} Linears as they were")
    model.to(settings.device).float()
    return AUTO_ROUND_BITS + (16 + AUTO_ROUND_BITS) / AUTO_ROUND_GROUP


def _one_by_one(sample: Any) -> list:
    """Return the rows of a processed batch of text as batches of one; a conversation as it is."""
    if not isinstance(sample, Mapping):
        return [sample]
    return [{k: v[i : i + 1] for k, v in sample.items()} for i in range(len(sample["input_ids"]))]


def gptqmodel(model: nn.Module, processor: Any, samples: list, settings: Settings) -> float:
    """GPTQModel: not run, with the reason; the method itself is a row of our own (`gptq_2bit`, `gptq_3bit`)."""
    _import("gptqmodel")
    raise NotRunError("`gptqmodel` imports here, but no adapter for it is written; see the rows of `gptq_*`")


PACKAGES: dict[str, Callable[[nn.Module, Any, list, Settings], float]] = {
    "HQQ 1-bit": functools.partial(hqq, bits=1),
    "HQQ 2-bit": functools.partial(hqq, bits=2),
    "quanto int2": quanto,
    "AutoRound W2": auto_round,
    "GPTQModel": gptqmodel,
}
