"""Sizes in words."""

from __future__ import annotations


def size_in_words(num_bytes: float) -> str:
    """Return a size in KiB, MiB or GiB; "–" for nothing."""
    if not num_bytes:
        return "–"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"
