"""What a run will need, told before it starts: bytes of the file, peak memory by place and stage, minutes by stage, disk.

The minutes are in `costs.py`.

The memory, for one block at a time (bytes; n × m are the Linears of a block, each expert one, z modalities, P full planes,
R = 1 with a residual plane, T tokens of the largest forward pass, T_s those on which sensitivity is measured, V the
vocabulary, E bytes of an activation):

    moments      = 4 z Σ m²                                  over the different inputs of the block; each expert has its own
    fit          = max(4 (z + 6) m² + 4 n m, 16 m² + 12 S² + 20 (P + R + 1) n m)     for the largest Linear, whose scale systems
                   have S unknowns, at most 16384; the first while the factors of its inputs are found
    distillation = Σ 20 n m (compact: 8) + max(4 T Σ (n + 2 m) + min(24 T V, 4 GiB), (28 + 4 (P + R)) n m)
                   over the blocks of a window, as many as fit; the last for the largest Linear; less their dense weights on the
                   device. N processes: Σ (12 / N + 8) n m, or block by block Σ 14 n m / N (compact: 8 / N) + 8 max Σ n m
    refinement   = Σ 20 n m + (8 (P + R) + 10) n m + 4 T Σ (n + 2 m)     the second for the largest Linear: levels, Adam
    capture      = everything beside the blocks + 3 E T max (n + m)
    sensitivity  = max(moments + 24 max m², 2 E T Σ (n + m), everything beside the blocks + min(20 T V, 4 GiB))
    device       = block's dense weights, if they come from RAM, + max(capture, sensitivity + further states, moments + fit,
                   refinement, distillation) + states, both as far as they are kept there + the model's weights that are there
    RAM          = weights in RAM + hidden states kept there + packed result (+ the line above, where the CPU computes, and a
                   fifth of it, for the fit half of it, for what the allocator keeps)
    states       = hidden_size E (T_all (3 with distillation, 2 with refinement, else 1) + 2 T_written) + masks and positions
    further      = hidden_size E T_s (blocks + 1) + masks and positions − states, if more: while sensitivity is measured

Of several processes, all of this is for each; states are those of its share of the samples.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..anatomy.roles import EMBEDDING, HEAD, LANGUAGE
from ..calibration import TEXT, CalibrationBatch, CalibrationSet
from ..config import SABQuantizationConfig
from ..machine.disk import Need, check_disk
from ..machine.precision import faster_dtype
from ..machine.rates import THOROUGH, Machine
from ..machine.store import GIB
from ..machine.workspace import Workspace
from ..method.fit import MAX_SYSTEM
from ..method.sensitivity import needs_sensitivity
from ..notebook import html_text
from ..packed.experts import expert_name, fused_name
from ..packing import stored_bytes
from ..passes.capture import count_first
from ..passes.gradients import BYTES_PER_LOGIT as GRADIENT_BYTES_PER_LOGIT
from ..passes.gradients import positions_at_once
from ..passes.tail import BYTES_PER_LOGIT, LOGIT_BYTES
from ..units import size_in_words
from .costs import Amounts, Work, count_work, seconds_of
from .distil import ACTIVATION_SHARE, HELD_OUT, activation_bytes, blocks_at_once, bytes_of_training
from .plan import Plan
from .rest import is_tied

logger = logging.getLogger(__name__)

KEPT_BY_ALLOCATOR, KEPT_IN_FIT = 1.2, 1.5
"""Resident memory over what is in use, on a CPU: freed pieces that the system's allocator has not given back (measured)."""

_START_BYTES = 28
"""A weight of one Linear while its latent is made for distillation, and 4 for each of its planes."""

_SHORT = 60
"""Seconds of a run for which a quick look at the machine's rates is enough."""

_STATE_BYTES = 12
"""Bytes of each trained weight in the commit of an unfinished distillation: it and Adam's two moments."""


