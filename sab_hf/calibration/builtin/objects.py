"""Things to read off in the built-in calibration set: signs, clocks, thermometers, dice, a game board."""

from __future__ import annotations

import math
from random import Random

from PIL import Image, ImageDraw

from .drawing import (
    COLOURS,
    Turn,
    a,
    fitting_size,
    font,
    image_size,
    listed,
    mix,
    number,
    readable_on,
    sentence,
    shaded,
)

_SQUARE = ((1, 1), (3, 2), (2, 3))
_WALLS = ((176, 162, 148), (120, 132, 140), (206, 196, 178), (150, 96, 78), (92, 112, 96), (196, 206, 214))

# What a sign says, line by line, and what it means.
_SIGNS = (
    (("STOP",), "Drivers must stop here."),
    (("EXIT",), "This is the way out."),
    (("NO", "PARKING"), "Cars must not be parked here."),
    (("OPEN", "9 - 17"), "The place is open from nine to five."),
    (("CLOSED", "on Sundays"), "It is closed on Sundays."),
    (("BAKERY", "fresh bread"), "Bread is sold here."),
    (("WET FLOOR",), "The floor is wet, so one should walk carefully."),
    (("QUIET", "PLEASE"), "One should not make noise here."),
    (("PUSH",), "The door must be pushed."),
    (("SALE", "50 % off"), "Things cost half of their usual price."),
    (("MIND", "THE STEP"), "There is a step that one could stumble over."),
    (("CAMPING", "2 km"), "A camping site is two kilometres away."),
    (("SORTIE",), "It is French and means exit."),
    (("ENTRADA",), "It is Spanish and means entrance."),
    (("AUSGANG",), "It is German and means exit."),
    (("CHIUSO",), "It is Italian and means closed."),
    (("MUSEU",), "It is Portuguese and means museum."),
)
_PLACES = ("EXIT", "BAKERY", "CAMPING", "SORTIE", "ENTRADA", "AUSGANG", "MUSEU")  # to which an arrow may point


def sign(rng: Random) -> tuple[Image.Image, list[Turn]]:
    """Put up a sign with a few words, perhaps a number and an arrow."""
    width, height = (2 * side for side in image_size(rng, ((1, 1), (3, 2), (2, 1))))
    lines, meaning = rng.choice(_SIGNS)
    if rng.random() < 0.35:
        kind, most = rng.choice([("PLATFORM", 14), ("ROOM", 320), ("GATE", 48), ("BUS", 99), ("HALL", 9)])
        value = rng.randint(1, most)
        lines, meaning = (kind, str(value)), f"It marks {kind.lower()} number {value}."
    colour = rng.choice([name for name in COLOURS if name not in ("grey", "pink")])
    arrow = rng.choice([None, "left", "right"]) if lines[-1].isdigit() or lines[0] in _PLACES else None
    wall = rng.choice(_WALLS)
    image = shaded((width, height), mix(wall, (255, 255, 255), 0.15), mix(wall, (0, 0, 0), 0.15))
    pen = ImageDraw.Draw(image)
    w, h = width * rng.uniform(0.68, 0.84), height * rng.uniform(0.5, 0.72)
    left, top = (width - w) * rng.uniform(0.3, 0.7), (height - h) * rng.uniform(0.25, 0.5)
    if rng.random() < 0.5:  # on a post
        pen.rectangle(
            (left + w / 2 - width * 0.02, top + h / 2, left + w / 2 + width * 0.02, height), fill=(96, 98, 102)
        )
    radius, tone = h * rng.choice([0.0, 0.08, 0.2]), readable_on(COLOURS[colour])
    pen.rounded_rectangle((left + 6, top + 8, left + w + 6, top + h + 8), radius, fill=mix(wall, (0, 0, 0), 0.4))
    pen.rounded_rectangle((left, top, left + w, top + h), radius, fill=COLOURS[colour])
    edge = h * 0.05
    pen.rounded_rectangle(
        (left + edge, top + edge, left + w - edge, top + h - edge),
        max(0, radius - edge),
        outline=tone,
        width=int(edge / 2),
    )
    rows = len(lines) + (arrow is not None)
    size = fitting_size(list(lines), w * 0.8, int(h * 0.72 / rows))
    for i, line in enumerate(lines):
        pen.text(
            (left + w / 2, top + h * (i + 0.5 + 0.12) / (rows + 0.24)), line, fill=tone, font=font(size), anchor="mm"
        )
    if arrow:
        _draw_arrow(
            pen, left + w / 2, top + h * (rows - 0.5 + 0.12) / (rows + 0.24), min(w * 0.16, h * 0.17), arrow, tone
        )
    return image.reduce(2), _ask_sign(" ".join(lines), meaning, colour, arrow)


