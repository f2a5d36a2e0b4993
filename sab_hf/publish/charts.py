"""The charts that reports and cards need: heat maps, lines, bars. Geometry is here, markup in `templates/chart.svg.jinja`.

Why no plotting library: a report is one file without scripts that is read on a phone and in the dark, and its pictures stand on
the card of a repository, which runs no scripts. Plotly, Bokeh and Vega bring megabytes of JavaScript; Matplotlib draws at one
width in one set of colours and brings more megabytes than all of this package; Pygal has no heat maps. These pictures take any
width with letters that keep their size (places across are percentages), follow light and dark, and hold a tooltip for each value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .palette import DARK, LIGHT, NUM_STEPS
from .templating import MARKUP

ALONE = 560
"""Width of a picture in a file of its own, pixels; on a page its width is what there is."""
WIDTHS = (440, 560, 700, 820)
"""Widths, pixels, from which on a picture shows more of its labels; `templates/chart.css.jinja` knows them too."""
NUM_SERIES = len(LIGHT.series)

_NARROW = 330  # the least width that pictures are laid out for, pixels
_LETTER = 7.0  # width of a letter of the 12-pixel font, pixels; of wide ones, such as DejaVu
_MOST_LETTERS = 20  # of a label beside the plot


@dataclass(frozen=True)
class Mark:
    """One element of a chart. Places across may be pixels ("12") or a share of the plot ("12.5%"); those down are pixels.

    Attributes:
        kind: "text", "box", "line", "dot" or "square".
        x, y: where it is, or starts.
        x2, y2: where a line ends; width and height of a box.
        css: classes of `templates/chart.css.jinja`.
        text: the text; of other kinds the tooltip.
        anchor: of a text: "start", "middle" or "end".
        dx: pixels added to `x` of a text.
        since: least width of the picture that shows it, pixels.
    """

    kind: str
    x: str
    y: float
    x2: str = "0"
    y2: float = 0
    css: str = ""
    text: str = ""
    anchor: str = "start"
    dx: float = 0
    since: int = 0


@dataclass
class Chart:
    """A chart that can be drawn at any width.

    Attributes:
        title: over the picture.
        height: pixels, without the title.
        left, right: pixels beside the plot.
        around: marks whose places across are those of the whole picture.
        plot: marks whose places across are those of the plot.
    """

    title: str
    height: float
    left: float
    right: float
    around: list[Mark] = field(default_factory=list)
    plot: list[Mark] = field(default_factory=list)

    def svg(self, alone: bool = False) -> str:
        """Return the picture as SVG: for a page that has the charts' style, or `alone`, as a file with style and title."""
        return MARKUP.get_template("chart.svg.jinja").render(chart=self, alone=alone, width=ALONE, **_STYLE)


_STYLE = {"light": LIGHT, "dark": DARK, "num_series": NUM_SERIES, "num_steps": NUM_STEPS, "widths": WIDTHS}


def style() -> str:
    """Return the charts' style sheet, which sets the colours of a page too."""
    return MARKUP.get_template("chart.css.jinja").render(_STYLE)


def hatchings() -> str:
    """Return the SVG that holds the hatchings of series, which a page with charts has once."""
    return MARKUP.get_template("hatchings.svg.jinja").render(_STYLE)


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    show: Callable[[float], str],
    scale: str = "blue",
    bounds: tuple[float, float] | None = None,
    x_label: str = "block",
    cell: int = 26,
) -> Chart:
    """Draw one cell for each value, with its number where there is room; a value of None leaves a grey cell.

    Args:
        title: over the chart.
        rows, columns: labels.
        values: [rows][columns].
        show: how to write a value.
        scale: name of a scale of the palette.
        bounds: values of the lowest and the highest shade; None: the least and greatest there are.
        x_label: under the columns.
        cell: height of a row, pixels.
    """
    known = [value for row in values for value in row if value is not None]
    low, high = bounds or (min(known, default=0.0), max(known, default=1.0))
    left, right, step = _margin(rows), 6, 100 / max(1, len(columns))
    chart = Chart(title, len(rows) * cell + 68, left, right)
    for i, row in enumerate(values):
        y = i * cell
        chart.around.append(_label(rows[i], left, y + cell / 2 + 4))
        for j, value in enumerate(row):
            share = 0.0 if value is None or high <= low else min(1.0, max(0.0, (value - low) / (high - low)))
            shade = "empty" if value is None else f"{scale}-{round(share * (NUM_STEPS - 1))}"
            label = f"{rows[i]}, {x_label} {columns[j]}: {'not known' if value is None else show(value)}"
            chart.plot.append(Mark("box", _percent(j * step), y, _percent(step), cell, f"cell {shade}", label))
            if value is not None and cell >= 20:
                since = _since(left + right + len(columns) * (len(show(value)) * _LETTER + 6))
                if since is not None:
                    middle = _percent((j + 0.5) * step)
                    chart.plot.append(
                        Mark("text", middle, y + cell / 2 + 4, css=f"on-{shade}", text=show(value), anchor="middle", since=since)
                    )  # fmt: skip
    bottom = len(rows) * cell
    chart.plot += _column_labels(columns, left + right, bottom + 16)
    chart.plot.append(Mark("text", "50%", bottom + 34, text=x_label, anchor="middle"))
    if known:
        for i in range(NUM_STEPS):
            chart.around.append(Mark("box", str(4 + 10 * i), bottom + 46, "10", 12, f"{scale}-{i}"))
        words = f"{show(low)} to {show(high)}"
        chart.around.append(Mark("text", str(12 + 10 * NUM_STEPS), bottom + 56, text=words))
    return chart


