"""Charts of the built-in calibration set: bars, lines and pies, with labels that can be read."""

from __future__ import annotations

import math
from random import Random

from PIL import Image, ImageDraw

from .drawing import COLOURS, Turn, fitting_size, font, image_size, listed, paper, readable_on, sentence, text_width

_THEMES = (
    ("Books sold", "books", ("Anna", "Bruno", "Carla", "David", "Elif", "Femi")),
    ("Rainfall", "mm", ("Jan", "Feb", "Mar", "Apr", "May", "Jun")),
    ("Visitors", "visitors", ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat")),
    ("Apple harvest", "tons", ("2018", "2019", "2020", "2021", "2022", "2023")),
    ("Goals scored", "goals", ("Lions", "Bears", "Hawks", "Wolves", "Foxes", "Owls")),
    ("Energy use", "kWh", ("Oslo", "Rome", "Lima", "Cairo", "Tokyo", "Quito")),
    ("Tickets closed", "tickets", ("North", "South", "East", "West", "Centre", "Coast")),
    ("Bicycles rented", "bicycles", ("Spring", "Summer", "Autumn", "Winter")),
)
_SHARES = (
    ("Energy sources", ("Wind", "Solar", "Hydro", "Gas", "Coal")),
    ("Ways to work", ("Bicycle", "Bus", "Car", "Train", "On foot")),
    ("Household budget", ("Rent", "Food", "Travel", "Savings", "Other")),
    ("Favourite fruit", ("Apple", "Mango", "Cherry", "Banana", "Grape")),
    ("Languages spoken", ("Spanish", "Hindi", "French", "Arabic", "Swahili")),
    ("Land use", ("Forest", "Farms", "Towns", "Water", "Roads")),
)
_TONES = ("blue", "orange", "green", "red", "purple", "turquoise", "brown", "pink")
_SCALE = 2  # drawn larger and reduced, for smooth edges


def _values(rng: Random, count: int) -> list[int]:
    """Draw different values, so that every comparison has an answer."""
    step = rng.choice([1, 2, 5, 10, 20])
    return [step * value for value in rng.sample(range(2, 40), count)]


def _headline(title: str, unit: str) -> str:
    return title if unit in title.lower() else f"{title} ({unit})"


def _ticks(highest: int) -> list[int]:
    """Return at most seven round numbers from 0 to a little above the highest value."""
    step = next(step for step in (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500) if highest * 1.08 / step <= 6)
    return list(range(0, int(highest * 1.08) + step, step))


def _frame(rng: Random, title: str, aspects: tuple) -> tuple[Image.Image, ImageDraw.ImageDraw, int, tuple]:
    """Return an empty chart with its title: image, pen, label size and the plot's box."""
    width, height = (_SCALE * side for side in image_size(rng, aspects, least=288))
    image, pen = paper(rng, (width, height))
    label = max(24, min(width, height) // 17)
    size = fitting_size([title], width * 0.9, int(label * 1.35))
    pen.text((width / 2, label * 0.5), title, fill=(30, 30, 36), font=font(size), anchor="mt")
    return image, pen, label, (label * 3, label * 2.8, width - label, height - label * 2)


def _axes(pen: ImageDraw.ImageDraw, box: tuple, ticks: list[int], label: int) -> None:
    left, top, right, bottom = box
    for tick in ticks:
        y = bottom - (bottom - top) * tick / ticks[-1]
        pen.line((left, y, right, y), fill=(206, 208, 212), width=_SCALE)
        pen.text((left - label * 0.3, y), str(tick), fill=(80, 82, 88), font=font(int(label * 0.85)), anchor="rm")
    pen.line((left, top, left, bottom, right, bottom), fill=(70, 72, 78), width=_SCALE + 1)


def bars(rng: Random) -> tuple[Image.Image, list[Turn]]:
    """Draw a bar chart, upright or lying, with a number on each bar."""
    title, unit, names = rng.choice(_THEMES)
    names = list(names)[: rng.randint(3, len(names))]
    values = _values(rng, len(names))
    image, pen, label, box = _frame(rng, _headline(title, unit), ((1, 1), (3, 2)))
    tones = rng.sample(_TONES, len(names)) if rng.random() < 0.5 else [rng.choice(_TONES)] * len(names)
    if rng.random() < 0.6:
        _upright(pen, box, names, values, tones, label)
    else:
        _lying(pen, box, names, values, tones, label)
    turns = _ask_values(rng, title, unit, names, values)
    if len(set(tones)) > 1:
        i = rng.randrange(len(names))
        turns.append((f"What colour is the bar of {names[i]}?", sentence(f"{tones[i]}.")))
    turns.append(("How many bars does the chart have?", f"{len(names)}"))
    return image.reduce(_SCALE), turns


def _upright(pen: ImageDraw.ImageDraw, box: tuple, names: list, values: list, tones: list, label: int) -> None:
    left, top, right, bottom = box
    ticks = _ticks(max(values))
    _axes(pen, box, ticks, label)
    slot = (right - left) / len(names)
    size = fitting_size(names, slot * 0.88, label)
    for i, (name, value, tone) in enumerate(zip(names, values, tones, strict=True)):
        x, y = left + slot * (i + 0.5), bottom - (bottom - top) * value / ticks[-1]
        pen.rectangle((x - slot * 0.33, y, x + slot * 0.33, bottom), fill=COLOURS[tone])
        pen.text((x, y - label * 0.15), str(value), fill=(40, 40, 46), font=font(int(label * 0.85)), anchor="mb")
        pen.text((x, bottom + label * 0.4), name, fill=(40, 40, 46), font=font(size), anchor="mt")


def _lying(pen: ImageDraw.ImageDraw, box: tuple, names: list, values: list, tones: list, label: int) -> None:
    _, top, right, bottom = box
    left = max(text_width(name, label) for name in names) + label
    right, slot = right - label * 2, (bottom + label - top) / len(names)
    for i, (name, value, tone) in enumerate(zip(names, values, tones, strict=True)):
        y, x = top + slot * (i + 0.5), left + (right - left) * value / max(values)
        pen.rectangle((left, y - slot * 0.32, x, y + slot * 0.32), fill=COLOURS[tone])
        pen.text((x + label * 0.25, y), str(value), fill=(40, 40, 46), font=font(int(label * 0.85)), anchor="lm")
        pen.text((left - label * 0.3, y), name, fill=(40, 40, 46), font=font(label), anchor="rm")
    pen.line((left, top, left, bottom + label), fill=(70, 72, 78), width=_SCALE + 1)


def _ask_values(rng: Random, title: str, unit: str, names: list[str], values: list[int]) -> list[Turn]:
    ranked = sorted(zip(values, names, strict=True), reverse=True)
    (high, best), (low, worst) = ranked[0], ranked[-1]
    i, j = rng.sample(range(len(names)), 2)
    more, fewer = max(values[i], values[j]), min(values[i], values[j])
    which = names[i] if values[i] > values[j] else names[j]
    limit = sorted(values)[len(values) // 2]
    above = [name for name, value in zip(names, values, strict=True) if value > limit]
    table = "; ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
    return [
        ("What is the title of the chart?", f"{title}."),
        (f"What is the value for {names[i]}?", f"{values[i]} {unit}."),
        ("Which entry has the highest value, and what is it?", f"{best}, with {high} {unit}."),
        ("Which one is the lowest?", f"{worst}, with {low} {unit}."),
        (f"Is the value of {names[i]} or of {names[j]} larger?", f"That of {which}: {more} against {fewer}."),
        (
            f"How much larger is {best} than {worst}?",
            f"{high} − {low} = {high - low}, so it is larger by {high - low} {unit}.",
        ),
        ("What is the sum of all values?", f"{' + '.join(map(str, values))} = {sum(values)} {unit}."),
        (f"Which entries lie above {limit} {unit}?", f"{listed(above)}." if above else "None."),
        ("Read out the data as a list.", f"{table}."),
        ("Rank the entries from high to low.", f"{', '.join(name for _, name in ranked)}."),
    ]


def lines(rng: Random) -> tuple[Image.Image, list[Turn]]:
    """Draw a line chart of one or two series over time, with marked points."""
    title, unit, names = rng.choice([theme for theme in _THEMES if theme[2][0] in ("Jan", "Mon", "2018", "Spring")])
    names, series = list(names), rng.sample([("Plan", "Actual"), ("Town A", "Town B"), ("Shop", "Online")], 1)[0]
    rows = [_values(rng, len(names)) for _ in range(rng.randint(1, 2))]
    image, pen, label, box = _frame(rng, _headline(title, unit), ((1, 1), (3, 2)))
    left, top, right, bottom = box
    if len(rows) > 1:
        top += label * 1.3
    ticks = _ticks(max(map(max, rows)))
    _axes(pen, (left, top, right, bottom), ticks, label)
    slot, size = (right - left) / len(names), fitting_size(names, (right - left) / len(names) * 0.88, label)
    tones = rng.sample(_TONES[:6], len(rows))
    for row, tone, name, key in zip(rows, tones, series, (left, (left + right) / 2), strict=False):
        points = [(left + slot * (i + 0.5), bottom - (bottom - top) * v / ticks[-1]) for i, v in enumerate(row)]
        pen.line(points, fill=COLOURS[tone], width=3 * _SCALE, joint="curve")
        for x, y in points:
            pen.ellipse((x - 3.5 * _SCALE, y - 3.5 * _SCALE, x + 3.5 * _SCALE, y + 3.5 * _SCALE), fill=COLOURS[tone])
        if len(rows) > 1:
            pen.line((key, box[1], key + label * 1.4, box[1]), fill=COLOURS[tone], width=3 * _SCALE)
            pen.text((key + label * 1.7, box[1]), name, fill=(40, 40, 46), font=font(label), anchor="lm")
    for i, name in enumerate(names):
        pen.text((left + slot * (i + 0.5), bottom + label * 0.4), name, fill=(40, 40, 46), font=font(size), anchor="mt")
    return image.reduce(_SCALE), _ask_lines(title, unit, names, rows, tones, series)


def _ask_lines(title: str, unit: str, names: list, rows: list, tones: list, series: tuple) -> list[Turn]:
    first = rows[0]
    peak, least = names[first.index(max(first))], names[first.index(min(first))]
    end = "higher" if first[-1] > first[0] else "lower"
    who = f"the {tones[0]} line" if len(rows) > 1 else "the line"
    falls = [f"{names[i]} to {names[i + 1]}" for i in range(len(first) - 1) if first[i + 1] < first[i]]
    at = "On" if names[0] == "Mon" else "In"
    turns = [
        ("What does the chart show?", f"It shows “{_headline(title, unit)}” from {names[0]} to {names[-1]}."),
        (f"When does {who} reach its highest point?", f"{at} {peak}."),
        (f"At which point is {who} lowest?", f"{at} {least}."),
        (f"Does {who} end higher or lower than it starts?", f"It ends {end} than it starts."),
        (f"Between which neighbouring points does {who} fall?", f"{listed(falls)}." if falls else "It never falls."),
        ("How many points are marked on each line?", f"{len(names)}"),
    ]
    if len(rows) > 1:
        ahead = [name for name, x, y in zip(names, *rows, strict=True) if x > y]
        turns += [
            ("What do the two colours stand for?", f"{sentence(tones[0])} is {series[0]}, {tones[1]} is {series[1]}."),
            (f"Where is {series[0]} above {series[1]}?", f"{at} {listed(ahead)}." if ahead else "Nowhere."),
        ]
    return turns


def pie(rng: Random) -> tuple[Image.Image, list[Turn]]:
    """Draw a pie chart with a legend; shares are whole percents, written on the slices."""
    title, names = rng.choice(_SHARES)
    names = list(names)[: rng.randint(3, 5)]
    cuts = sorted(rng.sample(range(1, 18), len(names) - 1))
    shares = [5 * (b - a) for a, b in zip([0, *cuts], [*cuts, 20], strict=True)]
    if len(set(shares)) < len(shares):  # different shares, so that every comparison has an answer
        shares = {3: [50, 30, 20], 4: [40, 30, 20, 10], 5: [35, 25, 20, 15, 5]}[len(names)]
        rng.shuffle(shares)
    image, pen, label, (_, top, right, _) = _frame(rng, title, ((3, 2),))
    tones = rng.sample(_TONES, len(names))
    radius = (image.height - top - label) / 2
    x, y, angle = label + radius, top + radius, -90.0
    for share, tone in zip(shares, tones, strict=True):
        end = angle + 3.6 * share
        pen.pieslice(
            (x - radius, y - radius, x + radius, y + radius), angle, end, fill=COLOURS[tone], outline="white", width=3
        )
        middle = math.radians((angle + end) / 2)
        spot = (x + radius * 0.68 * math.cos(middle), y + radius * 0.68 * math.sin(middle))
        pen.text(
            spot,
            f"{share}%",
            fill=readable_on(COLOURS[tone]),
            font=font(int(label * (0.9 if share > 5 else 0.75))),
            anchor="mm",
        )
        angle = end
    legend, size = x + radius + label, fitting_size(names, right - x - radius - label * 2.3, label)
    for i, (name, tone) in enumerate(zip(names, tones, strict=True)):
        row = top + label * (0.8 + 1.7 * i)
        pen.rectangle((legend, row - label * 0.4, legend + label * 0.8, row + label * 0.4), fill=COLOURS[tone])
        pen.text((legend + label * 1.2, row), name, fill=(40, 40, 46), font=font(size), anchor="lm")
    return image.reduce(_SCALE), _ask_pie(rng, title, names, shares, tones)


def _ask_pie(rng: Random, title: str, names: list[str], shares: list[int], tones: list[str]) -> list[Turn]:
    ranked = sorted(zip(shares, names, tones, strict=True), reverse=True)
    i, j = rng.sample(range(len(names)), 2)
    half = (
        f"Yes, {ranked[0][1]} has {ranked[0][0]} %." if ranked[0][0] > 50 else "No, no slice is larger than one half."
    )
    return [
        ("What is this chart about?", f"{title}."),
        (f"What share does {names[i]} have?", f"{shares[i]} %."),
        ("What is the largest slice?", f"{ranked[0][1]}, with {ranked[0][0]} %."),
        ("Which slice is the smallest?", f"The {ranked[-1][2]} one: {ranked[-1][1]} with {ranked[-1][0]} %."),
        (
            f"What do {names[i]} and {names[j]} make together?",
            f"{shares[i]} % + {shares[j]} % = {shares[i] + shares[j]} %.",
        ),
        (f"Which colour stands for {names[j]}?", sentence(f"{tones[j]}.")),
        ("Does any slice take more than half of the circle?", half),
        ("List all slices with their shares.", "; ".join(f"{n}: {s} %" for s, n, _ in ranked) + "."),
    ]
