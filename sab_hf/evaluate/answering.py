"""Open a model with its processor, and let it answer prompts greedily."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.chat import ChatEncoder
from ..processors import processor_of
from ..publish.locate import read_config
from ..publish.open import hub_options, opening_class
from ..publish.summary import device_of


@dataclass(frozen=True)
class Speed:
    """How fast one answer at a time is written: the least of several runs, since what else runs on the machine only adds to it.

    Attributes:
        device: what it ran on.
        prompt_tokens: length of the prompt.
        first_token_ms: from the processed prompt to the first token, ms.
        token_ms: each further token, ms.
    """

    device: str
    prompt_tokens: int
    first_token_ms: float
    token_ms: float


def open_model(model: Any, processor: Any, load_kwargs: dict[str, Any]) -> tuple[nn.Module, Any]:
    """Load what is given as a path or id; a model in memory needs a processor, or a name to load one from."""
    hub = hub_options(load_kwargs)
    if isinstance(model, (str, os.PathLike)):
        name = model
        model = opening_class(read_config(name, **hub)).from_pretrained(name, **load_kwargs)
    else:
        name = getattr(model, "name_or_path", "")
    return model, processor_of(name, processor, "evaluation needs", "pass `processor`", **hub)


def elsewhere(load_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of `from_pretrained` without those that hold for one repository only."""
    return {name: value for name, value in load_kwargs.items() if name not in ("revision", "subfolder")}


@contextlib.contextmanager
def training_off(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode, and back into the mode that they had."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def greedy(model: nn.Module, encoder: ChatEncoder, prompts: dict[str, Any], max_new_tokens: int) -> list[str]:
    """Return the greedy answers to processed prompts, padded on the left."""
    inputs = on_device(model, prompts)
    out = _generate(model, encoder, inputs, max_new_tokens=max_new_tokens)
    length = inputs["input_ids"].shape[1]
    if torch.equal(out[:, :length], inputs["input_ids"]):  # generation from embeddings returns the answer alone
        out = out[:, length:]
    return [text.strip() for text in encoder.tokenizer.batch_decode(out, skip_special_tokens=True)]


def measure_speed(
    model: nn.Module, encoder: ChatEncoder, prompt: dict[str, Any], runs: int = 5, tokens: int = 16
) -> Speed:
    """Time the generation of one answer.

    Args:
        model: a generating model that has answered before, so that its kernels are ready.
        encoder: of its processor.
        prompt: one processed prompt.
        runs: how often each time is taken.
        tokens: further tokens that are timed.
    """
    inputs = on_device(model, prompt)
    lengths = (1, 1 + tokens)
    times = [[_milliseconds(model, encoder, inputs, length) for length in lengths] for _ in range(runs)]
    first, more = (min(taken) for taken in zip(*times, strict=True))
    return Speed(device_of(model), inputs["input_ids"].shape[1], first, max(0.0, more - first) / tokens)


def on_device(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs on the device of a model, pixel values in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def _milliseconds(model: nn.Module, encoder: ChatEncoder, inputs: dict[str, Any], tokens: int) -> float:
    """Return the time of generating exactly so many tokens; moving them to the CPU waits for the device."""
    start = time.perf_counter()
    _generate(model, encoder, inputs, max_new_tokens=tokens, min_new_tokens=tokens).cpu()
    return 1000 * (time.perf_counter() - start)


def _generate(model: nn.Module, encoder: ChatEncoder, inputs: dict[str, Any], **lengths: int) -> Tensor:
    tokenizer = encoder.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return model.generate(**inputs, do_sample=False, num_beams=1, pad_token_id=pad, **lengths)