def _draw_arrow(pen: ImageDraw.ImageDraw, x: float, y: float, s: float, side: str, tone: tuple) -> None:
    d = 1 if side == "right" else -1
    pen.line((x - d * s, y, x + d * s * 0.6, y), fill=tone, width=max(3, int(s * 0.22)))
    pen.polygon([(x + d * s, y), (x + d * s * 0.35, y - s * 0.4), (x + d * s * 0.35, y + s * 0.4)], fill=tone)


def _ask_sign(text: str, meaning: str, colour: str, arrow: str | None) -> list[Turn]:
    pointing = f"It points to the {arrow}." if arrow else "There is no arrow on the sign."
    return [
        ("What does the sign say?", f"It says “{text}”."),
        ("Read the text in the image. Give only the text.", text),
        ("What does this sign mean?", meaning),
        ("What is the colour of the sign?", sentence(f"{colour}.")),
        ("In which direction does the arrow point?", pointing),
        ("Is there an arrow on the sign?", f"Yes, it points {arrow}." if arrow else "No."),
        (
            "Describe the picture.",
            f"{sentence(a(colour))} sign with the text “{text}”{' and an arrow' if arrow else ''}.",
        ),
        (
            "How many words or numbers are on the sign?",
            sentence(f"{number(len(text.replace(' %', '%').replace(' - ', '-').split()))}."),
        ),
    ]


def clock(rng: Random) -> tuple[Image.Image, list[Turn]]:
    """Show a clock with two hands."""
    hour, minute = rng.randint(1, 12), rng.randrange(0, 60, 5)
    width, height = (2 * side for side in image_size(rng, _SQUARE))
    wall = rng.choice(_WALLS)
    image = shaded((width, height), mix(wall, (255, 255, 255), 0.2), wall)
    pen, r = ImageDraw.Draw(image), min(width, height) * rng.uniform(0.36, 0.46)
    x, y = width / 2, height / 2
    rim, face = rng.choice(["black", "red", "blue", "brown", "green"]), rng.choice([(252, 252, 248), (246, 238, 218)])
    pen.ellipse((x - r, y - r, x + r, y + r), fill=face, outline=COLOURS[rim], width=int(r * 0.09))
    for i in range(1, 13):
        angle = math.radians(30 * i)
        spot = (x + r * 0.76 * math.sin(angle), y - r * 0.76 * math.cos(angle))
        pen.text(spot, str(i), fill=(30, 30, 34), font=font(int(r * 0.2)), anchor="mm")
    for turn, length, thick in ((30 * hour + minute / 2, 0.46, 0.06), (6 * minute, 0.68, 0.035)):
        angle = math.radians(turn)
        end = (x + r * length * math.sin(angle), y - r * length * math.cos(angle))
        pen.line((x, y, *end), fill=(24, 24, 28), width=int(r * thick))
    pen.ellipse((x - r * 0.05, y - r * 0.05, x + r * 0.05, y + r * 0.05), fill=(24, 24, 28))
    past = {0: "", 15: "a quarter past ", 30: "half past ", 45: "a quarter to "}.get(
        minute, f"{minute} minutes past " if minute < 30 else f"{60 - minute} minutes to "
    )
    named = hour if minute <= 30 else hour % 12 + 1
    spoken = f"{past}{number(named)}" + (" o'clock" if minute == 0 else "")
    later = f"{hour % 12 + 1}:{minute:02d}"
    turns = [
        ("What time does the clock show?", f"It shows {hour}:{minute:02d}."),
        ("Say in words what time it is.", f"It is {spoken}."),
        ("Which time will it be in one hour?", f"{later}."),
        ("Where does the long hand point?", f"To the {minute // 5 or 12}, which stands for {minute} minutes."),
        ("What colour is the rim of the clock?", sentence(f"{rim}.")),
        ("What object is this?", "A round clock with an hour hand and a minute hand."),
    ]
    return image.reduce(2), turns


