"""From a dense model to a packed one: one loop over blocks in which every step of the method is visible."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.logging import tqdm

from ..config import SABQuantizationConfig
from ..machine import distributed
from ..machine.fingerprint import digest, fingerprint
from ..machine.placement import check_finite
from ..machine.plain_torch import plain_torch
from ..machine.resume import FinishedBlocks, open_checkpoint
from ..machine.weights import check_weights
from ..machine.workspace import Workspace
from ..method.recipe import fit_linear
from ..method.sensitivity import Sensitivity
from ..packed.embedding import SABTiedHead
from ..packed.experts import split_experts
from ..packed.linear import SABLinear, replace_module
from ..passes.capture import BlockInputs
from ..passes.routing import with_fallback
from ..planes import SignPlanes
from .plan import Plan, make_plan
from .preflight import Estimate, estimate_run, log_estimate
from .records import FitRecord, QuantizationRecord
from .refine import RefineSettings, refine_block
from .rest import binarize_rest, check_rest, packed_rest, plan_rest, restore_rest
from .spending import find_sensitivity, spend

logger = logging.getLogger(__name__)

DEFAULT_REFINE_STEPS, DEFAULT_REFINE_STEPS_CPU = 400, 50
"""Refinement steps of a block on an accelerator and on a CPU."""


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
        ValueError: the model is quantized already, weights are not finite, too little of the language weights would be
            quantized, or the config, the processor or the samples do not suit the model.
        RuntimeError: inference mode is on, in which nothing can be trained.
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
    plan = make_plan(model, config, processor, samples)
    return _estimate(model, plan, config, Workspace.of(model, config))


def _estimate(model: nn.Module, plan: Plan, config: SABQuantizationConfig, workspace: Workspace) -> Estimate:
    steps = _refine_settings(config, workspace.device).steps
    return estimate_run(model, plan.roles.blocks, plan.shapes, plan.modules, plan.calibration, config, workspace, steps)


def run_plan(model: nn.Module, plan: Plan, config: SABQuantizationConfig) -> QuantizationRecord:
    """Binarize block after block; each sees the outputs of the already binarized blocks before it.

    Args:
        model: the model with its weights.
        plan: from `make_plan`.
        config: the method's numbers.
    """
    start = time.perf_counter()
    plan = replace(plan, rest=plan_rest(model, plan.roles, config))
    check_weights(model, plan.modules)
    check_rest(model, plan.rest)
    record = QuantizationRecord(plan.calibration.summary())
    with _evaluating(model), plain_torch():
        modules = _run_blocks(model, plan, config, record)
    tied = isinstance(model.get_output_embeddings(), SABTiedHead)
    _attach(model, SABQuantizationConfig.from_dict(config.to_dict() | {"modules": modules, "tied_head": tied}))
    record.seconds = time.perf_counter() - start
    model.hf_quantizer.record = record
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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while, and then each module into the mode of what had its name."""
    training = {name: module.training for name, module in model.named_modules()}  # modules would be kept alive
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training.get(name, training[""])


@dataclass
class _Run:
    """What the steps of a run share.

    Attributes:
        modules: name → sizes of all Linears of the language blocks, once the budget is spent.
        sensitivity: of all Linears, once it is measured.
    """

    model: nn.Module
    plan: Plan
    config: SABQuantizationConfig
    record: QuantizationRecord
    workspace: Workspace
    settings: RefineSettings
    finished: FinishedBlocks
    modules: dict[str, list[int]] = field(default_factory=dict)
    sensitivity: Sensitivity = field(default_factory=Sensitivity)


def _run_blocks(
    model: nn.Module, plan: Plan, config: SABQuantizationConfig, record: QuantizationRecord
) -> dict[str, list[int]]:
    """Binarize the model; returns the sizes of its packed modules."""
    measure = record.stages.measure
    workspace = Workspace.of(model, config)
    record.stages.device = workspace.device
    settings = _refine_settings(config, workspace.device)
    log_estimate(_estimate(model, plan, config, workspace))
    with _finished_blocks(model, plan, config, workspace, settings) as finished:
        run = _Run(model, plan, config, record, workspace, settings, finished)
        if plan.rest:
            with measure("towers, embedding, head"):
                _binarize_rest(run)
        blocks = plan.roles.blocks
        with tqdm(total=len(blocks), desc="binarizing blocks", disable=distributed.rank() > 0) as progress:
            for stage in plan.roles.stages:  # a later one reads what the binarized blocks of an earlier one give
                later = blocks[blocks.index(stage[-1]) + 1 :]
                with measure("capture"):
                    inputs = BlockInputs(model, stage, plan.calibration.batches, workspace, later)
                if not run.modules:
                    with measure("sensitivity"):
                        run.sensitivity = find_sensitivity(model, inputs, plan, config, settings.steps, finished)
                    record.measured = bool(run.sensitivity.linears)
                    modules = spend(model, plan, run.sensitivity, config)
                    run.modules = finished.modules = distributed.broadcast(modules, source=0)
                for index, block_name in enumerate(stage):
                    _run_block(run, inputs, block_name, index, last=index + 1 == len(stage), progress=progress)
                inputs.close()
    return run.modules | {name: [num_planes, 0] for name, num_planes in plan.rest.items()}


