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
from .budget import allocate, average_bits
from .calibration import MODALITY_NAMES, CalibrationSet, holds_batches, prepare_calibration
from .capture import BlockInputs
from .config import SABQuantizationConfig
from .embedding import SABTiedHead
from .fingerprint import digest, fingerprint
from .fit import fit_planes, fit_planes_elementwise
from .hessian import SecondMoments, damp, mix
from .linear import SABLinear, SABModule, replace_module
from .placement import check_finite, check_readable, offloaded, read_parameter
from .planes import SignPlanes
from .preflight import Estimate, estimate_run, log_estimate
from .refine import RefineResult, RefineSettings, refine_block
from .rest import binarize_rest, plan_rest
from .resume import FinishedBlocks, open_checkpoint
from .roles import Roles, find_roles
from .sensitivity import LinearSensitivity, Sensitivity, UnmeasurableError, measure_sensitivity
from .significance import significance_map, significant_columns
from .stages import StageClock
from .workspace import Workspace

logger = logging.getLogger(__name__)

DEFAULT_REFINE_STEPS, DEFAULT_REFINE_STEPS_CPU = 400, 50
"""Refinement steps of a block on an accelerator and on a CPU."""


@dataclass(frozen=True)
class Plan:
    """What will be done to a model, checked before its weights are touched.

    Attributes:
        roles: the parts of the model.
        modules: name → [full planes, significant columns] of each Linear to binarize; where `bits` go by sensitivity, the sizes
            are those of an even budget until it is measured.
        rest: name → full planes of each matrix outside the language blocks.
        calibration: the processed calibration set.
    """

    roles: Roles
    modules: dict[str, list[int]]
    rest: dict[str, int]
    calibration: CalibrationSet


@dataclass
class FitRecord:
    """How the fit of one Linear went.

    Attributes:
        name: the module.
        error: `tr(EHEᵀ) / tr(WHWᵀ)`, the relative squared error of its output under the modality-balanced H_Λ.
        tokens: calibration tokens by modality name.
        unimodal_share: r of the significance map.
        column_share: by modality name, the share of the significant columns' score that the modality has; empty without
            significant columns or scores.
        seconds: fitting time.
    """

    name: str
    error: float
    tokens: dict[str, int]
    unimodal_share: float
    column_share: dict[str, float]
    seconds: float


@dataclass
class QuantizationRecord:
    """What `quantize` did.

    Attributes:
        calibration: the calibration set in words.
        fits: one record for each Linear of the language blocks.
        refinements: block output errors before and after, one for each block that was refined.
        stages: time and peak memory by stage.
        seconds: in all, from the first weight on.
    """

    calibration: str
    fits: list[FitRecord] = field(default_factory=list)
    refinements: list[RefineResult] = field(default_factory=list)
    stages: StageClock = field(default_factory=StageClock)
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
    packed = next((name for name, module in model.named_modules() if isinstance(module, SABModule)), None)
    if packed or getattr(model, "quantization_method", "sab") != "sab":
        raise ValueError(
            f"{type(model).__name__} is quantized already ({packed or str(model.quantization_method)}); start from the dense "
            "checkpoint, or call `model.dequantize()` first"
        )
    roles = find_roles(model)
    rest, skipped = plan_rest(model, roles, config), config.modules_to_not_convert or []
    linears = language_linears(model, roles, skipped, others=tuple(rest))
    modules = allocate(_shapes(linears), config.bits)
    rest = {name: planes for name, planes in rest.items() if not _is_skipped(name, skipped)}
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
    return Plan(roles, modules, rest, calibration)


def run_plan(model: nn.Module, plan: Plan, config: SABQuantizationConfig) -> QuantizationRecord:
    """Binarize block after block; each sees the outputs of the already binarized blocks before it.

    Args:
        model: the model with its weights.
        plan: from `make_plan`.
        config: the method's numbers.
    """
    start = time.perf_counter()
    _check_weights(model, plan)
    record = QuantizationRecord(plan.calibration.summary())
    training = model.training
    model.eval()
    try:
        modules = _run_blocks(model, plan, config, record)
    finally:
        model.train(training)
    _attach(
        model,
        SABQuantizationConfig.from_dict(
            config.to_dict() | {"modules": modules, "tied_head": isinstance(model.get_output_embeddings(), SABTiedHead)}
        ),
    )
    record.seconds = time.perf_counter() - start
    model.hf_quantizer.record = record
    logger.info("binarized %d Linears in %.0f s", len(record.fits), record.seconds)
    return record


def _run_blocks(
    model: nn.Module, plan: Plan, config: SABQuantizationConfig, record: QuantizationRecord
) -> dict[str, list[int]]:
    """Binarize the model; returns the sizes of its packed modules."""
    measure = record.stages.measure
    workspace = Workspace.of(model, config)
    settings = _refine_settings(config, workspace.device)
    log_estimate(_estimate(model, plan, config, workspace))
    with _finished_blocks(model, plan, config, workspace, settings) as finished:
        rest = {}
        if plan.rest:
            with measure("towers, embedding, head"):
                rest = binarize_rest(model, plan.roles, plan.rest, plan.calibration.batches, config)
        with measure("capture"):
            inputs = BlockInputs(model, plan.roles.blocks, plan.calibration.batches, workspace)
        with measure("sensitivity"):
            sensitivity = _sensitivity(model, inputs, plan, config, finished)
        modules = finished.modules = distributed.broadcast(_spend(model, plan, sensitivity, config), source=0)
        progress = tqdm(plan.roles.blocks, desc="binarizing blocks", disable=distributed.rank() > 0)
        for index, block_name in enumerate(progress):
            with workspace.placement.visit(block_name, lasting=True) as block:
                stage = finished.find(block_name)
                if settings.steps:
                    with measure("targets"):
                        inputs.advance_targets(block, index)
                if stage is not None:
                    block_record = finished.restore(block_name, stage)
                else:
                    own = {name: size for name, size in modules.items() if name.startswith(f"{block_name}.")}
                    block_record = _binarize_block(
                        model, block_name, index, inputs, own, sensitivity, config, settings, record.stages
                    )
                    finished.commit(block_name, block_record)
                _note(record, block_record)
                if block_record["refinement"]:
                    progress.set_postfix(error="{before:.4f} → {after:.4f}".format(**block_record["refinement"]))
                if index + 1 < len(plan.roles.blocks):
                    with measure("binarized outputs"):
                        inputs.advance(block, index)
    return modules | rest


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


def _sensitivity(
    model: nn.Module, inputs: BlockInputs, plan: Plan, config: SABQuantizationConfig, finished: FinishedBlocks
) -> Sensitivity:
    """Measure the sensitivity of all Linears, if anything asks for it, or read what this run measured before."""
    if (config.significance, config.budget, config.refine_loss) == ("paper", "uniform", "balanced"):
        return Sensitivity()

    def measure() -> tuple[dict[str, Tensor], dict[str, Any]]:
        linears = {name: model.get_submodule(name) for name in plan.modules}
        return measure_sensitivity(
            model,
            inputs,
            plan.calibration.batches,
            plan.roles.blocks,
            linears,
            damping=config.damping,
            num_samples=config.sensitivity_samples,
            seed=config.seed,
        ).pack()

    try:
        return Sensitivity.unpack(*finished.remember("sensitivity", measure))
    except UnmeasurableError as reason:
        logger.warning(
            "the sensitivity of the loss could not be measured (%s): bits are spread evenly, and the significance map is "
            "the published one",
            reason,
        )
        return Sensitivity()


