"""From a dense model to a packed one: one loop over blocks in which every step of the method is visible."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AutoHfQuantizer

from ..calibration import CalibrationBatch
from ..config import SABQuantizationConfig
from ..machine import distributed
from ..machine.bar import Bar
from ..machine.clock import StageClock
from ..machine.commits import RunFolder
from ..machine.fingerprint import digest, fingerprint, glance
from ..machine.placement import check_finite
from ..machine.plain_torch import plain_torch
from ..machine.precision import held_in, may_be_widened
from ..machine.resume import Left, Steps
from ..machine.threads import free_threads
from ..machine.weights import iter_weights
from ..machine.workspace import Workspace
from ..method.hessian import InputFactors, SecondMoments
from ..method.recipe import FitRecord, fit_linear
from ..method.sensitivity import Sensitivity
from ..packed.experts import split_experts
from ..packed.linear import SABLinear, replace_module
from ..packed.swap import swap_in_empty
from ..passes.capture import BlockInputs
from ..passes.order import in_running_order
from ..passes.routing import with_fallback
from ..planes import SignPlanes
from .distil import distil_window, plan_windows
from .plan import Plan, make_plan, plan_with_weights
from .preflight import Estimate, check_room, duration, estimate_run, log_estimate
from .records import QuantizationRecord
from .refine import refine_block
from .rest import binarize_rest, packed_rest, restore_rest, tied_to_planes
from .settings import RefineSettings
from .sizes import find_sensitivity, spend_budget
from .written import OPENED_BUILTIN, write_samples

logger = logging.getLogger(__name__)
_MODALITY = "modality of each position"

Seen = tuple[dict[str, SecondMoments], set[str]]
"""Second moments by Linear, and the Linears that have those of others."""

IN_BLOCKS = "second moments", "fit", "refinement"
"""Stages that a run which goes on does not do again."""


def binarize(
    model: nn.Module,
    plan: Plan,
    config: SABQuantizationConfig,
    workspace: Workspace,
    steps: Steps,
    record: QuantizationRecord,
) -> dict[str, list[int]]:
    """Binarize a model in place, block after block.

    Blocks that are refined, or not trained at all, see the outputs of the already binarized blocks before them. Those that are
    distilled alone are fitted to what full-precision blocks give, which is as accurate then, and takes fewer passes.

    Args:
        model: the model with its weights, in evaluation mode.
        plan: from `plan_with_weights`.
        config: the method's numbers.
        workspace: where to compute, and where to keep hidden states.
        steps: does each step once, over several runs and processes.
        record: gets what was done.
    Returns:
        The sizes of all packed modules.
    """
    measure, bar = record.stages.measure, workspace.bar
    batches, given = list(plan.calibration.batches), len(plan.calibration.batches)
    plan = replace(plan, roles=in_running_order(model, plan.roles, batches, workspace))
    if plan.distil.written:
        with measure("written samples"):
            batches += _write_samples(model, plan, config, workspace, steps)
    if plan.rest:
        with measure("towers, embedding, head"):
            restore = partial(restore_rest, model, plan.roles, plan.rest)
            steps.once("rest", partial(_binarize_rest, model, plan, config, workspace), restore)
    with measure("sensitivity"):
        sensitivity = find_sensitivity(model, plan, config, workspace, steps)
    record.measured = bool(sensitivity.linears)
    plan = spend_budget(model, plan, sensitivity, config)  # final from here on
    for blocks in plan.roles.stacks:  # later ones read what the binarized blocks of earlier ones give
        with measure("capture"):
            later = plan.roles.blocks[plan.roles.blocks.index(blocks[-1]) + 1 :]
            inputs = BlockInputs(model, blocks, batches[:given], workspace, later)
            windows = plan_windows(model, plan, blocks, inputs, steps)
            more = batches[given:] if windows[0].trained else []  # what the model wrote is for distillation only
            written = BlockInputs(model, blocks, more, workspace, later, all_run=False, first_number=given)
        for window in windows:
            refine = plan.refine.beside(window.trained)
            dense = window.trained and not refine.steps  # full-precision blocks give the inputs of the fit
            entering = (inputs.fork(dense), written.fork(dense=True)) if window.trained else ()
            weights: dict[str, Tensor] = {}
            for index, name in enumerate(window.names, window.first):
                own, number = plan.linears_of(name), plan.roles.blocks.index(name) + 1
                bar.in_block(number, len(plan.roles.blocks))
                if window.trained:
                    weights |= {key: distributed.own_rows(W) for key, W in iter_weights(model, own)}
                with workspace.placement.visit(name, lasting=True) as block:
                    split_experts(model, own)
                    if written.states or refine.steps:
                        with measure("targets"):
                            written.advance(block, index)
                            if refine.steps:
                                inputs.advance_targets(block, index)
                    seen = None
                    if dense:
                        seen = _second_moments(model, block, index, inputs, own, record.stages, advance=True)
                    work = partial(
                        _binarize_block,
                        model,
                        block,
                        name,
                        index,
                        inputs,
                        own,
                        seen,
                        sensitivity,
                        refine,
                        config,
                        record,
                    )
                    restore = partial(_restore_block, model, name, own, workspace.device)
                    _, done = steps.once(name, work, restore, share=True)
                    del work, seen  # second moments take as much memory as the block
                    record.note(done)
                    bar.count(IN_BLOCKS, number)
                    bar.note(_refinement_in_words(done["refinement"]))
                    if index + 1 < len(blocks) and not dense:
                        with measure("binarized outputs"):
                            inputs.advance(block, index)
            bar.in_block(0, 0)
            if window.trained:
                with measure("distillation"):
                    for own, ahead in zip(entering, (inputs, written), strict=True):
                        own.take_targets(ahead)
                    inputs, written = entering
                    result = distil_window(model, plan, window, weights, (inputs, written), batches, steps)
                    record.distillations.append(result)
        inputs.close()
        written.close()
    return plan.modules | {name: [num_planes, 0] for name, num_planes in plan.rest.items()}


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
        OSError: there is too little room in `checkpoint_dir` or `offload_dir`.
    """
    config = SABQuantizationConfig.of(config)
    plan = make_plan(model, config, processor, samples)
    check_room(model, plan, config)
    return run_plan(model, plan, config)


