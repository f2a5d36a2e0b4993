"""What bounds the memory of a run: where weights are, where hidden states are, how many samples run at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ..config import SABQuantizationConfig
from .bar import Bar
from .limits import SampleLimit
from .placement import Placement
from .store import GIB, StateStore


@dataclass
class Workspace:
    """Places and limits of one run.

    Attributes:
        placement: brings blocks to the compute device.
        store: keeps hidden states.
        limit: samples of one forward pass.
        bar: is told how far the run is.
    """

    placement: Placement
    store: StateStore
    limit: SampleLimit
    bar: Bar = field(default_factory=Bar)

    @property
    def device(self) -> torch.device:
        """The compute device."""
        return self.placement.device

    @classmethod
    def of(cls, model: nn.Module, config: SABQuantizationConfig | None = None) -> Workspace:
        """Return the workspace that `config` asks for; None: the defaults.

        Raises:
            ValueError: the compute device does not exist.
        """
        config = config or SABQuantizationConfig()
        placement = Placement(model, config.compute_device)
        limits = [None if gib is None else gib * GIB for gib in (config.cache_device_gib, config.cache_ram_gib)]
        return cls(placement, StateStore(placement.device, *limits, config.offload_dir), SampleLimit())
