"""How records look in a notebook: HTML of text and tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def html_table(rows: Sequence[Sequence[str]], notes: str = "") -> str:
    """Return a table of which the first row is the head and the first column the names, with lines of text below it."""
    lines = []
    for number, row in enumerate(rows):
        cell = "td" if number else "th"
        align = ("left", *["right"] * (len(row) - 1))
        cells = (
            f'<{cell} style="text-align: {side}">{escape(text)}</{cell}>' for side, text in zip(align, row, strict=True)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>{html_text(notes) if notes else ''}"


def html_text(text: str) -> str:
    """Return text as it is, in letters of one width."""
    return f"<pre>{escape(text)}</pre>"
