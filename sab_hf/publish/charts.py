"""The few charts that reports need, drawn as SVG text: heat maps, lines, stacked bars. No plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

COLOURS = ("#2f6f9f", "#d9822b", "#4f9d69", "#9467a8", "#b5495b", "#7f7f7f")
"""Of series, told apart also without colour by their order in legend and stack."""
BLUES = ((247, 251, 255), (8, 69, 132))
ORANGES = ((255, 247, 236), (166, 54, 3))
GREENS = ((247, 252, 245), (0, 90, 50))
PURPLES = ((252, 251, 253), (74, 20, 134))

_INK, _FAINT, _EMPTY = "#222", "#d0d0d0", "#f1f1f1"
_FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"
_LETTER = 6.6  # width of a letter of the 12-pixel font, pixels


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    show: Callable[[float], str],
    scale: tuple[tuple[int, int, int], tuple[int, int, int]] = BLUES,
    bounds: tuple[float, float] | None = None,
    x_label: str = "block",
    cell: tuple[int, int] | None = None,
) -> str:
    """Draw one cell for each value, with its number where there is room; a value of None leaves a grey cell.

    Args:
        title: over the chart.
        rows, columns: labels.
        values: [rows][columns].
        show: how to write a value.
        scale: colours of the lowest and the highest value, RGB 0 to 255.
        bounds: values of the two colours; None: the least and greatest there are.
        x_label: under the columns.
        cell: width and height of a cell in pixels; None: what fits.
    """
    known = [value for row in values for value in row if value is not None]
    low, high = bounds or (min(known, default=0.0), max(known, default=1.0))
    width, height = cell or (max(5, min(64, 640 // max(1, len(columns)))), 26)
    left, top = _margin(rows), 42
    parts = [_text(left, 22, title, 15, weight="600")]
    for i, row in enumerate(values):
        y = top + i * height
        parts.append(_text(left - 8, y + height / 2 + 4, rows[i], anchor="end"))
        for j, value in enumerate(row):
            share = 0.0 if value is None or high <= low else (value - low) / (high - low)
            share = min(1.0, max(0.0, share))
            fill = _EMPTY if value is None else _blend(scale, share)
            label = f"{rows[i]}, {x_label} {columns[j]}: {'not known' if value is None else show(value)}"
            parts.append(_rectangle(left + j * width, y, width - 1, height - 1, fill, label))
            if value is not None and len(show(value)) * _LETTER < width - 4:
                ink = "#fff" if share > 0.55 else _INK
                parts.append(_text(left + (j + 0.5) * width, y + height / 2 + 4, show(value), 11, "middle", ink))
    bottom = top + len(rows) * height
    parts += _column_labels(columns, left, width, bottom + 16)
    parts.append(_text(left + len(columns) * width / 2, bottom + 34, x_label, anchor="middle"))
    if known:
        parts.append(_legend_of_scale(left, bottom + 46, scale, show(low), show(high)))
    total = max(left + len(columns) * width + 16, left + 280, 40 + len(title) * 8 + left)
    return _svg(total, bottom + 74, parts, title)


def lines(title: str, x: Sequence[str], series: dict[str, Sequence[float | None]], x_label: str, y_label: str) -> str:
    """Draw one line with dots for each series over common places.

    Args:
        title: over the chart.
        x: labels of the places.
        series: name → a value for each place, None where there is none.
        x_label, y_label: labels of the axes.
    """
    left, top, width, height = 76, 70, 640, 240
    known = [value for values in series.values() for value in values if value is not None]
    ticks = _ticks(max(known, default=1.0))
    step = width / max(1, len(x))

    def place(i: int, value: float) -> tuple[float, float]:
        return left + (i + 0.5) * step, top + height * (1 - value / ticks[-1])

    parts = [_text(left, 22, title, 15, weight="600"), *_legend(list(series), left, 40)]
    parts += _value_axis(ticks, left, top, width, height, y_label)
    for colour, (name, values) in zip(COLOURS, series.items(), strict=False):
        points = [(*place(i, value), i, value) for i, value in enumerate(values) if value is not None]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _, _ in points)
        parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>")
        for a, b, i, value in points:
            label = escape(f"{name}, {x_label} {x[i]}: {value:.4g}")
            parts.append(f"<circle cx='{a:.1f}' cy='{b:.1f}' r='3.5' fill='{colour}'><title>{label}</title></circle>")
    parts += _column_labels(x, left, step, top + height + 18)
    parts.append(_text(left + width / 2, top + height + 38, x_label, anchor="middle"))
    return _svg(left + width + 20, top + height + 52, parts, title)


def stacked_bars(
    title: str, bars: Sequence[str], series: dict[str, Sequence[float]], show: Callable[[float], str]
) -> str:
    """Draw one horizontal bar for each label, made of one piece for each series, with the sum behind it.

    Args:
        title: over the chart.
        bars: labels.
        series: name → a value for each bar.
        show: how to write a value.
    """
    left, width, height = _margin(bars), 520, 30
    sums = [sum(values[i] for values in series.values()) for i in range(len(bars))]
    unit = width / (max(sums, default=0.0) or 1.0)
    names = list(series) if len(series) > 1 else []
    top = 62 if names else 38
    parts = [_text(left, 22, title, 15, weight="600"), *_legend(names, left, 40)]
    for i, bar in enumerate(bars):
        y, x = top + i * height, float(left)
        parts.append(_text(left - 8, y + height / 2 + 4, bar, anchor="end"))
        for colour, (name, values) in zip(COLOURS, series.items(), strict=False):
            label = f"{bar}, {name}: {show(values[i])}"
            parts.append(_rectangle(x, y + 3, values[i] * unit, height - 8, colour, label))
            x += values[i] * unit
        parts.append(_text(x + 8, y + height / 2 + 4, show(sums[i])))
    return _svg(left + width + 110, top + len(bars) * height + 10, parts, title)


def _svg(width: float, height: float, parts: list[str], title: str) -> str:
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' role='img' aria-label='{escape(title, quote=True)}' "
        f"viewBox='0 0 {width:.0f} {height:.0f}' width='{width:.0f}' height='{height:.0f}' {_FONT}>"
    )
    ground = f"<rect width='{width:.0f}' height='{height:.0f}' fill='#fff'/>"
    return "\n".join([head, ground, *parts, "</svg>"]) + "\n"


def _text(
    x: float, y: float, text: str, size: int = 12, anchor: str = "start", fill: str = _INK, weight: str = "400"
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' text-anchor='{anchor}' fill='{fill}' "
        f"font-weight='{weight}'>{escape(text)}</text>"
    )


def _rectangle(x: float, y: float, width: float, height: float, fill: str, label: str) -> str:
    return (
        f"<rect x='{x:.1f}' y='{y:.1f}' width='{max(0, width):.2f}' height='{height:.1f}' fill='{fill}'>"
        f"<title>{escape(label)}</title></rect>"
    )


def _column_labels(labels: Sequence[str], left: float, step: float, y: float) -> list[str]:
    """Label the columns, as many as fit; where some labels are empty, the others fit."""
    room = 0 if "" in labels else max((len(label) for label in labels), default=1) * _LETTER + 6
    every = max(1, math.ceil(room / step))
    return [
        _text(left + (i + 0.5) * step, y, label, anchor="middle")
        for i, label in enumerate(labels)
        if label and i % every == 0
    ]


def _legend(names: list[str], left: float, y: float) -> list[str]:
    parts, x = [], left
    for colour, name in zip(COLOURS, names, strict=False):
        parts.append(_rectangle(x, y, 12, 12, colour, name))
        parts.append(_text(x + 17, y + 10, name))
        x += 36 + len(name) * _LETTER
    return parts


def _legend_of_scale(left: float, y: float, scale: tuple, low: str, high: str) -> str:
    steps = [_rectangle(left + 8 * i, y, 8, 10, _blend(scale, i / 15), "") for i in range(16)]
    labels = [_text(left + 134, y + 9, f"{low} to {high}")]
    return "\n".join(steps + labels)


def _value_axis(ticks: list[float], left: float, top: float, width: float, height: float, label: str) -> list[str]:
    parts = []
    for tick in ticks:
        y = top + height * (1 - tick / ticks[-1])
        parts.append(
            f"<line x1='{left}' x2='{left + width}' y1='{y:.1f}' y2='{y:.1f}' stroke='{_FAINT}' stroke-width='1'/>"
        )
        parts.append(_text(left - 8, y + 4, f"{tick:.4g}", anchor="end"))
    middle = top + height / 2
    parts.append(
        f"<text transform='translate(18 {middle:.0f}) rotate(-90)' font-size='12' text-anchor='middle' fill='{_INK}'>"
        f"{escape(label)}</text>"
    )
    return parts


def _ticks(most: float) -> list[float]:
    """Return four to six round numbers from 0 to at least `most`."""
    if not most > 0 or math.isinf(most):
        return [0.0, 1.0]
    power = 10 ** math.floor(math.log10(most))
    step = next(power * f for f in (0.1, 0.2, 0.25, 0.5, 1, 2, 2.5) if math.ceil(most / (power * f)) <= 5)
    return [step * i for i in range(math.ceil(most / step - 1e-9) + 1)]


def _margin(labels: Sequence[str]) -> float:
    return 24 + max((len(label) for label in labels), default=0) * _LETTER


def _blend(scale: tuple[tuple[int, int, int], tuple[int, int, int]], share: float) -> str:
    low, high = scale
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))
