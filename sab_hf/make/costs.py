"""How many seconds each stage of a run takes: its operations, counted, over what the machine does in a second.

Work is of four kinds: matrix products in the dtype of the run, in float32, and in that of training; bytes that elementwise
operations move; and calls of small operations, which a CPU makes one after the other. Each stage reaches a part of the rate of a
plain product; that part is a named constant, with what it was measured on.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..config import SABQuantizationConfig
from ..machine.rates import Machine
from ..method.fit import MAX_SYSTEM
from ..method.trainable import pass_dtype
from .distil import MEASUREMENTS
from .settings import DistilSettings, RefineSettings
from .written import most_at_once

MODEL, FLOAT32, TRAINING, BYTES, CALLS = "model", "float32", "training", "bytes", "calls"
"""The kinds of work."""

Work = dict[str, float]
"""Kind → operations, bytes or calls."""

ROUNDS = 8
"""Rounds of the alternating fit before one gains less than 0.1 %, with one or two planes; more take all that are allowed."""

REFINE_BYTES, DISTIL_BYTES = {"cpu": 110.0, "cuda": 180.0}, 110.0
"""Bytes moved in a training step for each weight, as if by elementwise operations: levels, gradients, Adam, in kernels."""

LOGIT_TRAFFIC = 60.0
"""Bytes moved for each logit of a loss and its gradient."""

BLOCK_CALLS, REFINE_CALLS, DISTIL_CALLS = 60, {"cpu": 4000.0, "cuda": 2500.0}, {"cpu": 4000.0, "cuda": 4.0}
"""Small operations of a block: of its forward pass, and of a training step forward, backward and in the optimizer.

