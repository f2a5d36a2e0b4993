"""Which Linears of the language blocks are binarized, which weights stay dense and why, and the share that this covers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from torch import nn

from ..packed.experts import ExpertWeights, expert_name, experts_apart, fused_parameters
from ..packed.linear import SABModule
from ..packing import stored_bytes
from .roles import LANGUAGE, Roles

LEAST_COVERAGE = 0.9
"""Share of the language weights that must be quantized, unless `allow_low_coverage` is set."""

MOST_BITS = 4
"""A Linear of which one plane takes more bits per weight than this stays dense (a gate of one row would take 17)."""


@dataclass(frozen=True)
class DenseWeight:
    """A weight matrix of the text model that is not quantized.

    Attributes:
        name: the parameter, without a trailing `.weight`.
        num_weights: its entries.
        reason: why it stays dense.
    """

    name: str
    num_weights: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """How much of the language weights is quantized; embeddings, head, norms and biases count nowhere.

    Attributes:
        num_quantized, num_dense: entries of weight matrices.
        dense: the matrices that stay dense.
    """

    num_quantized: int
    dense: list[DenseWeight]

    @property
    def num_dense(self) -> int:
        return sum(weight.num_weights for weight in self.dense)

    @property
    def share(self) -> float:
        """Quantized share of the language weights (of their bytes, as the dense model has one dtype), 0 to 1."""
        return self.num_quantized / max(1, self.num_quantized + self.num_dense)

    def summary(self) -> str:
        """Return the share and, by reason, what stays dense, in one line."""
        reasons: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for weight in self.dense:
            reasons[weight.reason] += weight.num_weights
            examples.setdefault(weight.reason, weight.name)
        total = max(1, self.num_quantized + self.num_dense)
        listed = "; ".join(
            f"{100 * count / total:.1f} % {reason}, such as `{examples[reason]}`"
            for reason, count in reasons.most_common()
        )
        return f"{100 * self.share:.1f} % of the language weights are quantized" + (
            f"; dense: {listed}" if listed else ""
        )

    def check(self, allow_low_coverage: bool) -> None:
        """Raise a ValueError if less than `LEAST_COVERAGE` is covered and that is not allowed."""
        if self.share < LEAST_COVERAGE and not allow_low_coverage:
            raise ValueError(
                f"at least {100 * LEAST_COVERAGE:.0f} % of the language weights must be quantized, and only "
                f"{self.summary()}. Shorten `modules_to_not_convert` if it names too much, or set allow_low_coverage=True"
            )


def coverage(model: nn.Module, roles: Roles, selected: dict[str, nn.Linear], skipped: list[str]) -> Coverage:
    """Count the language weights that `selected` covers, and give a reason for each that it does not.

    Args:
        model: the model; fused experts may be taken apart or not.
        roles: its parts.
        selected: the Linears that are (to be) quantized, by name.
        skipped: the entries of `modules_to_not_convert`.
    """
    quantized = sum(linear.out_features * linear.in_features for linear in selected.values())
    dense = []
    for name, parameter in model.named_parameters():
        owner_name, _, last = name.rpartition(".")
        shown = owner_name if last == "weight" else name
        if parameter.ndim < 2 or roles.of(name) != LANGUAGE or owner_name in selected:
            continue
        owner = model.get_submodule(owner_name)
        left = math.prod(parameter.shape) - _selected_experts(name, parameter, selected)
        if left and not isinstance(owner, SABModule):
            dense.append(DenseWeight(shown, left, _reason(roles, shown, owner, skipped)))
    return Coverage(quantized, dense)


def language_linears(
    model: nn.Module, roles: Roles, skipped: list[str], others: tuple[str, ...] = ()
) -> dict[str, nn.Linear]:
    """Return the Linears of the language blocks by name, each expert of fused experts being one.

    What stays dense: what `skipped` names, routers, and Linears too small to shrink. Fused experts are taken apart for this
    look only; the Linears returned for them share the fused parameter's memory.

    Args:
        skipped: entries as in `modules_to_not_convert`.
        others: names outside the language blocks that an entry may also mean.
    Raises:
        ValueError: an entry of `skipped` matches nothing, or nothing is left.
    """
    fused = fused_parameters(model, roles.blocks)
    with experts_apart(model, [name for name in fused if not is_skipped(name, skipped)]):
        linears = {
            f"{block}.{name}": module
            for block in roles.blocks
            for name, module in model.get_submodule(block).named_modules()
            if is_plain_linear(module)
        }
        routers = {f"{block}.{name}" for block in roles.blocks for name in _routers(model.get_submodule(block))}
    for entry in skipped:
        if not any(is_skipped(name, [entry]) for name in (*linears, *fused, *others)):
            raise ValueError(
                f"`modules_to_not_convert` entry {entry!r} matches nothing that would be binarized, such as "
                f"`{next(iter(linears), 'none')}`; what it does not list stays dense anyway"
            )
    kept = {
        name: linear
        for name, linear in linears.items()
        if name not in routers and is_worth_packing(linear) and not is_skipped(name, skipped)
    }
    known: dict[nn.Linear, str] = {}
    for name, linear in kept.items():
        other = known.setdefault(linear, name)
        if other != name:
            raise ValueError(
                f"`{other}` and `{name}` are one Linear, and blocks are binarized one by one; add its name to "
                "`modules_to_not_convert`"
            )
    if not kept:
        raise ValueError(f"{type(model).__name__} has no Linear left to binarize; shorten `modules_to_not_convert`")
    return kept


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes what `nn.Linear` computes (some routers are Linears that return more)."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def is_worth_packing(linear: nn.Linear) -> bool:
    """Whether one sign plane and its scales are clearly smaller than the dense weight."""
    size = linear.out_features * linear.in_features
    return 8 * stored_bytes(linear.out_features, linear.in_features, 1, 0) <= MOST_BITS * size


def is_skipped(name: str, entries: list[str]) -> bool:
    """Whether one of the entries is a run of whole dotted parts of `name`."""
    return any(f".{entry}." in f".{name}." for entry in entries)


def _routers(block: nn.Module) -> set[str]:
    """Return the names of the Linears of a block that choose experts.

    A router has one output for each expert, and is alone in a part beside the experts (an attention's key projection, which may
    have as many outputs, is not).
    """
    routers = set()
    for name, module in block.named_modules():
        if isinstance(module, ExpertWeights):
            *experts, _, _ = name.split(".")
            experts = ".".join(experts)
        elif isinstance(module, nn.ModuleList) and _holds_experts(module):
            experts = name
        else:
            continue
        for around in _parents(experts)[:2]:
            for part_name, part in block.get_submodule(around).named_children():
                prefix = f"{around}.{part_name}".lstrip(".")
                linears = [(n, m) for n, m in part.named_modules(prefix=prefix) if isinstance(m, nn.Linear)]
                if len(linears) == 1 and linears[0][1].out_features == len(module):
                    routers.add(linears[0][0])
    return routers


def _holds_experts(modules: nn.ModuleList) -> bool:
    return len(modules) > 1 and all(any(isinstance(m, nn.Linear) for m in item.modules()) for item in modules)


def _parents(name: str) -> list[str]:
    """Return the names of the parts that hold `name`, the smallest first."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]


def _selected_experts(name: str, parameter: nn.Parameter, selected: dict[str, nn.Linear]) -> int:
    """Return how many entries of a fused parameter are in `selected`, under the names of its experts."""
    if parameter.ndim != 3:
        return 0
    return sum(
        math.prod(parameter.shape[1:]) for expert in range(len(parameter)) if expert_name(name, expert) in selected
    )


def _reason(roles: Roles, name: str, owner: nn.Module, skipped: list[str]) -> str:
    if is_skipped(name, skipped):
        return "named in `modules_to_not_convert`"
    if not name.startswith(tuple(f"{block}." for block in roles.blocks)):
        return "outside of the language blocks"
    if not is_plain_linear(owner):
        return f"in {type(owner).__name__}, which is no nn.Linear"
    return "in a router" if is_worth_packing(owner) else "too small to shrink"