def lines(title: str, x: Sequence[str], series: dict[str, Sequence[float | None]], x_label: str, y_label: str) -> Chart:
    """Draw one line with marks for each series over common places.

    Args:
        title: over the chart.
        x: labels of the places.
        series: name → a value for each place, None where there is none.
        x_label, y_label: labels of the axes.
    """
    left, right, height = 62, 12, 220
    known = [value for values in series.values() for value in values if value is not None]
    ticks = _ticks(max(known, default=1.0))
    step = 100 / max(1, len(x))
    legend, top = _legend(list(series), "square")
    top += 30
    chart = Chart(
        title, top + height + 46, left, right, [*legend, Mark("text", "4", top - 14, css="soft", text=y_label)]
    )
    for tick in ticks:
        y = top + height * (1 - tick / ticks[-1])
        chart.plot.append(Mark("line", "0%", y, "100%", y, "rule"))
        chart.around.append(Mark("text", str(left - 8), y + 4, text=f"{tick:.4g}", anchor="end"))
    for number, (name, values) in enumerate(series.items()):
        points = [
            (
                _percent((i + 0.5) * step),
                top + height * (1 - value / ticks[-1]),
                f"{name}, {x_label} {x[i]}: {value:.4g}",
            )
            for i, value in enumerate(values)
            if value is not None
        ]
        css = f"series-{number % NUM_SERIES}"
        for (a, b, _), (c, d, _) in itertools.pairwise(points):
            chart.plot.append(Mark("line", a, b, c, d, f"line {css}"))
        chart.plot += [Mark("square" if number % 2 else "dot", a, b, css=css, text=label) for a, b, label in points]
    chart.plot += _column_labels(x, left + right, top + height + 18)
    chart.plot.append(Mark("text", "50%", top + height + 38, text=x_label, anchor="middle"))
    return chart


def stacked_bars(
    title: str, bars: Sequence[str], series: dict[str, Sequence[float]], show: Callable[[float], str]
) -> Chart:
    """Draw one horizontal bar for each label, made of one piece for each series, with the sum behind it.

    Args:
        title: over the chart.
        bars: labels.
        series: name → a value for each bar.
        show: how to write a value.
    """
    sums = [sum(values[i] for values in series.values()) for i in range(len(bars))]
    most = max(sums, default=0.0) or 1.0
    legend, top = _legend(list(series), "box") if len(series) > 1 else ([], 0)
    right = 14 + max((len(show(value)) for value in sums), default=0) * _LETTER
    chart = Chart(title, top + len(bars) * 30 + 4, _margin(bars), right, legend)
    for i, bar in enumerate(bars):
        y, x = top + i * 30, 0.0
        chart.around.append(_label(bar, chart.left, y + 19))
        for number, (name, values) in enumerate(series.items()):
            share = 100 * (values[i] / most)
            chart.plot += _bar(x, y + 3, share, 22, number, f"{bar}, {name}: {show(values[i])}")
            x += share
        chart.plot.append(Mark("text", _percent(x), y + 19, text=show(sums[i]), dx=8))
    return chart


