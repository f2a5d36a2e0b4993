"""How much the model's output depends on each Linear: input variance by column, output gradient by row, by modality."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..config import SABQuantizationConfig


def needs_sensitivity(config: SABQuantizationConfig, refine_steps: int) -> bool:
    """Return whether a run with `refine_steps` steps of refinement uses the sensitivity of Linears or of block outputs."""
    in_refinement = refine_steps > 0 and config.refine_loss == "gradient"
    in_budget = config.budget == "sensitivity" and not config.portable  # that has planes of one size
    return config.significance == "gradient" or in_budget or in_refinement


class LinearSensitivity(NamedTuple):
    """What the loss near a Linear `y = W x` looks like: an error E of W costs about `Σ_m N_m Σ_ij g_m[i] v_m[j] E[i,j]²`.

    Attributes:
        variance: modality → [in_features], v_m[j] = 1 / [(H_m + λI)⁻¹]_jj, the variance of an input feature that the others do
            not explain.
        gradient: modality → [out_features], g_m[i], mean squared gradient of the loss at an output feature.
        tokens: modality → N_m, how many tokens of the modality the Linear sees.
    """

    variance: dict[int, Tensor]
    gradient: dict[int, Tensor]
    tokens: dict[int, int]

    def column_scores(self, W: Tensor) -> dict[int, Tensor]:
        """Return, by modality, the loss at stake in each column [in_features] of W: `N_m v_m[j] Σ_i g_m[i] W[i,j]²`."""
        squares = W.detach().float().square()
        return {
            m: self.tokens[m] * self.variance[m].to(W.device) * (self.gradient[m].to(W.device) @ squares)
            for m in self.variance.keys() & self.gradient.keys()
        }


@dataclass
class Sensitivity:
    """Sensitivities of a model.

    Attributes:
        linears: by module name; a Linear that no token reached is missing. All tensors are on the CPU.
        outputs: by the name of the block, modality → [hidden_size], mean squared gradient of the loss at the block's output; a
            block that no sample went through is missing.
    """

    linears: dict[str, LinearSensitivity] = field(default_factory=dict)
    outputs: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors by name and plain data, from which `unpack` makes the same again."""
        tensors = {f"output|{block}|{m}": g for block, means in self.outputs.items() for m, g in means.items()}
        for name, at in self.linears.items():
            tensors |= {f"variance|{name}|{m}": v for m, v in at.variance.items()}
            tensors |= {f"gradient|{name}|{m}": g for m, g in at.gradient.items()}
        tokens = {name: {str(m): n for m, n in at.tokens.items()} for name, at in self.linears.items()}
        return tensors, {"tokens": tokens}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], record: dict[str, Any]) -> Sensitivity:
        """Return what was packed."""
        linears = {
            name: LinearSensitivity({}, {}, {int(m): n for m, n in tokens.items()})
            for name, tokens in record["tokens"].items()
        }
        result = cls(linears)
        for key in sorted(tensors):
            kind, name, m = key.split("|")
            if kind == "output":
                result.outputs.setdefault(name, {})[int(m)] = tensors[key]
            else:
                getattr(linears[name], kind)[int(m)] = tensors[key]
        return result


class UnmeasurableError(Exception):
    """A model whose loss cannot be differentiated block by block; the message says why."""