def run_plan(model: nn.Module, plan: Plan, config: SABQuantizationConfig) -> QuantizationRecord:
    """Binarize a model as planned, and make transformers see a quantized one.

    Args:
        model: the model with its weights.
        plan: from `make_plan`.
        config: the method's numbers.
    """
    start = time.perf_counter()
    workspace = Workspace.of(model, config)
    plan = plan_with_weights(model, plan, config)
    with ExitStack() as stack:
        stack.enter_context(distributed.shared_work())
        stack.enter_context(_evaluating(model))
        stack.enter_context(plain_torch())
        steps = stack.enter_context(closing(_open_steps(model, plan, config, workspace)))
        stack.enter_context(free_threads(workspace.device, steps))
        predicted = estimate_run(model, plan, config, workspace)
        log_estimate(predicted)
        stack.enter_context(held_in(model, _computing_dtype(model, predicted, steps)))
        workspace.bar = Bar(predicted.seconds, predicted.runs, config.progress, workspace.device)
        clock = StageClock(device=workspace.device, bar=stack.enter_context(workspace.bar.shown()))
        record = QuantizationRecord(plan.calibration.summary(), stages=clock, predicted=predicted)
        modules = binarize(model, plan, config, workspace, steps, record)
    written = {"modules": modules} | tied_to_planes(model)
    _attach(model, SABQuantizationConfig.from_dict(config.to_dict() | written))
    record.seconds = time.perf_counter() - start
    model.hf_quantizer.record = record
    logger.info(
        "binarized %d Linears in %.0f s; %s were predicted",
        len(record.fits),
        record.seconds,
        duration(predicted.all_seconds),
    )
    if record.fallbacks:
        logger.warning(
            "%d of %d Linears are experts that saw too few calibration tokens (first `%s`) and were fitted to the tokens of all "
            "experts of their layer; raise `num_samples`",
            len(record.fallbacks),
            len(record.fits),
            record.fallbacks[0],
        )
    return record


