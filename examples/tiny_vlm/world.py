"""Draw a small visual world with questions whose answers are known exactly.

Three kinds of picture (scenes of coloured shapes, signs with characters, bar charts) and three text-only exercises. A
sample is a function of the random generator it is drawn from and of nothing else: no files, no fonts of the system.
"""

import random
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 96  # pixels, both sides

VISUAL_SKILLS = ("color", "shape", "size", "position", "count", "exists", "read", "chart")
TEXT_SKILLS = ("arithmetic", "copy", "recall")
SKILLS = VISUAL_SKILLS + TEXT_SKILLS
SCENE_SKILLS = VISUAL_SKILLS[:6]

COLORS = {
    "red": (222, 34, 38),
    "green": (36, 160, 52),
    "blue": (40, 74, 222),
    "yellow": (242, 220, 36),
    "purple": (132, 38, 178),
    "orange": (246, 134, 20),
    "pink": (252, 130, 200),
    "cyan": (44, 206, 224),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
RADII = {"small": 7, "large": 13}  # pixels
POSITIONS = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
CELL = IMAGE_SIZE // 3
BAR_UNIT = 8  # pixels of height for one unit of a bar's value

NAMES = ("Tom", "Eva", "Sam", "Mia", "Leo", "Zoe", "Max", "Ida", "Ben", "Amy", "Dan", "Kim", "Jon", "Sue", "Ray", "Pia")
CITIES = ("Rome", "Oslo", "Lima", "Paris", "Cairo", "Delhi", "Quito", "Tokyo", "Milan", "Bonn", "Kyiv", "Seoul")
FOODS = ("rice", "soup", "bread", "fish", "cake", "eggs", "corn", "figs", "beans", "pears", "nuts", "plums")
COPY_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"

# Capitals and digits, five columns by seven rows; O and I are left out because of 0 and 1. Two lines of 17.
SIGN_CHARACTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ0123456789"
_GLYPHS = """
01110 11110 01110 11110 11111 11111 01111 10001 00111 10001 10000 10001 10001 11110 01110 11110 01111
10001 10001 10001 10001 10000 10000 10000 10001 00010 10010 10000 11011 11001 10001 10001 10001 10000
10001 10001 10000 10001 10000 10000 10000 10001 00010 10100 10000 10101 10101 10001 10001 10001 10000
11111 11110 10000 10001 11110 11110 10111 11111 00010 11000 10000 10101 10011 11110 10001 11110 01110
10001 10001 10000 10001 10000 10000 10001 10001 00010 10100 10000 10001 10001 10000 10101 10100 00001
10001 10001 10001 10001 10000 10000 10001 10001 10010 10010 10000 10001 10001 10000 10010 10010 00001
10001 11110 01110 11110 11111 10000 01111 10001 01100 10001 11111 10001 10001 10000 01101 10001 11110

11111 10001 10001 10001 10001 10001 11111 01110 00100 01110 11110 00010 11111 00110 11111 01110 01110
00100 10001 10001 10001 10001 10001 00001 10001 01100 10001 00001 00110 10000 01000 00001 10001 10001
00100 10001 10001 10001 01010 01010 00010 10011 00100 00001 00001 01010 11110 10000 00010 10001 10001
00100 10001 10001 10101 00100 00100 00100 10101 00100 00010 01110 10010 00001 11110 00100 01110 01111
00100 10001 10001 10101 01010 00100 01000 11001 00100 00100 00001 11111 00001 10001 00100 10001 00001
00100 10001 01010 11011 10001 00100 10000 10001 00100 01000 00001 00010 10001 10001 00100 10001 00010
00100 01110 00100 10001 10001 00100 11111 01110 01110 11111 11110 00010 01110 01110 00100 01110 01100
"""
GLYPH_SCALE = 2  # pixels of a glyph's dot
GLYPH_ADVANCE = 6 * GLYPH_SCALE


@dataclass(frozen=True)
class Thing:
    """A shape of a scene, in the cell (row, column) of a grid of three by three."""

    color: str
    shape: str
    size: str
    row: int
    column: int

    @property
    def position(self) -> str:
        return POSITIONS[self.row][self.column]


@dataclass(frozen=True)
class Sign:
    """A panel of one colour with characters on it."""

    color: str
    text: str


@dataclass(frozen=True)
class Bar:
    """A bar of a chart; its value is 1 to 9."""

    color: str
    value: int


@dataclass
class Sample:
    """One picture, or none, with questions about it.

    skill: what the first question asks for, one of `SKILLS`.
    image: RGB, `IMAGE_SIZE` pixels square, or None for a text-only skill.
    turns: (question, answer) pairs; an evaluation sample has one.
    things: what was drawn, for checking the answers.
    """

    skill: str
    image: Image.Image | None
    turns: list[tuple[str, str]]
    things: list = field(default_factory=list)

    @property
    def answer(self) -> str:
        """Return the answer to the last question, the one that `messages(with_answer=False)` leaves open."""
        return self.turns[-1][1]

    def messages(self, with_answer: bool = True) -> list[dict]:
        """Return the sample as chat messages for `apply_chat_template`; the image is in the first user message."""
        messages = []
        for i, (question, answer) in enumerate(self.turns):
            content = [{"type": "text", "text": question}]
            if i == 0 and self.image is not None:
                content.insert(0, {"type": "image", "image": self.image})
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return messages if with_answer else messages[:-1]


def sample(rng: random.Random, skill: str, turns: int = 1) -> Sample:
    """Draw one sample whose first question is of `skill`.

    rng: the only source of chance; the same state gives the same sample.
    turns: the number of questions, about the same image; later ones are of any skill that fits it.

    Raises ValueError for a skill that is not in `SKILLS`.
    """
    if skill in TEXT_SKILLS:
        pairs = [_EXERCISES[skill](rng)]
        while len(pairs) < turns:
            pairs.append(_EXERCISES[rng.choice(TEXT_SKILLS)](rng))
        return Sample(skill, None, pairs)
    if skill not in VISUAL_SKILLS:
        raise ValueError(f"`skill` must be one of {', '.join(SKILLS)}, got {skill!r}")

    pairs = None
    while not pairs:  # a scene may have nothing that the skill can ask for, such as a colour that occurs once
        if skill == "read":
            things, ask = _signs(rng), [_ask_read]
        elif skill == "chart":
            things, ask = _bars(rng), [_ask_chart]
        else:
            things, ask = _scene(rng), [_SCENE_QUESTIONS[s] for s in SCENE_SKILLS]
        first = _SCENE_QUESTIONS[skill] if skill in SCENE_SKILLS else ask[0]
        pairs = [pair] if (pair := first(rng, things)) else None
    for _ in range(3 * turns):  # repeats and impossible questions are passed over, so a poor image may yield fewer
        if len(pairs) >= turns:
            break
        pair = rng.choice(ask)(rng, things)
        if pair and pair not in pairs:
            pairs.append(pair)
    draw = {"read": _draw_signs, "chart": _draw_bars}.get(skill, _draw_scene)
    return Sample(skill, _finish(rng, draw, things), pairs, things)


def samples(num: int, seed: int | str, skills: tuple[str, ...] = SKILLS) -> list[Sample]:
    """Draw `num` samples with one question each, the skills in turn.

    Sample i depends on `seed`, i and its skill only, so a longer list begins with the shorter one.
    """
    return [sample(random.Random(f"world/{seed}/{i}"), skills[i % len(skills)]) for i in range(num)]


# ---- what is in a picture


def _scene(rng):
    # A small palette makes repeated colours and shapes, which counting needs; a large one makes unique names.
    colors = rng.sample(list(COLORS), rng.randint(2, 6))
    shapes = rng.sample(SHAPES, rng.randint(2, 5))
    cells = rng.sample(range(9), rng.randint(2, 5))
    return [
        Thing(rng.choice(colors), rng.choice(shapes), rng.choice(("small", "large")), cell // 3, cell % 3)
        for cell in cells
    ]


def _signs(rng):
    colors = rng.sample(list(COLORS), rng.randint(1, 3))
    return [Sign(color, "".join(rng.choices(SIGN_CHARACTERS, k=rng.randint(3, 5)))) for color in colors]


def _bars(rng):
    colors = rng.sample(list(COLORS), rng.randint(3, 5))
    return [Bar(color, rng.randint(1, 9)) for color in colors]


# ---- questions


def _unique(things, *names):
    """Return the things that no other thing shares the named attributes with."""
    keys = [tuple(getattr(thing, name) for name in names) for thing in things]
    return [thing for thing, key in zip(things, keys, strict=True) if keys.count(key) == 1]


def _the(rng, things, attributes):
    """Pick a thing and a phrase that names it alone, by one of the tuples of `attributes`; None if there is none."""
    for names in rng.sample(attributes, len(attributes)):
        if candidates := _unique(things, *names):
            thing = rng.choice(candidates)
            if names == ("row", "column"):
                where = "in the center" if thing.position == "center" else f"at the {thing.position}"
                return thing, f"object {where}"
            words = [getattr(thing, name) for name in names]
            return thing, " ".join(words if "shape" in names else [*words, "object"])
    return None


def _a(word):
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _ask_color(rng, things):
    if found := _the(rng, things, [("shape",), ("size", "shape"), ("row", "column")]):
        return f"What color is the {found[1]}?", found[0].color


def _ask_shape(rng, things):
    if found := _the(rng, things, [("color",), ("size", "color"), ("row", "column")]):
        return f"What shape is the {found[1]}?", found[0].shape


def _ask_size(rng, things):
    if found := _the(rng, things, [("color", "shape"), ("color",), ("shape",)]):
        return f"Is the {found[1]} small or large?", found[0].size


def _ask_position(rng, things):
    if found := _the(rng, things, [("color", "shape"), ("color",), ("shape",)]):
        return f"Where is the {found[1]}?", found[0].position


def _ask_count(rng, things):
    kind = rng.randrange(5)
    if kind == 0:
        return "How many objects are there?", str(len(things))
    if kind <= 2:
        color = rng.choice([thing.color for thing in things] if rng.random() < 0.9 else list(COLORS))
        return f"How many {color} objects are there?", str(sum(thing.color == color for thing in things))
    shape = rng.choice([thing.shape for thing in things] if rng.random() < 0.9 else SHAPES)
    plural = shape + ("es" if shape == "cross" else "s")
    return f"How many {plural} are there?", str(sum(thing.shape == shape for thing in things))


def _ask_exists(rng, things):
    pairs = {(thing.color, thing.shape) for thing in things}
    if rng.random() < 0.5:
        color, shape = rng.choice(sorted(pairs))
        return f"Is there {_a(color)} {shape}?", "yes"
    # A present colour with a present shape is the hard "no": it takes binding, not a list of what is there.
    colors = sorted({c for c, _ in pairs}) if rng.random() < 0.8 else list(COLORS)
    shapes = sorted({s for _, s in pairs}) if rng.random() < 0.8 else SHAPES
    absent = [(c, s) for c in colors for s in shapes if (c, s) not in pairs]
    if absent:
        color, shape = rng.choice(absent)
        return f"Is there {_a(color)} {shape}?", "no"


def _ask_read(rng, signs):
    sign = rng.choice(signs)
    return f"What does the {sign.color + ' ' if len(signs) > 1 else ''}sign say?", sign.text


def _ask_chart(rng, bars):
    if rng.random() < 0.3:
        word, pick = rng.choice((("tallest", max), ("shortest", min)))
        extreme = pick(bar.value for bar in bars)
        found = [bar.color for bar in bars if bar.value == extreme]
        if len(found) == 1:
            return f"Which bar is the {word}?", found[0]
    bar = rng.choice(bars)
    return f"What is the value of the {bar.color} bar?", str(bar.value)


_SCENE_QUESTIONS = {
    "color": _ask_color,
    "shape": _ask_shape,
    "size": _ask_size,
    "position": _ask_position,
    "count": _ask_count,
    "exists": _ask_exists,
}


def _arithmetic(rng):
    a, b = rng.randrange(100), rng.randrange(100)
    if rng.random() < 0.5:
        return f"What is {a} + {b}?", str(a + b)
    a, b = max(a, b), min(a, b)
    return f"What is {a} - {b}?", str(a - b)


def _copy(rng):
    text = "".join(rng.choices(COPY_CHARACTERS, k=rng.randint(4, 8)))
    return f"Repeat: {text}", text


def _recall(rng):
    who = rng.sample(NAMES, 2)
    asked = rng.randrange(2)
    if rng.random() < 0.5:
        what = rng.sample(CITIES, 2)
        facts = [f"{name} lives in {city}." for name, city in zip(who, what, strict=True)]
        question = f"Where does {who[asked]} live?"
    else:
        what = rng.sample(FOODS, 2)
        facts = [f"{name} eats {food}." for name, food in zip(who, what, strict=True)]
        question = f"What does {who[asked]} eat?"
    return f"{facts[0]} {facts[1]} {question}", what[asked]


_EXERCISES = {"arithmetic": _arithmetic, "copy": _copy, "recall": _recall}


# ---- drawing


def _shade(rng, color):
    return tuple(min(255, max(0, channel + rng.randint(-12, 12))) for channel in COLORS[color])


def _polygon(shape, x, y, r):
    if shape == "triangle":
        return [(x, y - r), (x + r, y + r - 1), (x - r, y + r - 1)]
    if shape == "diamond":
        return [(x, y - r), (x + r, y), (x, y + r), (x - r, y)]
    if shape == "cross":
        a = r // 3 + 1
        offsets = [(-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a), (a, r), (-a, r), (-a, a), (-r, a), (-r, -a)]
        return [(x + dx, y + dy) for dx, dy in [*offsets, (-a, -a)]]
    # the ten corners of a star: every second one at 0.4 of the radius
    corners = [(0, -10), (2.4, -3.2), (9.5, -3.1), (3.8, 1.2), (5.9, 8.1), (0, 4), (-5.9, 8.1), (-3.8, 1.2)]
    return [(x + dx * r / 10, y + dy * r / 10) for dx, dy in [*corners, (-9.5, -3.1), (-2.4, -3.2)]]


def _draw_scene(rng, canvas, things):
    for thing in things:
        r = RADII[thing.size]
        slack = CELL // 2 - r - 1
        x = thing.column * CELL + CELL // 2 + rng.randint(-slack, slack)
        y = thing.row * CELL + CELL // 2 + rng.randint(-slack, slack)
        fill = _shade(rng, thing.color)
        if thing.shape == "circle":
            canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif thing.shape == "square":
            a = r - r // 6
            canvas.rectangle((x - a, y - a, x + a, y + a), fill=fill)
        else:
            canvas.polygon(_polygon(thing.shape, x, y, r), fill=fill)


@cache
def _glyph(character):
    """Return a character as a PIL bitmap (mode "1")."""
    block, index = divmod(SIGN_CHARACTERS.index(character), 17)
    rows = [line.split()[index] for line in _GLYPHS.strip().split("\n\n")[block].splitlines()]
    dots = np.array([[dot == "1" for dot in row] for row in rows], dtype=np.uint8) * 255
    return Image.fromarray(dots.repeat(GLYPH_SCALE, 0).repeat(GLYPH_SCALE, 1)).convert("1")


def _draw_signs(rng, canvas, signs):
    room = IMAGE_SIZE // len(signs)  # signs stand one below the other
    for i, sign in enumerate(signs):
        width, height = len(sign.text) * GLYPH_ADVANCE - GLYPH_SCALE, 7 * GLYPH_SCALE
        margin = rng.randint(4, 7)
        x = rng.randint(margin + 1, IMAGE_SIZE - width - margin - 2)
        y = i * room + rng.randint(margin + 1, room - height - margin - 2)
        fill = _shade(rng, sign.color)
        canvas.rectangle((x - margin, y - margin, x + width + margin - 1, y + height + margin - 1), fill=fill)
        dark = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] < 120
        ink = (250, 250, 250) if dark else (10, 10, 10)
        for j, character in enumerate(sign.text):
            canvas.bitmap((x + j * GLYPH_ADVANCE, y), _glyph(character), fill=ink)


def _draw_bars(rng, canvas, bars):
    base = rng.randint(84, 90)  # y of the value zero
    pitch = rng.randint(13, 84 // len(bars)) if len(bars) > 3 else rng.randint(16, 26)
    left = rng.randint(6, IMAGE_SIZE - len(bars) * pitch - 2)
    width = pitch - rng.randint(4, 6)
    canvas.rectangle((left - 3, base - 9 * BAR_UNIT - 2, left + len(bars) * pitch, base), fill=(250, 250, 250))
    for value in range(1, 10):
        line = (150, 150, 150) if value == 5 else (215, 215, 215)
        canvas.line((left - 3, base - value * BAR_UNIT, left + len(bars) * pitch, base - value * BAR_UNIT), fill=line)
    for i, bar in enumerate(bars):
        x = left + i * pitch + 1
        canvas.rectangle((x, base - bar.value * BAR_UNIT, x + width, base), fill=_shade(rng, bar.color))
    canvas.line((left - 3, base, left + len(bars) * pitch, base), fill=(20, 20, 20))


_RAMP = np.linspace(-1, 1, IMAGE_SIZE)
_RAMPS = [
    np.broadcast_to(np.rint(sign * 12 * ramp).astype(np.int16), (IMAGE_SIZE, IMAGE_SIZE, 3))
    for sign in (-1, 1)
    for ramp in (_RAMP[:, None, None], _RAMP[None, :, None])
]


def _finish(rng, draw, things):
    """Draw on a light or dark background, and add a slope of light and a little noise."""
    low, high = (205, 240) if rng.random() < 0.5 else (18, 55)
    grey = rng.randint(low, high)
    background = tuple(min(255, max(0, grey + rng.randint(-8, 8))) for _ in range(3))
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), background)
    draw(rng, ImageDraw.Draw(image), things)
    noise = np.frombuffer(rng.randbytes(IMAGE_SIZE * IMAGE_SIZE * 3), dtype=np.uint8) & 15
    pixels = np.asarray(image).astype(np.int16) + noise.reshape(IMAGE_SIZE, IMAGE_SIZE, 3)
    pixels += rng.choice(_RAMPS) - np.int16(8)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
