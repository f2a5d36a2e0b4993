"""Textures of the built-in calibration set: natural materials and regular patterns."""

from __future__ import annotations

from random import Random

import numpy as np
from PIL import Image, ImageDraw

from .drawing import COLOURS, Turn, a, image_size, sentence


def noise(rng: Random, size: tuple[int, int], cells: tuple[int, int], octaves: int = 3) -> np.ndarray:
    """Return smooth random values in 0..1, [height, width] float32, with features of about size / cells pixels."""
    source = np.random.default_rng(rng.getrandbits(32))
    total, weight = np.zeros((size[1], size[0]), np.float32), 0.0
    for octave in range(octaves):
        shape = (cells[1] * 2**octave + 1, cells[0] * 2**octave + 1)
        layer = Image.fromarray(source.random(shape, np.float32)).resize(size, Image.Resampling.BICUBIC)
        total += np.asarray(layer) * 0.5**octave
        weight += 0.5**octave
    return np.clip(total / weight, 0, 1)


_MATERIALS = {
    "wood": ("the grain of a wooden board", "brown", (118, 78, 44), (196, 148, 98), (1, 14), "fine lines run along it"),
    "marble": ("polished marble", "white and grey", (120, 124, 132), (244, 243, 240), (4, 4), "dark veins cross it"),
    "sand": ("sand", "pale yellow", (186, 154, 104), (232, 208, 160), (40, 40), "it is made of many small grains"),
    "water": ("rippling water", "blue", (20, 74, 122), (120, 182, 214), (5, 16), "light plays on flat waves"),
    "grass": (
        "a lawn seen from above",
        "green",
        (42, 88, 34),
        (134, 176, 78),
        (46, 24),
        "short blades of grass cover it",
    ),
    "clouds": (
        "clouds in a blue sky",
        "blue and white",
        (84, 146, 214),
        (250, 250, 252),
        (3, 3),
        "the clouds are soft at the edges",
    ),
    "rust": ("rusted metal", "orange and brown", (92, 48, 30), (208, 120, 62), (9, 9), "it has darker patches"),
}


def texture(rng: Random) -> tuple[Image.Image, list[Turn]]:
    """Draw a natural material from smooth noise, and ask what it is."""
    size = image_size(rng)
    material = rng.choice(list(_MATERIALS))
    what, colours, low, high, cells, detail = _MATERIALS[material]
    values = noise(rng, size, cells)
    if material == "marble":
        values = np.abs(2 * values - 1) ** 0.5
    values = np.clip((values - 0.5) * rng.uniform(1.2, 1.8) + 0.5, 0, 1)[..., None]
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    image = Image.fromarray((low + (high - low) * values).astype(np.uint8))
    turns = [
        ("What does this image show?", f"It shows {what}."),
        ("Describe the surface.", sentence(f"{what}: it is {colours}, and {detail}.")),
        ("Which colours dominate?", sentence(f"{colours}.")),
        ("Is there any writing in the picture?", "No, only a surface without any text."),
        ("Which material could this be? Answer in one word.", material.capitalize()),
        ("How would you describe the pattern?", sentence(f"{detail}.")),
    ]
    return image, turns


def pattern(rng: Random) -> tuple[Image.Image, list[Turn]]:
    """Draw a regular pattern of two colours, and ask about it."""
    width, height = image_size(rng)
    width, height = 2 * width, 2 * height
    kind = rng.choice(["horizontal stripes", "vertical stripes", "diagonal stripes", "checks", "dots", "bricks"])
    first, second = rng.sample([name for name in COLOURS if name != "grey"], 2)
    step = rng.choice([32, 48, 64, 80])
    image = Image.new("RGB", (width, height), COLOURS[first])
    pen, fill = ImageDraw.Draw(image), COLOURS[second]
    if kind == "diagonal stripes":
        for x in range(-height, width, 2 * step):
            pen.polygon([(x, height), (x + step, height), (x + step + height, 0), (x + height, 0)], fill=fill)
    for i, y in enumerate(range(0, height, step)):
        if kind == "horizontal stripes" and i % 2:
            pen.rectangle((0, y, width, y + step - 1), fill=fill)
        for j, x in enumerate(range(-step if kind == "bricks" else 0, width, step)):
            if (kind == "vertical stripes" and j % 2) or (kind == "checks" and (i + j) % 2):
                pen.rectangle((x, y, x + step - 1, y + step - 1), fill=fill)
            elif kind == "dots":
                pen.ellipse((x + step * 0.2, y + step * 0.2, x + step * 0.8, y + step * 0.8), fill=fill)
            elif kind == "bricks" and j % 2 == 0:
                left = x + (step if i % 2 else 0)
                pen.rectangle((left + 3, y + 3, left + 2 * step - 4, y + step - 4), fill=fill)
    ground = {"dots": f"{second} dots on {a(first)} ground", "bricks": f"{second} bricks with {first} joints"}.get(
        kind, f"{kind} in {first} and {second}"
    )
    turns = [
        ("What pattern is this?", sentence(f"{ground}.")),
        ("Which two colours does the pattern use?", sentence(f"{first} and {second}.")),
        ("Is the pattern regular?", f"Yes, the {kind} repeat evenly across the whole image."),
        ("Are there stripes in this image?", f"Yes, {kind}." if "stripes" in kind else f"No, it shows {kind}."),
        (
            "Describe the image for someone who cannot see it.",
            f"A flat, regular pattern: {ground}, filling the whole picture.",
        ),
    ]
    return image.reduce(2), turns