def _computing_dtype(model: nn.Module, predicted: Estimate, steps: Steps) -> torch.dtype:
    """Return the dtype of the prediction; a run that goes on keeps the one that it began with."""
    if not may_be_widened(model, predicted.device):
        return model.dtype
    name = str(predicted.dtype).removeprefix("torch.")
    decided = distributed.broadcast(steps.once("dtype", lambda: ({}, {"dtype": name}))[1], source=0)["dtype"]
    return getattr(torch, decided)


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


def _open_steps(model: nn.Module, plan: Plan, config: SABQuantizationConfig, workspace: Workspace) -> Steps:
    """Join the other processes and open the folder of the run, on the first process."""
    distributed.start(workspace.device, config.process_timeout)
    batches = plan.calibration.batches
    if distributed.size() > 1:
        data = digest(value for batch in batches for value in (batch.inputs["input_ids"], batch.modality))
        others = glance(item for batch in batches for item in sorted(batch.inputs.items(), key=lambda item: item[0]))
        distributed.check_same(
            {
                "config": config.to_dict(),
                "modules": plan.modules,
                "written samples": plan.distil.written,
                "calibration data": data,
                "pictures and masks of the calibration data": others,
                "model, by some of its weights": glance(model.named_parameters()),
            }
        )
    if config.checkpoint_dir is None or distributed.rank() > 0:
        return Steps(workspace, None)
    decided = {
        "device": workspace.device,
        "processes": distributed.size(),
        "refine_steps": plan.refine.steps,
        "distil_steps": plan.distil.steps,
        "written_samples": plan.distil.written,
    }
    return Steps(workspace, RunFolder(config.checkpoint_dir, fingerprint(model, batches, config, **decided)))


def _write_samples(
    model: nn.Module, plan: Plan, config: SABQuantizationConfig, workspace: Workspace, steps: Steps
) -> list[CalibrationBatch]:
    """Have the model write samples, or take those that it wrote before; of several processes, the first one writes."""

    def write() -> Left:
        written = []
        if distributed.rank() == 0:
            with workspace.placement.visit_whole():
                given, opened = plan.calibration.batches, OPENED_BUILTIN if plan.calibration.builtin else 0.0
                written = write_samples(model, given, plan.distil.written, config.seed, workspace.bar, opened)
        contents = [{**batch.inputs, _MODALITY: batch.modality} for batch in written]
        tensors = {f"{i}|{key}": v for i, one in enumerate(contents) for key, v in one.items() if torch.is_tensor(v)}
        return tensors, {"others": [{k: v for k, v in one.items() if not torch.is_tensor(v)} for one in contents]}

    tensors, record = distributed.broadcast(steps.once("written", write), source=0)
    batches = [dict(others) for others in record["others"]]
    for name, tensor in tensors.items():
        number, _, key = name.partition("|")
        batches[int(number)][key] = tensor
    return [CalibrationBatch(inputs, modality) for inputs in batches for modality in [inputs.pop(_MODALITY)]]


def _binarize_rest(model: nn.Module, plan: Plan, config: SABQuantizationConfig, workspace: Workspace) -> Left:
    """Binarize what the plan names outside the language blocks."""
    binarize_rest(model, plan.roles, plan.rest, plan.calibration.batches, config, workspace)
    return packed_rest(model, plan.rest), {}


