"""What a run will need, told before it starts: peak memory by place, and roughly how many operations.

The formula, for one block at a time (bytes; n × m are the Linears of a block, each expert one, z modalities, P full planes,
R = 1 with a residual plane on the share s of the columns, T tokens of the largest forward pass, T_s those on which sensitivity is
measured, V the vocabulary, E bytes of an activation):

    moments  = 4 z Σ m²                                  over the different inputs of the block; each expert has its own
    fit      = 4 (z + 4) m² + 11 min((P+R) m, 16384)² + 4 (7 (P+R) + 5) n m     for the largest Linear
    distil   = Σ 20 n m (compact: 8) + 4 T Σ (n + 2 m) + min(24 T V, 4 GiB)     over the blocks of a window, as many as fit
    refine   = Σ n m (25 (P + s R) + 20) + 4 T Σ (n + 2 m)
    capture  = everything beside the blocks + 3 E T max (n + m)
    measure  = max(moments + 24 max m², 2 E T Σ (n + m), everything beside the blocks + min(20 T V, 4 GiB))
    device   = block's dense weights + max(capture, measure + further states, moments + fit, refine, distil) + states, both
               as far as they are kept there
    RAM      = weights in RAM + hidden states kept there + packed result (+ the line above, where the CPU computes, and a fifth of
               it for what the allocator keeps)
    states   = hidden_size E T_all (3 with distillation, 2 with refinement, else 1) + masks and positions
    further  = hidden_size E T_s (blocks + 1) + masks and positions − states, if more: while sensitivity is measured
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import psutil
import torch
from torch import nn

from ..calibration import CalibrationSet
from ..config import SABQuantizationConfig
from ..machine.placement import free_memory
from ..machine.store import GIB
from ..machine.workspace import Workspace
from ..method.fit import MAX_SYSTEM
from ..method.sensitivity import needs_sensitivity
from ..packed.experts import fused_name
from ..packing import stored_bytes
from ..passes.capture import count_first
from ..passes.gradients import BYTES_PER_LOGIT as GRADIENT_BYTES_PER_LOGIT
from ..passes.gradients import LOGIT_BYTES, positions_at_once
from ..passes.tail import BYTES_PER_LOGIT
from .distil import ACTIVATION_SHARE, BYTES_PER_WEIGHT, activation_bytes, blocks_at_once
from .plan import Plan
from .settings import DistilSettings

logger = logging.getLogger(__name__)

KEPT_BY_ALLOCATOR = 1.2
"""Resident memory over what is in use, on a CPU: freed pieces that the system's allocator has not given back (measured)."""


@dataclass(frozen=True)
class Estimate:
    """Predicted peaks of a run.

    Attributes:
        device: the compute device.
        working: bytes on the compute device by step: "capture", "measure", "fit", "refine", "distil" (steps follow each other).
        weights: bytes of the model's weights in RAM; those of memory-mapped files can be dropped by the system.
        packed: bytes of the packed result.
        states: bytes of hidden states by place: "device" (those of the "measure" step alone count as its working set), "ram",
            "disk".
        operations: floating-point operations by step: "passes", "moments", "fit", "refine".
    """

    device: torch.device
    working: dict[str, float]
    weights: float
    packed: float
    states: dict[str, float]
    operations: dict[str, float] = field(default_factory=dict)

    @property
    def peak_device(self) -> float:
        """Most bytes on the compute device."""
        return max(self.working.values()) + self.states.get("device", 0.0)

    @property
    def peak_ram(self) -> float:
        """Most bytes in RAM; the Python process itself (about half a GiB) comes on top."""
        own = self.weights + self.packed + self.states["ram"]
        return own + (KEPT_BY_ALLOCATOR * max(self.working.values()) if self.device.type == "cpu" else 0.0)

    def __str__(self) -> str:
        total = max(sum(self.operations.values()), 1.0)
        steps = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.working.items())
        shares = ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in self.operations.items())
        device = "" if self.device.type == "cpu" else f"{self.device} peak {self.peak_device / GIB:.2f} GiB, "
        return (
            f"estimate: {device}RAM peak {self.peak_ram / GIB:.2f} GiB (weights {self.weights / GIB:.2f}, hidden states "
            f"{self.states['ram'] / GIB:.2f}), disk {self.states['disk'] / GIB:.2f} GiB; working set of a block in GiB: {steps}; "
            f"{total:.1e} operations: {shares}"
        )


