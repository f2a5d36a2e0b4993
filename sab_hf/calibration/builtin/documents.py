"""Documents of the built-in calibration set: receipts, menus, tables, forms."""

from __future__ import annotations

from random import Random

from PIL import Image

from . import words
from .drawing import Sheet, Turn, counted, mix, sentence

_PORTRAIT, _ANY = ((2, 3),), ((2, 3), (1, 1))
_CURRENCIES = ("$", "EUR ", "GBP ")


def receipt(rng: Random) -> tuple[Image.Image, list[Turn]]:
    """Print a shop's receipt: goods, prices, total, what was paid."""
    shop, sign, day, time = rng.choice(words.SHOPS), rng.choice(_CURRENCIES), words.date(rng), words.clock_time(rng)
    goods = rng.sample(list(words.GROCERIES), rng.randint(2, 6))
    prices = [words.price(rng, words.GROCERIES[name]) for name in goods]
    total = sum(prices)
    paid = rng.choice([None, (total // 500 + 1) * 500, (total // 1000 + 1) * 1000])
    sheet = Sheet(rng, _ANY if len(goods) < 4 else _PORTRAIT, len(goods) + 9, largest=20)
    sheet.write(shop, anchor="ma", scale=1.3, bold=True)
    sheet.skip(1.5)
    street = f"{rng.randint(2, 98)} {rng.choice(words.STREETS)}"
    for text in (street, f"{day}  {time}"):
        sheet.write(text, anchor="ma", scale=0.9)
        sheet.skip()
    sheet.rule(dashed=True)
    for name, cents in zip(goods, prices, strict=True):
        sheet.write(name)
        sheet.write(words.money(cents), anchor="ra")
        sheet.skip()
    sheet.rule(dashed=True)
    sheet.write("TOTAL", bold=True)
    sheet.write(f"{sign}{words.money(total)}", anchor="ra", bold=True)
    sheet.skip(1.2)
    lines = [("Paid by card", total)] if paid is None else [("Cash", paid), ("Change", paid - total)]
    for name, cents in lines:
        sheet.write(name)
        sheet.write(words.money(cents), anchor="ra")
        sheet.skip()
    sheet.skip(0.5)
    sheet.write("Thank you!", anchor="ma")
    dear, name = max(zip(prices, goods, strict=True))
    asked = rng.randrange(len(goods))
    how = (
        "By card."
        if paid is None
        else f"In cash: {sign}{words.money(paid)}, with {sign}{words.money(paid - total)} back."
    )
    turns = [
        ("Which shop is this receipt from?", f"It is from {shop}."),
        ("What is the total?", f"{sign}{words.money(total)}"),
        (f"How much did the {goods[asked].lower()} cost?", f"{sign}{words.money(prices[asked])}."),
        ("What is the date on the receipt?", f"{day}."),
        ("At what time was this bought?", f"At {time}."),
        ("How many different items were bought?", sentence(f"{counted(len(goods), 'item')}.")),
        ("Which item was the most expensive?", f"The {name.lower()}, at {sign}{words.money(dear)}."),
        ("How was it paid?", how),
        ("What is the address of the shop?", f"{street}."),
        ("Read all items and prices.", "\n".join(f"{g}: {words.money(p)}" for g, p in zip(goods, prices, strict=True))),
    ]
    return sheet.done(rng), turns


def menu(rng: Random) -> tuple[Image.Image, list[Turn]]:
    """Write a restaurant's menu with prices."""
    place = f"Cafe {rng.choice(words.LAST_NAMES)}"
    dishes = rng.sample(list(words.DISHES), rng.randint(4, 7))
    prices = {name: 10 * (words.price(rng, words.DISHES[name]) // 10) for name in dishes}
    special = rng.choice([name for name in dishes if name not in words.DRINKS] or dishes)
    sheet = Sheet(rng, _ANY, len(dishes) * 1.4 + 5)
    sheet.write(place, anchor="ma", scale=1.5, bold=True)
    sheet.skip(1.9)
    sheet.rule()
    for name in dishes:
        sheet.write(name + (" *" if name == special else ""))
        sheet.write(words.money(prices[name]), anchor="ra")
        sheet.skip(1.3)
    sheet.rule()
    sheet.write("* dish of the day", scale=0.9)
    cheap = min(dishes, key=lambda name: prices[name])
    first, second = rng.sample(dishes, 2)
    both = prices[first] + prices[second]
    budget = rng.randrange(400, 1500, 100)
    within = [name for name in dishes if prices[name] <= budget]
    turns = [
        ("What is the name of the restaurant?", f"{place}."),
        (f"How much is the {first.lower()}?", f"{words.money(prices[first])}."),
        ("Which dish is marked with a star, and what does the star mean?", f"{special}: it is the dish of the day."),
        (f"What do the {first.lower()} and the {second.lower()} cost together?", f"{words.money(both)}."),
        ("What is the cheapest thing on the menu?", f"The {cheap.lower()}, at {words.money(prices[cheap])}."),
        (f"What can I order for at most {words.money(budget)}?", f"{', '.join(within)}." if within else "Nothing."),
        ("How many dishes are listed?", f"{len(dishes)}"),
    ]
    return sheet.done(rng), turns


def table(rng: Random) -> tuple[Image.Image, list[Turn]]:
    """Rule a table of people with a city and a number each."""
    head, low, high = rng.choice([("Age", 18, 79), ("Points", 2, 99), ("Room", 101, 499), ("Hours", 4, 42)])
    count = rng.randint(3, 6)
    people, cities = rng.sample(words.FIRST_NAMES, count), rng.sample(words.CITIES, count)
    values = rng.sample(range(low, high + 1), count)
    sheet = Sheet(rng, ((3, 2), (1, 1)), count * 1.5 + 3.2, largest=18, columns=27)
    columns = (sheet.left + 4, sheet.left + sheet.width * 0.38, sheet.right - 4)
    top, step = sheet.y, sheet.step * 1.5
    header = mix((70, 110, 160), (250, 250, 250), rng.uniform(0.3, 0.8))
    sheet.pen.rectangle((sheet.left, top, sheet.right, top + step), fill=header)
    for i in range(count + 2):
        y = top + step * i
        sheet.pen.line((sheet.left, y, sheet.right, y), fill=(120, 124, 130))
    for row in [("Name", "City", head), *zip(people, cities, map(str, values), strict=True)]:
        sheet.y = top + step * 0.25
        for text, x, anchor in zip(row, columns, ("la", "la", "ra"), strict=True):
            sheet.write(text, at=x, anchor=anchor, bold=row[0] == "Name")
        top += step
    i, j = rng.sample(range(count), 2)
    best = max(range(count), key=values.__getitem__)
    mean = f"({' + '.join(map(str, values))}) / {count} = {round(sum(values) / count, 2):g}"
    turns = [
        (f"Which city is listed for {people[i]}?", f"{cities[i]}."),
        (f"What number does the column {head} give for {people[j]}?", f"{values[j]}"),
        (f"Who is listed with {cities[j]}?", f"{people[j]}."),
        (f"Which row has the largest number under {head}?", f"That of {people[best]}, with {values[best]}."),
        ("How many people are in the table?", sentence(f"{counted(count, 'person', 'people')}.")),
        ("What are the column headings?", f"Name, City and {head}."),
        (
            "Write the table in Markdown.",
            f"| Name | City | {head} |\n|---|---|---|\n"
            + "\n".join(f"| {p} | {c} | {v} |" for p, c, v in zip(people, cities, values, strict=True)),
        ),
    ]
    if head in ("Age", "Points", "Hours"):
        turns.append((f"What is the mean of the column {head}?", f"{mean}."))
    return sheet.done(rng), turns


def form(rng: Random) -> tuple[Image.Image, list[Turn]]:
    """Fill in a form with boxes to tick."""
    title = rng.choice(["Library card", "Sports club", "Hotel registration", "Language course", "Parking permit"])
    fields = {
        "Name": words.full_name(rng),
        "Date of birth": f"{rng.randint(1, 28):02d}.{rng.randint(1, 12):02d}.{rng.randint(1950, 2005)}",
        "City": rng.choice(words.CITIES),
        "Phone": f"0{rng.randint(20, 99)} {rng.randint(100, 999)} {rng.randint(1000, 9999)}",
        "Number": f"{rng.choice('ABCDEFG')}-{rng.randint(1000, 9999)}",
    }
    options = rng.choice([("Day", "Week", "Year"), ("Adult", "Student", "Child"), ("Mail", "Phone", "Letter")])
    ticked = rng.randrange(3)
    sheet = Sheet(rng, _ANY, 15, largest=16, columns=27)
    sheet.write(title, anchor="ma", scale=1.4, bold=True)
    sheet.skip(1.9)
    for name, value in fields.items():
        sheet.write(f"{name}:", scale=0.85)
        sheet.write(value, at=sheet.left + sheet.width * 0.42)
        sheet.y += sheet.step * 0.9
        x, y = sheet.left + sheet.width * 0.4, sheet.y + sheet.step * 0.15
        sheet.pen.line((x, y, sheet.right, y), fill=(150, 154, 160))
        sheet.y += sheet.step * 0.8
    for i, option in enumerate(options):
        x, s = sheet.left + sheet.width * i / 3, sheet.size
        sheet.pen.rectangle((x, sheet.y, x + s, sheet.y + s), outline=sheet.ink)
        if i == ticked:
            sheet.pen.line((x + 2, sheet.y + 2, x + s - 2, sheet.y + s - 2), fill=sheet.ink, width=2)
            sheet.pen.line((x + s - 2, sheet.y + 2, x + 2, sheet.y + s - 2), fill=sheet.ink, width=2)
        sheet.write(option, at=x + s * 1.25, scale=0.82)
    asked = rng.sample(list(fields), 2)
    turns = [
        ("What kind of form is this?", f"A form for: {title.lower()}."),
        *((f"What is written in the field “{name}”?", f"{fields[name]}") for name in asked),
        ("Which box is ticked?", f"The box “{options[ticked]}”."),
        (f"Is the box “{options[0]}” ticked?", "Yes." if ticked == 0 else "No, it is empty."),
        ("Extract the form as JSON.", "{" + ", ".join(f'"{name}": "{value}"' for name, value in fields.items()) + "}"),
        ("Who filled in this form?", f"{fields['Name']}."),
    ]
    return sheet.done(rng), turns
