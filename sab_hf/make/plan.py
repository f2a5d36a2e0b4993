"""What will be done to a model, decided and checked before its weights are touched."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..anatomy.adapters import refuse_adapters
from ..anatomy.llama_cpp import ARCHITECTURES, check_rows
from ..anatomy.roles import Roles, find_roles
from ..anatomy.selection import Coverage, coverage, language_linears
from ..calibration import CalibrationSet, holds_batches, prepare_calibration
from ..calibration.origins import is_builtin
from ..config import SABQuantizationConfig
from ..machine.placement import compute_device
from ..machine.plain_torch import plain_torch
from ..machine.weights import check_weights
from ..method.budget import allocate
from ..packed.linear import SABModule
from ..processors import processor_of
from .rest import check_rest, plan_rest, rest_names
from .settings import DistilSettings, RefineSettings, image_tokens
from .written import writes_well

logger = logging.getLogger(__name__)

BITS_UNTRAINED = 2.1
"""Bits from which on a fit alone leaves a usable language model: perplexity 54 instead of 21, and 1,031 at 1.1 bits
(benchmarks/ACCURACY.md)."""


@dataclass(frozen=True)
class Plan:
    """What will be done to a model.

    Attributes:
        roles: the parts of the model.
        shapes: name → (out_features, in_features) of each Linear to binarize, experts of fused parameters included.
        modules: name → [full planes, significant columns] of each of them; where `bits` go by sensitivity, the sizes are those
            of an even budget until it is measured, before the first block.
        rest: name → full planes of each matrix outside the language blocks.
        calibration: the processed calibration set.
        coverage: the share of the language weights that `modules` is.
        refine: numbers of block refinement.
        distil: numbers of distillation.
    """

    roles: Roles
    shapes: dict[str, tuple[int, int]]
    modules: dict[str, list[int]]
    rest: dict[str, int]
    calibration: CalibrationSet
    coverage: Coverage
    refine: RefineSettings
    distil: DistilSettings

    def linears_of(self, block: str) -> dict[str, list[int]]:
        """Return `modules`, those in one block."""
        return {name: size for name, size in self.modules.items() if name.startswith(f"{block}.")}


def make_plan(model: nn.Module, config: SABQuantizationConfig, processor: Any = None, samples: Any = None) -> Plan:
    """Check everything that can be checked without weights, and prepare the calibration set.

    Args:
        model: the model or its skeleton on the meta device.
        config, processor, samples: as in `quantize`.
    Raises:
        ValueError, RuntimeError: see `quantize`.
    """
    plan = plan_with(model, config, lambda: _calibration(model, config, processor, samples))
    logger.info(plan.coverage.summary())
    if not plan.refine.steps and not plan.distil.steps and (config.bits or 0) < BITS_UNTRAINED:
        logger.warning(
            "nothing is trained (`refine_steps=0`, `distil_steps=0`): at so few bits a model with real weights forgets most of "
            "what it knew; leave `distil_steps` at its default%s",
            "" if config.portable else f", or set `bits` to {BITS_UNTRAINED} or more",
        )
    kind = model.config.get_text_config().model_type
    if config.portable and kind not in ARCHITECTURES:
        logger.warning(
            'portable="gguf": this text model is of the type %r, and a GGUF file can be written for the types %s: the packed '
            "model will run in transformers, and `sab-hf export gguf` will refuse it",
            kind,
            sorted(ARCHITECTURES),
        )
    return plan


def plan_with(model: nn.Module, config: SABQuantizationConfig, calibrate: Callable[[], CalibrationSet]) -> Plan:
    """Return the plan for a calibration set, which is made once the model has been checked; see `make_plan`."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "quantization trains scales and signs, which torch.inference_mode() rules out; quantize (or load with "
            "`quantization_config`) outside of it"
        )
    refuse_adapters(
        model,
        "quantize the base model: `model.merge_and_unload()` first makes the adapter part of it, `model.unload()` leaves it away "
        "(an adapter can be put on the packed model again, see `sab_hf.peft`)",
    )
    packed = next((name for name, module in model.named_modules() if isinstance(module, SABModule)), None)
    if packed or getattr(model, "quantization_method", "sab") != "sab":
        raise ValueError(
            f"{type(model).__name__} is quantized already ({packed or str(model.quantization_method)}); start from the dense "
            "checkpoint, or call `model.dequantize()` first"
        )
    roles = find_roles(model, config.language_blocks)
    skipped = config.modules_to_not_convert or []
    linears = language_linears(model, roles, skipped, others=rest_names(model, roles, config))
    covered = coverage(model, roles, linears, skipped)
    covered.check(config.allow_low_coverage)
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    if config.portable:
        check_rows(shapes)
        modules = {name: [1, 0] for name in shapes}
    else:
        modules = allocate(shapes, config.bits)
    with plain_torch():
        calibration = calibrate()
    settings = _settings(model, config, calibration)
    return Plan(roles, shapes, modules, plan_rest(model, roles, config), calibration, covered, *settings)


def plan_with_weights(model: nn.Module, plan: Plan, config: SABQuantizationConfig) -> Plan:
    """Return the plan for the model with its weights: they tell where it computes, and whether embedding and head are one matrix.

    Raises:
        ValueError: weights are not finite, or cannot be loaded from where they are.
    """
    refine, distil = _settings(model, config, plan.calibration)
    plan = replace(plan, rest=plan_rest(model, plan.roles, config), refine=refine, distil=distil)
    check_weights(model, plan.modules)
    check_rest(model, plan.rest)
    return plan


def _settings(
    model: nn.Module, config: SABQuantizationConfig, calibration: CalibrationSet
) -> tuple[RefineSettings, DistilSettings]:
    """Return the numbers of training for the device that computes."""
    device = compute_device(model, config.compute_device)
    writes = calibration.builtin and writes_well(model, device)
    return RefineSettings.of(config, device), DistilSettings.of(config, device, writes)


def _calibration(model: nn.Module, config: SABQuantizationConfig, processor: Any, samples: Any) -> CalibrationSet:
    samples = config.calibration if samples is None else samples
    processor = config.processor if processor is None else processor
    if is_builtin(samples):
        logger.warning(
            "calibrating on the built-in samples, which are about few subjects: for a model with real weights name data like "
            "yours in `calibration` (`--calibration`; docs/your_data.md)"
        )
    if not holds_batches(samples):
        processor = processor_of(
            model,
            processor,
            "calibration needs",
            "pass `SABQuantizationConfig(processor=...)` with the processor (or tokenizer) or the path of one",
            revision=getattr(model.config, "_commit_hash", None),
        )
    return prepare_calibration(
        samples,
        processor,
        model.config,
        num_samples=config.num_samples,
        seed=config.seed,
        max_length=config.max_length,
        batch_size=config.batch_size,
        allow_text_only=config.allow_text_only,
        allow_urls=config.allow_urls,
        vocabulary=model.get_input_embeddings().weight.shape[0],
        image_tokens=image_tokens(config, compute_device(model, config.compute_device)),
        strict_image_tokens=config.image_tokens is not None,
    )