On a GPU a step of distillation is a few graphs: of SmolLM2-135M it takes one H200 20 ms alone, which is busy for 18 of them,
2026-11-30 (benchmarks/LOG.md). A step of its block refinement takes 21 ms, by the launches.
"""

WRITING_CALLS = 200
"""Those of a block in a decoding step of `generate`, on a GPU a guess: three processes side by side took an H200 90 s for what
26 s are predicted for one."""

COLUMN_CALLS = {"cpu": 13.0, "cuda": 0.1}
"""Small operations of the sign sweep for one column; a GPU has a kernel for many columns."""

FIT_CALLS = {"cpu": 0.0, "cuda": 2600.0}
"""Those of the fit of a Linear beside its sweeps, with what a GPU takes to solve small systems: 22 ms on an H200, 2026-11-30."""

COLUMN_BYTES = {"cpu": 870.0, "cuda": 0.0}
"""Bytes that the sweep moves for one row in one column: of a block of 128 columns, half is read and written."""


class Efficiency(NamedTuple):
    """What part of a plain product's rate a stage reaches, and the seconds that it takes in any case.

    Attributes:
        part: of the rate; above 1 where less is done than is counted (fewer rounds, kernels that are faster than a product).
        start: seconds: kernels are loaded and compiled, caches are filled.
    """

    part: float
    start: float = 0.0


EFFICIENCY: dict[str, dict[str, Efficiency]] = {
    # Models of 1 to 6 million weights on a CPU core, 2026-11-29; benchmarks/results/known_cpu.json.
    "cpu": {
        "written samples": Efficiency(0.5),
        "towers, embedding, head": Efficiency(0.50),
        "sensitivity": Efficiency(0.38, 0.3),
        "capture": Efficiency(0.75, 0.1),
        "targets": Efficiency(0.76),
        "second moments": Efficiency(0.70),
        "fit": Efficiency(0.67),
        "refinement": Efficiency(0.50),
        "binarized outputs": Efficiency(1.50),
        "distillation": Efficiency(0.54),
    },
    # Qwen2.5-VL-7B's shape on an H200, 2026-11-30 (refinement: 2026-11-27); benchmarks/results/quantize_7b_h200.json.
    # SmolLM2-135M takes 20 ms a step of distillation, and 17 s to compile: benchmarks/LOG.md. The rest and written samples were
    # not measured.
    "cuda": {
        "written samples": Efficiency(0.2),
        "towers, embedding, head": Efficiency(0.5),
        "sensitivity": Efficiency(0.80, 7.7),
        "capture": Efficiency(0.5, 8.5),
        "targets": Efficiency(0.75),
        "second moments": Efficiency(5.3),
        "fit": Efficiency(2.0, 3.0),
        "refinement": Efficiency(0.59),
        "binarized outputs": Efficiency(0.7, 0.3),
        "distillation": Efficiency(0.62, 17.0),
    },
}
"""By kind of device and stage."""


@dataclass(frozen=True)
class Amounts:
    """A run in numbers: what its stages are counted from.

    Attributes:
        blocks: for each language block, (out_features, in_features, full planes, significant columns) of its Linears.
        inputs: for each block, in_features of the different inputs of its Linears.
        active: weights of all blocks that a token meets: of experts, those that it is sent to.
        seen: operations of all second moments for a token.
        distilled: part of the blocks' work that is in the last list of blocks, which alone is distilled.
        tokens, samples, batches: of the calibration set, padding counted.
        length: of a mean sample, tokens.
        text: share of the tokens on which the loss of distillation counts.
        modalities: that have second moments of their own.
        measured: samples on which sensitivity is measured; 0 for none.
        written: samples that the model writes itself.
        vocabulary, width: of the output head.
        towers: weights outside the language blocks, embedding and head.
        patches: of all images, as the towers see them.
        rest: (out_features, in_features, full planes) of each matrix to binarize outside the blocks.
        windows: blocks that are distilled at a time, as parts of all.
        bytes: of the whole model.
        held: tokens on which the loss of distillation is measured.
    """

    blocks: list[list[tuple[int, int, int, int]]]
    inputs: list[list[int]]
    active: float
    seen: float
    distilled: float
    tokens: int
    samples: int
    batches: int
    length: float
    text: float
    modalities: int
    measured: int
    written: int
    vocabulary: int
    width: int
    towers: int
    patches: float
    rest: list[tuple[int, int, int]]
    windows: list[int]
    bytes: float
    held: float

    @property
    def weights(self) -> float:
        """Weights of the language blocks."""
        return float(sum(n * m for block in self.blocks for n, m, _, _ in block))

    @property
    def attention(self) -> float:
        """Operations of attention for one token, in all blocks."""
        return 4.0 * self.length * self.width * len(self.blocks)


@dataclass
class _Counter:
    """The work of stages by kind."""

    work: dict[str, Work] = field(default_factory=dict)

    def add(self, stage: str, **amounts: float) -> None:
        own = self.work.setdefault(stage, defaultdict(float))
        for kind, amount in amounts.items():
            own[kind] += amount


def count_work(
    amounts: Amounts, config: SABQuantizationConfig, refine: RefineSettings, distil: DistilSettings, device: str
) -> dict[str, Work]:
    """Return the work of each stage of a run by kind, in the order in which they run.

    Args:
        amounts: of the run.
        config: its numbers.
        refine, distil: those of training.
        device: "cpu" or "cuda": what calls cost differs.
    """
    a, c, count = amounts, config, _Counter()
    part = min(1.0, a.measured / a.samples)  # of the calibration set
    through = 2.0 * a.active + a.attention  # a token through all blocks
    logits = 2.0 * a.vocabulary * a.width  # of a token
    passes = a.batches * len(a.blocks) * BLOCK_CALLS
    towers = 2.0 * a.towers * a.patches
    if a.written:
        rounds = math.ceil(a.written / most_at_once(device)) * a.length
        made = {"model": a.written * a.length * (through + logits), "bytes": rounds * a.bytes}
        count.add("written samples", **made, calls=rounds * len(a.blocks) * WRITING_CALLS)
    if a.rest:
        share, most = min(1.0, c.sensitivity_samples / a.samples), c.alternations
        count.add(
            "towers, embedding, head",
            model=share * (2 * towers + a.tokens * through),
            float32=sum(_fit_operations(min(n, 4096), m, K, most) + 3 * n * m * m * (3 + 4 * K) for n, m, K in a.rest),
            calls=sum((most + 3 * math.ceil(n / 4096)) * m for n, m, _ in a.rest) * COLUMN_CALLS[device],
            bytes=sum((most * min(n, 4096) + 3 * n) * m for n, m, _ in a.rest) * COLUMN_BYTES[device],
        )
    if a.measured:
        count.add(
            "sensitivity",
            model=part * (towers + a.tokens * (3 * through + 3 * logits)),
            float32=part * a.tokens * a.seen + a.modalities * sum(4 / 3 * m**3 for block in a.inputs for m in block),
            bytes=part * a.tokens * a.vocabulary * LOGIT_TRAFFIC,
            calls=4 * part * passes,
        )
    more = a.written * a.length / a.tokens  # tokens of written samples, for one of the calibration set
    recorded = 2 * a.batches * (1 + more) * BLOCK_CALLS
    count.add("capture", model=towers + 4 * through * a.tokens / a.batches, calls=recorded)
    trained = bool(distil.steps)
    apart = 0.0 if refine.beside(trained).steps else a.distilled * trained  # blocks that are distilled alone, as a part
    refined = (1.0 - apart) * bool(refine.steps)
    if wanted := refined + a.distilled * more:
        count.add("targets", model=wanted * through * a.tokens, calls=wanted * passes)
    count.add("second moments", model=through * a.tokens, float32=a.seen * a.tokens, calls=2 * passes)
    linears, rounds = [linear for block in a.blocks for linear in block], min(ROUNDS, c.alternations)
    count.add(
        "fit",
        float32=sum(_fit_operations(n, m, K + k / m, rounds) for n, m, K, k in linears),
        calls=sum(rounds * m * COLUMN_CALLS[device] + FIT_CALLS[device] for _, m, _, _ in linears),
        bytes=sum(rounds * n * m for n, m, _, _ in linears) * COLUMN_BYTES[device],
    )
    if refined:
        tokens = min(refine.samples_per_step, a.samples) * a.tokens / a.samples
        count.add(
            "refinement",
            training=refined
            * through
            * (3 * refine.steps * tokens + 2 * a.tokens),  # the error of all, before and after
            bytes=refined * refine.steps * a.weights * REFINE_BYTES[device],
            calls=refined * refine.steps * len(a.blocks) * REFINE_CALLS[device],
        )
    if apart < 1:
        count.add("binarized outputs", model=(1 - apart) * through * a.tokens, calls=(1 - apart) * passes)
    if trained:
        tokens = min(distil.samples_per_step, a.samples) * a.tokens / a.samples
        text = a.text * tokens
        counted = a.text if device == "cpu" else 1.0  # part of the positions that logits are made for
        for size in a.windows:
            share = size / len(a.blocks)
            count.add(
                "distillation",
                training=distil.steps * tokens * (share * 3 * through + counted * 4 * logits)
                + (min(distil.steps, MEASUREMENTS) + 1) * a.held * (share * through + counted * 2 * logits),
                bytes=distil.steps * (share * a.weights * DISTIL_BYTES + text * a.vocabulary * LOGIT_TRAFFIC),
                calls=distil.steps * size * DISTIL_CALLS[device],
            )
    return {stage: dict(work) for stage, work in count.work.items()}


def seconds_of(work: dict[str, Work], machine: Machine, dtype: torch.dtype, processes: int = 1) -> dict[str, float]:
    """Return the seconds of each stage on a machine, shared among processes that each have one like it.

    A GPU works while the host calls, so that the longer of both counts.
    """
    device, rates = machine.device.type, machine.rates
    together = max if device == "cuda" else lambda work, calls: work + calls
    speed = {
        MODEL: rates.products[dtype],
        FLOAT32: rates.products[torch.float32],
        TRAINING: rates.products[pass_dtype(machine.device)],
    }
    known = EFFICIENCY[device]
    return {
        stage: known[stage].start
        + machine.crowded
        / processes
        * together(
            sum(amounts.get(kind, 0.0) / (rate * known[stage].part) for kind, rate in speed.items())
            + amounts.get(BYTES, 0.0) / rates.bandwidth,
            amounts.get(CALLS, 0.0) / rates.calls,
        )
        for stage, amounts in work.items()
    }


def _fit_operations(n: int, m: int, terms: float, rounds: int) -> float:
    """Return the operations of the alternating fit of an [n, m] matrix by `terms` planes, parts of planes for some columns."""
    unknowns = min(terms * m, MAX_SYSTEM)
    systems = math.ceil(terms * m / unknowns)
    scales = 4.0 * terms * n * m * m + 2.0 * n * m * m * (1 + terms * unknowns / m) + systems * unknowns**3 * 2 / 3
    return 3.0 * m**3 + (rounds + 1) * (scales + 3.0 * n * m * m)
