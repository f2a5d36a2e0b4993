"""How large each Linear gets: the model's sensitivity to each, and the sizes that a budget of bits gives them by it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SABQuantizationConfig
from ..machine import distributed
from ..machine.resume import Steps
from ..machine.weights import iter_weights
from ..machine.workspace import Workspace
from ..method.budget import allocate, average_bits
from ..method.sensitivity import Sensitivity, UnmeasurableError, needs_sensitivity
from ..passes.capture import BlockInputs, count_first
from ..passes.gradients import measure_sensitivity
from .plan import Plan

logger = logging.getLogger(__name__)


def find_sensitivity(
    model: nn.Module, plan: Plan, config: SABQuantizationConfig, workspace: Workspace, steps: Steps
) -> Sensitivity:
    """Measure the sensitivity of all Linears, if anything asks for it, or read what this run measured before.

    Where it cannot be measured, a warning says why, and the result is empty.
    """
    if not needs_sensitivity(config, plan.refine.steps):
        return Sensitivity()
    batches = plan.calibration.batches
    batches = batches[: count_first([batch.modality.shape[0] for batch in batches], config.sensitivity_samples)]

    def measure() -> tuple[dict[str, Tensor], dict[str, Any]]:
        with workspace.bar.steps(1, part=0.1):
            inputs = BlockInputs(model, plan.roles.blocks, batches, workspace, all_run=False)
        try:
            return measure_sensitivity(
                model,
                inputs,
                batches,
                plan.roles.blocks,
                list(plan.modules),
                damping=config.damping,
                num_samples=config.sensitivity_samples,
                seed=config.seed,
            ).pack()
        finally:
            inputs.close()

    try:
        if len(plan.roles.stacks) > 1:
            raise UnmeasurableError(
                f"the loss depends on `{plan.roles.stacks[0][0]}` only through the blocks of `{plan.roles.stacks[-1][0]}`, "
                "which read its output"
            )
        return Sensitivity.unpack(*steps.once("sensitivity", measure))
    except UnmeasurableError as reason:
        logger.warning(
            "the sensitivity of the loss could not be measured (%s): bits are spread evenly, a significance map is the published "
            "one, and refinement balances modalities",
            reason,
        )
        return Sensitivity()


def spend_budget(model: nn.Module, plan: Plan, sensitivity: Sensitivity, config: SABQuantizationConfig) -> Plan:
    """Return the plan with the sizes of all Linears of the language blocks: its own, or those that the sensitivity asks for."""
    modules, shapes = plan.modules, plan.shapes
    if config.budget == "sensitivity" and sensitivity.linears and not config.portable:
        scores = {name: torch.zeros(width) for name, (_, width) in shapes.items()}  # stays 0 where no token came
        for name, weight in iter_weights(model, [name for name in shapes if name in sensitivity.linears]):
            for by_modality in sensitivity.linears[name].column_scores(weight).values():
                scores[name] += by_modality.cpu()
        modules = allocate(shapes, config.bits, scores)
    logger.info("budget: %.4f bits/weight over %d Linears", average_bits(shapes, modules), len(modules))
    return replace(plan, modules=distributed.broadcast(modules, source=0))