def thermometer(rng: Random) -> tuple[Image.Image, list[Turn]]:
    """Show a thermometer with a scale in degrees."""
    low = rng.choice([-20, -10, 0])
    top_value, value = low + 60, rng.randrange(low + 4, low + 58, 2)
    width, height = (2 * side for side in image_size(rng, ((1, 1), (2, 3))))
    wall = rng.choice(_WALLS)
    image = shaded((width, height), mix(wall, (255, 255, 255), 0.35), mix(wall, (255, 255, 255), 0.1))
    pen, tube = ImageDraw.Draw(image), width * 0.035
    x, top, bottom = width * 0.45, height * 0.11, height * 0.8
    fluid = COLOURS[rng.choice(["red", "blue"])]
    pen.rounded_rectangle((width * 0.24, height * 0.03, width * 0.8, height * 0.97), width * 0.06, fill=(252, 252, 250))
    size = int(min(width * 0.075, height * 0.05))
    for mark in range(low, top_value + 1, 2):
        y = bottom - (bottom - top) * (mark - low) / 60
        long = tube * (2.6 if mark % 10 == 0 else 1.2)
        pen.line((x + tube * 1.6, y, x + tube * 1.6 + long, y), fill=(60, 62, 68), width=3)
        if mark % 10 == 0:
            pen.text((x + tube * 4.8, y), str(mark), fill=(40, 42, 48), font=font(size), anchor="lm")
    level = bottom - (bottom - top) * (value - low) / 60
    pen.rounded_rectangle((x - tube, top - tube * 1.5, x + tube, bottom + tube), tube, fill=(222, 226, 230))
    pen.rectangle((x - tube * 0.7, level, x + tube * 0.7, bottom + tube), fill=fluid)
    bulb = tube * 2.1
    pen.ellipse((x - bulb, bottom, x + bulb, bottom + 2 * bulb), fill=fluid)
    shown = str(value)
    state = "below" if value < 0 else "above"
    advice = "a warm coat" if value < 8 else "a light jacket" if value < 19 else "light summer clothes"
    turns = [
        ("What temperature does the thermometer show?", f"{shown} degrees."),
        (
            "Is it above or below freezing?",
            "Exactly at zero degrees." if value == 0 else f"It is {state} zero: {shown} degrees.",
        ),
        ("What is the highest number on the scale?", f"{top_value}"),
        ("If it gets 10 degrees warmer, what will be shown?", f"{value + 10!s} degrees."),
        ("What would you wear outside, if the scale is in °C?", sentence(f"{advice}: it is {shown} degrees.")),
        ("Which instrument is this?", "A thermometer with a liquid column."),
    ]
    return image.reduce(2), turns


