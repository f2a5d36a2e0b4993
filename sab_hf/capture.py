"""The calibration set's hidden states, cached between blocks, so that the model never runs again for a layer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .calibration import CalibrationBatch
from .hessian import SecondMoments
from .rows import take_rows
from .store import map_nested
from .workspace import Workspace


@dataclass
class BatchState:
    """One calibration batch on its way through the blocks. Its tensors live where the workspace has room for them.

    Attributes:
        number: of the batch in the calibration set, counted over all processes.
        workspace: where it is computed and kept.
        modality: [batch, length] int8, see `calibration.py`.
        hidden: [batch, length, hidden_size], the input of the next block, from the binarized blocks before it.
        target: [batch, length, hidden_size], the same from the full-precision blocks; None where it is not needed.
        calls: for each block, the other arguments that the model gives it (masks, rotary positions, …).
        injections: for each block, what the model adds to the hidden states before it (as deep visual features), or None.
        others: what blocks return beside the hidden states; None if they return a bare tensor.
    """

    number: int
    workspace: Workspace
    modality: Tensor
    hidden: Tensor = field(init=False)
    target: Tensor | None = None
    calls: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)
    injections: list[Tensor | None] = field(default_factory=list)
    others: tuple | None = None

    @property
    def rows(self) -> int:
        """Samples of the batch."""
        return self.modality.shape[0]

    def pieces(self, index: int) -> Iterator[BatchState]:
        """Yield the batch on the compute device, ready for block number `index`, in parts that fit into its memory."""
        device = self.workspace.device
        batch, length = self.modality.shape
        for rows in self.workspace.limit.slices(batch):
            piece = BatchState(self.number, self.workspace, self.modality[rows].to(device))
            piece.hidden = self.hidden[rows].to(device)
            piece.target = None if self.target is None else self.target[rows].to(device)
            call = take_rows(self.calls[index], rows, batch, length)
            piece.calls = [None] * index + [_to_device(call, device)]
            yield piece


class BlockInputs:
    """Inputs of successive blocks for the whole calibration set.

    Recording runs the model once, with blocks that only note what they are called with and hand their input on: masks and
    positions do not depend on the hidden states, so one cheap pass gives the arguments of all blocks. What a model does
    to hidden states between blocks must be an addition (it is, in the families known), and is replayed as such.

    Where several processes work together, each holds its share of the batches.

    Args:
        model: a transformers model in evaluation mode.
        block_names: its blocks, in order.
        batches: the calibration set.
        workspace: where to compute and where to keep hidden states; None: where the model is.
    Raises:
        RuntimeError: the model does not run its blocks one after the other on one row per token.
    """

    def __init__(
        self,
        model: nn.Module,
        block_names: tuple[str, ...],
        batches: list[CalibrationBatch],
        workspace: Workspace | None = None,
    ):
        blocks = [model.get_submodule(name) for name in block_names]
        self.workspace = workspace or Workspace.of(model)
        self.keeps = False
        placement = self.workspace.placement
        self.states = []
        with placement.visit_rest(block_names), placement.visit(block_names[0]):
            for number, batch in distributed.share(batches):
                self.states.append(self._record(model, blocks, number, batch))

    @torch.no_grad()
    def _record(self, model: nn.Module, blocks: list[nn.Module], number: int, batch: CalibrationBatch) -> BatchState:
        state = BatchState(number, self.workspace, batch.modality)
        inputs = model_inputs(model, batch.inputs, self.workspace.placement.input_device)
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            inputs["logits_to_keep"] = 1  # nobody reads the logits, which may be larger than all hidden states
        with _recording(blocks, state):
            model(**inputs, use_cache=False)
        if len(state.calls) != len(blocks):
            raise RuntimeError(
                f"{type(model).__name__} ran {len(state.calls)} of its {len(blocks)} language blocks for a calibration "
                "sample; this architecture is not supported yet"
            )
        if state.hidden.shape[:2] != state.modality.shape:
            raise RuntimeError(
                f"{type(model).__name__} turned {list(state.modality.shape)} input positions into hidden states of shape "
                f"{list(state.hidden.shape)}; every position needs its modality"
            )
        store, seen = self.workspace.store, {}
        state.hidden = store.put_all(state.hidden, seen)
        state.calls = store.put_all(state.calls, seen)
        state.injections = store.put_all(state.injections, seen)
        state.modality = state.modality.cpu()
        return state

    def first(self, num_samples: int) -> BlockInputs:
        """Return the inputs of the first batches, as many as hold `num_samples` samples; they advance by themselves.

        Of several processes, each has its share of these batches. What they advanced from stays as it was, so each `advance`
        takes room in the store until it is given to `StateStore.forget`.
        """
        part = copy.copy(self)
        part.keeps = True
        sizes = sorted(distributed.merge({state.number: state.rows for state in self.states}).items())
        count = count_first([rows for _, rows in sizes], num_samples)
        chosen = {number for number, _ in sizes[:count]}
        part.states = [copy.copy(state) for state in self.states if state.number in chosen]
        return part

    @torch.no_grad()
    def advance_targets(self, block: nn.Module, index: int) -> None:
        """Compute what the full-precision `block`, number `index`, makes of its full-precision input."""
        store = self.workspace.store
        for state in self.states:
            output = self._output(block, index, state, of_target=state.target is not None)
            state.target = store.put(output) if state.target is None else store.replace(state.target, output)

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int) -> None:
        """Replace the cached hidden states by the output of `block`, which is number `index`."""
        store = self.workspace.store
        for state in self.states:
            output = self._output(block, index, state)
            injection = state.injections[index + 1] if index + 1 < len(state.injections) else None
            if injection is not None:
                output = output + injection.to(output.device)
                if state.target is not None:
                    state.target = store.replace(state.target, state.target + injection.to(state.target.device))
            state.hidden = store.put(output) if self.keeps else store.replace(state.hidden, output)

    def _output(self, block: nn.Module, index: int, state: BatchState, of_target: bool = False) -> Tensor:
        """Run the block on a whole batch, in parts where memory asks for it."""

        def run() -> Tensor:
            parts = [
                block_output(block, index, piece, piece.target if of_target else piece.hidden)
                for piece in state.pieces(index)
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return self.workspace.limit.retry(f"running block {index}", state.rows, run)

    @torch.no_grad()
    def second_moments(self, block: nn.Module, index: int, linears: dict[str, nn.Linear]) -> dict[str, SecondMoments]:
        """Collect the second moments of the inputs of all `linears` of a block in one streaming pass.

        Linears that get the very same tensor (query, key and value; gate and up) share one accumulator. A Linear that was
        never called is missing from the result.

        The moments are those of the samples of all processes.

        Raises:
            ValueError: inputs are not finite, or are not one row for each token.
        """
        largest = max((state.rows for state in self.states), default=1)
        owner, moments = self.workspace.limit.retry(
            f"collecting second moments of block {index}", largest, lambda: self._own_moments(block, index, linears)
        )
        owner = distributed.merge(owner)
        distributed.sum_moments(moments, sorted(set(owner.values())), self.workspace.device)
        for name, moment in moments.items():
            if not moment.is_finite():
                raise ValueError(
                    f"the inputs of `{name}` are not finite on the calibration set; load the model with "
                    "dtype=torch.bfloat16 or torch.float32 (float16 overflows in many models)"
                )
        return {name: moments[first] for name, first in owner.items()}

    def _own_moments(
        self, block: nn.Module, index: int, linears: dict[str, nn.Linear]
    ) -> tuple[dict[str, str], dict[str, SecondMoments]]:
        """Return the Linear that accumulates for each Linear, and the moments of this process's samples by the former."""
        owner: dict[str, str] = {}
        moments: dict[str, SecondMoments] = {}
        modality = last_input = last_owner = None

        def observe(name: str, x: Tensor) -> None:
            nonlocal last_input, last_owner
            if name not in owner:
                owner[name] = last_owner if x is last_input else name
            last_input, last_owner = x, owner[name]
            if owner[name] != name:
                return
            if x.shape[:-1].numel() != modality.numel():
                raise ValueError(
                    f"`{name}` gets inputs of shape {list(x.shape)} for {modality.numel()} tokens; add it to "
                    "`modules_to_not_convert`"
                )
            moments.setdefault(name, SecondMoments(x.shape[-1], x.device)).add(x.flatten(0, -2), modality.to(x.device))

        with observing(linears, lambda name, x, _: observe(name, x)):
            for state in self.states:
                for piece in state.pieces(index):
                    modality = piece.modality.flatten()
                    block_output(block, index, piece, piece.hidden)
        return owner, moments


