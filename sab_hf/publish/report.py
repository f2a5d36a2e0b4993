"""Honest bits: what each module, each role and the whole checkpoint really store."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..anatomy.roles import LANGUAGE, Roles, find_roles
from ..anatomy.selection import Coverage, coverage
from ..notebook import html_table
from ..packed.linear import SABModule
from ..packed.names import tied
from ..units import size_in_words


@dataclass(frozen=True)
class ModuleReport:
    """One quantized module.

    Attributes:
        name, role: where it is and what it belongs to.
        out_features, in_features: shape of the matrix.
        num_planes, num_significant: full planes, and columns with a residual plane.
        stored_bytes: bytes of its packed tensors in the file (bias excluded: it is not quantized).
    """

    name: str
    role: str
    out_features: int
    in_features: int
    num_planes: int
    num_significant: int
    stored_bytes: int

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.stored_bytes / self.num_weights


@dataclass(frozen=True)
class RoleReport:
    """One role: quantized weights with the bytes they take, and the bytes of everything left dense."""

    num_quantized: int
    quantized_bytes: int
    dense_bytes: int

    @property
    def bits(self) -> float | None:
        """Stored bits per quantized weight; None if the role is dense."""
        return 8 * self.quantized_bytes / self.num_quantized if self.num_quantized else None


@dataclass(frozen=True, repr=False)
class Report:
    """Sizes of a quantized model; `str()` gives a table (and a notebook shows one), `to_dict()` plain data.

    Attributes:
        modules: the quantized modules.
        roles: by role name.
        total_bytes: tensor bytes of the whole checkpoint (safetensors headers, a few KiB, come on top).
        coverage: how much of the language weights is quantized, and what is not.
        fallback_experts: experts that saw too few calibration tokens for a fit of their own; None if the model was not
            quantized in this process.
        seconds, predicted_seconds: that quantizing took, and was expected to take; None likewise.
    """

    modules: list[ModuleReport]
    roles: dict[str, RoleReport]
    total_bytes: int
    coverage: Coverage
    fallback_experts: int | None = field(default=None, compare=False)
    seconds: float | None = field(default=None, compare=False)
    predicted_seconds: float | None = field(default=None, compare=False)

    @property
    def bits(self) -> float:
        """Stored bits per weight over all quantized weights."""
        weights = sum(module.num_weights for module in self.modules)
        return 8 * sum(module.stored_bytes for module in self.modules) / weights if weights else float("nan")

    def to_dict(self) -> dict:
        plain = dataclasses.asdict(self)
        for module, entry in zip(self.modules, plain["modules"], strict=True):
            entry["bits"] = module.bits
        for name, role in self.roles.items():
            plain["roles"][name]["bits"] = role.bits
        plain["coverage"] |= {"share": self.coverage.share}
        return plain | {"bits": self.bits}

    def to_json(self) -> str:
        return json.dumps(finite(self.to_dict()), indent=2)

    def __repr__(self) -> str:
        about = (
            f"{self.bits:.3f} bits/weight, {len(self.modules)} packed matrices" if self.modules else "nothing packed"
        )
        return f"{type(self).__name__}({about}, {size_in_words(self.total_bytes)})"

    def __str__(self) -> str:
        lines = ["{:<12}{:>18}{:>13}{:>12}{:>12}".format(*row) for row in self._rows()]
        return "\n".join([*lines, *self._notes()])

    def _repr_html_(self) -> str:
        return html_table(self._rows(), "\n".join(self._notes()))

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [("role", "quantized weights", "bits/weight", "packed", "dense")]
        for name, role in self.roles.items():
            bits = "–" if role.bits is None else f"{role.bits:.3f}"
            packed, dense = size_in_words(role.quantized_bytes), size_in_words(role.dense_bytes)
            rows.append((name, f"{role.num_quantized:,}", bits, packed, dense))
        return rows

    def _notes(self) -> list[str]:
        lines = []
        if self.modules and self.coverage.dense:
            lines.append(self.coverage.summary())
        if self.fallback_experts:
            lines.append(
                f"{self.fallback_experts} experts saw too few tokens and were fitted to those of their whole layer"
            )
        lines.append(f"whole checkpoint: {size_in_words(self.total_bytes)}")
        if self.seconds is not None and self.predicted_seconds is not None:
            lines.append(f"quantizing took {self.seconds:.0f} s, {self.predicted_seconds:.0f} s were predicted")
        return lines


def report(model: nn.Module) -> Report:
    """Count what `model` stores, tied tensors once; equal to the bytes in its safetensors files.

    Args:
        model: a transformers model, quantized or not.
    """
    roles = find_roles(model)
    modules = [
        ModuleReport(
            name,
            roles.of(name),
            module.out_features,
            module.in_features,
            module.num_planes,
            module.num_significant,
            sum(tensor.nbytes for tensor in module.packed_tensors().values()),
        )
        for name, module in model.named_modules()
        if isinstance(module, SABModule)
    ]
    packed = {id(t) for m in model.modules() if isinstance(m, SABModule) for t in m.packed_tensors().values()}
    dense: dict[str, int] = {}
    state = model.state_dict(keep_vars=True)
    again = tied(state)
    for name, tensor in state.items():
        if id(tensor) not in packed and name not in again:
            dense[roles.of(name)] = dense.get(roles.of(name), 0) + tensor.nbytes
    by_role = {}
    for role in sorted(dense.keys() | {module.role for module in modules}):
        own = [module for module in modules if module.role == role]
        by_role[role] = RoleReport(
            sum(module.num_weights for module in own), sum(module.stored_bytes for module in own), dense.get(role, 0)
        )
    total = sum(role.quantized_bytes + role.dense_bytes for role in by_role.values())
    record = getattr(getattr(model, "hf_quantizer", None), "record", None)
    made = () if record is None else (len(record.fallbacks), record.seconds, record.predicted_seconds)
    return Report(modules, by_role, total, _coverage(model, roles), *made)


def _coverage(model: nn.Module, roles: Roles) -> Coverage:
    linears = {name: m for name, m in model.named_modules() if isinstance(m, SABModule) and roles.of(name) == LANGUAGE}
    config = getattr(model.config, "quantization_config", None)
    return coverage(model, roles, linears, getattr(config, "modules_to_not_convert", None) or [])


def finite(plain: Any) -> Any:
    """Return plain data with None for NaN and infinity, which JSON lacks."""
    if isinstance(plain, dict):
        return {key: finite(value) for key, value in plain.items()}
    if isinstance(plain, (list, tuple)):
        return [finite(value) for value in plain]
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain
