"""Colours of reports and charts, light and dark; a test computes their contrasts."""

from __future__ import annotations

from typing import NamedTuple

RGB = tuple[int, int, int]

NUM_STEPS = 10
"""Shades of a heat map's scale."""


class Theme(NamedTuple):
    """Colours of one appearance.

    Attributes:
        paper, panel: grounds of the page and of its boxes.
        ink, soft: text, and text that matters less.
        line, empty: rules, and cells without a value.
        good, bad: words and signs for right and wrong.
        series: fills of bars and lines, in order; each has a hatching of its own as well.
        scales: name → colours of the lowest and the highest value.
    """

    paper: str
    panel: str
    ink: str
    soft: str
    line: str
    empty: str
    good: str
    bad: str
    series: tuple[str, ...]
    scales: dict[str, tuple[str, str]]

    def steps(self, scale: str) -> list[tuple[str, str]]:
        """Return the shades of a scale from low to high, each with the colour of text on it."""
        low, high = (rgb(colour) for colour in self.scales[scale])
        shares = [i / (NUM_STEPS - 1) for i in range(NUM_STEPS)]
        fills = ["#" + "".join(f"{round(a + (b - a) * s):02x}" for a, b in zip(low, high, strict=True)) for s in shares]
        return [(fill, max(("#000000", "#ffffff"), key=lambda text: contrast(text, fill))) for fill in fills]


LIGHT = Theme(
    paper="#ffffff",
    panel="#f1f5f9",
    ink="#1b1f24",
    soft="#555d66",
    line="#d0d4d9",
    empty="#ededed",
    good="#17693a",
    bad="#a3212f",
    series=("#2f6f9f", "#b85c00", "#3a7d52", "#8455a0", "#b5495b", "#6b6f76"),
    scales={
        "blue": ("#f7fbff", "#084584"),
        "orange": ("#fff7ec", "#a63603"),
        "green": ("#f7fcf5", "#005a32"),
        "purple": ("#fcfbfd", "#4a1486"),
    },
)
DARK = Theme(
    paper="#15181c",
    panel="#20252b",
    ink="#e8eaed",
    soft="#aab2bc",
    line="#3a4149",
    empty="#2a2f36",
    good="#7fd39b",
    bad="#ff9aa5",
    series=("#6fb1e0", "#f0a356", "#74c28f", "#c39ad8", "#ef8797", "#a9aeb6"),
    scales={
        "blue": ("#1b2632", "#8ccbff"),
        "orange": ("#2e2319", "#ffb877"),
        "green": ("#1a2b22", "#86e0a8"),
        "purple": ("#292333", "#d8b4ff"),
    },
)


def rgb(colour: str) -> RGB:
    """Return red, green and blue, 0 to 255, of "#rrggbb"."""
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue


def contrast(first: str, second: str) -> float:
    """Return the contrast of two colours, 1 to 21; text needs 4.5, the parts of a picture 3.

    Source: Web Content Accessibility Guidelines 2.2, "contrast ratio" and "relative luminance".
    """

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb(colour))]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)
