"""Messages of the built-in calibration set: letters, departure boards, chats."""

from __future__ import annotations

from random import Random

from PIL import Image, ImageDraw

from . import words
from .drawing import Sheet, Turn, font, image_size, wrap

_REASONS = (
    ("the meeting of our reading group", "We will talk about the new novel and choose the next one."),
    ("the repair of your bicycle", "The brakes were worn and have been replaced; the chain is clean again."),
    ("your visit to the museum", "The guided tour lasts one hour and starts at the main entrance."),
    ("the lease of your flat", "The new contract is enclosed; please sign both copies and return one."),
    ("the concert of the town choir", "Doors open half an hour earlier, and seats cannot be reserved."),
    ("your order of garden seeds", "One of the five packets is out of stock and will follow later."),
    ("the parents' evening", "Each talk takes ten minutes; please bring the blue folder."),
    ("the water supply in your street", "The pipes will be cleaned, and the water may look cloudy for a while."),
)


def letter(rng: Random) -> tuple[Image.Image, list[Turn]]:
    """Write a short letter with sender, date, reason and a time to come."""
    sender, reader = words.full_name(rng), words.full_name(rng)
    city, day, weekday = rng.choice(words.CITIES), words.date(rng), rng.choice(words.WEEKDAYS)
    time, (reason, detail) = words.clock_time(rng, 8, 19), rng.choice(_REASONS)
    sheet = Sheet(rng, ((2, 3),), 19, largest=15, columns=30)
    body = (
        f"I am writing about {reason}. {detail} The date is {weekday} at {time}. Please tell me if that does not suit."
    )
    sheet.write(sender)
    sheet.skip()
    sheet.write(f"{city}, {day}", anchor="ra")
    sheet.skip(2)
    sheet.write(f"Dear {reader.split()[0]},")
    sheet.skip(1.5)
    for line in wrap(body, sheet.size, sheet.width):
        sheet.write(line)
        sheet.skip()
    sheet.skip(0.6)
    sheet.write("Kind regards,")
    sheet.skip(1.4)
    sheet.write(sender.split()[0], scale=1.2)
    turns = [
        ("Who wrote this letter?", f"{sender}."),
        ("To whom is the letter addressed?", f"To {reader.split()[0]}."),
        ("What is the letter about?", f"It is about {reason}."),
        ("When and where was it written?", f"In {city}, on {day}."),
        ("Which day and time does the letter name?", f"{weekday} at {time}."),
        (
            "Summarize the letter in one sentence.",
            f"{sender} writes to {reader.split()[0]} about {reason}, on {weekday} at {time}.",
        ),
        ("Transcribe the main paragraph.", body),
        ("What should the reader do if the date does not suit?", f"Tell {sender.split()[0]}."),
    ]
    return sheet.done(rng), turns