def _binarize_rest(run: _Run) -> None:
    """Binarize what the plan names outside the language blocks, or restore it."""
    plan, packed = run.plan, False

    def work() -> tuple[dict[str, Tensor], dict[str, Any]]:
        nonlocal packed
        binarize_rest(run.model, plan.roles, plan.rest, plan.calibration.batches, run.config, run.workspace)
        packed = True
        return packed_rest(run.model, plan.rest), {}

    tensors, _ = run.finished.remember("rest", work)
    if not packed:
        restore_rest(run.model, plan.roles, plan.rest, tensors)


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


def _run_block(run: _Run, inputs: BlockInputs, name: str, index: int, last: bool, progress: Any) -> None:
    """Binarize one block, number `index` of its stage, or restore it; then the inputs are those of the next one."""
    measure = run.record.stages.measure
    with run.workspace.placement.visit(name, lasting=True) as block:
        own = {linear: size for linear, size in run.modules.items() if linear.startswith(f"{name}.")}
        stage = run.finished.find(name)
        split_experts(run.model, own)
        if run.settings.steps:
            with measure("targets"):
                inputs.advance_targets(block, index)
        if stage is not None:
            block_record = run.finished.restore(name, stage)
        else:
            block_record = _binarize_block(run, inputs, block, name, index, own)
            run.finished.commit(name, block_record)
        run.record.note(block_record)
        if block_record["refinement"]:
            progress.set_postfix(error="{before:.4f} → {after:.4f}".format(**block_record["refinement"]))
        progress.update()
        if not last:
            with measure("binarized outputs"):
                inputs.advance(block, index)


def _binarize_block(
    run: _Run, inputs: BlockInputs, block: nn.Module, name: str, index: int, modules: dict[str, list[int]]
) -> dict[str, Any]:
    """Fit, refine and pack one block, whose Linears get the sizes `modules`; returns its record as plain data."""
    planes, fits = _fit_block(run, inputs, block, index, modules)
    result = None
    with run.record.stages.measure("refinement"):
        if run.settings.steps and planes:
            gradient = run.sensitivity.outputs.get(name) if run.config.refine_loss == "gradient" else None
            result = refine_block(run.model, block, index, planes, inputs, run.settings, gradient)
        else:
            for linear in planes:
                packed = SABLinear.from_planes(planes[linear], run.model.get_submodule(linear).bias)
                replace_module(run.model, linear, packed)
    return {"fits": [asdict(fit) for fit in fits], "refinement": result and result._asdict()}


def _fit_block(
    run: _Run, inputs: BlockInputs, block: nn.Module, index: int, modules: dict[str, list[int]]
) -> tuple[dict[str, SignPlanes], list[FitRecord]]:
    """Fit the Linears of a block to the second moments of its inputs; returns their planes by module name, and records."""
    linears = {name: run.model.get_submodule(name) for name in modules}
    for name, linear in linears.items():
        check_finite(name, linear.weight)  # weights that were offloaded are seen here for the first time
    with run.record.stages.measure("second moments"):
        moments, fallbacks = with_fallback(run.model, inputs.second_moments(block, index, linears), linears)
    costs = {
        name: float(linear.in_features * (linear.in_features + linear.out_features)) for name, linear in linears.items()
    }

    def fit(name: str) -> tuple[SignPlanes, FitRecord]:
        at_linear = run.sensitivity.linears.get(name)
        planes, fit_record = fit_linear(name, linears[name], moments.get(name), at_linear, modules[name], run.config)
        fit_record.fallback = name in fallbacks
        return planes, fit_record

    with run.record.stages.measure("fit"):
        results = distributed.divide(costs, fit, inputs.workspace.device)
    return {name: planes for name, (planes, _) in results.items()}, [record for _, record in results.values()]


def _refine_settings(config: SABQuantizationConfig, device: torch.device) -> RefineSettings:
    """Return the numbers of block refinement on a compute device."""
    steps = config.refine_steps
    if steps is None:
        steps = DEFAULT_REFINE_STEPS_CPU if device.type == "cpu" else DEFAULT_REFINE_STEPS
    return RefineSettings(steps, config.refine_batch, config.refine_scale_rate, config.refine_latent_rate, config.seed)


def _attach(model: nn.Module, config: SABQuantizationConfig) -> None:
    """Make transformers see a quantized model, as `from_pretrained` does."""
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