@dataclass(frozen=True, repr=False)
class Estimate:
    """Predicted needs of a run.

    Attributes:
        machine: on which it would run.
        sizes: bytes in the file by role.
        working: bytes on the compute device by stage, beside what is there all the time.
        weights: bytes of the model's weights in RAM; those of memory-mapped files can be dropped by the system.
        dtype: that the run computes in, and holds the weights in.
        widened: bytes of `weights` that come with that dtype.
        on_device: bytes of the model's weights on a GPU.
        loaded: whether the weights are there already, so that what is free is what is left.
        packed: bytes of the packed language blocks.
        states: bytes of hidden states by place: "device" (those of the "sensitivity" stage alone count as its working set),
            "ram", "disk".
        seconds: by stage.
        runs: stage → how many times it runs.
        work: operations by stage and kind, see `costs.py`.
        samples, tokens: of the calibration set, padding counted; `tokens_from` says how they are known.
        commits: bytes in `checkpoint_dir`, if there is one.
        advice: where memory is too small, how much is missing and with which setting it would do; else "".
    """

    machine: Machine
    sizes: dict[str, int]
    working: dict[str, float]
    weights: float
    on_device: float
    loaded: bool
    packed: float
    states: dict[str, float]
    dtype: torch.dtype
    widened: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)
    work: dict[str, Work] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    tokens_from: str = "the calibration set"
    commits: float = 0.0
    advice: str = ""

    @property
    def device(self) -> torch.device:
        """The compute device."""
        return self.machine.device

    @property
    def file_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(self.sizes.values())

    @property
    def peak_device(self) -> float:
        """Most bytes on the compute device."""
        return max(device for device, _ in self.memory().values())

    @property
    def peak_ram(self) -> float:
        """Most bytes in RAM; the Python process itself (about half a GiB) comes on top."""
        return max(ram for _, ram in self.memory().values())

    @property
    def all_seconds(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    @property
    def needed(self) -> dict[str, float]:
        """Bytes that must be free, by place; beside a GPU, weights in RAM may be dropped, as they can be read again."""
        if self.device.type == "cpu":
            return {"RAM": self.peak_ram - (self.weights - self.widened) * self.loaded}
        return {str(self.device): self.peak_device - self.on_device * self.loaded, "RAM": self.peak_ram - self.weights}

    @property
    def free(self) -> dict[str, float]:
        """Bytes that are free, by place."""
        return {"RAM": self.machine.ram} | ({} if self.device.type == "cpu" else {str(self.device): self.machine.free})

    @property
    def fits(self) -> bool:
        """Whether there is enough memory."""
        return all(size <= self.free[place] for place, size in self.needed.items())

    def memory(self) -> dict[str, tuple[float, float]]:
        """Return stage → (bytes on the compute device, bytes in RAM)."""
        own = self.weights + self.packed + self.states["ram"]
        on_cpu = self.device.type == "cpu"
        return {
            stage: (
                size + self.states.get("device", 0.0) + self.on_device,
                own + ((KEPT_IN_FIT if stage == "fit" else KEPT_BY_ALLOCATOR) * size if on_cpu else 0.0),
            )
            for stage, size in self.working.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: bytes, seconds, tokens."""
        memory = self.memory()
        stages = {
            stage: {
                "seconds": self.seconds.get(stage),
                "device_bytes": memory[stage][0] if stage in memory and self.device.type != "cpu" else None,
                "ram_bytes": memory[stage][1] if stage in memory else None,
            }
            for stage in dict.fromkeys([*self.seconds, *memory])
        }
        return {
            "machine": self.machine.name,
            "device": str(self.device),
            "file_bytes": self.file_bytes,
            "file_bytes_by_role": self.sizes,
            "peak_device_bytes": None if self.device.type == "cpu" else self.peak_device,
            "peak_ram_bytes": self.peak_ram,
            "fits": self.fits,
            "advice": self.advice,
            "seconds": self.all_seconds,
            "stages": stages,
            "computes_in": str(self.dtype).removeprefix("torch."),
            "samples": self.samples,
            "tokens": self.tokens,
            "tokens_from": self.tokens_from,
            "disk_bytes": {"checkpoint_dir": self.commits, "offload_dir": self.states["disk"]},
        }

    def __repr__(self) -> str:
        peaks = f"{self.device} {self.peak_device / GIB:.2f} GiB, RAM {self.peak_ram / GIB:.2f} GiB"
        return f"{type(self).__name__}(peaks: {peaks})"

    def _repr_html_(self) -> str:
        return html_text(str(self))

    def __str__(self) -> str:
        longest = sorted(self.seconds, key=lambda stage: -self.seconds[stage])[:3]
        stages = ", ".join(f"{stage} {duration(self.seconds[stage])}" for stage in longest)
        device = "" if self.device.type == "cpu" else f"{self.device} peak {size_in_words(self.peak_device)}, "
        return (
            f"estimate: {duration(self.all_seconds)} on {self.machine.name}{self._dtype_in_words} ({stages}); {device}"
            f"RAM peak {size_in_words(self.peak_ram)} (weights {size_in_words(self.weights)}, hidden states "
            f"{size_in_words(self.states['ram'])}), disk {size_in_words(self.commits + self.states['disk'])}; file "
            f"{size_in_words(self.file_bytes)}; {self.tokens:,} tokens"
        )

    @property
    def _dtype_in_words(self) -> str:
        return f" in {self.dtype}".replace("torch.", "") if self.widened else ""

    def table(self) -> str:
        """Return the estimate in some lines: stages, then the file by role, then what else is known."""
        on_gpu, memory = self.device.type != "cpu", self.memory()
        lines = [f"{'stage':<26}{'time':>10}{'GPU, GiB':>12}{'RAM, GiB':>12}"]
        for stage in dict.fromkeys([*self.seconds, *memory]):
            time = duration(self.seconds[stage]) if stage in self.seconds else "–"
            device, ram = (f"{size / GIB:.2f}" for size in memory[stage]) if stage in memory else ("–", "–")
            lines.append(f"{stage:<26}{time:>10}{device if on_gpu else '–':>12}{ram:>12}")
        peak = f"{self.peak_device / GIB:.2f}" if on_gpu else "–"
        lines.append(f"{'all':<26}{duration(self.all_seconds):>10}{peak:>12}{self.peak_ram / GIB:>12.2f}")
        lines.append("")
        lines += [f"file, {role:<20}{size / 2**20:>10.1f} MiB" for role, size in self.sizes.items()]
        lines.append(f"{'file, all':<26}{self.file_bytes / 2**20:>10.1f} MiB")
        lines.append("")
        where = f"on {self.machine.name}{self._dtype_in_words}"
        lines.append(f"{where}; {self.samples:,} samples, {self.tokens:,} tokens, from {self.tokens_from}")
        disk = (("checkpoint_dir", self.commits), ("offload_dir", self.states["disk"]))
        lines += [f"`{name}` gets {size_in_words(size)}" for name, size in disk if size]
        lines += [self.advice] if self.advice else []
        return "\n".join(lines)


def duration(seconds: float) -> str:
    """Return a time in words: seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 10 * 3600 else f"{seconds / 3600:,.0f} h"


def estimate_run(
    model: nn.Module,
    plan: Plan,
    config: SABQuantizationConfig,
    workspace: Workspace,
    tokens_from: str | None = None,
    processes: int | None = None,
) -> Estimate:
    """Predict what a run will need on this machine, whose rates are measured for it.

    Args:
        model: with its weights, or on the meta device, which will be loaded to where its `hf_device_map` says, else to RAM.
        plan, config, workspace: of the run.
        tokens_from: how the tokens are known, if not from the calibration set itself.
        processes: that share the run; None: those that there are.
    """
    linears = max(plan.shapes.values(), key=math.prod)
    machine = Machine.here(workspace)
    machine = replace(machine, processes=processes or machine.processes)
    found = _in_a_dtype_that_fits(machine.measured(linears, model.dtype), model, plan, config)
    if found.all_seconds > _SHORT:
        found = _in_a_dtype_that_fits(machine.measured(linears, model.dtype, THOROUGH), model, plan, config)
    advice = "" if found.fits else _advice(found, model, plan, config)
    return replace(found, tokens_from=tokens_from or found.tokens_from, advice=advice)


def _in_a_dtype_that_fits(machine: Machine, model: nn.Module, plan: Plan, config: SABQuantizationConfig) -> Estimate:
    """Predict a run in the dtype that is fastest here; in the model's own, which is smaller, where that one does not fit."""
    dtype = faster_dtype(model, machine.device)
    found = estimate_on(machine, model, plan, config, dtype)
    return found if found.fits or dtype == model.dtype else estimate_on(machine, model, plan, config)


def estimate_on(
    machine: Machine,
    model: nn.Module,
    plan: Plan,
    config: SABQuantizationConfig,
    dtype: torch.dtype | None = None,
) -> Estimate:
    """Predict what a run will need on a machine; `model`, `plan` and `config` as in `estimate_run`.

    Without the rates of the machine, `seconds` is empty. `dtype` is the one that it computes in; None: that of the model.
    """
    dtype = dtype or model.dtype
    block_names, shapes, modules, calibration = plan.roles.blocks, plan.shapes, plan.modules, plan.calibration
    refine_steps = plan.refine.beside(bool(plan.distil.steps)).steps
    measured = needs_sensitivity(config, plan.refine.steps) and len(plan.roles.stacks) == 1
    copies = (
        3 if plan.distil.steps else 2 if refine_steps else 1
    )  # of the hidden states: entering, running ahead, wanted
    first = config.sensitivity_samples if measured else 0
    data = _Data.of(calibration, model, dtype, len(block_names), copies, first, plan.distil.written)
    share = _share_of_an_expert(model, modules)
    places = weight_places(model)
    blocks = [_Block.of(model, name, shapes, modules, machine.device, places, dtype, share) for name in block_names]
    dearest = max(blocks, key=lambda block: block.weights)
    beside = _beside_blocks(model, block_names, machine.device, places)
    working = {}
    if measured:
        through = dearest.moved + max(_measure(dearest, data), _backward(dearest, data))
        working["sensitivity"] = max(through, beside + data.logit_bytes)
    working["capture"] = beside + dearest.moved + _activations(dearest, data)
    working["fit"] = dearest.moved + _moments(dearest, data) + _fit(dearest, data)
    if refine_steps:
        working["refinement"] = dearest.moved + _refine(dearest, data, machine)
    if plan.distil.steps:
        working["distillation"] = beside + _distil(blocks, data, machine)
    states, most = (
        _places(size / machine.processes, machine.room) for size in (data.state_bytes, data.most_state_bytes)
    )
    if measured:
        working["sensitivity"] += most["device"] - states["device"]
    amounts = _amounts(model, plan, blocks, data, machine, config, measured, dtype)
    work = count_work(amounts, config, plan.refine, plan.distil, machine.device.type)
    per_place, widened = {"cpu": 0.0, "gpu": 0.0}, 0.0
    for p, place in places.items():
        per_place["cpu" if place == "cpu" else "gpu"] += p.nbytes
        widened += _held_bytes(p, model.dtype, dtype) - p.nbytes
    packed = sum(block.packed for block in blocks)
    return Estimate(
        machine,
        stored_sizes(model, plan),
        working,
        per_place["cpu"] + widened,
        per_place["gpu"],
        not any(p.is_meta for p in model.parameters()),
        packed,
        most | {"device": states["device"]},
        dtype,
        widened,
        seconds_of(work, machine, dtype, machine.processes) if machine.rates else {},
        _runs(plan, amounts),
        work,
        data.samples,
        data.tokens,
        commits=_commits(plan, blocks, packed) if config.checkpoint_dir else 0.0,
    )


def disk_needs(estimate: Estimate, config: SABQuantizationConfig) -> list[Need]:
    """Return what a run writes where while it works."""
    needs = [Need("offload_dir", config.offload_dir, estimate.states["disk"])]
    if config.checkpoint_dir:
        needs.append(Need("checkpoint_dir", config.checkpoint_dir, estimate.commits, resumes=True))
    return needs


def check_room(model: nn.Module, plan: Plan, config: SABQuantizationConfig) -> None:
    """Check, before anything is done, that there is room on disk for what a run writes while it works.

    Raises:
        OSError: there is too little.
    """
    machine = Machine.here(Workspace.of(model, config))  # its rates, which take a while to measure, say nothing of room
    check_disk(disk_needs(estimate_on(machine, model, plan, config), config))


def log_estimate(estimate: Estimate) -> None:
    """Write the pre-flight line, and a warning where the prediction exceeds the memory that is free."""
    logger.info("%s", estimate)
    if estimate.advice:
        logger.warning("%s", estimate.advice)


def _advice(estimate: Estimate, model: nn.Module, plan: Plan, config: SABQuantizationConfig) -> str:
    """Return how much memory is missing, and the settings with which the run would fit, in words."""
    what = "; ".join(
        f"{place} has {estimate.free[place] / GIB:.1f} GiB free, {size / GIB:.1f} GiB may be needed"
        for place, size in estimate.needed.items()
        if size > estimate.free[place]
    )
    machine = estimate.machine
    tier = "ram" if machine.device.type == "cpu" else "device"
    small, cache = replace(machine, room=machine.room | {tier: 0.0}), f"cache_{tier}_gib=0"
    alone, untrained = _with_single_samples(plan), "refine_steps=0, distil_steps=0"
    trials = {
        "batch_size=1": (machine, alone),
        cache: (small, plan),
        untrained: (machine, _without_training(plan)),
        f"{untrained}, batch_size=1, {cache}": (small, _without_training(alone)),
    }
    for setting, (there, planned) in trials.items():
        found = estimate_on(there, model, planned, config)
        if found.fits:
            return f"{what}; with {setting} it fits"
    least = ", ".join(f"{size / GIB:.1f} GiB of {place}" for place, size in found.needed.items())
    return f"{what}; with {setting} it takes {least}: free memory, or use a machine with more"


def _with_single_samples(plan: Plan) -> Plan:
    batches = [
        CalibrationBatch(batch.inputs, row[None]) for batch in plan.calibration.batches for row in batch.modality
    ]
    return replace(plan, calibration=replace(plan.calibration, batches=batches))


def _without_training(plan: Plan) -> Plan:
    return replace(plan, refine=replace(plan.refine, steps=0), distil=replace(plan.distil, steps=0, written=0))


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
        dtype: torch.dtype,
        num_blocks: int,
        copies: int,
        measured: int,
        written: int,
    ) -> _Data:
        shapes = [tuple(batch.modality.shape) for batch in calibration.batches]
        tokens = sum(rows * length for rows, length in shapes)
        largest = max(batch * length for batch, length in shapes)
        width = model.get_input_embeddings().embedding_dim
        size = dtype.itemsize
        arguments = sum(batch * length * (length + 512 * size) for batch, length in shapes)  # mask, rotary factors
        first = calibration.batches[: count_first((batch for batch, _ in shapes), measured)]
        kept = sum(batch.modality.numel() for batch in first) * (num_blocks + 1)
        samples = sum(batch for batch, _ in shapes)
        more = written / samples  # a written sample is as long as a given one; two sets of states are kept of it
        states = width * size * tokens * (copies + 2 * more) + arguments * (1 + more)
        most = max(states, width * size * kept + arguments)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        logits = max(
            (GRADIENT_BYTES_PER_LOGIT * vocabulary * positions_at_once(model, b) * b.modality.shape[0] for b in first),
            default=0,
        )
        longest = max(length for _, length in shapes)
        return cls(
            tokens, largest, longest, samples, len(calibration.tokens), size, states, most, logits, vocabulary, width
        )


@dataclass(frozen=True)
class _Block:
    """A block in numbers.

    Attributes:
        linears: (out_features, in_features, full planes, significant columns) of each Linear that becomes packed.
        inputs: in_features of the different inputs; Linears beside each other may share theirs, so this is an upper bound.
        moved: bytes of its weights that come to the compute device for a while.
        given_up: bytes on the compute device of the dense weights that become packed.
        active: weights that a token meets: of experts, those that it is sent to.
        seen: operations of the second moments for a token.
    """

    linears: list[tuple[int, int, int, int]]
    inputs: list[int]
    moved: int
    given_up: int
    active: float
    seen: float

    @classmethod
    def of(
        cls,
        model: nn.Module,
        name: str,
        shapes: dict[str, tuple[int, int]],
        modules: dict[str, list[int]],
        device: torch.device,
        places: dict[nn.Parameter, str],
        dtype: torch.dtype,
        share: float = 1.0,
    ) -> _Block:
        linears, beside, active = [], {}, 0.0
        for inner, sizes in modules.items():
            if inner.startswith(f"{name}."):
                linears.append((*shapes[inner], *sizes))
                active += math.prod(shapes[inner]) * (share if _is_expert(inner) else 1.0)
                # each expert has its own rows of tokens
                part = inner if fused_name(inner) else inner.rpartition(".")[0]
                beside.setdefault((part, shapes[inner][1]), []).append(inner)
        inputs = [width for (_, width), names in beside.items() for _ in names[:2]]
        shared = [(width, names[0]) for (_, width), names in beside.items()]
        seen = sum(2.0 * width**2 * (share if _is_expert(first) else 1.0) for width, first in shared)
        own = list(model.get_submodule(name).parameters())
        held = (_held_bytes(p, model.dtype, dtype) for p in own if p.ndim > 1 and places[p] == device.type)
        given_up = sum(held)
        return cls(linears, inputs, _moved(own, device, places), given_up, active, seen)

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
        at_once = min(m, MAX_SYSTEM // terms)  # columns
        unknowns = planes * at_once + min(significant, at_once)
        factors = 4 * (data.modalities + 6) * m * m + 4 * n * m
        return max(factors, 16 * m * m + 12 * unknowns**2 + 20 * (terms + 1) * n * m)

    return max((one(*linear) for linear in block.linears), default=0.0)


def _refine(block: _Block, data: _Data, machine: Machine) -> float:
    """Return the peak of training one block; each step works on one Linear after the other."""
    at_once = max((n * m * (8 * (planes + bool(k)) + 10) for n, m, planes, k in block.linears), default=0)
    shapes = [(n, m) for n, m, _, _ in block.linears]
    return bytes_of_training([block.weights], machine.device) + at_once + activation_bytes(shapes, data.largest)


def _distil(blocks: list[_Block], data: _Data, machine: Machine) -> float:
    """Return the peak of training a window of blocks, and of the logits that it is held to; dense weights go as it begins."""
    free = machine.free
    way = blocks_at_once([block.weights for block in blocks], machine.device, free, machine.processes)
    window = sorted(blocks, key=lambda block: block.weights)[-way.blocks :]
    sizes = [block.weights for block in window]
    weights = bytes_of_training(sizes, machine.device, machine.processes, way.compact, way.lent)
    weights -= sum(block.given_up for block in window)
    shapes = [[(n, m) for n, m, _, _ in block.linears] for block in window]
    activations = sum(activation_bytes(own, data.largest) for own in shapes)
    if activations > ACTIVATION_SHARE * (free - weights):
        activations = max(activation_bytes(own, data.largest) for own in shapes)
    logits = min(LOGIT_BYTES, BYTES_PER_LOGIT * data.largest * data.vocabulary)
    linears = (linear for block in window for linear in block.linears)
    at_start = max((n * m * (_START_BYTES + 4 * (planes + bool(k))) for n, m, planes, k in linears), default=0)
    return weights + max(activations + logits, at_start)


def _activations(block: _Block, data: _Data) -> float:
    return data.activation_bytes * data.largest * 3 * max((n + m for n, m, _, _ in block.linears), default=0)


def _beside_blocks(
    model: nn.Module, block_names: tuple[str, ...], device: torch.device, places: dict[nn.Parameter, str]
) -> float:
    inside = tuple(f"{name}." for name in block_names)
    outside = (p for name, p in model.named_parameters() if not name.startswith(inside))
    return _moved(outside, device, places)


def _moved(parameters: Iterable[nn.Parameter], device: torch.device, places: dict[nn.Parameter, str]) -> int:
    """Return the bytes of weights that come to a device; what is there, or on the CPU for the CPU, needs no second place."""
    return 0 if device.type == "cpu" else sum(p.nbytes for p in parameters if places[p] != device.type)


def weight_places(model: nn.Module) -> dict[nn.Parameter, str]:
    """Return weight → the kind of device that it is on.

    Those on the meta device are offloaded or still to be loaded: they are where the model's device map says, else in RAM.
    """
    device_map = getattr(model, "hf_device_map", None) or {}
    return {p: _mapped_place(name, device_map) if p.is_meta else p.device.type for name, p in model.named_parameters()}


def _mapped_place(name: str, device_map: dict[str, Any]) -> str:
    """Return the kind of device that a weight's longest entry in a device map names; RAM if there is none, or for the disk."""
    while name not in device_map and name:
        name = name.rpartition(".")[0]
    place = device_map.get(name, "cpu")
    return "cpu" if place == "disk" else torch.device(place).type


def _held_bytes(p: nn.Parameter, own: torch.dtype, dtype: torch.dtype) -> int:
    """Return the bytes of a weight while the run computes in `dtype`, in which it holds what is of the model's `own`."""
    return p.numel() * (dtype if p.dtype == own else p.dtype).itemsize


def _places(states: float, rooms: dict[str, float]) -> dict[str, float]:
    """Spread bytes over the tiers of the store as it would fill them."""
    places = {"device": 0.0, "ram": 0.0, "disk": 0.0}
    for tier, room in rooms.items():
        places[tier] = min(states, room)
        states -= places[tier]
    places["disk"] = states
    return places


def _is_expert(name: str) -> bool:
    return fused_name(name) is not None or ".experts." in f".{name}."


def _share_of_an_expert(model: nn.Module, modules: dict[str, list[int]]) -> float:
    """Return the part of the tokens that an expert gets, on average: of a model that does not tell, all."""
    config = model.config.get_text_config()
    chosen = next(
        (n for name in ("num_experts_per_tok", "top_k_experts", "moe_topk") if (n := getattr(config, name, None))), None
    )
    numbers = [name.rpartition("experts.")[2] for name in modules if _is_expert(name)]
    experts = {next((part for part in number.split(".") if part.isdigit()), "0") for number in numbers}
    return min(1.0, chosen / len(experts)) if isinstance(chosen, int) and experts else 1.0


def stored_sizes(model: nn.Module, plan: Plan) -> dict[str, int]:
    """Return role → bytes that the packed model stores, tied tensors once: what `sab_hf.report` will count.

    Where bits go by sensitivity, the budget is spent to within a few columns of one matrix.
    """
    packed = plan.modules | {name: [planes, 0] for name, planes in plan.rest.items()}
    roles, tied = plan.roles, is_tied(model) and plan.roles.head is not None
    sizes: dict[str, int] = {}
    seen: set[int] = set()

    def add(name: str, size: int) -> None:
        sizes[roles.of(name)] = sizes.get(roles.of(name), 0) + size

    for name, size in packed.items():
        n, m = plan.shapes[name] if name in plan.shapes else _shape_of(model, name)
        add(name, stored_bytes(n, m, *size))
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, last = name.rpartition(".")
        if id(tensor) in seen or (tied and owner == roles.head and last == "weight"):
            continue
        seen.add(id(tensor))
        if owner in packed and last == "weight":
            continue
        experts = sum(expert_name(name, e) in packed for e in range(len(tensor))) if tensor.ndim == 3 else 0
        add(name, tensor.nbytes * (len(tensor) - experts) // len(tensor) if experts else tensor.nbytes)
    return dict(sorted(sizes.items()))


def _amounts(
    model: nn.Module,
    plan: Plan,
    blocks: list[_Block],
    data: _Data,
    machine: Machine,
    config: SABQuantizationConfig,
    measured: bool,
    dtype: torch.dtype,
) -> Amounts:
    """Return the run in numbers."""
    roles, batches = plan.roles, plan.calibration.batches
    outside = {
        name: p
        for name, p in model.named_parameters()
        if p.ndim > 1 and roles.of(name) not in (LANGUAGE, EMBEDDING, HEAD)
    }
    own = blocks[len(blocks) - len(roles.stacks[-1]) :]
    size = blocks_at_once([block.weights for block in own], machine.device, machine.free, machine.processes).blocks
    windows = [min(size, len(own) - start) for start in range(0, len(own), size)]
    text = sum(int((batch.modality == TEXT).sum()) for batch in batches)
    held = batches[HELD_OUT // 2 :: HELD_OUT] or batches[:1]
    return Amounts(
        blocks=[block.linears for block in blocks],
        inputs=[block.inputs for block in blocks],
        active=sum(block.active for block in blocks),
        seen=sum(block.seen for block in blocks),
        distilled=sum(block.active for block in own) / sum(block.active for block in blocks),
        tokens=data.tokens,
        samples=data.samples,
        batches=len(batches),
        length=data.tokens / data.samples,
        text=text / data.tokens,
        modalities=data.modalities,
        measured=min(config.sensitivity_samples, data.samples) if measured else 0,
        written=plan.distil.written,
        vocabulary=data.vocabulary,
        width=data.width,
        towers=sum(p.numel() for p in outside.values()),
        patches=_patches(model, plan.calibration),
        rest=[(*_shape_of(model, name), planes) for name, planes in plan.rest.items()],
        windows=windows,
        bytes=float(sum(p.numel() * dtype.itemsize for p in model.parameters())),
        held=sum(batch.modality.numel() for batch in held),
    )


def _shape_of(model: nn.Module, name: str) -> tuple[int, int]:
    n, m = model.get_submodule(name).weight.shape
    return n, m


def _patches(model: nn.Module, calibration: CalibrationSet) -> float:
    """Return the patches of all images: of processed batches those that are there, else so many an image token."""
    vision = getattr(model.config, "vision_config", None)
    side = getattr(vision, "patch_size", None) or 14
    side = side if isinstance(side, int) else side[0]
    merged = getattr(vision, "spatial_merge_size", None) or getattr(model.config, "scale_factor", None) or 1
    total = 0.0
    for batch in calibration.batches:
        pixels = batch.inputs.get("pixel_values")
        if isinstance(pixels, torch.Tensor) and pixels.ndim > 3:  # [..., channels, height, width]
            total += math.prod(pixels.shape[:-3]) * pixels.shape[-1] * pixels.shape[-2] / side**2
        elif isinstance(pixels, torch.Tensor):  # patches in a row
            total += math.prod(pixels.shape[:-1])
        else:
            total += int((batch.modality > TEXT).sum()) * merged**2
    return total


def _runs(plan: Plan, amounts: Amounts) -> dict[str, int]:
    """Return how often each stage runs: once, for each block, for each list of blocks or for each window."""
    blocks, stacks = len(plan.roles.blocks), len(plan.roles.stacks)
    each = dict.fromkeys(("targets", "second moments", "fit", "refinement"), blocks)
    return each | {
        "capture": stacks,
        "binarized outputs": max(1, blocks - stacks),
        "distillation": len(amounts.windows),
    }


def _commits(plan: Plan, blocks: list[_Block], packed: float) -> float:
    """Return the bytes of a run's commits: packed blocks, and of distillation its state, twice while it is replaced."""
    training = 2 * _STATE_BYTES * sum(block.weights for block in blocks) if plan.distil.steps else 0
    return 2 * packed + training  # each window's result comes beside the fitted blocks
