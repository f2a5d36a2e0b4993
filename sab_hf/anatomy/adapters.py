"""Adapters of PEFT around or inside a model, found without importing PEFT."""

from __future__ import annotations

from torch import nn


def find_adapters(model: nn.Module) -> list[str]:
    """Return the names of the parts of a model that are PEFT's: the wrapper around it ("") or layers with adapters in it."""
    return [name for name, module in model.named_modules() if _is_of_peft(type(module))]


def _is_of_peft(kind: type) -> bool:
    return any(cls.__module__.partition(".")[0] == "peft" for cls in kind.__mro__)


def refuse_adapters(model: nn.Module, what_to_do: str) -> None:
    """Raise a ValueError that ends in `what_to_do` if a model carries adapters."""
    found = find_adapters(model)
    if found:
        where = f"is a {type(model).__name__}" if found[0] == "" else f"has one in `{found[0]}`"
        raise ValueError(f"a model without adapters is required, and this {where}; {what_to_do}")