def paired_bars(
    title: str, groups: Sequence[str], series: dict[str, Sequence[float | None]], show: Callable[[float], str]
) -> Chart:
    """Draw one horizontal bar for each series under each label, with its value behind it.

    Each group has a scale of its own, from 0 to 1 or to the greatest of its values: groups are measures of different kinds.

    Args:
        title: over the chart.
        groups: labels.
        series: name → a value for each group, None where there is none.
        show: how to write a value.
    """
    legend, top = _legend(list(series), "box")
    words = [show(value) for values in series.values() for value in values if value is not None]
    right = 14 + max(map(len, words), default=0) * _LETTER
    height = 18 * len(series) + 32
    chart = Chart(title, top + len(groups) * height, 4, right, legend)
    for i, group in enumerate(groups):
        y = top + i * height + 16
        chart.around.append(Mark("text", "4", y, css="strong", text=_shortened(group, 48)))
        most = max([1.0, *(values[i] for values in series.values() if values[i] is not None)])
        for number, (name, values) in enumerate(series.items()):
            value, row = values[i], y + 6 + 18 * number
            if value is None:
                chart.plot.append(Mark("text", "0%", row + 12, css="soft", text="not measured"))
                continue
            share = max(0.0, 100 * (value / most))
            chart.plot += _bar(0, row, share, 16, number, f"{group}, {name}: {show(value)}")
            chart.plot.append(Mark("text", _percent(share), row + 12, text=show(value), dx=8))
    return chart


def _bar(x: float, y: float, width: float, height: float, number: int, label: str) -> list[Mark]:
    """Return a piece of a bar: its fill, and over it its hatching, which tells series apart without colour."""
    number %= NUM_SERIES
    across = (_percent(x), y, _percent(width), height)
    return [
        Mark("box", *across, css=f"series-{number}", text=label),
        *([Mark("box", *across, css=f"hatched-{number}", text=label)] if number else []),
    ]


def _label(text: str, left: float, y: float) -> Mark:
    return Mark("text", f"{left - 8:.0f}", y, text=_shortened(text, _MOST_LETTERS), anchor="end")


def _shortened(text: str, most: int) -> str:
    """Return a text of at most `most` letters; what is left out of a longer one is its middle."""
    head = most // 3
    return text if len(text) <= most else f"{text[:head]}…{text[head + 1 - most :]}"


def _column_labels(labels: Sequence[str], beside: float, y: float) -> list[Mark]:
    """Label the columns, as many as fit each width; where some labels are empty, the others fit."""
    room = 0 if "" in labels else max((len(label) for label in labels), default=1) * _LETTER + 6
    marks = []
    for i, label in enumerate(labels):
        for since, width in ((0, _NARROW), *((width, width) for width in WIDTHS)):
            fit = max(1, int((width - beside) / room)) if room else len(labels)
            every = 1 << max(
                0, math.ceil(math.log2(len(labels) / fit))
            )  # doubled, so that fewer labels are some of more
            if i % every == 0 and label:
                middle = _percent(100 * (i + 0.5) / len(labels))
                marks.append(Mark("text", middle, y, text=label, anchor="middle", since=since))
                break
    return marks


def _legend(names: list[str], kind: str) -> tuple[list[Mark], float]:
    """Return the legend of the series in as many rows as the narrowest picture needs, and its height."""
    marks, x, y = [], 4.0, 4
    for number, name in enumerate(names):
        name = _shortened(name, 40)
        width = 34 + len(name) * _LETTER
        if x > 4 and x + width > _NARROW:
            x, y = 4.0, y + 20
        css = f"series-{number % NUM_SERIES}"
        if kind == "box":
            marks.append(Mark("box", f"{x:.0f}", y, "14", 14, css))
            if number % NUM_SERIES:
                marks.append(Mark("box", f"{x:.0f}", y, "14", 14, f"hatched-{number % NUM_SERIES}"))
        else:
            marks.append(Mark("line", f"{x:.0f}", y + 7, f"{x + 18:.0f}", y + 7, f"line {css}"))
            marks.append(Mark("square" if number % 2 else "dot", f"{x + 9:.0f}", y + 7, css=css))
        marks.append(Mark("text", f"{x:.0f}", y + 11, text=name, dx=22))
        x += width
    return marks, y + 24.0


def _since(width: float) -> int | None:
    """Return the width from which on something that needs `width` pixels is shown; None: never."""
    return 0 if width <= _NARROW else next((known for known in WIDTHS if width <= known), None)


def _ticks(most: float) -> list[float]:
    """Return four to six round numbers from 0 to at least `most`."""
    if not most > 0 or math.isinf(most):
        return [0.0, 1.0]
    power = 10 ** math.floor(math.log10(most))
    step = next(power * f for f in (0.1, 0.2, 0.25, 0.5, 1, 2, 2.5) if math.ceil(most / (power * f)) <= 5)
    return [step * i for i in range(math.ceil(most / step - 1e-9) + 1)]


def _margin(labels: Sequence[str]) -> float:
    return 14 + min(_MOST_LETTERS, max((len(label) for label in labels), default=0)) * _LETTER


def _percent(share: float) -> str:
    return f"{share:.2f}%"
