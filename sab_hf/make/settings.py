"""The numbers of training, with what the config leaves open decided for a device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..config import SABQuantizationConfig

REFINE_STEPS, REFINE_STEPS_CPU = 400, 50
"""Steps of block refinement, for each block, on an accelerator and on a CPU."""

DISTIL_STEPS, DISTIL_STEPS_CPU = 1000, 150
"""Steps of distillation on an accelerator and on a CPU."""

WRITTEN_BUILTIN = 2048
"""Samples that the model writes after the built-in ones, where it can do so quickly: these alone are about too few subjects.

SmolLM2-135M at 1.1 bits chooses its own next token in a chat 51 % of the time with them, 29 % without (`benchmarks/ACCURACY.md`).
"""

IMAGE_TOKENS_CPU = 256
"""Most tokens of a calibration picture on a CPU: those that a picture of 448 x 448 pixels has where a token is 28 pixels wide."""


def image_tokens(config: SABQuantizationConfig, device: torch.device) -> int:
    """Return the most tokens of a calibration picture that a config means on a device; a sample has room for some text too."""
    if config.image_tokens is not None:
        return config.image_tokens
    room = max(1, config.max_length * 3 // 4)
    return min(IMAGE_TOKENS_CPU, room) if device.type == "cpu" else room


@dataclass(frozen=True)
class RefineSettings:
    """Numbers of block refinement; see `SABQuantizationConfig`."""

    steps: int
    samples_per_step: int
    scale_rate: float
    latent_rate: float
    seed: int
    asked_for: bool

    @classmethod
    def of(cls, config: SABQuantizationConfig, device: torch.device) -> RefineSettings:
        """Return the numbers that a config means on a compute device."""
        steps = config.refine_steps
        if steps is None:
            steps = REFINE_STEPS_CPU if device.type == "cpu" else REFINE_STEPS
        rates = config.refine_scale_rate, config.refine_latent_rate
        return cls(steps, config.refine_batch, *rates, config.seed, config.refine_steps is not None)

    def beside(self, distilled: bool) -> RefineSettings:
        """Return the numbers for blocks that are distilled afterwards or not: those that are need no refinement by default."""
        return replace(self, steps=0) if distilled and not self.asked_for else self


@dataclass(frozen=True)
class DistilSettings:
    """Numbers of distillation; see `SABQuantizationConfig`. written: samples that the model writes for it, 0 without steps."""

    steps: int
    samples_per_step: int
    scale_rate: float
    latent_rate: float
    seed: int
    written: int

    @classmethod
    def of(cls, config: SABQuantizationConfig, device: torch.device, writes: bool) -> DistilSettings:
        """Return the numbers that a config means on a compute device.

        Args:
            writes: whether the model is to write samples where the config leaves it open.
        """
        steps = config.distil_steps
        if steps is None:
            steps = DISTIL_STEPS_CPU if device.type == "cpu" else DISTIL_STEPS
        latent_rate = config.distil_latent_rate or _latent_rate(config.bits, steps)
        scale_rate = config.distil_scale_rate or min(5e-3, latent_rate / 5)
        written = config.written_samples
        if written is None:
            written = WRITTEN_BUILTIN if writes else 0
        return cls(steps, config.distil_batch, scale_rate, latent_rate, config.seed, written if steps else 0)


def _latent_rate(bits: float | None, steps: int) -> float:
    """Return the rate of latent weights: finer levels and longer runs need lower ones.

    Measured at 1.1 to 3.1 bits and 300 to 3,300 steps (`benchmarks/LOG.md`).
    """
    return min(3e-2, 4e-2 / (bits or 1.1)) * min(1.0, math.sqrt(DISTIL_STEPS / max(1, steps)))
