"""Dotted names of modules and tensors: where their first number is, which is the block's."""

from __future__ import annotations


def at_number(name: str) -> tuple[str, str, str] | None:
    """Split a name at its first number: what is before it (the list of blocks), the number, and what is after it.

    Returns:
        The three parts, without the dots between them; None if the name has no number.
    """
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if first is None:
        return None
    return ".".join(parts[:first]), parts[first], ".".join(parts[first + 1 :])


def block_of(name: str) -> str | None:
    """Return the name of the block that a module or tensor is in: `name` up to its first number; None if there is none."""
    split = at_number(name)
    return None if split is None else f"{split[0]}.{split[1]}".lstrip(".")
