"""The calibration set's hidden states, cached between blocks, so that the model never runs again for a layer."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import PADDING, TEXT, CalibrationBatch, media_modality
from .hessian import SecondMoments
from .routing import RowLabels


@dataclass
class BatchState:
    """One calibration batch on its way through the blocks.

    Attributes:
        modality: [batch, length] int8 of the positions of `hidden`, see `calibration.py`.
        given: [batch, length] int8 of the batch's own tokens: the same, but for a decoder that reads an encoder's output.
        foreign: the modality of what blocks read beside them (image features through cross-attention).
        hidden: [..., batch, length, hidden_size], the input of the next block, from the binarized blocks before it. Some
            models have several streams of hidden states, on a first axis.
        target: as `hidden`, the same from the full-precision blocks; None where it is not needed.
        calls: for each block, the other arguments that the model gives it (masks, rotary positions, …); None for a block that
            the model leaves out for this batch (cross-attention without an image).
        injections: for each block, what the model adds to the hidden states before it (as deep visual features), or None.
    """

    modality: Tensor
    given: Tensor
    foreign: int
    hidden: Tensor | None = None
    target: Tensor | None = None
    calls: list[tuple[tuple, dict[str, Any]] | None] = field(default_factory=list)
    injections: list[Tensor | None] = field(default_factory=list)


class BlockInputs:
    """Inputs of successive blocks for the whole calibration set.

    Recording runs the model once, with blocks that only note what they are called with and hand their input on: masks and
    positions do not depend on the hidden states, so one cheap pass gives the arguments of all blocks. What a model does
    to hidden states between blocks must be an addition (it is, in the families known), and is replayed as such.

    Args:
        model: a transformers model in evaluation mode.
        block_names: blocks that run one after the other, in order; blocks that run before them compute as they are.
        batches: the calibration set.
    Raises:
        RuntimeError: the model does not run its blocks one after the other, each once, on one row per token.
    """

    def __init__(self, model: nn.Module, block_names: tuple[str, ...], batches: list[CalibrationBatch]):
        blocks = [model.get_submodule(name) for name in block_names]
        self.states = [self._record(model, blocks, batch) for batch in batches]
        ran = sum(any(state.calls[i] is not None for state in self.states) for i in range(len(blocks)))
        if ran != len(blocks):
            raise RuntimeError(
                f"{type(model).__name__} ran {ran} of its {len(blocks)} language blocks for the calibration samples; if some run "
                "for images only, calibrate with images, else this architecture is not supported yet"
            )

    def running(self, index: int) -> list[BatchState]:
        """Return the batches for which the model runs block number `index`."""
        return [state for state in self.states if state.calls[index] is not None]

    @torch.no_grad()
    def _record(self, model: nn.Module, blocks: list[nn.Module], batch: CalibrationBatch) -> BatchState:
        state = BatchState(batch.modality, batch.modality, media_modality(batch.inputs))
        state.calls, state.injections = [None] * len(blocks), [None] * len(blocks)
        with _recording(blocks, state):
            model(**_model_inputs(model, batch.inputs), use_cache=False)
        if state.hidden is None:
            return state
        shape = state.hidden.shape[:-1]
        if shape[-2:] != state.modality.shape:
            state.modality = _decoder_modality(batch.inputs, shape)
        if state.modality is None:
            raise RuntimeError(
                f"{type(model).__name__} turned {list(batch.modality.shape)} input positions into hidden states of shape "
                f"{list(state.hidden.shape)}; every position needs its modality. For an encoder-decoder, pass processed batches "
                "with 'labels' or 'decoder_input_ids'"
            )
        state.modality = state.modality.to(state.hidden.device)
        return state

    @torch.no_grad()
    def advance_targets(self, block: nn.Module, index: int) -> None:
        """Compute what the full-precision `block`, number `index`, makes of its full-precision input."""
        for state in self.running(index):
            state.target = block_output(block, index, state, state.hidden if state.target is None else state.target)

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int) -> None:
        """Replace the cached hidden states by the output of `block`, which is number `index`."""
        for state in self.states:
            if state.calls[index] is not None:
                state.hidden = block_output(block, index, state, state.hidden)
            injection = state.injections[index + 1] if index + 1 < len(state.injections) else None
            if injection is not None:
                state.hidden = state.hidden + injection.to(state.hidden.device)
                state.target = None if state.target is None else state.target + injection.to(state.target.device)

    @torch.no_grad()
    def second_moments(self, block: nn.Module, index: int, linears: dict[str, nn.Linear]) -> dict[str, SecondMoments]:
        """Collect the second moments of the inputs of all `linears` of a block in one streaming pass.

        Linears that get the very same tensor (query, key and value; gate and up) share one accumulator. A Linear that was
        never called is missing from the result.

        Raises:
            ValueError: inputs are not finite, or are not rows whose modality is known.
        """
        owner: dict[str, str] = {}
        moments: dict[str, SecondMoments] = {}
        last_input = last_owner = None
        inside = {module: name for name, module in block.named_modules()}
        labels = RowLabels(block)

        def observe(name: str, module: nn.Module, x: Tensor) -> None:
            nonlocal last_input, last_owner
            if name not in owner:
                owner[name] = last_owner if x is last_input else name
            last_input, last_owner = x, owner[name]
            if owner[name] != name:
                return
            modality = labels.of(inside[module], x)
            if modality is None:
                raise ValueError(
                    f"`{name}` gets inputs of shape {list(x.shape)}, whose rows are not the tokens; add it to "
                    "`modules_to_not_convert`"
                )
            moments.setdefault(name, SecondMoments(x.shape[-1], x.device)).add(x.flatten(0, -2), modality)

        hooks = [
            module.register_forward_pre_hook(lambda module, args, name=name: observe(name, module, args[0]))
            for name, module in linears.items()
        ]
        try:
            with labels.watching():
                for state in self.running(index):
                    labels.start(state.modality, state.given, state.foreign)
                    block_output(block, index, state, state.hidden)
        finally:
            for hook in hooks:
                hook.remove()
        for name, moment in moments.items():
            if not moment.is_finite():
                raise ValueError(
                    f"the inputs of `{name}` are not finite on the calibration set; load the model with "
                    "dtype=torch.bfloat16 or torch.float32 (float16 overflows in many models)"
                )
        return {name: moments[first] for name, first in owner.items()}


def block_output(block: nn.Module, index: int, state: BatchState, hidden: Tensor) -> Tensor:
    """Run `block`, number `index`, on `hidden` with the arguments that the model gives it for this batch.

    Floating-point arguments (masks, rotary positions) take the dtype of `hidden`.
    """
    args, kwargs = _cast(state.calls[index], hidden.dtype)
    shared = {name: dict(value) for name, value in kwargs.items() if isinstance(value, MutableMapping)}
    output = block(hidden, *args, **kwargs)
    for name, before in shared.items():  # what blocks leave for later ones: keys and values that several of them use
        left = {key: value for key, value in kwargs[name].items() if value is not before.get(key)}
        state.calls[index][1][name].update(left)
    return output[0] if isinstance(output, tuple) else output


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, MutableMapping):
        return type(value)({key: _cast(item, dtype) for key, item in value.items()})
    return value


@contextmanager
def _recording(blocks: list[nn.Module], state: BatchState) -> Iterator[None]:
    """Let the blocks record into `state` instead of computing; the first one runs once, to learn what it returns."""
    sent: Tensor | None = None  # a private copy of what the block before handed on
    others: tuple | None = None  # what blocks return beside the hidden states; None if they return a bare tensor

    def recorder(index, original):
        def forward(*args, **kwargs):
            nonlocal sent, others
            hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            args = args[1:]
            if any(call is not None for call in state.calls[index:]):
                raise RuntimeError(f"block {index} runs twice or out of order; this architecture is not supported yet")
            if state.hidden is None:
                state.hidden = hidden.clone()
                output = original(hidden.clone(), *args, **kwargs)
                others = output[1:] if isinstance(output, tuple) else None
            state.injections[index] = None if sent is None or torch.equal(sent, hidden) else hidden - sent
            state.calls[index] = (args, kwargs)
            sent = hidden.clone()
            return hidden if others is None else (hidden, *others)

        return forward

    instance_forwards = [vars(block).get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = recorder(index, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, instance_forwards, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _decoder_modality(inputs: dict[str, Any], shape: torch.Size) -> Tensor | None:
    """Return the modality of a decoder's positions, which are text, if hidden states of `shape` can be theirs."""
    tokens = next((inputs[key] for key in ("decoder_input_ids", "labels") if inputs.get(key) is not None), None)
    if tokens is None or tokens.shape != shape:
        return None
    modality = torch.full(shape, TEXT, dtype=torch.int8)
    mask = inputs.get("decoder_attention_mask")
    if mask is not None:
        modality[mask == 0] = PADDING
    return modality


def _model_inputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Move tensors to the model's device, and floating-point ones (pixels) to its dtype."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(model.device, model.dtype if value.is_floating_point() else None)

    return {name: move(value) for name, value in inputs.items()}
