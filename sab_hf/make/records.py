"""What a run tells afterwards: how each fit and each refinement went, and where the time went."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..machine.clock import StageClock
from ..method.recipe import FitRecord
from .distil import DistilResult
from .preflight import Estimate
from .refine import RefineResult


@dataclass(repr=False)
class QuantizationRecord:
    """What `quantize` did.

    Attributes:
        calibration: the calibration set in words.
        fits: one record for each Linear of the language blocks.
        refinements: block output errors before and after, one for each block that was refined.
        distillations: the loss on held-out samples before and after, one for each window of blocks that was distilled.
        stages: time and peak memory by stage.
        seconds: in all, from the first weight on.
        predicted: what was expected before the run; beside `stages`, what each stage took and was expected to take.
        measured: whether the sensitivity of the loss was measured; if not, bits are spread evenly.
    """

    calibration: str
    fits: list[FitRecord] = field(default_factory=list)
    refinements: list[RefineResult] = field(default_factory=list)
    distillations: list[DistilResult] = field(default_factory=list)
    stages: StageClock = field(default_factory=StageClock)
    seconds: float = 0.0
    measured: bool = False
    predicted: Estimate | None = None

    @property
    def predicted_seconds(self) -> float | None:
        """Seconds that all stages were expected to take; None where nothing was predicted."""
        return None if self.predicted is None else self.predicted.all_seconds

    def compared(self) -> str:
        """Return, stage by stage, what was predicted and measured, in some lines."""
        lines = [f"{'stage':<26}{'predicted, s':>14}{'measured, s':>14}"]
        expected = {} if self.predicted is None else self.predicted.seconds
        for name, stage in self.stages.stages.items():
            known = f"{expected[name]:.1f}" if name in expected else "–"
            lines.append(f"{name:<26}{known:>14}{stage.seconds:>14.1f}")
        total = "–" if self.predicted_seconds is None else f"{self.predicted_seconds:.1f}"
        return "\n".join([*lines, f"{'all':<26}{total:>14}{self.seconds:>14.1f}"])

    def __repr__(self) -> str:
        trained = f"{len(self.refinements)} blocks refined, {len(self.distillations)} windows distilled"
        return f"{type(self).__name__}({len(self.fits)} matrices fitted, {trained}, {self.seconds:.0f} s)"

    @property
    def fallbacks(self) -> list[str]:
        """Names of the experts that saw too few calibration tokens for a fit of their own."""
        return [fit.name for fit in self.fits if fit.fallback]

    def note(self, block_record: dict[str, Any]) -> None:
        """Add what was done to one block, plain data under "fits" and "refinement"."""
        self.fits += [FitRecord(**fit) for fit in block_record["fits"]]
        if block_record["refinement"]:
            self.refinements.append(RefineResult(**block_record["refinement"]))
