"""The order in which lists of blocks run: one list after the other, or alternately."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..anatomy.roles import Roles
from ..calibration import CalibrationBatch
from ..machine.workspace import Workspace
from .capture import new_state
from .tracing import running_where_they_are, trace


@torch.no_grad()
def in_running_order(model: nn.Module, roles: Roles, batches: list[CalibrationBatch], workspace: Workspace) -> Roles:
    """Return the roles with lists of blocks that run alternately (IDEFICS) as one stage, in the order in which they run.

    That order shows when the first batch runs, up to the last block of the first list, which hands its input on.
    """
    first, *others = roles.stacks
    if not others:
        return roles
    order: dict[str, None] = {}
    hooks = [model.get_submodule(name).register_forward_pre_hook(_noting(name, order)) for name in roles.blocks]
    blocks = [model.get_submodule(name) for name in first]
    placement = workspace.placement
    try:
        with (
            placement.visit_rest(roles.blocks),
            placement.visit(first[0]),
            running_where_they_are({name: model.get_submodule(name) for stage in others for name in stage}, placement),
        ):
            trace(model, blocks, batches[0], new_state(0, workspace, batches[0]), to_the_end=False)
    finally:
        for hook in hooks:
            hook.remove()
    alternate = [stage for stage in others if order.keys() & set(stage)]
    if not alternate:
        return roles
    merged = dict.fromkeys([*order, *first, *(name for stage in alternate for name in stage)])
    return replace(roles, stacks=(tuple(merged), *(stack for stack in others if stack not in alternate)))


def _noting(name: str, order: dict[str, None]) -> Any:
    return lambda *_: order.setdefault(name)