def count_first(rows: Iterable[int], num_samples: int) -> int:
    """Return how many of the first batches, which have so many rows each, hold `num_samples` samples (all, if too few)."""
    total = count = 0
    for size in rows:
        if total >= num_samples:
            break
        total += size
        count += 1
    return count


@contextmanager
def observing(modules: dict[str, nn.Module], observe: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `observe(name, input, output)` after each run of one of the modules."""
    hooks = [
        module.register_forward_hook(lambda _, args, output, name=name: observe(name, args[0], output))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def block_output(block: nn.Module, index: int, state: BatchState, hidden: Tensor) -> Tensor:
    """Run `block`, number `index`, on `hidden` with the arguments that the model gives it for this batch.

    Floating-point arguments (masks, rotary positions) take the dtype of `hidden`.
    """
    args, kwargs = _cast(state.calls[index], hidden.dtype)
    output = block(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return map_nested(value, lambda item: _cast(item, dtype))


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return map_nested(value, lambda item: _to_device(item, device))


def output_of_last_block(
    model: nn.Module, blocks: list[nn.Module], batch: CalibrationBatch, state: BatchState, hidden: Tensor
) -> Any:
    """Return what `model` makes of a batch whose last block gives `hidden`; the blocks themselves do not run.

    Args:
        state: of the batch.
        hidden: [batch, length, hidden_size].
    Returns:
        The model's output, with `logits` [batch, length, vocabulary].
    """
    with _replaced(blocks, lambda _: lambda *args, **kwargs: _returned(hidden, state.others)):
        return model(**model_inputs(model, batch.inputs, state.workspace.placement.input_device), use_cache=False)


@contextmanager
def _recording(blocks: list[nn.Module], state: BatchState) -> Iterator[None]:
    """Let the blocks record into `state` instead of computing; the first one runs once, to learn what it returns."""
    sent: Tensor | None = None  # a private copy of what the block before handed on

    def recorder(original: Callable) -> Callable:
        def forward(*args, **kwargs):
            nonlocal sent
            hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            args = args[1:]
            if not state.calls:
                state.hidden = hidden.clone()
                output = original(hidden.clone(), *args, **kwargs)
                state.others = output[1:] if isinstance(output, tuple) else None
            state.injections.append(None if sent is None or torch.equal(sent, hidden) else hidden - sent)
            state.calls.append((args, kwargs))
            sent = hidden.clone()
            return _returned(hidden, state.others)

        return forward

    with _replaced(blocks, recorder):
        yield


def _returned(hidden: Tensor, others: tuple | None) -> Tensor | tuple:
    return hidden if others is None else (hidden, *others)


@contextmanager
def _replaced(blocks: list[nn.Module], replacement: Callable[[Callable], Callable]) -> Iterator[None]:
    """Let each block run `replacement(its forward)` instead of its forward."""
    instance_forwards = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = replacement(block.forward)
        yield
    finally:
        for block, forward in zip(blocks, instance_forwards, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def model_inputs(model: nn.Module, inputs: dict[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """Move tensors to `device` (None: the model's), and floating-point ones (pixels) to the model's dtype."""
    device = model.device if device is None else device

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, model.dtype if value.is_floating_point() else None)

    return {name: move(value) for name, value in inputs.items()}
