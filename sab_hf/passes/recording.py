"""Running a model with blocks that only note what they are called with, or that give a known output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import PADDING, TEXT, CalibrationBatch
from ..machine.store import map_tensors
from .states import BatchState


class _OtherRowsError(Exception):
    """A block got hidden states of another shape than the block before it handed on."""


class _FinishedError(Exception):
    """All blocks of the stage have been called; what the model does afterwards is not wanted."""


@torch.no_grad()
def record(
    model: nn.Module, blocks: list[nn.Module], batch: CalibrationBatch, state: BatchState, to_the_end: bool
) -> None:
    """Run the model on a batch and note in `state` what its blocks are called with.

    Blocks hand their input on instead of computing; the first one runs once, to learn what it returns.

    Args:
        blocks: the blocks in order; blocks that run before them compute as they are.
        to_the_end: False: stop when the last block was called, as blocks after it cannot run now.
    Raises:
        RuntimeError: a block runs twice, or the hidden states are not one row for each token.
    """
    inputs = model_inputs(model, batch.inputs, state.workspace.placement.input_device)
    options: list[dict[str, Any]] = [{}]
    if makes_some_logits(model, inputs):
        options.insert(0, {"logits_to_keep": 1})  # nobody reads the logits, which may be larger than all hidden states
    for option in options:
        state.hidden, state.others = None, None
        state.calls, state.injections = [None] * len(blocks), [None] * len(blocks)
        try:
            with _recording(blocks, state, to_the_end):
                model(**inputs, **option, use_cache=False)
            break
        except _OtherRowsError as error:  # Gemma 4 drops the other positions in the middle of its blocks
            if option is options[-1]:
                raise RuntimeError(
                    f"{type(model).__name__}: {error}; this architecture is not supported yet"
                ) from error
    if state.hidden is None:
        return
    shape = state.hidden.shape[:-1]
    if shape[-2:] != state.modality.shape:
        found = _decoder_modality(batch.inputs, shape)
        if found is None:
            raise RuntimeError(
                f"{type(model).__name__} turned {list(state.modality.shape)} input positions into hidden states of shape "
                f"{list(state.hidden.shape)}; every position needs its modality. For an encoder-decoder, pass processed batches "
                "with 'labels' or 'decoder_input_ids'"
            )
        state.modality = found


def output_of_last_block(
    model: nn.Module,
    blocks: list[nn.Module],
    batch: CalibrationBatch,
    state: BatchState,
    hidden: Tensor,
    **options: Any,
) -> Any:
    """Return what `model` makes of a batch whose last block gives `hidden`; the blocks themselves do not run.

    Args:
        state: state of the batch.
        hidden: [..., batch, length, hidden_size].
        options: further arguments of the model.
    Returns:
        The model's output, with `logits` [batch, length, vocabulary].
    """
    # A copy for each: models write into what a block gives (deep visual features of Qwen3-VL on transformers 4).
    with _replaced(blocks, lambda *_: lambda *args, **kwargs: _returned(hidden.clone(), state.others)):
        inputs = model_inputs(model, batch.inputs, state.workspace.placement.input_device)
        return model(**inputs, **options, use_cache=False)


def makes_some_logits(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Tell whether the model can be asked, with `logits_to_keep`, for the logits of some positions of these inputs only."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters and inputs.get("labels") is None


def model_inputs(model: nn.Module, inputs: dict[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """Move tensors to `device` (None: the model's), and floating-point ones (pixels) to the model's dtype."""
    device = model.device if device is None else device

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, model.dtype if value.is_floating_point() else None)

    return {name: move(value) for name, value in inputs.items()}


@contextmanager
def _recording(blocks: list[nn.Module], state: BatchState, to_the_end: bool) -> Iterator[None]:
    sent: Tensor | None = None  # a private copy of what the block before handed on

    def recorder(index: int, original: Callable) -> Callable:
        def forward(*args, **kwargs):
            nonlocal sent
            hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            args = args[1:]
            if any(call is not None for call in state.calls[index:]):
                raise RuntimeError(f"block {index} runs twice or out of order; this architecture is not supported yet")
            if sent is not None and sent.shape != hidden.shape:
                raise _OtherRowsError(
                    f"block {index} gets hidden states {list(hidden.shape)}, and the block before it gave {list(sent.shape)}"
                )
            if state.hidden is None:
                state.hidden = hidden.clone()
                state.others = _others(original, state.workspace.device, hidden.clone(), args, kwargs)
            state.injections[index] = None if sent is None or torch.equal(sent, hidden) else hidden - sent
            state.calls[index] = (args, kwargs)
            if index + 1 == len(blocks) and not to_the_end:
                raise _FinishedError
            sent = hidden.clone()
            return _returned(hidden, state.others)

        return forward

    with _replaced(blocks, recorder), suppress(_FinishedError):
        yield


def _others(
    forward: Callable, device: torch.device, hidden: Tensor, args: tuple, kwargs: dict[str, Any]
) -> tuple | None:
    """Run a block, which is on `device` wherever its caller is, and return what it gives beside the hidden states.

    What it leaves in dicts among its arguments stays there: it gets copies.
    """
    home = hidden.device
    hidden, args, kwargs = map_tensors((hidden, args, kwargs), lambda tensor: tensor.to(device))
    output = forward(hidden, *args, **kwargs)
    return map_tensors(output[1:], lambda tensor: tensor.to(home)) if isinstance(output, tuple) else None


def _returned(hidden: Tensor, others: tuple | None) -> Tensor | tuple:
    return hidden if others is None else (hidden, *others)


@contextmanager
def _replaced(blocks: list[nn.Module], replacement: Callable[[int, Callable], Callable]) -> Iterator[None]:
    """Let each block run `replacement(its number, its forward)` instead of its forward."""
    instance_forwards = [vars(block).get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = replacement(index, block.forward)
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
        modality[mask.cpu() == 0] = PADDING
    return modality
