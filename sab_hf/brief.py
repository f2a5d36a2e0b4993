"""Values and errors in messages, cut where they are long."""

from __future__ import annotations

from typing import Any

LONGEST_SHOWN = 200
"""Characters of a value or an error in a message."""


def brief(value: Any) -> str:
    """Return type and content of a value for a message, cut where it is long."""
    return f"{type(value).__name__} {shortened(value, 60)}"


def shortened(value: Any, limit: int = LONGEST_SHOWN) -> str:
    """Return `repr(value)`, cut to `limit` characters."""
    return _cut(repr(value[:limit] if isinstance(value, (str, bytes)) and len(value) > limit else value), limit)


def brief_error(error: Exception) -> str:
    """Return an error in words, cut where it is long: some hold the file that they are about."""
    return _cut(str(error) or type(error).__name__, LONGEST_SHOWN)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
