"""What all drawings of the built-in calibration set share: colours, fonts, sizes, small grammar."""

from __future__ import annotations

from functools import lru_cache
from random import Random

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Turn = tuple[str, str]  # a question about an image, and its answer

COLOURS: dict[str, Colour] = {
    "red": (208, 42, 48),
    "orange": (240, 138, 36),
    "yellow": (246, 205, 40),
    "green": (44, 150, 74),
    "blue": (38, 96, 196),
    "purple": (124, 66, 164),
    "pink": (240, 132, 176),
    "brown": (128, 82, 48),
    "black": (28, 28, 30),
    "white": (250, 250, 248),
    "grey": (136, 140, 146),
    "turquoise": (42, 178, 178),
}

# Long sides in pixels and shapes (width : height) whose token counts stay moderate also where a model cuts images
# into tiles: 3:4, for example, would become 12 tiles and an overview in InternVL.
LONG_SIDES = (224, 256, 288, 320, 336, 336, 384, 448)
ASPECTS = ((1, 1), (1, 1), (3, 2), (2, 3), (2, 1), (1, 2))

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def image_size(rng: Random, aspects: tuple = ASPECTS, least: int = 0) -> tuple[int, int]:
    """Draw the width and height of an image, in pixels.

    Args:
        rng: source of the choice.
        aspects: (width, height) ratios to choose from.
        least: smallest long side.
    """
    side = rng.choice([side for side in LONG_SIDES if side >= least])
    width, height = rng.choice(aspects)
    longest = max(width, height)
    return side * width // longest, side * height // longest


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's own font at a size in pixels: no font of the system is needed."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> float:
    """Return how wide a line of text is, in pixels."""
    return font(size).getlength(text)


def fitting_size(lines: list[str], width: float, largest: int, smallest: int = 9) -> int:
    """Return the largest font size at which every line fits into `width` pixels."""
    widest = max(text_width(line, 100) for line in lines) / 100
    return max(smallest, min(largest, int(width / max(widest, 0.1))))


def wrap(text: str, size: int, width: float) -> list[str]:
    """Break a text into lines of at most `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(joined, size) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Blend two colours; share 0 gives the first, 1 the second."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))


def shaded(size: tuple[int, int], top: Colour, bottom: Colour) -> Image.Image:
    """Return an image that fades from one colour at the top to another at the bottom."""
    strip = Image.new("RGB", (1, 16))
    strip.putdata([mix(top, bottom, i / 15) for i in range(16)])
    return strip.resize((1, size[1]), Image.Resampling.BILINEAR).resize(size, Image.Resampling.NEAREST)


def paper(rng: Random, size: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return a sheet of paper, white to cream, a little darker to one side, and its pen."""
    tint = rng.choice([(255, 255, 255), (252, 250, 244), (247, 244, 234), (240, 245, 250), (250, 250, 252)])
    image = shaded(size, tint, mix(tint, (200, 200, 205), rng.uniform(0, 0.25)))
    return image, ImageDraw.Draw(image)


def ink(rng: Random) -> Colour:
    """Return a dark colour for text."""
    return rng.choice([(24, 24, 28), (32, 36, 60), (58, 40, 30), (20, 52, 44), (48, 48, 52)])


def on_desk(rng: Random, sheet: Image.Image) -> Image.Image:
    """Lay a sheet, slightly turned, on a surface, as in a photograph of a document."""
    wood = rng.choice([(150, 112, 78), (96, 72, 56), (70, 78, 88), (176, 168, 156), (60, 92, 84)])
    width, height = sheet.size
    desk = shaded((width, height), mix(wood, (255, 255, 255), 0.12), mix(wood, (0, 0, 0), 0.18))
    small = sheet.resize((width * 15 // 16, height * 15 // 16), Image.Resampling.BICUBIC)
    angle = rng.uniform(-2.5, 2.5)
    mask = Image.new("L", small.size, 255).rotate(angle, Image.Resampling.BILINEAR, expand=True)
    small = small.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    left, top = (width - small.width) // 2, (height - small.height) // 2
    desk.paste((30, 26, 24), (left + 3, top + 4), mask.point(lambda value: value * 2 // 5))
    desk.paste(small, (left, top), mask)
    return desk


class Sheet:
    """A page that is written from top to bottom.

    Args:
        rng: source of its colours.
        aspects: (width, height) ratios to choose from.
        rows: lines that must fit.
        largest: font size in pixels where there is room.
        columns: letters of a usual size that must fit beside each other.
    """

    def __init__(self, rng: Random, aspects: tuple, rows: int, largest: int = 17, columns: int = 26):
        width, height = image_size(rng, aspects, least=320)
        self.image, self.pen = paper(rng, (width, height))
        self.ink, self.margin = ink(rng), max(8, width // 18)
        self.size = max(10, min(largest, int((height - 2 * self.margin) / rows / 1.3), int(width / columns / 0.52)))
        self.left, self.right, self.y = self.margin, width - self.margin, float(self.margin)

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def step(self) -> float:
        return self.size * 1.3

    def write(
        self, text: str, *, at: float | None = None, anchor: str = "la", scale: float = 1.0, bold: bool = False
    ) -> None:
        """Write one line at the current height, without going on to the next."""
        size = fitting_size([text], self.width, int(self.size * scale))
        x = {"l": self.left, "m": (self.left + self.right) / 2, "r": self.right}[anchor[0]] if at is None else at
        for shift in (0, 1) if bold else (0,):
            self.pen.text((x + shift, self.y), text, fill=self.ink, font=font(size), anchor=anchor)

    def skip(self, lines: float = 1.0) -> None:
        """Go on to the next line."""
        self.y += self.step * lines

    def rule(self, dashed: bool = False) -> None:
        """Draw a line across the page."""
        y, tone = self.y + self.step * 0.2, mix(self.ink, (255, 255, 255), 0.45)
        if dashed:
            for x in range(self.left, self.right, 8):
                self.pen.line((x, y, x + 4, y), fill=tone)
        else:
            self.pen.line((self.left, y, self.right, y), fill=tone)
        self.y += self.step * 0.5

    def done(self, rng: Random) -> Image.Image:
        """Return the page, sometimes as a photograph of it."""
        return on_desk(rng, self.image) if rng.random() < 0.3 else self.image


def readable_on(colour: Colour) -> Colour:
    """Return black or white, whichever can be read on a colour."""
    red, green, blue = colour
    return (20, 20, 22) if 0.3 * red + 0.59 * green + 0.11 * blue > 150 else (252, 252, 250)


def a(noun: str) -> str:
    """Put the indefinite article before a noun phrase."""
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


def listed(items: list[str]) -> str:
    """Join words as in a sentence: a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def number(count: int) -> str:
    """Spell a small number."""
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return a spelled number with its noun: one tree, three trees."""
    return f"{number(count)} {noun if count == 1 else plural or noun + 's'}"


def sentence(text: str) -> str:
    """Start a text with a capital."""
    return text[0].upper() + text[1:]
