"""From a dense model to a packed one: one loop over blocks in which every step of the method is visible."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.logging import tqdm

from . import distributed
from .budget import allocate
from .calibration import MODALITY_NAMES, CalibrationSet, holds_batches, prepare_calibration
from .capture import BlockInputs
from .config import SABQuantizationConfig
from .fingerprint import digest, fingerprint
from .fit import FitResult, fit_planes, fit_planes_elementwise
from .hessian import SecondMoments, balanced, damp
from .linear import SABLinear, replace_module
from .placement import check_readable, offloaded
from .planes import SignPlanes
from .preflight import Estimate, estimate_run, log_estimate
from .refine import RefineResult, RefineSettings, refine_block
from .resume import FinishedBlocks, open_checkpoint
from .roles import Roles, find_roles
from .significance import SignificanceMap, significance_map, significant_columns
from .workspace import Workspace

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
    """

    roles: Roles
    modules: dict[str, list[int]]
    calibration: CalibrationSet


@dataclass
class FitRecord:
    """How the fit of one Linear went.

    Attributes:
        name: the module.
        error: `tr(EHEᵀ) / tr(WHWᵀ)`, the relative squared error of its output under the modality-balanced H_Λ.
        tokens: calibration tokens by modality name.
        unimodal_share: r of the significance map.
        seconds: fitting time.
    """

    name: str
    error: float
    tokens: dict[str, int]
    unimodal_share: float
    seconds: float


@dataclass
class QuantizationRecord:
    """What `quantize` did: the calibration set in words, and one record for each Linear."""

    calibration: str
    fits: list[FitRecord] = field(default_factory=list)
    refinements: list[RefineResult] = field(default_factory=list)
    seconds: float = 0.0


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


def estimate(
    model: nn.Module, processor: Any = None, samples: Any = None, config: SABQuantizationConfig | None = None
) -> Estimate:
    """Predict the peak memory and the operations of `quantize` with the same arguments. Nothing is changed.

    Raises:
        ValueError: as `quantize` does.
    """
    config = config or SABQuantizationConfig()
    return _estimate(model, make_plan(model, config, processor, samples), config, Workspace.of(model, config))


def _estimate(model: nn.Module, plan: Plan, config: SABQuantizationConfig, workspace: Workspace) -> Estimate:
    steps = _refine_settings(config, workspace.device).steps
    return estimate_run(model, plan.roles.blocks, plan.modules, plan.calibration, config, workspace, steps)


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
    roles = find_roles(model)
    linears = language_linears(model, roles, config.modules_to_not_convert or [])
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
    return Plan(roles, {name: [num_planes, num_significant[name]] for name in linears}, calibration)


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
    record.seconds = time.perf_counter() - start
    logger.info("binarized %d Linears in %.0f s", len(record.fits), record.seconds)
    return record


def _run_blocks(model: nn.Module, plan: Plan, config: SABQuantizationConfig, record: QuantizationRecord) -> None:
    workspace = Workspace.of(model, config)
    settings = _refine_settings(config, workspace.device)
    log_estimate(_estimate(model, plan, config, workspace))
    with _finished_blocks(model, plan, config, workspace, settings) as finished:
        inputs = BlockInputs(model, plan.roles.blocks, plan.calibration.batches, workspace)
        progress = tqdm(plan.roles.blocks, desc="binarizing blocks", disable=distributed.rank() > 0)
        for index, block_name in enumerate(progress):
            with workspace.placement.visit(block_name, lasting=True) as block:
                stage = finished.find(block_name)
                if settings.steps:
                    inputs.advance_targets(block, index)
                if stage is not None:
                    block_record = finished.restore(block_name, stage)
                else:
                    block_record = _binarize_block(model, block_name, index, inputs, plan, config, settings)
                    finished.commit(block_name, block_record)
                _note(record, block_record)
                if block_record["refinement"]:
                    progress.set_postfix(error="{before:.4f} → {after:.4f}".format(**block_record["refinement"]))
                if index + 1 < len(plan.roles.blocks):
                    inputs.advance(block, index)


@contextmanager
def _finished_blocks(
    model: nn.Module, plan: Plan, config: SABQuantizationConfig, workspace: Workspace, settings: RefineSettings
) -> Iterator[FinishedBlocks]:
    """Join the other processes and open the checkpoint of the run."""
    distributed.start(workspace.device, config.process_timeout)
    batches = plan.calibration.batches
    if distributed.size() > 1:
        data = digest(value for batch in batches for value in (batch.inputs["input_ids"], batch.modality))
        distributed.check_same({"config": config.to_dict(), "modules": plan.modules, "calibration data": data})

    def identify():
        run = {"device": workspace.device, "processes": distributed.size(), "refine_steps": settings.steps}
        return fingerprint(model, batches, config, **run)

    checkpoint = open_checkpoint(config.checkpoint_dir, identify)
    try:
        yield FinishedBlocks(model, plan.modules, workspace, checkpoint)
    finally:
        workspace.store.close()
        if checkpoint is not None:
            checkpoint.close()


def _binarize_block(
    model: nn.Module,
    block_name: str,
    index: int,
    inputs: BlockInputs,
    plan: Plan,
    config: SABQuantizationConfig,
    settings: RefineSettings,
) -> dict[str, Any]:
    """Fit, refine and pack one block; returns its record as plain data."""
    block = model.get_submodule(block_name)
    planes, fits = _fit_block(model, block_name, index, inputs, plan, config)
    result = None
    if settings.steps and planes:
        result = refine_block(model, block, index, planes, inputs, settings)
    else:
        for name in planes:
            replace_module(model, name, SABLinear.from_planes(planes[name], model.get_submodule(name).bias))
    return {"fits": [asdict(fit) for fit in fits], "refinement": result and result._asdict()}


def _note(record: QuantizationRecord, block_record: dict[str, Any]) -> None:
    record.fits += [FitRecord(**fit) for fit in block_record["fits"]]
    if block_record["refinement"]:
        record.refinements.append(RefineResult(**block_record["refinement"]))


def _fit_block(
    model: nn.Module, block_name: str, index: int, inputs: BlockInputs, plan: Plan, config: SABQuantizationConfig
) -> tuple[dict[str, SignPlanes], list[FitRecord]]:
    """Fit the Linears of a block to the second moments of its inputs; returns their planes by module name, and records."""
    linears = {name: model.get_submodule(name) for name in plan.modules if name.startswith(f"{block_name}.")}
    for name, linear in linears.items():
        _check_finite(name, linear.weight)  # weights that were offloaded are seen here for the first time
    moments = inputs.second_moments(model.get_submodule(block_name), index, linears)
    costs = {
        name: float(linear.in_features * (linear.in_features + linear.out_features)) for name, linear in linears.items()
    }
    results = distributed.divide(
        costs,
        lambda name: fit_linear(name, linears[name], moments.get(name), plan.modules[name], config),
        inputs.workspace.device,
    )
    return {name: planes for name, (planes, _) in results.items()}, [record for _, record in results.values()]


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


def language_linears(model: nn.Module, roles: Roles, skipped: list[str]) -> dict[str, nn.Linear]:
    """Return the Linears of the language blocks by name, without those that `skipped` names.

    Raises:
        ValueError: an entry of `skipped` matches nothing, or nothing is left.
    """
    linears = {
        f"{block}.{name}": module
        for block in roles.blocks
        for name, module in model.get_submodule(block).named_modules()
        if isinstance(module, nn.Linear)
    }
    for block in roles.blocks:
        for name, parameter in model.get_submodule(block).named_parameters():
            if parameter.ndim > 2:
                raise ValueError(
                    f"`{block}.{name}` has {parameter.ndim} dimensions: fused mixture-of-experts weights, which are no Linears, "
                    "are not supported yet and would stay dense"
                )
    for entry in skipped:
        if not any(_matches(name, entry) for name in linears):
            raise ValueError(
                f"`modules_to_not_convert` entry {entry!r} matches no Linear of the language blocks, which are such as "
                f"`{next(iter(linears), 'none')}`; other parts of the model stay dense anyway"
            )
    kept = {name: linear for name, linear in linears.items() if not any(_matches(name, entry) for entry in skipped)}
    if not kept:
        raise ValueError(f"{type(model).__name__} has no Linear left to binarize; shorten `modules_to_not_convert`")
    return kept


def _matches(name: str, entry: str) -> bool:
    """Whether `entry` is a run of whole dotted parts of `name`."""
    return f".{entry}." in f".{name}."


def _fit(
    W: Tensor, H: Tensor, significance: SignificanceMap, num_planes: int, columns: Tensor, config: SABQuantizationConfig
) -> FitResult:
    if config.fit == "elementwise":
        v = significance.Lambda.square()
        return fit_planes_elementwise(W, v, num_planes, columns, alternations=config.alternations)
    return fit_planes(W, H, num_planes, columns, alternations=config.alternations, block_size=config.block_size)


def _refine_settings(config: SABQuantizationConfig, device: torch.device) -> RefineSettings:
    """Return the numbers of block refinement on a compute device."""
    steps = config.refine_steps
    if steps is None:
        steps = DEFAULT_REFINE_STEPS_CPU if device.type == "cpu" else DEFAULT_REFINE_STEPS
    return RefineSettings(steps, config.refine_batch, config.refine_scale_rate, config.refine_latent_rate, config.seed)


def _check_weights(model: nn.Module, modules: dict[str, list[int]]) -> None:
    """Check what can be checked before work starts: weights in memory are finite, offloaded ones can be loaded."""
    absent = offloaded(model)
    for name in absent:
        check_readable(model, name)
    for name in modules:
        weight = model.get_submodule(name).weight
        if f"{name}.weight" not in absent:
            _check_finite(name, weight)


def _check_finite(name: str, weight: Tensor) -> None:
    if not weight.isfinite().all():
        raise ValueError(f"the weight of `{name}` holds NaN or infinite values; the checkpoint is damaged")


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
