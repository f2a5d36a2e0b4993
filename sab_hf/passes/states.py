"""One calibration batch on its way through the blocks, and how a block runs on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..machine.limits import take_samples
from ..machine.store import map_nested, map_tensors, tensors_in
from ..machine.workspace import Workspace

Left = dict[str, dict[Any, Any]]
"""Argument name → what blocks left in that dict for later blocks (keys and values that several of them use)."""


@dataclass
class BatchState:
    """One calibration batch. Its tensors live where the workspace has room for them.

    Attributes:
        number: number of the batch in the calibration set, counted over all processes.
        workspace: where it is computed and kept.
        modality: [batch, length] int8 of the positions of `hidden`, see `calibration/modality.py`.
        given: [batch, length] int8 of the batch's own tokens: the same, but for a decoder that reads an encoder's output.
        foreign: the modality of what blocks read beside them (image features through cross-attention).
        hidden: [..., batch, length, hidden_size], the input of the next block, from the blocks before it: binarized ones, or
            full-precision ones where these give the inputs of the fit. Some models have several streams of hidden states, on a
            first axis. None if the model ran no block for the batch.
        target: hidden states from the full-precision blocks, like `hidden`; None where that is both, or it is not needed.
        calls: for each block, the other arguments that the model gives it (masks, rotary positions, …); None for a block
            that the model leaves out for this batch (cross-attention without an image).
        injections: for each block, what the model adds to the hidden states before it (as deep visual features), or None.
        others: what blocks return beside the hidden states; None if they return a bare tensor.
        left, target_left: what the blocks that gave `hidden` and `target` have left for later ones.
        shared: whether another state reads the tensor `hidden`.
    """

    number: int
    workspace: Workspace
    modality: Tensor
    given: Tensor
    foreign: int
    hidden: Tensor | None = None
    target: Tensor | None = None
    calls: list[tuple[tuple, dict[str, Any]] | None] = field(default_factory=list)
    injections: list[Tensor | None] = field(default_factory=list)
    others: tuple | None = None
    left: Left = field(default_factory=dict)
    target_left: Left = field(default_factory=dict)
    shared: bool = False

    @property
    def rows(self) -> int:
        """Samples of the batch."""
        return self.modality.shape[0]

    def runs(self, index: int) -> bool:
        """Whether the model runs block number `index` for this batch."""
        return self.calls[index] is not None

    def pieces(self, index: int, of_target: bool = False, count: int = 1) -> Iterator[BatchState]:
        """Yield the batch on the compute device, ready for block number `index`, in parts that fit into its memory.

        Args:
            index: number of a block; one of the `count` from it on runs for this batch.
            of_target: the block will run on `target`, and reads what full-precision blocks left.
            count: number of blocks that the parts are ready for.
        """
        device = self.workspace.device
        batch, length = self.modality.shape
        for rows in self.workspace.limit.slices(batch):
            parts = (t[rows].to(device) for t in (self.modality, self.given))
            piece = BatchState(self.number, self.workspace, *parts, self.foreign)
            piece.hidden = _rows_of(self.hidden, rows).to(device)
            piece.target = None if self.target is None else _rows_of(self.target, rows).to(device)
            left = map_tensors(self.target_left if of_target else self.left, lambda tensor, rows=rows: tensor[rows])
            here: dict[int, Tensor] = {}  # blocks share masks and positions

            def take(tensor: Tensor, rows: slice = rows, here: dict[int, Tensor] = here) -> Tensor:
                if id(tensor) not in here:
                    here[id(tensor)] = take_samples(tensor, rows, batch, length).to(device)
                return here[id(tensor)]

            for call, injection in zip(self.calls[index : index + count], self.injections[index:], strict=False):
                if call is not None:
                    args, kwargs = map_tensors(call, take)
                    call = args, _with_left(kwargs, map_tensors(left, lambda tensor: tensor.to(device)))
                piece.calls.append(call)
                piece.injections.append(None if injection is None else _rows_of(injection, rows).to(device))
            after = self.injections[index + count] if index + count < len(self.injections) else None
            piece.injections.append(None if after is None else _rows_of(after, rows).to(device))
            piece.calls, piece.injections = [None] * index + piece.calls, [None] * index + piece.injections
            yield piece

    def tensors(self) -> list[Tensor]:
        """Return the different tensors that blocks read, and the targets."""
        return tensors_in(self._arguments())

    def with_tensors(self, tensors: list[Tensor]) -> BatchState:
        """Return the same batch with others in the place of what `tensors` returns."""
        places = {id(mine): given for mine, given in zip(self.tensors(), tensors, strict=True)}
        other = copy.copy(self)
        arguments = map_tensors(self._arguments(), lambda tensor: places[id(tensor)])
        other.modality, other.given, other.hidden, other.target, other.calls, other.injections = arguments
        return other

    def form(self) -> tuple:
        """Return all that decides how blocks run, beside the values of tensors; equal for batches that run alike."""
        places: dict[int, int] = {}
        return tuple(_forms(self._arguments(), places))

    def _arguments(self) -> tuple:
        return self.modality, self.given, self.hidden, self.target, self.calls, self.injections


def _forms(value: Any, places: dict[int, int]) -> Iterator[Hashable]:
    """Yield the nested structure of a value: tensors by shape, dtype and where they came first, anything else by its words."""
    if isinstance(value, Tensor):
        yield (*value.shape, value.dtype, places.setdefault(id(value), len(places)))
    elif isinstance(value, (tuple, list)):
        yield type(value), len(value)
        for item in value:
            yield from _forms(item, places)
    elif isinstance(value, MutableMapping):
        yield type(value), len(value)
        for key, item in value.items():
            yield key
            yield from _forms(item, places)
    else:
        yield value if isinstance(value, (int, float, str, type(None))) else id(value)


def block_output(block: nn.Module, index: int, state: BatchState, hidden: Tensor) -> Tensor:
    """Run `block`, number `index`, on `hidden` with the arguments that the model gives it for this batch.

    Floating-point arguments (masks, rotary positions) take the dtype of `hidden`. `state.left` becomes what the block left.
    """
    args, kwargs = _cast(state.calls[index], hidden.dtype)
    before = {name: dict(value) for name, value in kwargs.items() if isinstance(value, MutableMapping)}
    output = block(hidden, *args, **kwargs)
    state.left = {
        name: {key: value for key, value in kwargs[name].items() if value is not known.get(key)}
        for name, known in before.items()
    }
    return output[0] if isinstance(output, tuple) else output


def window_output(
    blocks: list[nn.Module], first: int, state: BatchState, hidden: Tensor, run: Callable[..., Tensor] = block_output
) -> Tensor:
    """Run successive blocks, the first of which is number `first`, with what each leaves for later ones.

    Args:
        state: ready for all of them, from `BatchState.pieces`.
        hidden: [..., batch, length, hidden_size], what enters the first block.
        run: runs one block as `block_output` does, and may save memory.
    Returns:
        What enters the block after them: their output, and what the model adds to it.
    """
    left: Left = {}
    for index, block in enumerate(blocks, first):
        if state.runs(index):
            args, kwargs = state.calls[index]
            one = copy.copy(state)
            one.calls = [None] * index + [(args, _with_left(kwargs, left))]
            hidden = run(block, index, one, hidden)
            for name, values in one.left.items():
                left.setdefault(name, {}).update(values)
        if state.injections[index + 1] is not None:
            hidden = hidden + state.injections[index + 1]
    return hidden


def join(outputs: list[Tensor], left: list[Left]) -> tuple[Tensor, Left]:
    """Put the outputs [..., batch, length, hidden_size] of a batch's parts together, and what the block left for them."""
    if len(outputs) == 1:
        return outputs[0], left[0]
    joined = {
        name: {key: _joined([part[name][key] for part in left]) for key in values} for name, values in left[0].items()
    }
    return torch.cat(outputs, dim=-3), joined


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if isinstance(values[0], (tuple, list)):
        return type(values[0])(_joined(list(items)) for items in zip(*values, strict=True))
    return values[0]


def _rows_of(hidden: Tensor, rows: slice) -> Tensor:
    return hidden.narrow(-3, rows.start, rows.stop - rows.start)


def _with_left(kwargs: dict[str, Any], left: Left) -> dict[str, Any]:
    """Return the arguments with what earlier blocks left in those that are dicts."""
    filled = dict(kwargs)
    for name, value in kwargs.items():
        if isinstance(value, MutableMapping):
            filled[name] = copy.copy(value)  # of the same type; the block at hand may write to it
            filled[name].update(left.get(name, {}))
    return filled


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return map_nested(value, lambda item: _cast(item, dtype))