def _spend(
    model: nn.Module, plan: Plan, sensitivity: Sensitivity, config: SABQuantizationConfig
) -> dict[str, list[int]]:
    """Return the sizes of all modules: the plan's, or those that the measured sensitivity asks for."""
    if config.budget == "uniform":
        return plan.modules
    shapes = _shapes({name: model.get_submodule(name) for name in plan.modules})
    scores = {name: torch.zeros(width) for name, (_, width) in shapes.items()}  # stays 0 where no token came
    for name, at in sensitivity.linears.items():
        for by_modality in at.column_scores(read_parameter(model, f"{name}.weight")).values():
            scores[name] += by_modality.cpu()
    modules = allocate(shapes, config.bits, scores)
    logger.info("budget: %.4f bits/weight over %d Linears", average_bits(shapes, modules), len(modules))
    return modules


def _shapes(linears: dict[str, nn.Linear]) -> dict[str, tuple[int, int]]:
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}


def _binarize_block(
    model: nn.Module,
    block_name: str,
    index: int,
    inputs: BlockInputs,
    modules: dict[str, list[int]],
    sensitivity: Sensitivity,
    config: SABQuantizationConfig,
    settings: RefineSettings,
    clock: StageClock,
) -> dict[str, Any]:
    """Fit, refine and pack one block, whose Linears get the sizes `modules`; returns its record as plain data."""
    block = model.get_submodule(block_name)
    planes, fits = _fit_block(model, block, index, inputs, modules, sensitivity, config, clock)
    result = None
    with clock.measure("refinement"):
        if settings.steps and planes:
            gradient = sensitivity.outputs[index] if sensitivity.outputs and config.refine_loss == "gradient" else None
            result = refine_block(model, block, index, planes, inputs, settings, gradient)
        else:
            for name in planes:
                replace_module(model, name, SABLinear.from_planes(planes[name], model.get_submodule(name).bias))
    return {"fits": [asdict(fit) for fit in fits], "refinement": result and result._asdict()}


def _note(record: QuantizationRecord, block_record: dict[str, Any]) -> None:
    record.fits += [FitRecord(**fit) for fit in block_record["fits"]]
    if block_record["refinement"]:
        record.refinements.append(RefineResult(**block_record["refinement"]))


def _fit_block(
    model: nn.Module,
    block: nn.Module,
    index: int,
    inputs: BlockInputs,
    modules: dict[str, list[int]],
    sensitivity: Sensitivity,
    config: SABQuantizationConfig,
    clock: StageClock,
) -> tuple[dict[str, SignPlanes], list[FitRecord]]:
    """Fit the Linears of a block to the second moments of its inputs; returns their planes by module name, and records."""
    linears = {name: model.get_submodule(name) for name in modules}
    for name, linear in linears.items():
        check_finite(name, linear.weight)  # weights that were offloaded are seen here for the first time
    with clock.measure("second moments"):
        moments = inputs.second_moments(block, index, linears)
    costs = {
        name: float(linear.in_features * (linear.in_features + linear.out_features)) for name, linear in linears.items()
    }

    def fit(name: str) -> tuple[SignPlanes, FitRecord]:
        at_linear = sensitivity.linears.get(name)
        return fit_linear(name, linears[name], moments.get(name), at_linear, modules[name], config)

    with clock.measure("fit"):
        results = distributed.divide(costs, fit, inputs.workspace.device)
    return {name: planes for name, (planes, _) in results.items()}, [record for _, record in results.values()]