def timetable(rng: Random) -> tuple[Image.Image, list[Turn]]:
    """Show a departure board of a station."""
    count = rng.randint(3, 6)
    cities = rng.sample(words.RAILWAY_CITIES, count)
    times = sorted({words.clock_time(rng) for _ in range(3 * count)})[:count]
    platforms = [str(rng.randint(1, 12)) for _ in cities]
    late = rng.choice([None, rng.randrange(count)])
    width, height = image_size(rng, ((3, 2), (1, 1)), least=320)
    image = Image.new("RGB", (width, height), rng.choice([(18, 22, 34), (20, 36, 70), (28, 30, 32)]))
    pen, size = ImageDraw.Draw(image), max(12, min(width // 21, height // (2 * count + 3)))
    amber, step, left = (
        rng.choice([(255, 196, 60), (250, 250, 244), (150, 230, 160)]),
        height / (count + 2),
        width // 20,
    )
    columns = (left, width * 0.24, width * 0.96)
    for x, text, anchor in zip(columns, ("Time", "Departures", "Platform"), ("lm", "lm", "rm"), strict=True):
        pen.text((x, step * 0.7), text, fill=(190, 194, 204), font=font(int(size * 0.85)), anchor=anchor)
    pen.line((left, step * 1.15, width - left, step * 1.15), fill=(120, 124, 136), width=2)
    for i, row in enumerate(zip(times, cities, platforms, strict=True)):
        y = step * (1.7 + i)
        for x, text, anchor in zip(columns, row, ("lm", "lm", "rm"), strict=True):
            pen.text((x, y), text, fill=amber, font=font(size), anchor=anchor)
        if i == late:
            pen.text((width * 0.82, y), "late", fill=(255, 110, 90), font=font(size), anchor="rm")
    i = rng.randrange(count)
    turns = [
        (f"When does the train to {cities[i]} leave?", f"At {times[i]}."),
        (f"From which platform does the train to {cities[i]} leave?", f"From platform {platforms[i]}."),
        (f"Where does the train at {times[-1]} go?", f"To {cities[-1]}."),
        ("Which train leaves first?", f"The one to {cities[0]}, at {times[0]}."),
        ("Is any train late?", "No." if late is None else f"Yes, the train to {cities[late]}."),
        ("How many departures are listed?", f"{count}"),
        (
            "Read the board line by line.",
            "\n".join(f"{t} {c}, platform {p}" for t, c, p in zip(times, cities, platforms, strict=True)),
        ),
    ]
    return image, turns


_TALKS = (
    ("Are you still coming on {day}?", "Yes, I will be there at {time}.", "Great, I will bring the {thing}."),
    ("Did you find the {thing}?", "Yes, it was in {city}!", "Good. See you on {day} at {time}."),
    ("Can we move our call to {day}?", "Sure, does {time} work?", "Perfect. I will send you the {thing}."),
    ("I am at the station in {city}.", "Already? The train comes at {time}.", "I know. I forgot the {thing} on {day}."),
)


def chat(rng: Random) -> tuple[Image.Image, list[Turn]]:
    """Show a chat of two people on a phone."""
    friend, lines = rng.choice(words.FIRST_NAMES), rng.choice(_TALKS)
    slots = {
        "day": rng.choice(words.WEEKDAYS),
        "time": words.clock_time(rng),
        "thing": rng.choice(["map", "tickets", "blue umbrella", "cake", "photo album", "spare keys", "red notebook"]),
        "city": rng.choice(words.CITIES),
    }
    lines = [line.format(**slots) for line in lines]
    width, height = image_size(rng, ((2, 3), (1, 1)), least=320)
    size, dark = max(12, width // 19), rng.random() < 0.4
    image = Image.new("RGB", (width, height), (24, 26, 32) if dark else (238, 240, 244))
    pen, mine = ImageDraw.Draw(image), rng.choice([(46, 116, 226), (36, 150, 96), (128, 80, 190)])
    pen.rectangle((0, 0, width, size * 2.2), fill=(40, 44, 54) if dark else (252, 252, 253))
    pen.text(
        (width / 2, size * 1.1), friend, fill=(240, 240, 242) if dark else (24, 24, 28), font=font(size), anchor="mm"
    )
    y = size * 3.0
    for i, line in enumerate(lines):
        rows = wrap(line, size, width * 0.66)
        wide = max(font(size).getlength(row) for row in rows) + size * 1.2
        x, tall = (size * 0.7, width - size * 0.7 - wide)[i % 2], size * (1.3 * len(rows) + 0.7)
        fill = mine if i % 2 else ((58, 62, 74) if dark else (255, 255, 255))
        pen.rounded_rectangle((x, y, x + wide, y + tall), size * 0.7, fill=fill)
        for k, row in enumerate(rows):
            tone = (250, 250, 250) if i % 2 or dark else (24, 24, 28)
            pen.text((x + size * 0.6, y + size * (0.45 + 1.3 * k)), row, fill=tone, font=font(size))
        y += tall + size * 0.6
    turns = [
        ("Who is this chat with?", f"With {friend}."),
        ("What does the first message say?", f"“{lines[0]}”"),
        ("What is the answer of the person who holds the phone?", f"“{lines[1]}”"),
        ("Which time is mentioned?", f"{slots['time']}."),
        ("Which day of the week is mentioned?", f"{slots['day']}."),
        ("Transcribe the whole chat.", f"{friend}: {lines[0]}\nMe: {lines[1]}\n{friend}: {lines[2]}"),
        (f"What is the last message of {friend}?", f"“{lines[2]}”"),
        ("Is the screen light or dark?", "Dark." if dark else "Light."),
    ]
    return image, turns
