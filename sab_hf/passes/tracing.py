"""Running a model with blocks that only note what they are called with, or that give a known output."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import PADDING, TEXT, CalibrationBatch
from ..machine.placement import Placement
from ..machine.store import map_tensors
from .states import BatchState


class _OtherRowsError(Exception):
    """A block got hidden states of another shape than the block before it handed on."""


_NOISE = 0.02
"""Share of a row's length by which rounding may change what a model adds to it; in bfloat16 it is below 0.01."""


class _FinishedError(Exception):
    """All blocks of the stage have been called; what the model does afterwards is not wanted."""


@torch.no_grad()
def trace(
    model: nn.Module, blocks: list[nn.Module], batch: CalibrationBatch, state: BatchState, to_the_end: bool
) -> dict[str, Any]:
    """Run the model on a batch and note in `state` what its blocks are called with.

    Blocks hand their input on instead of computing; the first one runs once, to learn what it returns.

    Args:
        blocks: the blocks in order; blocks that run before them compute as they are.
        to_the_end: False: stop when the last block was called, as blocks after it cannot run now.
    Returns:
        The further arguments with which the model was run.
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
        return option
    shape = state.hidden.shape[:-1]
    if shape[-2:] != state.modality.shape:
        found = _decoder_modality(batch.inputs, shape)
        if found is None:
            raise RuntimeError(
                f"{type(model).__name__} turned {list(state.modality.shape)} input positions into hidden states of shape "
                f"{list(state.hidden.shape)}; every position needs its modality. {_why_unknown(model, shape, state.modality)}"
            )
        state.modality = found
    return option


@torch.no_grad()
def check_replay(
    model: nn.Module,
    blocks: list[nn.Module],
    batch: CalibrationBatch,
    state: BatchState,
    to_the_end: bool,
    option: dict[str, Any],
) -> None:
    """Check on one batch that blocks run one by one get what the model's own forward gives them.

    What was recorded in `state` (arguments of the blocks, and what is added to hidden states between them) must not depend on
    what the blocks compute. So it is recorded once more, with blocks that hand on other hidden states, and must be the same.
    A norm, a projection or another block between two blocks shows here, as does a second stream that blocks hand on beside
    the hidden states.

    Args:
        model, blocks, batch, to_the_end: as they were given to `record`.
        state: what that noted.
        option: what that returned.
    Raises:
        RuntimeError: it depends on them; the message names the block.
    """
    if state.hidden is None:
        return
    other = copy.copy(state)
    generator = torch.Generator().manual_seed(0)

    def moved(hidden: Tensor) -> Tensor:
        noise = torch.randn(hidden.shape, generator=generator).to(hidden.device, hidden.dtype)
        return state.hidden.to(hidden.device) + noise * state.hidden.to(hidden.device).std(-1, keepdim=True)

    inputs = model_inputs(model, batch.inputs, state.workspace.placement.input_device)
    other.hidden, other.calls, other.injections = None, [None] * len(blocks), [None] * len(blocks)
    with _recording(blocks, other, to_the_end, moved):
        model(**inputs, **option, use_cache=False)
    lengths = state.hidden.float().norm(dim=-1).cpu()
    for index, (call, again) in enumerate(zip(state.calls, other.calls, strict=True)):
        between = [
            0 if item is None else item.float().cpu() for item in (state.injections[index], other.injections[index])
        ]
        added = torch.as_tensor(between[0] - between[1])
        if added.ndim and (added.norm(dim=-1) > _NOISE * (2 * lengths + _longest(between))).any():
            what = "changes hidden states between blocks by more than an addition (a norm, a projection, another block) before"
        elif not _same(call, again):
            what = "hands arguments that depend on what earlier blocks compute to"
        else:
            continue
        raise RuntimeError(
            f"{type(model).__name__} {what} block {index} of {len(blocks)}, so its blocks cannot be calibrated one after the "
            "other; this architecture is not supported yet"
        )


def _longest(values: list[Any]) -> Tensor:
    """Return the length of each row, of the longer of two."""
    return torch.stack([value.norm(dim=-1) for value in values if isinstance(value, Tensor)]).amax(0)


def _same(one: Any, other: Any) -> bool:
    """Whether the tensors in two nested values are the same, up to rounding."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for value, tensors in zip((one, other), found, strict=True):
        map_tensors(value, lambda tensor, tensors=tensors: tensors.append(tensor) or tensor)
    if len(found[0]) != len(found[1]):
        return False
    for a, b in zip(*found, strict=True):
        if a.shape != b.shape:
            return False
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return False
        elif not torch.allclose(a.float(), b.float(), rtol=_NOISE, atol=_NOISE * float(_finite(a).abs().mean())):
            return False
    return True


def _finite(tensor: Tensor) -> Tensor:
    """Return the entries that are finite and no mask's least number; [0.0] if there are none."""
    values = tensor[tensor.abs() < torch.finfo(tensor.dtype).max / 2].float()
    return values if values.numel() else torch.zeros(1)


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
def _recording(
    blocks: list[nn.Module], state: BatchState, to_the_end: bool, moved: Callable[[Tensor], Tensor] = Tensor.clone
) -> Iterator[None]:
    """Let blocks note in `state` what they are called with, and hand on `moved(hidden states)`."""
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
                state.others = _others(original, state.workspace.device, moved(hidden), args, kwargs)
            state.injections[index] = None if sent is None or torch.equal(sent, hidden) else hidden - sent
            state.calls[index] = (args, kwargs)
            if index + 1 == len(blocks) and not to_the_end:
                raise _FinishedError
            sent = moved(hidden)
            return _returned(sent.clone(), state.others)

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


@contextmanager
def running_where_they_are(blocks: dict[str, nn.Module], placement: Placement) -> Iterator[None]:
    """Have each block come to the compute device whenever the model runs it."""

    def visited(index: int, original: Callable) -> Callable:
        def forward(*args, **kwargs):
            with placement.visit(names[index]):
                return original(*args, **kwargs)

        return forward

    names = list(blocks)
    with _replaced(list(blocks.values()), visited):
        yield


def _why_unknown(model: nn.Module, shape: torch.Size, modality: Tensor) -> str:
    """Return why the modality of hidden states' positions `shape` is not known, or what to do, as a sentence."""
    if getattr(model.config, "is_encoder_decoder", False) and shape[1:] < modality.shape[1:]:
        return "For an encoder-decoder, pass processed batches with 'labels' or 'decoder_input_ids'"
    if shape[:2] == modality.shape:
        return "Several streams of hidden states for each position, on the third axis, are not supported yet"
    if shape[-1] > modality.shape[-1]:
        return "Positions that no token stands for (image features before or after the text) are not supported yet"
    return "For an encoder-decoder, pass processed batches with 'labels' or 'decoder_input_ids'"


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
