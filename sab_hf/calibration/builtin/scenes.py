"""Scenes of the built-in calibration set: coloured shapes and landscapes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

from .drawing import COLOURS, Turn, a, counted, image_size, listed, mix, number, sentence, shaded

_SHAPES = ("circle", "square", "triangle", "star", "diamond", "hexagon", "cross", "heart", "ring", "oval")
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
_PLACES = {
    ("middle", "centre"): "in the centre",
    ("top", "centre"): "at the top, in the middle",
    ("bottom", "centre"): "at the bottom, in the middle",
    ("middle", "left"): "on the left, half way up",
    ("middle", "right"): "on the right, half way up",
}


@dataclass(frozen=True)
class _Thing:
    shape: str
    colour: str
    row: int
    column: int
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        row, column = _ROWS[self.row], _COLUMNS[self.column]
        return _PLACES.get((row, column), f"in the {row} {column} corner")


def shapes(rng: Random) -> tuple[Image.Image, list[Turn]]:
    """Draw one to seven coloured shapes in the cells of a 3 × 3 grid, and ask what, where and how many."""
    size = image_size(rng)
    background = rng.choice([("white", "grey"), ("black", "grey"), ("grey", "white"), ("white", "white")])
    base = mix(COLOURS[background[0]], COLOURS[background[1]], 0.25)
    image = shaded((2 * size[0], 2 * size[1]), base, mix(base, COLOURS[rng.choice(list(COLOURS))], 0.2))
    pen = ImageDraw.Draw(image)
    contrast = [name for name, rgb in COLOURS.items() if sum(abs(x - y) for x, y in zip(rgb, base, strict=True)) > 190]
    palette, kinds = rng.sample(contrast, 4), rng.sample(_SHAPES, 4)
    cell_w, cell_h = 2 * size[0] / 3, 2 * size[1] / 3
    things = []
    for cell in rng.sample(range(9), rng.randint(1, 7)):
        row, column = divmod(cell, 3)
        radius = min(cell_w, cell_h) * rng.choice([0.24, 0.34, 0.43])
        x = (column + 0.5) * cell_w + rng.uniform(-1, 1) * (cell_w / 2 - radius - 2)
        y = (row + 0.5) * cell_h + rng.uniform(-1, 1) * (cell_h / 2 - radius - 2)
        thing = _Thing(rng.choice(kinds), rng.choice(palette), row, column, radius)
        _draw_shape(pen, thing, x, y)
        things.append(thing)
    return image.reduce(2), _ask_shapes(rng, things, palette, kinds)


def _draw_shape(pen: ImageDraw.ImageDraw, thing: _Thing, x: float, y: float) -> None:
    r, fill = thing.radius, COLOURS[thing.colour]

    def polygon(corners: int, turn: float, inner: float = 1.0) -> None:
        steps = corners if inner == 1.0 else 2 * corners
        radii = [r if i % 2 == 0 else r * inner for i in range(steps)] if inner != 1.0 else [r] * steps
        angles = [turn + 2 * math.pi * i / steps for i in range(steps)]
        pen.polygon([(x + q * math.sin(t), y - q * math.cos(t)) for q, t in zip(radii, angles, strict=True)], fill=fill)

    if thing.shape in ("circle", "ring"):
        width = int(r * 0.45) if thing.shape == "ring" else 0
        pen.ellipse((x - r, y - r, x + r, y + r), fill=None if width else fill, outline=fill, width=width)
    elif thing.shape == "oval":
        pen.ellipse((x - r, y - r * 0.6, x + r, y + r * 0.6), fill=fill)
    elif thing.shape == "square":
        pen.rectangle((x - r * 0.85, y - r * 0.85, x + r * 0.85, y + r * 0.85), fill=fill)
    elif thing.shape == "cross":
        pen.rectangle((x - r, y - r * 0.32, x + r, y + r * 0.32), fill=fill)
        pen.rectangle((x - r * 0.32, y - r, x + r * 0.32, y + r), fill=fill)
    elif thing.shape == "heart":
        for side in (-1, 1):
            pen.ellipse(
                (x + side * r * 0.48 - r * 0.5, y - r * 0.85, x + side * r * 0.48 + r * 0.5, y + 0.15 * r), fill=fill
            )
        pen.polygon(
            [(x - r * 0.93, y - r * 0.16), (x, y - r * 0.5), (x + r * 0.93, y - r * 0.16), (x, y + r * 0.95)], fill=fill
        )
    elif thing.shape == "star":
        polygon(5, 0, 0.42)
    else:
        polygon({"triangle": 3, "diamond": 4, "hexagon": 6}[thing.shape], 0)


def _ask_shapes(rng: Random, things: list[_Thing], palette: list[str], kinds: list[str]) -> list[Turn]:
    count, by_name = len(things), Counter(thing.name for thing in things)
    by_shape, by_colour = Counter(thing.shape for thing in things), Counter(thing.colour for thing in things)
    turns = [
        ("How many shapes are in the picture?", sentence(f"{counted(count, 'shape')}.")),
        ("Describe the image.", _describe(things)),
        ("List every object with its colour.", sentence(listed([a(thing.name) for thing in _in_order(things)]) + ".")),
    ]
    for thing in things:
        if by_shape[thing.shape] == 1:
            turns.append((f"What colour is the {thing.shape}?", f"The {thing.shape} is {thing.colour}."))
        if by_colour[thing.colour] == 1:
            turns.append((f"What shape is the {thing.colour} object?", sentence(f"{a(thing.shape)}.")))
        if by_name[thing.name] == 1:
            turns.append((f"Where is the {thing.name}?", sentence(f"{thing.place}.")))
    for colour in palette[:2]:
        found = [thing.shape for thing in _in_order(things) if thing.colour == colour]
        turns.append((f"How many {colour} shapes are there?", sentence(f"{number(len(found))}.") if found else "None."))
        answer = f"Yes, {a(found[0])}." if found else "No."
        turns.append((f"Is any of the shapes {colour}?", answer))
    for kind in kinds[:2]:
        plural = "crosses" if kind == "cross" else f"{kind}s"
        turns.append((f"Count the {plural}.", f"{by_shape[kind]}"))
        turns.append((f"Is there {a(kind)} in the image? Answer yes or no.", "Yes" if by_shape[kind] else "No"))
    return turns + _compare(rng, [thing for thing in things if by_name[thing.name] == 1])


def _compare(rng: Random, unique: list[_Thing]) -> list[Turn]:
    if len(unique) < 2:
        return []
    turns = []
    first, second = rng.sample(unique, 2)
    if first.column != second.column:
        side = "left" if first.column < second.column else "right"
        turns.append(
            (f"Is the {first.name} to the left or to the right of the {second.name}?", f"It is to the {side} of it.")
        )
    if first.row != second.row:
        side = "above" if first.row < second.row else "below"
        turns.append((f"Is the {first.name} above or below the {second.name}?", f"The {first.name} is {side} it."))
    if max(first.radius, second.radius) > 1.2 * min(first.radius, second.radius):
        larger = max(first, second, key=lambda thing: thing.radius)
        turns.append((f"Which is larger, the {first.name} or the {second.name}?", f"The {larger.name} is larger."))
    return turns


def _in_order(things: list[_Thing]) -> list[_Thing]:
    return sorted(things, key=lambda thing: (thing.row, thing.column))


def _describe(things: list[_Thing]) -> str:
    parts = [f"{a(thing.name)} {thing.place}" for thing in _in_order(things)]
    return f"The picture shows {'; '.join(parts[:-1]) + ' and ' + parts[-1] if len(parts) > 1 else parts[0]}."


_SKIES = {
    "a clear day": ((96, 164, 228), (206, 230, 246)),
    "sunset": ((90, 72, 140), (250, 164, 96)),
    "night": ((12, 16, 44), (44, 54, 96)),
    "an overcast day": ((150, 158, 168), (212, 216, 220)),
    "early morning": ((150, 184, 224), (250, 214, 196)),
}
_GROUNDS = {"grass": (92, 148, 72), "sand": (216, 190, 138), "snow": (238, 242, 248), "sea": (38, 92, 140)}


def landscape(rng: Random) -> tuple[Image.Image, list[Turn]]:
    """Draw sky, hills, ground, trees, perhaps a house or a boat, and ask about them."""
    width, height = image_size(rng, ((1, 1), (3, 2), (2, 1), (2, 3)))
    width, height = 2 * width, 2 * height
    time, ground = rng.choice(list(_SKIES)), rng.choice(list(_GROUNDS))
    dark = {"night": 0.6, "sunset": 0.25, "an overcast day": 0.15}.get(time, 0.0)
    image = shaded((width, height), *_SKIES[time])
    pen = ImageDraw.Draw(image)
    light = _draw_light(rng, pen, time, width, height)
    horizon = height * rng.uniform(0.55, 0.68)
    ridges = rng.randint(0, 3)
    for i in range(ridges):
        tone = mix(mix((104, 122, 150), (60, 96, 76), i / 3), (10, 14, 30), dark)
        _draw_ridge(rng, pen, width, height, horizon - height * (0.16 - 0.05 * i), tone)
    floor = mix(_GROUNDS[ground], (10, 14, 30), dark)
    image.paste(shaded((width, height - int(horizon)), floor, mix(floor, (0, 0, 0), 0.25)), (0, int(horizon)))
    facts = {"trees": 0, "roof": None, "boat": None}
    if ground == "sea":
        facts["boat"] = rng.choice(["red", "white", "yellow", "green", None])
        _draw_waves(rng, pen, width, height, horizon, floor)
        if facts["boat"]:
            _draw_boat(
                pen, width * rng.uniform(0.3, 0.7), horizon + height * 0.13, height * 0.13, facts["boat"], dark / 2
            )
    else:
        facts["roof"] = rng.choice(["red", "brown", "blue", "grey", None])
        spots = rng.sample(range(6), rng.randint(1, 5))
        home = spots.pop() if facts["roof"] else None
        facts["trees"] = len(spots)
        for spot in sorted(spots):
            x, y = width * (spot + 0.5) / 6, horizon + height * rng.uniform(0.05, 0.2)
            _draw_tree(
                pen, x, y, min(width / 7, height * 0.24), mix((46, 104, 58), (10, 14, 30), dark), rng.random() < 0.5
            )
        if home is not None:
            _draw_house(
                pen, width * (home + 0.5) / 6, horizon + height * 0.13, min(width / 7, height / 5), facts["roof"], dark
            )
    return image.reduce(2), _ask_landscape(time, ground, ridges, light, facts)


def _draw_light(rng: Random, pen: ImageDraw.ImageDraw, time: str, width: int, height: int) -> str | None:
    if time == "an overcast day":
        for _ in range(7):
            x, y, r = rng.uniform(0, width), rng.uniform(0, height * 0.35), rng.uniform(0.08, 0.16) * width
            pen.ellipse((x - r, y - r * 0.35, x + r, y + r * 0.35), fill=(176, 182, 190))
        return None
    x, y, r = width * rng.uniform(0.15, 0.85), height * rng.uniform(0.12, 0.3), min(width, height) * 0.07
    if time == "night":
        for _ in range(40):
            star_x, star_y = rng.uniform(0, width), rng.uniform(0, height * 0.5)
            pen.ellipse((star_x, star_y, star_x + 3, star_y + 3), fill=(220, 224, 240))
    fill = {"night": (240, 238, 220), "sunset": (255, 214, 120), "early morning": (255, 236, 190)}.get(
        time, (255, 236, 130)
    )
    pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    return "moon" if time == "night" else "sun"


def _draw_ridge(rng: Random, pen: ImageDraw.ImageDraw, width: int, height: int, top: float, fill: tuple) -> None:
    waves = [(rng.uniform(0.5, 3.0), rng.uniform(0, 6.3), rng.uniform(0.01, 0.05)) for _ in range(3)]
    xs = range(0, width + 16, 16)
    line = [(x, top + height * sum(h * math.sin(f * 6.3 * x / width + p) for f, p, h in waves)) for x in xs]
    pen.polygon([*line, (width, height), (0, height)], fill=fill)


def _draw_waves(rng: Random, pen: ImageDraw.ImageDraw, width: int, height: int, horizon: float, sea: tuple) -> None:
    for _ in range(26):
        x, y = rng.uniform(-20, width), rng.uniform(horizon + 4, height)
        length = width * 0.03 * (1 + 3 * (y - horizon) / (height - horizon))
        pen.line((x, y, x + length, y), fill=mix(sea, (255, 255, 255), 0.22), width=3)


def _draw_boat(pen: ImageDraw.ImageDraw, x: float, y: float, s: float, hull: str, dark: float) -> None:
    fill, sail = mix(COLOURS[hull], (10, 14, 30), dark), mix((244, 240, 228), (10, 14, 30), dark)
    pen.polygon([(x - s, y), (x + s, y), (x + s * 0.65, y + s * 0.5), (x - s * 0.65, y + s * 0.5)], fill=fill)
    pen.line((x, y, x, y - s * 1.7), fill=mix((70, 50, 36), (10, 14, 30), dark), width=5)
    pen.polygon([(x + 5, y - s * 1.6), (x + 5, y - s * 0.15), (x + s * 0.85, y - s * 0.15)], fill=sail)


def _draw_tree(pen: ImageDraw.ImageDraw, x: float, y: float, s: float, leaf: tuple, conifer: bool) -> None:
    trunk = mix((92, 64, 42), leaf, 0.2)
    pen.rectangle((x - s * 0.07, y - s * 0.45, x + s * 0.07, y), fill=trunk)
    if conifer:
        for i in range(3):
            base, half = y - s * (0.25 + 0.3 * i), s * (0.42 - 0.09 * i)
            pen.polygon(
                [(x - half, base), (x + half, base), (x, base - s * 0.5)], fill=mix(leaf, (255, 255, 255), 0.05 * i)
            )
    else:
        for dx, dy, r in ((-0.2, 0.6, 0.27), (0.2, 0.6, 0.27), (0.0, 0.85, 0.3)):
            box = (x + s * (dx - r), y - s * (dy + r), x + s * (dx + r), y - s * (dy - r))
            pen.ellipse(box, fill=mix(leaf, (255, 255, 255), 0.1 * dy))


def _draw_house(pen: ImageDraw.ImageDraw, x: float, y: float, s: float, roof: str, dark: float) -> None:
    wall = mix((236, 224, 200), (10, 14, 30), dark)
    pen.rectangle((x - s * 0.5, y - s * 0.6, x + s * 0.5, y), fill=wall)
    top = mix(COLOURS[roof], (10, 14, 30), dark)
    pen.polygon([(x - s * 0.62, y - s * 0.58), (x + s * 0.62, y - s * 0.58), (x, y - s * 1.1)], fill=top)
    pen.rectangle((x - s * 0.1, y - s * 0.34, x + s * 0.12, y), fill=mix((104, 70, 44), (10, 14, 30), dark))
    window = (255, 226, 130) if dark > 0.25 else mix((130, 170, 200), (10, 14, 30), dark)
    for left in (-0.4, 0.22):
        pen.rectangle((x + s * left, y - s * 0.46, x + s * (left + 0.2), y - s * 0.26), fill=window)


def _ask_landscape(time: str, ground: str, ridges: int, light: str | None, facts: dict) -> list[Turn]:
    where = {"sea": "the open sea", "grass": "a green meadow", "sand": "a sandy plain", "snow": "a snowy field"}[ground]
    when = {"sunset": "at sunset", "night": "at night", "early morning": "in the early morning"}.get(time, f"on {time}")
    things = [counted(facts["trees"], "tree")] if facts["trees"] else []
    things += [f"a house with a {facts['roof']} roof"] if facts["roof"] else []
    things += [f"a sailing boat with a {facts['boat']} hull"] if facts["boat"] else []
    text = f"The picture shows {where} {when}{' with ' + listed(things) if things else ''}."
    text += " Hills rise in the background." if ridges else " The horizon is flat."
    text += f" The {light} stands in the sky." if light else " Clouds cover the sky."
    turns = [
        ("Describe this picture in a few sentences.", text),
        ("What time of day is it, or what is the weather like?", sentence(f"it is {time}.")),
        ("Can you see any hills?", "Yes, in the background." if ridges else "No, the land is flat."),
        ("Is this a view of land or of water?", "Water: it shows the sea." if ground == "sea" else f"Land: {where}."),
        ("Write a short caption.", sentence(f"{where} {when}.")),
        (
            "Is the sun or the moon visible?",
            f"Yes, the {light} is." if light else "No, the sky is covered with clouds.",
        ),
    ]
    if ground != "sea":
        turns.append(
            ("How many trees are there?", sentence(f"{number(facts['trees'])}.") if facts["trees"] else "None.")
        )
    if facts["roof"]:
        turns.append(("What colour is the roof of the house?", sentence(f"{facts['roof']}.")))
    if facts["boat"]:
        turns.append(("What colour is the boat?", f"Its hull is {facts['boat']} and its sail is white."))
    return turns
