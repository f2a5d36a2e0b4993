"""What makes two runs the same: weights, calibration data, and the numbers of the config."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..calibration import CalibrationBatch
from ..config import SABQuantizationConfig
from ..version import __version__
from .placement import read_parameter

_WORKERS = 4  # hashing releases the interpreter's lock
_GLANCED = 64  # values of a tensor


@dataclass(frozen=True)
class Fingerprint:
    """Digests and numbers by subject.

    Attributes:
        config: fields of the config by name, and the version of this package.
        model: "class", and the digest of each parameter by name.
        data: digest of every input tensor of the calibration set, in order.
        software: what may change a result by rounding: versions, device type, number of processes.
    """

    config: dict[str, Any]
    model: dict[str, str]
    data: str
    software: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fingerprint(
    model: nn.Module,
    batches: list[CalibrationBatch],
    config: SABQuantizationConfig,
    *,
    device: torch.device,
    processes: int,
    **decided: Any,
) -> Fingerprint:
    """Take the fingerprint of a run. Every weight is read once, offloaded ones too.

    Args:
        model: the model with its dense weights.
        batches: the calibration set.
        config: config of the run.
        device: the compute device.
        processes: that work together.
        decided: numbers that the config leaves open and the run has decided.
    """
    fields = {key: value for key, value in config.to_dict().items() if key not in ("modules", "calibration")}
    names = [name for name, _ in model.named_parameters()]
    with ThreadPoolExecutor(_WORKERS) as pool:
        digests = pool.map(lambda name: digest([read_parameter(model, name)]), names)
        weights = dict(zip(names, digests, strict=True))
    return Fingerprint(
        config=fields | decided | {"version of sab_hf": __version__},
        model={"class": type(model).__name__} | weights,
        data=digest(value for batch in batches for value in _contents(batch)),
        software={
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": device.type,
            "processes": processes,
        },
    )


def digest(values: Iterable[Any]) -> str:
    """Return a digest of tensors (dtype, shape, bytes) and of other values by what they print."""
    result = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            result.update(f"{value.dtype} {list(value.shape)} ".encode())
            result.update(value.reshape(-1).view(torch.uint8).numpy())
        else:
            result.update(repr(value).encode())
    return result.hexdigest()[:32]


def glance(tensors: Iterable[tuple[str, Any]]) -> str:
    """Return a digest of some values of each tensor, and of other values: it tells models and samples apart in little time.

    Args:
        tensors: names and values; tensors without values (offloaded ones) count by shape.
    """
    parts: list[Any] = []
    for name, value in tensors:
        parts.append(name)
        if isinstance(value, Tensor):
            parts.append(f"{value.dtype} {list(value.shape)}")
            if not value.is_meta and value.numel():
                flat = value.detach().reshape(-1)
                parts.append(flat[:: max(1, len(flat) // _GLANCED)])
        else:
            parts.append(value)
    return digest(parts)


def differences(stored: Fingerprint, now: Fingerprint) -> tuple[list[str], list[str]]:
    """Return what makes two runs different runs, and what only makes them differ by rounding, in words."""
    refused = [
        f"`{key}` was {stored.config.get(key)!r:.80}, is {now.config.get(key)!r:.80}"
        for key in sorted(stored.config.keys() | now.config.keys())
        if stored.config.get(key) != now.config.get(key)
    ]
    changed = [
        key for key in sorted(stored.model.keys() | now.model.keys()) if stored.model.get(key) != now.model.get(key)
    ]
    if changed:
        refused.append(f"the model's weights changed ({len(changed)} tensors, first `{changed[0]}`)")
    if stored.data != now.data:
        refused.append("the calibration data changed")
    noted = [
        f"{key} was {stored.software.get(key)}, is {now.software.get(key)}"
        for key in sorted(stored.software.keys() | now.software.keys())
        if stored.software.get(key) != now.software.get(key)
    ]
    return refused, noted


def _contents(batch: CalibrationBatch) -> list[Any]:
    pairs = [item for key in sorted(batch.inputs) for item in (key, batch.inputs[key])]
    return [*pairs, batch.modality]
