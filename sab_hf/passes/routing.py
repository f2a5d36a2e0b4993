"""Which calibration tokens a Linear's inputs are, also where a router sends it some of them, and what to do if it sends few."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import PADDING, TEXT
from ..method.hessian import SecondMoments
from ..packed.experts import ExpertWeights
from .states import BatchState

_INTEGERS = {4: torch.int32, 2: torch.int16, 8: torch.int64}


class RowLabels:
    """Tells the modality of each row that a Linear of a block gets, for one calibration batch after the other.

    Most Linears get one row for each token, in order. Experts get the rows that their router sends, in an order of its own:
    those are found among the inputs of the parts around the experts by their values (bit by bit), and an expert's second
    Linear has the rows of its first. Rows from elsewhere (cross-attention to image features) have the modality `foreign`.

    Args:
        block: the block, which must be run inside `watching`.
    """

    def __init__(self, block: nn.Module):
        self.block = block
        self._names = {module: name for name, module in block.named_modules()}
        self._modality = self._given = self._foreign = None
        self._sources: list[Tensor] = []
        self._routes: list[Tensor] = []
        self._last: dict[tuple[int, ...], Tensor] = {}

    def start(self, state: BatchState) -> None:
        """Begin a batch, or a part of one."""
        self._modality, self._given, self._foreign = state.modality, state.given, state.foreign
        self._sources, self._routes, self._last = [], [], {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what goes into the parts around experts while the block runs."""
        hooks = [part.register_forward_pre_hook(self._note, with_kwargs=True) for part in _around_experts(self.block)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def of(self, linear: nn.Module, x: Tensor) -> Tensor | None:
        """Return the modality of each row of the input `x` [..., in_features] of a Linear of the block.

        Returns:
            [rows] int8; PADDING: counts nowhere. None if the rows are not the tokens and the batch holds nothing else that
            they could be.
        """
        x = x.detach()
        rows = x.flatten(0, -2)
        number = _numbers(self._names[linear])
        if not number:
            return self._in_order(x)
        labels = self._routed(rows, number[-1])
        if labels is None:
            labels = self._last.get(number)
        if labels is None or len(labels) != len(rows):
            labels = self._in_order(x)
        if labels is None:
            return None
        labels = torch.where(rows.any(-1), labels.to(rows.device), PADDING)  # a zero row stands for a token not sent
        self._last[number] = labels
        return labels

    def _in_order(self, x: Tensor) -> Tensor | None:
        """Return the modality of rows that are the tokens in order, or several times so, or else features from elsewhere."""
        count = x.shape[:-1].numel()
        for tokens in (self._modality, self._given):
            if count == tokens.numel() or (x.ndim > 3 and x.shape[-3:-1] == tokens.shape):
                return tokens.flatten().repeat(count // tokens.numel()).to(x.device)
        if self._foreign == TEXT:
            return None
        return torch.full((count,), self._foreign, dtype=torch.int8, device=x.device)

    def _routed(self, rows: Tensor, expert: int) -> Tensor | None:
        """Find the rows among the tokens that went into the parts around the experts; None if one is not there."""
        for source in reversed(self._sources):
            if source.shape[-1] != rows.shape[-1] or source.dtype != rows.dtype:
                continue
            keys, order = _fingerprints(source).sort()
            wanted = _fingerprints(rows)
            place = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
            if not torch.equal(keys[place], wanted):
                continue
            tokens = order[place]
            labels = self._modality.flatten().to(rows.device)[tokens]
            for route in self._routes:  # some models run every expert on every token, and drop what was not routed
                if len(route) == self._modality.numel() and len(rows) == len(route):
                    labels = torch.where((route[tokens] == expert).any(-1), labels, PADDING)
            return labels
        return None

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if not isinstance(value, Tensor) or value.ndim < 2:
                continue
            rows = value.detach().flatten(0, -2)
            if len(rows) != self._modality.numel():
                continue
            if value.is_floating_point():
                self._sources.append(rows)
            elif value.dtype in (torch.int32, torch.int64):
                self._routes = [rows]


def with_fallback(
    model: nn.Module, moments: dict[str, SecondMoments], linears: dict[str, nn.Linear]
) -> tuple[dict[str, SecondMoments], set[str]]:
    """Give experts that saw fewer tokens than they have inputs the second moments of all experts of their layer.

    Args:
        model: what the names are of.
        moments: by Linear; one that was never called is missing.
        linears: the Linears of a block, by name. Experts are those whose names differ only in the number that they have, or
            the part that they are in has, in a list of modules.
    Returns:
        The moments, and the names of the Linears that have those of their group.
    """
    groups: dict[tuple[str, int], list[str]] = {}
    for name, linear in linears.items():
        groups.setdefault((_group(model, name), linear.in_features), []).append(name)
    result, fallbacks = dict(moments), set()
    for (_, in_features), names in groups.items():
        few = [name for name in names if name not in moments or sum(moments[name].counts.values()) < in_features]
        if len(names) == 1 or not few or not any(name in moments for name in names):
            continue
        pooled = SecondMoments.pooled([moments[name] for name in names if name in moments])
        for name in few:
            result[name] = pooled
            fallbacks.add(name)
    return result, fallbacks


def _around_experts(block: nn.Module) -> list[nn.Module]:
    """Return the parts of a block that directly hold experts, and the parts that hold those, without the block itself."""
    names = set()
    for name, module in block.named_modules():
        parts = name.split(".")
        if _may_hold_experts(module) and len(module) > 1:
            names |= {".".join(parts[:i]) for i in range(1, len(parts))}
    return [module for name, module in block.named_modules() if name in names]


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def _may_hold_experts(module: nn.Module) -> bool:
    return isinstance(module, (ExpertWeights, nn.ModuleList))


def _group(model: nn.Module, name: str) -> str:
    """Return `name` with its last number left open, if that counts the members of a list; else as it is."""
    numbered = re.fullmatch(r"(.*)\.\d+((?:\.[^.\d]+)*)", name)
    if numbered is None or not _may_hold_experts(model.get_submodule(numbered[1])):
        return name
    return f"{numbered[1]}.*{numbered[2]}"


def _fingerprints(rows: Tensor) -> Tensor:
    """Return an int64 for each row [rows, width], equal for rows that are equal bit by bit, and hardly ever otherwise."""
    bits = rows.contiguous().view(_INTEGERS[rows.element_size()])
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[-1],), generator=generator).mul_(2).add_(1).to(rows.device)
    return torch.cat([(part.long() * factors).sum(-1) for part in bits.split(4096)])