def fit_linear(
    name: str,
    linear: nn.Linear,
    moments: SecondMoments | None,
    sensitivity: LinearSensitivity | None,
    sizes: list[int],
    config: SABQuantizationConfig,
) -> tuple[SignPlanes, FitRecord]:
    """Fit one Linear: second moments → significance map → significant columns → planes.

    Args:
        name: for the record.
        linear: with its dense weight.
        moments: of its inputs; None if no token reached it.
        sensitivity: of the loss to it; None where it was not measured.
        sizes: [full planes, significant columns].
        config: the method's numbers.
    """
    start = time.perf_counter()
    W = linear.weight.detach().float()
    matrices = moments.matrices() if moments else {}
    gradient = None
    if sensitivity and config.significance == "gradient":
        gradient = {m: g.to(W.device) for m, g in sensitivity.gradient.items()}
    significance = significance_map(
        W,
        matrices,
        gradient=gradient,
        damping=config.damping,
        salient_top_p=config.salient_top_p,
        diff_quantile=config.diff_quantile,
        sparsity_threshold=config.sparsity_threshold,
    )
    H = damp(mix(moments, W.shape[1], W.device, config.modality_balance), config.damping)
    row_weight = None
    if config.significance != "none":
        Lambda = significance.column_weight
        H = Lambda[:, None] * H * Lambda
    if gradient:
        row_weight = significance.row_weight * torch.stack([g / g.mean() for g in gradient.values()]).mean(0)
    columns = significant_columns(W if row_weight is None else W * row_weight.sqrt()[:, None], H, sizes[1])
    if config.fit == "elementwise":
        v = torch.ones_like(W) if config.significance == "none" else significance.Lambda.square()
        fit = fit_planes_elementwise(W, v, sizes[0], columns, alternations=config.alternations)
    else:
        fit = fit_planes(
            W,
            H,
            sizes[0],
            columns,
            row_weight=row_weight,
            alternations=config.alternations,
            block_size=config.block_size,
        )
    return fit.planes, FitRecord(
        name,
        fit.error,
        {MODALITY_NAMES[m]: count for m, count in moments.counts.items()} if moments else {},
        significance.unimodal_share,
        _column_share(W, sensitivity, columns),
        time.perf_counter() - start,
    )


def _column_share(W: Tensor, sensitivity: LinearSensitivity | None, columns: Tensor) -> dict[str, float]:
    """Return, by modality name, its share of the loss at stake in the significant columns."""
    if sensitivity is None or not columns.any():
        return {}
    scores = {MODALITY_NAMES[m]: float(s[columns].sum()) for m, s in sensitivity.column_scores(W).items()}
    total = sum(scores.values())
    return {name: score / total for name, score in scores.items()} if total else {}


def language_linears(
    model: nn.Module, roles: Roles, skipped: list[str], others: tuple[str, ...] = ()
) -> dict[str, nn.Linear]:
    """Return the Linears of the language blocks by name, without those that `skipped` names.

    Args:
        skipped: entries as in `modules_to_not_convert`.
        others: names outside the language blocks that an entry may also mean.

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
        if not any(_is_skipped(name, [entry]) for name in (*linears, *others)):
            raise ValueError(
                f"`modules_to_not_convert` entry {entry!r} matches nothing that would be binarized, such as "
                f"`{next(iter(linears), 'none')}`; what it does not list stays dense anyway"
            )
    kept = {name: linear for name, linear in linears.items() if not _is_skipped(name, skipped)}
    if not kept:
        raise ValueError(f"{type(model).__name__} has no Linear left to binarize; shorten `modules_to_not_convert`")
    return kept


def _is_skipped(name: str, entries: list[str]) -> bool:
    """Whether one of the entries is a run of whole dotted parts of `name`."""
    return any(f".{entry}." in f".{name}." for entry in entries)


def _refine_settings(config: SABQuantizationConfig, device: torch.device) -> RefineSettings:
    """Return the numbers of block refinement on a compute device."""
    steps = config.refine_steps
    if steps is None:
        steps = DEFAULT_REFINE_STEPS_CPU if device.type == "cpu" else DEFAULT_REFINE_STEPS
    return RefineSettings(steps, config.refine_batch, config.refine_scale_rate, config.refine_latent_rate, config.seed)


def _check_weights(model: nn.Module, plan: Plan) -> None:
    """Check what can be checked before work starts: weights in memory are finite, offloaded ones can be loaded."""
    absent = offloaded(model)
    if absent and plan.rest:
        raise ValueError(
            f"`{next(iter(absent))}` is offloaded, and what is outside the language blocks can only be binarized in memory; "
            "leave `rest_bits` and the bits of single roles at 16, or load with device_map='cpu'"
        )
    for name in absent:
        check_readable(model, name)
    for name in plan.modules:
        weight = model.get_submodule(name).weight
        if f"{name}.weight" not in absent:
            check_finite(name, weight)


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
