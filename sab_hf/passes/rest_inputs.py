"""Second moments of what goes into the matrices outside the language blocks, with one block in memory at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..anatomy.roles import Roles
from ..calibration import IMAGE, CalibrationBatch
from ..machine import distributed
from ..machine.workspace import Workspace
from ..method.hessian import SecondMoments
from .capture import BlockInputs, new_state, observing
from .states import BatchState
from .tracing import output_of_last_block, trace


def moments_before_blocks(
    model: nn.Module,
    roles: Roles,
    linears: dict[str, nn.Linear],
    batches: list[CalibrationBatch],
    workspace: Workspace,
) -> dict[str, SecondMoments]:
    """Return the second moments of the inputs of Linears that run before the language blocks: those of towers and projector.

    Language blocks do not run. A Linear that runs after them, or never, is missing from the result.
    """
    stage, *_ = roles.stacks
    later = roles.blocks[len(stage) :]
    blocks = [model.get_submodule(name) for name in stage]
    collector = _Collector(linears, workspace)
    placement = workspace.placement
    with placement.visit_rest(roles.blocks), placement.visit(stage[0]), observing(linears, collector.observe):
        for number, batch in distributed.share(batches):
            collector.state = new_state(number, workspace, batch)
            trace(model, blocks, batch, collector.state, to_the_end=not later)
    return collector.collected()


def moments_after_blocks(
    model: nn.Module,
    roles: Roles,
    linears: dict[str, nn.Linear],
    batches: list[CalibrationBatch],
    workspace: Workspace,
) -> dict[str, SecondMoments]:
    """Return the second moments of the inputs of Linears that run after the full-precision blocks: of the output head.

    The blocks come to the compute device one at a time; in an encoder-decoder, the encoder's all at once.
    """
    stage, placement = roles.stacks[-1], workspace.placement
    inputs = BlockInputs(model, stage, batches, workspace, all_run=False)
    for index, name in enumerate(stage):
        with placement.visit(name) as block:
            inputs.advance(block, index)
    collector = _Collector(linears, workspace)
    blocks = [model.get_submodule(name) for name in stage]
    with placement.visit_rest(stage), observing(linears, collector.observe):
        for state in inputs.states:
            collector.state = new_state(state.number, workspace, batches[state.number], state.modality)
            output_of_last_block(model, blocks, batches[state.number], state, state.hidden.to(workspace.device))
    inputs.close()
    return collector.collected()


class _Collector:
    """Second moments by Linear: by modality where there is one row a token, else as images.

    Attributes:
        state: the batch that is running; once it has hidden states, the blocks have been reached and nothing counts any more.
    """

    state: BatchState

    def __init__(self, linears: dict[str, nn.Linear], workspace: Workspace):
        self._names, self._workspace = list(linears), workspace
        self._moments: dict[str, SecondMoments] = {}

    def observe(self, name: str, x: Tensor, _: Tensor) -> None:
        if self.state.hidden is not None:
            return
        modality = self.state.modality
        kinds = torch.full(x.shape[:-1], IMAGE) if x.shape[:-1] != modality.shape else modality
        own = self._moments.setdefault(name, SecondMoments(x.shape[-1], x.device))
        own.add(x.flatten(0, -2), kinds.flatten().to(x.device))

    def collected(self) -> dict[str, SecondMoments]:
        """Return what all processes have collected."""
        seen = distributed.merge(dict.fromkeys(self._moments, True))
        distributed.sum_moments(self._moments, [name for name in self._names if name in seen], self._workspace.device)
        return self._moments