def _binarize_block(
    model: nn.Module,
    block: nn.Module,
    name: str,
    index: int,
    inputs: BlockInputs,
    modules: dict[str, list[int]],
    seen: Seen | None,
    sensitivity: Sensitivity,
    refine: RefineSettings,
    config: SABQuantizationConfig,
    record: QuantizationRecord,
) -> Left:
    """Fit, refine and pack one block, number `index`, whose Linears get the sizes `modules`.

    Args:
        seen: the second moments of their inputs; None: those of `inputs`.
    """
    seen = seen or _second_moments(model, block, index, inputs, modules, record.stages)
    planes, fits = _fit_block(model, inputs.workspace, modules, seen, sensitivity, config, record.stages)
    result = None
    with record.stages.measure("refinement"):
        if refine.steps and planes:
            gradient = sensitivity.outputs.get(name) if config.refine_loss == "gradient" else None
            result = refine_block(model, block, index, planes, inputs, refine, gradient)
        else:
            for linear in planes:
                dense = model.get_submodule(linear)
                packed = SABLinear.from_planes(planes[linear], dense.bias, dense.weight.dtype)
                replace_module(model, linear, packed)
    return block.state_dict(), {"fits": [asdict(fit) for fit in fits], "refinement": result and result._asdict()}


def _second_moments(
    model: nn.Module,
    block: nn.Module,
    index: int,
    inputs: BlockInputs,
    modules: dict[str, list[int]],
    stages: StageClock,
    advance: bool = False,
) -> Seen:
    """Return the second moments of the inputs of a block's Linears; advance: the inputs become those of the next block."""
    linears = {name: model.get_submodule(name) for name in modules}
    for name, linear in linears.items():
        check_finite(name, linear.weight)  # weights that were offloaded are seen here for the first time
    with stages.measure("second moments"):
        return with_fallback(model, inputs.second_moments(block, index, linears, advance), linears)


def _fit_block(
    model: nn.Module,
    workspace: Workspace,
    modules: dict[str, list[int]],
    seen: Seen,
    sensitivity: Sensitivity,
    config: SABQuantizationConfig,
    stages: StageClock,
) -> tuple[dict[str, SignPlanes], list[FitRecord]]:
    """Fit the Linears of a block to the second moments of its inputs; returns their planes by module name, and records."""
    linears, (moments, fallbacks) = {name: model.get_submodule(name) for name in modules}, seen
    names = _by_input(linears, moments)
    costs = {name: float(linears[name].in_features * sum(linears[name].weight.shape)) for name in names}
    factors: InputFactors | None = None  # of the input at work, whose Linears come one after the other

    def fit(name: str) -> tuple[SignPlanes, FitRecord]:
        nonlocal factors
        at_linear, linear = sensitivity.linears.get(name), linears[name]
        if factors is None or name not in moments or factors.moments is not moments[name]:
            device = linear.weight.device
            factors = InputFactors(
                moments.get(name), linear.in_features, device, config.modality_balance, config.damping
            )
        planes, fit_record = fit_linear(name, linear, factors, at_linear, modules[name], config)
        fit_record.fallback = name in fallbacks
        fitted.update()
        return planes, fit_record

    with stages.measure("fit"), workspace.bar.steps(len(linears)) as fitted:
        results = distributed.divide(costs, fit, workspace.device)
    return {name: results[name][0] for name in linears}, [results[name][1] for name in linears]


def _by_input(linears: dict[str, nn.Linear], moments: dict[str, SecondMoments]) -> list[str]:
    """Return the names of Linears in order, but those with the same input one after the other."""
    groups: dict[int, list[str]] = {}
    for name in linears:
        groups.setdefault(id(moments.get(name, linears[name])), []).append(name)
    return [name for names in groups.values() for name in names]


def _refinement_in_words(result: dict[str, float] | None) -> str:
    return "error {before:.4f} → {after:.4f}".format(**result) if result else ""


def _restore_block(
    model: nn.Module, name: str, modules: dict[str, list[int]], device: torch.device, tensors: dict[str, Tensor]
) -> None:
    """Make a block, whose Linears have the sizes `modules`, what it was when `tensors` were its state."""
    block = model.get_submodule(name)
    packed = block.state_dict().keys() & tensors.keys()
    dense = {linear: size for linear, size in modules.items() if f"{linear[len(name) + 1 :]}.signs" not in packed}
    if dense:
        swap_in_empty(model, dense)
    block.load_state_dict({key: tensor.to(device) for key, tensor in tensors.items()}, assign=True)


def _attach(model: nn.Module, config: SABQuantizationConfig) -> None:
    """Make transformers see a quantized model, as `from_pretrained` does."""
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