def estimate_run(model: nn.Module, plan: Plan, config: SABQuantizationConfig, workspace: Workspace) -> Estimate:
    """Predict what a run will need in a workspace."""
    block_names, shapes, modules, calibration = plan.roles.blocks, plan.shapes, plan.modules, plan.calibration
    refine_steps = plan.refine.steps
    measured = needs_sensitivity(config, refine_steps)
    copies = (
        3 if plan.distil.steps else 2 if refine_steps else 1
    )  # of the hidden states: entering, running ahead, wanted
    data = _Data.of(
        calibration, model, len(block_names), copies, workspace, config.sensitivity_samples if measured else 0
    )
    blocks = [_Block.of(model, name, shapes, modules) for name in block_names]
    dearest = max(blocks, key=lambda block: block.weights)
    moved = 0 if workspace.device.type == "cpu" else 1  # what is computed where it is needs no second place
    beside = moved * _beside_blocks(model, block_names)
    working = {"capture": beside + moved * dearest.dense + _activations(dearest, data)}
    if measured:
        through = moved * dearest.dense + max(_measure(dearest, data), _backward(dearest, data))
        working["measure"] = max(through, beside + data.logit_bytes)
    working["fit"] = moved * dearest.dense + _moments(dearest, data) + _fit(dearest, data)
    if refine_steps:
        working["refine"] = _refine(dearest, data)
    if plan.distil.steps:
        working["distil"] = beside + _distil(blocks, data, workspace)
    states, most = (_places(size, workspace) for size in (data.state_bytes, data.most_state_bytes))
    if measured:
        working["measure"] += most["device"] - states["device"]
    in_ram = sum(p.nbytes for p in model.parameters() if p.device.type == "cpu")
    return Estimate(
        workspace.device,
        working,
        in_ram,
        sum(block.packed for block in blocks),
        most | {"device": states["device"]},
        _operations(blocks, data, config, refine_steps, plan.distil),
    )


def log_estimate(estimate: Estimate) -> None:
    """Write the pre-flight line, and a warning where the prediction exceeds what the compute device has free."""
    logger.info("%s", estimate)
    if estimate.device.type == "cuda":
        needed, free = estimate.peak_device, torch.cuda.mem_get_info(estimate.device)[0]
    else:
        needed, free = estimate.peak_ram - estimate.weights, psutil.virtual_memory().available
    if needed > free:
        logger.warning(
            "%s has %.1f GiB free, %.1f GiB may be needed; lower `batch_size` or `max_length`, or set `refine_steps=0`",
            estimate.device,
            free / GIB,
            needed / GIB,
        )


@dataclass(frozen=True)
class _Data:
    """The calibration set in numbers: tokens in all and in the largest pass, modalities, bytes of an activation.

    Attributes:
        state_bytes, most_state_bytes: hidden states, while blocks are binarized and at most.
    """

    tokens: int
    largest: int
    longest: int
    samples: int
    modalities: int
    activation_bytes: int
    state_bytes: float
    most_state_bytes: float
    logit_bytes: float
    vocabulary: int
    width: int

    @classmethod
    def of(
        cls,
        calibration: CalibrationSet,
        model: nn.Module,
        num_blocks: int,
        copies: int,
        workspace: Workspace,
        measured: int,
    ) -> _Data:
        shapes = [tuple(batch.modality.shape) for batch in calibration.batches]
        tokens = sum(rows * length for rows, length in shapes)
        rows = workspace.limit.samples
        largest = max(min(batch, rows or batch) * length for batch, length in shapes)
        width = model.get_input_embeddings().embedding_dim
        size = model.dtype.itemsize
        arguments = sum(batch * length * (length + 512 * size) for batch, length in shapes)  # mask, rotary factors
        first = calibration.batches[: count_first((batch for batch, _ in shapes), measured)]
        kept = sum(batch.modality.numel() for batch in first) * (num_blocks + 1)
        states = width * size * tokens * copies + arguments
        most = max(states, width * size * kept + arguments)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        logits = max(
            (GRADIENT_BYTES_PER_LOGIT * vocabulary * positions_at_once(model, b) * b.modality.shape[0] for b in first),
            default=0,
        )
        longest = max(length for _, length in shapes)
        samples = sum(batch for batch, _ in shapes)
        return cls(
            tokens, largest, longest, samples, len(calibration.tokens), size, states, most, logits, vocabulary, width
        )


@dataclass(frozen=True)
class _Block:
    """A block in numbers.

    Attributes:
        linears: (out_features, in_features, full planes, significant columns) of each Linear that becomes packed.
        inputs: in_features of the different inputs; Linears beside each other may share theirs, so this is an upper bound.
        dense: bytes of all its weights.
    """

    linears: list[tuple[int, int, int, int]]
    inputs: list[int]
    dense: int

    @classmethod
    def of(
        cls, model: nn.Module, name: str, shapes: dict[str, tuple[int, int]], modules: dict[str, list[int]]
    ) -> _Block:
        linears, beside = [], {}
        for inner, sizes in modules.items():
            if inner.startswith(f"{name}."):
                linears.append((*shapes[inner], *sizes))
                # each expert has its own rows of tokens
                part = inner if fused_name(inner) else inner.rpartition(".")[0]
                beside.setdefault((part, shapes[inner][1]), []).append(inner)
        inputs = [width for (_, width), names in beside.items() for _ in names[:2]]
        return cls(linears, inputs, sum(p.nbytes for p in model.get_submodule(name).parameters()))

    @property
    def weights(self) -> int:
        return sum(n * m for n, m, _, _ in self.linears)

    @property
    def packed(self) -> int:
        return sum(stored_bytes(*linear) for linear in self.linears)


