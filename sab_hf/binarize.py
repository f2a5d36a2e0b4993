"""From a dense model to a packed one: one loop over blocks in which every step of the method is visible."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.logging import tqdm

from .budget import allocate
from .calibration import MODALITY_NAMES, CalibrationSet, holds_batches, prepare_calibration
from .capture import BlockInputs
from .config import SABQuantizationConfig
from .experts import fused_name, split_experts
from .fit import FitResult, fit_planes, fit_planes_elementwise
from .hessian import SecondMoments, balanced, damp
from .linear import SABLinear, replace_module
from .planes import SignPlanes
from .refine import RefineResult, RefineSettings, refine_block
from .roles import Roles, find_roles
from .routing import with_fallback
from .selection import Coverage, coverage, language_linears
from .significance import SignificanceMap, significance_map, significant_columns

logger = logging.getLogger(__name__)

DEFAULT_REFINE_STEPS, DEFAULT_REFINE_STEPS_CPU = 400, 50
"""Refinement steps of a block on an accelerator and on a CPU."""


@dataclass(frozen=True)
class Plan:
    """What will be done to a model, checked before its weights are touched.

    Attributes:
        roles: the parts of the model.
        modules: name → [full planes, significant columns] of each Linear to binarize.
        calibration: the processed calibration set.
        coverage: the share of the language weights that `modules` is.
    """

    roles: Roles
    modules: dict[str, list[int]]
    calibration: CalibrationSet
    coverage: Coverage


@dataclass
class FitRecord:
    """How the fit of one Linear went.

    Attributes:
        name: the module.
        error: `tr(EHEᵀ) / tr(WHWᵀ)`, the relative squared error of its output under the modality-balanced H_Λ.
        tokens: calibration tokens by modality name.
        unimodal_share: r of the significance map.
        seconds: fitting time.
        fallback: whether this is an expert that saw too few tokens, fitted to those of all experts of its layer.
    """

    name: str
    error: float
    tokens: dict[str, int]
    unimodal_share: float
    seconds: float
    fallback: bool = False


@dataclass
class QuantizationRecord:
    """What `quantize` did: the calibration set in words, and one record for each Linear."""

    calibration: str
    fits: list[FitRecord] = field(default_factory=list)
    refinements: list[RefineResult] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def fallbacks(self) -> list[str]:
        """Names of the experts that saw too few calibration tokens for a fit of their own."""
        return [fit.name for fit in self.fits if fit.fallback]


def quantize(
    model: nn.Module, processor: Any = None, samples: Any = None, config: SABQuantizationConfig | None = None
) -> QuantizationRecord:
    """Binarize the language Linears of a model in memory, in place.

    The model can then be used, saved with `save_pretrained` and loaded with `from_pretrained` like one that was quantized
    while loading.

    Args:
        model: a transformers model with dense weights, on any device.
        processor: its processor (or tokenizer); None: `config.processor`, or from where the model came.
        samples: calibration samples in any form that `SABQuantizationConfig.calibration` takes; None: the config's.
        config: None: the defaults.
    Returns:
        A record of the fits.
    Raises:
        ValueError: the model is quantized already, weights are not finite, or the config, the processor or the samples
            do not suit the model.
    """
    config = config or SABQuantizationConfig()
    plan = make_plan(model, config, processor, samples)
    return run_plan(model, plan, config)


def make_plan(model: nn.Module, config: SABQuantizationConfig, processor: Any = None, samples: Any = None) -> Plan:
    """Check everything that can be checked without weights, and prepare the calibration set.

    Args:
        model: the model or its skeleton on the meta device.
        config, processor, samples: as in `quantize`.
    Raises:
        ValueError: see `quantize`.
    """
    packed = next((name for name, module in model.named_modules() if isinstance(module, SABLinear)), None)
    if packed or getattr(model, "quantization_method", "sab") != "sab":
        raise ValueError(
            f"{type(model).__name__} is quantized already ({packed or str(model.quantization_method)}); start from the dense "
            "checkpoint, or call `model.dequantize()` first"
        )
    roles = find_roles(model, config.language_blocks)
    skipped = config.modules_to_not_convert or []
    linears = language_linears(model, roles, skipped)
    covered = coverage(model, roles, linears, skipped)
    covered.check(config.allow_low_coverage)
    logger.info(covered.summary())
    num_planes, num_significant = allocate(
        {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}, config.bits
    )
    samples = config.calibration if samples is None else samples
    processor = config.processor if processor is None else processor
    if not holds_batches(samples):
        processor = _load_processor(model, processor)
    calibration = prepare_calibration(
        samples,
        processor,
        model.config,
        num_samples=config.num_samples,
        seed=config.seed,
        max_length=config.max_length,
        batch_size=config.batch_size,
        allow_text_only=config.allow_text_only,
    )
    return Plan(roles, {name: [num_planes, num_significant[name]] for name in linears}, calibration, covered)


def run_plan(model: nn.Module, plan: Plan, config: SABQuantizationConfig) -> QuantizationRecord:
    """Binarize block after block; each sees the outputs of the already binarized blocks before it.

    Args:
        model: the model with its weights.
        plan: from `make_plan`.
        config: the method's numbers.
    """
    start = time.perf_counter()
    _check_weights(model, plan.modules)
    record = QuantizationRecord(plan.calibration.summary())
    training = model.training
    model.eval()
    try:
        _run_blocks(model, plan, config, record)
    finally:
        model.train(training)
    _attach(model, SABQuantizationConfig.from_dict(config.to_dict() | {"modules": plan.modules}))
    model.hf_quantizer.record = record
    record.seconds = time.perf_counter() - start
    logger.info("binarized %d Linears in %.0f s", len(record.fits), record.seconds)
    if record.fallbacks:
        logger.warning(
            "%d of %d Linears are experts that saw too few calibration tokens (first `%s`) and were fitted to the tokens of all "
            "experts of their layer; raise `num_samples`",
            len(record.fallbacks),
            len(record.fits),
            record.fallbacks[0],
        )
    return record


def _run_blocks(model: nn.Module, plan: Plan, config: SABQuantizationConfig, record: QuantizationRecord) -> None:
    with tqdm(total=len(plan.roles.blocks), desc="binarizing blocks") as progress:
        for stage in plan.roles.stages:  # a later one reads what the binarized blocks of an earlier one give
            _run_stage(model, stage, plan, config, record, progress)


def _run_stage(
    model: nn.Module,
    stage: tuple[str, ...],
    plan: Plan,
    config: SABQuantizationConfig,
    record: QuantizationRecord,
    progress,
) -> None:
    inputs = BlockInputs(model, stage, plan.calibration.batches)
    settings = _refine_settings(config, model.device)
    for index, block_name in enumerate(stage):
        split_experts(model, [name for name in plan.modules if name.startswith(f"{block_name}.")])
        block = model.get_submodule(block_name)
        if settings.steps:
            inputs.advance_targets(block, index)
        planes = _fit_block(model, block_name, index, inputs, plan, config, record)
        if settings.steps and planes:
            result = refine_block(model, block, index, planes, inputs.running(index), settings)
            record.refinements.append(result)
            progress.set_postfix(error=f"{result.before:.4f} → {result.after:.4f}")
        else:
            for name in planes:
                replace_module(model, name, SABLinear.from_planes(planes[name], model.get_submodule(name).bias))
        if index + 1 < len(stage):
            inputs.advance(block, index)
        progress.update()


def _fit_block(
    model: nn.Module,
    block_name: str,
    index: int,
    inputs: BlockInputs,
    plan: Plan,
    config: SABQuantizationConfig,
    record: QuantizationRecord,
) -> dict[str, SignPlanes]:
    """Fit the Linears of a block to the second moments of its inputs; returns their planes by module name."""
    linears = {name: model.get_submodule(name) for name in plan.modules if name.startswith(f"{block_name}.")}
    moments = inputs.second_moments(model.get_submodule(block_name), index, linears)
    moments, fallbacks = with_fallback(moments, linears)
    planes = {}
    for name, linear in linears.items():
        planes[name], fit_record = fit_linear(name, linear, moments.get(name), plan.modules[name], config)
        fit_record.fallback = name in fallbacks
        record.fits.append(fit_record)
    return planes


def fit_linear(
    name: str, linear: nn.Linear, moments: SecondMoments | None, sizes: list[int], config: SABQuantizationConfig
) -> tuple[SignPlanes, FitRecord]:
    """Fit one Linear: second moments → significance map → significant columns → planes."""
    start = time.perf_counter()
    W = linear.weight.detach().float()
    matrices = moments.matrices() if moments else {}
    tokens = {MODALITY_NAMES[m]: count for m, count in moments.counts.items()} if moments else {}
    significance = significance_map(
        W,
        matrices,
        damping=config.damping,
        salient_top_p=config.salient_top_p,
        diff_quantile=config.diff_quantile,
        sparsity_threshold=config.sparsity_threshold,
    )
    Lambda = significance.column_weight
    H = Lambda[:, None] * damp(balanced(matrices, W.shape[1], W.device), config.damping) * Lambda
    columns = significant_columns(W, H, sizes[1])
    fit = _fit(W, H, significance, sizes[0], columns, config)
    return fit.planes, FitRecord(name, fit.error, tokens, significance.unimodal_share, time.perf_counter() - start)


def _fit(
    W: Tensor, H: Tensor, significance: SignificanceMap, num_planes: int, columns: Tensor, config: SABQuantizationConfig
) -> FitResult:
    if config.fit == "elementwise":
        v = significance.Lambda.square()
        return fit_planes_elementwise(W, v, num_planes, columns, alternations=config.alternations)
    return fit_planes(W, H, num_planes, columns, alternations=config.alternations, block_size=config.block_size)


def _refine_settings(config: SABQuantizationConfig, device: torch.device) -> RefineSettings:
    steps = config.refine_steps
    if steps is None:
        steps = DEFAULT_REFINE_STEPS_CPU if device.type == "cpu" else DEFAULT_REFINE_STEPS
    return RefineSettings(steps, config.refine_batch, config.refine_scale_rate, config.refine_latent_rate, config.seed)


def _check_weights(model: nn.Module, modules: dict[str, list[int]]) -> None:
    offloaded = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if offloaded:
        raise ValueError(
            f"`{offloaded}` is offloaded; quantizing needs all weights in memory: load with device_map='cpu' or on GPUs that "
            "hold the model"
        )
    for name in modules:
        if not _weight(model, name).isfinite().all():
            raise ValueError(f"the weight of `{name}` holds NaN or infinite values; the checkpoint is damaged")


def _weight(model: nn.Module, name: str) -> Tensor:
    """Return the weight of a Linear, or of an expert of fused experts: its slice of the fused parameter."""
    fused = fused_name(name)
    if fused is None:
        return model.get_submodule(name).weight
    return model.get_parameter(fused)[int(name.rpartition(".")[2])]


def _load_processor(model: nn.Module, processor: Any) -> Any:
    """Return `processor`, loading it if it is a path, and from where the model came if it is None."""
    if processor is not None and not isinstance(processor, str):
        return processor
    source, revision = processor, None
    if source is None:
        source, revision = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
    try:
        return AutoProcessor.from_pretrained(source, revision=revision)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"calibration needs the model's processor, and none could be loaded from {source!r}; pass "
            "`SABQuantizationConfig(processor=...)` with the processor (or tokenizer) or the path of one"
        ) from error


def _attach(model: nn.Module, config: SABQuantizationConfig) -> None:
    """Make transformers see a quantized model, as `from_pretrained` does."""
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