def dice(rng: Random) -> tuple[Image.Image, list[Turn]]:
    """Throw one to four dice onto a cloth."""
    rolls = [rng.randint(1, 6) for _ in range(rng.randint(1, 4))]
    width, height = (2 * side for side in image_size(rng, ((1, 1), (3, 2), (2, 1))))
    cloth = rng.choice([(30, 96, 66), (120, 34, 44), (44, 58, 110), (90, 70, 54)])
    image = shaded((width, height), mix(cloth, (255, 255, 255), 0.12), cloth)
    colour = rng.choice(["white", "red", "yellow", "blue", "black"])
    slot = width / len(rolls)
    side = int(min(slot * 0.62, height * 0.5))
    for i, roll in enumerate(rolls):
        die = Image.new("RGBA", (side, side))
        pen, dot = ImageDraw.Draw(die), side * 0.09
        pen.rounded_rectangle((0, 0, side - 1, side - 1), side * 0.18, fill=(*COLOURS[colour], 255))
        spots = {(0, 0)} if roll % 2 else set()
        spots |= {(-1, -1), (1, 1)} if roll > 1 else set()
        spots |= {(-1, 1), (1, -1)} if roll > 3 else set()
        spots |= {(-1, 0), (1, 0)} if roll == 6 else set()
        for dx, dy in spots:
            x, y = side * (0.5 + 0.27 * dx), side * (0.5 + 0.27 * dy)
            pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=readable_on(COLOURS[colour]))
        die = die.rotate(rng.uniform(-28, 28), Image.Resampling.BILINEAR, expand=True)
        spot = (int(slot * (i + 0.5) - die.width / 2), int((height - die.height) * rng.uniform(0.25, 0.75)))
        image.paste(die, spot, die)
    total = sum(rolls)
    turns = [
        ("How many dice are there?", sentence(f"{number(len(rolls))}.")),
        ("Which numbers do the dice show, from left to right?", f"{', '.join(map(str, rolls))}."),
        (
            "What is the sum of the dots?",
            f"{' + '.join(map(str, rolls))} = {total}." if len(rolls) > 1 else f"{total}.",
        ),
        ("What is the highest number that was rolled?", f"{max(rolls)}"),
        (f"What colour {'are the dice' if len(rolls) > 1 else 'is the die'}?", sentence(f"{colour}.")),
        ("Did anyone roll a six?", "Yes." if 6 in rolls else "No."),
        ("Is the sum even or odd?", f"{total} is {'odd' if total % 2 else 'even'}."),
    ]
    return image.reduce(2), turns


def board(rng: Random) -> tuple[Image.Image, list[Turn]]:
    """Show a game of noughts and crosses."""
    marks = rng.randint(2, 8)
    cells = [""] * 9
    for i, cell in enumerate(rng.sample(range(9), marks)):
        cells[cell] = "XO"[i % 2]
    size = 2 * image_size(rng, ((1, 1),))[0]
    ground, tone = rng.choice(
        [((250, 248, 240), (30, 32, 40)), ((36, 70, 58), (240, 244, 236)), ((28, 32, 60), (236, 236, 250))]
    )
    image = Image.new("RGB", (size, size), ground)
    pen, cell, edge = ImageDraw.Draw(image), size * 0.28, size * 0.08
    for i in (1, 2):
        at = edge + cell * i
        pen.line((at, edge, at, size - edge), fill=tone, width=6)
        pen.line((edge, at, size - edge, at), fill=tone, width=6)
    for i, mark in enumerate(cells):
        x, y, r = edge + cell * (i % 3 + 0.5), edge + cell * (i // 3 + 0.5), cell * 0.3
        if mark == "O":
            pen.ellipse(
                (x - r, y - r, x + r, y + r), outline=COLOURS["blue"] if ground[0] > 99 else COLOURS["yellow"], width=9
            )
        elif mark == "X":
            red = COLOURS["red"] if ground[0] > 99 else COLOURS["pink"]
            pen.line((x - r, y - r, x + r, y + r), fill=red, width=10)
            pen.line((x - r, y + r, x + r, y - r), fill=red, width=10)
    runs = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6)]
    winners = sorted({cells[i] for i, j, k in runs if cells[i] and cells[i] == cells[j] == cells[k]})
    row = rng.randrange(3)
    named = [{"X": "a cross", "O": "a nought", "": "an empty field"}[mark] for mark in cells[3 * row : 3 * row + 3]]
    turns = [
        ("Which game is this?", "Noughts and crosses, also called tic-tac-toe."),
        ("How many crosses are on the board?", f"{cells.count('X')}"),
        ("How many noughts are on the board?", f"{cells.count('O')}"),
        ("Has anyone three in a row?", f"Yes: {listed(winners)}." if winners else "No, nobody has."),
        (
            f"What is in the {('top', 'middle', 'bottom')[row]} row, from left to right?",
            sentence(f"{', '.join(named)}."),
        ),
        ("What is in the centre?", {"X": "A cross.", "O": "A nought.", "": "Nothing, it is empty."}[cells[4]]),
        ("How many fields are still empty?", f"{cells.count('')}"),
        (
            "Write the board as text, with a dot for an empty field.",
            "\n".join("".join(c or "." for c in cells[i : i + 3]) for i in (0, 3, 6)),
        ),
    ]
    return image.reduce(2), turns