def _moments(block: _Block, data: _Data) -> float:
    return 4 * data.modalities * sum(m * m for m in block.inputs)


def _measure(block: _Block, data: _Data) -> float:
    return _moments(block, data) + 24 * max((m * m for m in block.inputs), default=0)


def _backward(block: _Block, data: _Data) -> float:
    return 2 * data.activation_bytes * data.largest * sum(n + m for n, m, _, _ in block.linears)


def _fit(block: _Block, data: _Data) -> float:
    def one(n: int, m: int, planes: int, significant: int) -> float:
        terms = planes + bool(significant)
        system = min(terms * m, MAX_SYSTEM)
        return 4 * (data.modalities + 4) * m * m + 11 * system**2 + 4 * (7 * terms + 5) * n * m

    return max((one(*linear) for linear in block.linears), default=0.0)


def _refine(block: _Block, data: _Data) -> float:
    trained = sum(n * m * (25 * (planes + significant / m) + 20) for n, m, planes, significant in block.linears)
    return trained + 4 * data.largest * sum(n + 2 * m for n, m, _, _ in block.linears)


def _distil(blocks: list[_Block], data: _Data, workspace: Workspace) -> float:
    """Return the peak of training a window of blocks, and of the logits that it is held to."""
    free = free_memory(workspace.device)
    count, compact = blocks_at_once([block.weights for block in blocks], workspace.device, free)
    window = sorted(blocks, key=lambda block: block.weights)[-count:]
    shapes = [[(n, m) for n, m, _, _ in block.linears] for block in window]
    activations = sum(activation_bytes(own, data.largest) for own in shapes)
    if activations > ACTIVATION_SHARE * free:
        activations = max(activation_bytes(own, data.largest) for own in shapes)
    weights = BYTES_PER_WEIGHT["compact" if compact else "built"] * sum(block.weights for block in window)
    return weights + activations + min(LOGIT_BYTES, BYTES_PER_LOGIT * data.largest * data.vocabulary)


def _activations(block: _Block, data: _Data) -> float:
    return data.activation_bytes * data.largest * 3 * max((n + m for n, m, _, _ in block.linears), default=0)


def _beside_blocks(model: nn.Module, block_names: tuple[str, ...]) -> float:
    inside = tuple(f"{name}." for name in block_names)
    return sum(p.nbytes for name, p in model.named_parameters() if not name.startswith(inside))


def _places(states: float, workspace: Workspace) -> dict[str, float]:
    """Spread bytes over the tiers of the store as it would fill them."""
    places = {"device": 0.0, "ram": 0.0, "disk": 0.0}
    for tier, room in workspace.store.room.items():
        places[tier] = min(states, room)
        states -= places[tier]
    places["disk"] = states
    return places


def _operations(
    blocks: list[_Block], data: _Data, config: SABQuantizationConfig, refine_steps: int, distil: DistilSettings
) -> dict[str, float]:
    weights = sum(block.weights for block in blocks)
    per_step = min(config.refine_batch, data.samples) * data.tokens / data.samples
    fit = 0.0
    for n, m, planes, significant in (linear for block in blocks for linear in block.linears):
        terms = planes + bool(significant)
        unknowns = min(terms * m, MAX_SYSTEM)
        systems = math.ceil(terms * m / unknowns)
        scales = 4 * terms * n * m * m + 2 * n * m * m * (1 + terms * unknowns / m) + systems * unknowns**3 * 2 / 3
        fit += 3 * m**3 + (config.alternations + 1) * (scales + 3 * n * m * m)
    operations = {
        "passes": (3 if refine_steps or distil.steps else 2) * 2.0 * weights * data.tokens,
        "moments": 2.0 * data.tokens * sum(m * m for block in blocks for m in block.inputs),
        "fit": fit,
    }
    if refine_steps:
        operations["refine"] = 6.0 * weights * per_step * refine_steps
    if distil.steps:
        per_step = min(distil.samples_per_step, data.samples) * data.tokens / data.samples
        operations["distil"] = (6.0 * weights + 6.0 * data.vocabulary * data.width) * per_step * distil.steps
    return operations
