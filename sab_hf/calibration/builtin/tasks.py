"""Small tasks with an exact answer for the built-in calibration set: sums, copying, recall, lists, JSON, code."""

from __future__ import annotations

import json
from random import Random

from . import words
from .drawing import Turn, listed, number, sentence


def arithmetic(rng: Random) -> list[Turn]:
    """Compute, alone or several times in a row."""
    turns = []
    for _ in range(rng.randint(1, 3)):
        a, b, c = rng.randint(12, 989), rng.randint(11, 489), rng.randint(3, 19)
        quotient = rng.randint(12, 99)
        turns.append(
            rng.choice(
                [
                    (f"What is {a} + {b}?", f"{a} + {b} = {a + b}"),
                    (f"Compute {a + b} - {b}.", f"{a + b} - {b} = {a}"),
                    (f"What is {a} times {c}?", f"{a} × {c} = {a * c}"),
                    (f"Divide {quotient * c} by {c}.", f"{quotient * c} / {c} = {quotient}"),
                    (f"What is {c * 5} % of {b * 20}?", f"{c * 5} % of {b * 20} is {c * 5 * b * 20 // 100}."),
                    (
                        f"{a} + {b} * {c} = ?",
                        f"First the product: {b} × {c} = {b * c}; the result is {a + b * c}.",
                    ),
                    (f"Is {a} divisible by {c}?", f"{'No' if a % c else 'Yes'}: {a} = {a // c} × {c} + {a % c}."),
                    (f"Which is larger, {a} or {b * 2}?", f"{'They are equal.' if a == 2 * b else max(a, 2 * b)}"),
                ]
            )
        )
    return turns


def word_problem(rng: Random) -> list[Turn]:
    """Solve a problem told in words, step by step."""
    first, second = rng.sample(words.FIRST_NAMES, 2)
    thing = rng.choice(["apples", "stamps", "marbles", "postcards", "tickets", "pencils", "cookies"])
    many, few, times, cost = rng.randint(20, 90), rng.randint(2, 19), rng.randint(2, 9), rng.randint(2, 30)
    speed, hours, people = rng.randrange(40, 130, 5), rng.randint(2, 7), rng.randint(2, 8)
    city, other = rng.sample(words.RAILWAY_CITIES, 2)
    left, total, start = many - few, times * few + many, f"{few % 12 + 6}:{times * 5:02d}"
    problems = [
        (
            f"{first} has {many} {thing} and gives {few} of them to {second}. How many are left?",
            f"{many} - {few} = {left}. {first} has {left} {thing} left.",
        ),
        (
            f"A box holds {few} {thing}. {first} buys {times} boxes, and {second} has {many} {thing}. "
            "How many do they have together?",
            f"The boxes hold {times} × {few} = {times * few}. Together they have {times * few} + {many} = {total}.",
        ),
        (
            f"A car leaves {city} for {other} at {speed} km per hour. How far has it come after {hours} hours?",
            f"Distance is speed times time: {speed} × {hours} = {speed * hours} km.",
        ),
        (
            f"{first} pays {times} tickets at {cost} euros each with {cost * times + few} euros. What is the change?",
            f"The tickets cost {times} × {cost} = {times * cost} euros, so {first} gets {few} euros back.",
        ),
        (
            f"{sentence(number(people))} friends share {people * many} {thing} equally. How many does each get?",
            f"{people * many} / {people} = {many}. Each gets {many} {thing}.",
        ),
        (
            f"A train leaves {city} at {start} and needs {hours} hours to {other}. When does it arrive?",
            f"{hours} hours after {start} it is {few % 12 + 6 + hours}:{times * 5:02d}.",
        ),
        (
            f"{first} is {many} years old, {second} is {few} years younger. How old will {second} be in {times} years?",
            f"{second} is {many} - {few} = {left} now, and {left + times} in {times} years.",
        ),
    ]
    return [rng.choice(problems)]


def units(rng: Random) -> list[Turn]:
    """Convert units of length, mass, time and temperature."""
    value, tenth = rng.randint(2, 240), rng.randint(11, 995) / 10
    hours, minutes = rng.randint(1, 9), rng.randrange(5, 60, 5)
    choices = [
        (f"How many metres are {tenth} km?", f"{tenth} km are {round(tenth * 1000)} m."),
        (f"Convert {value * 5} cm to metres.", f"{value * 5} cm = {value * 5 / 100:g} m"),
        (
            f"How many minutes are {hours} h {minutes} min?",
            f"{hours} × 60 + {minutes} = {hours * 60 + minutes} minutes.",
        ),
        (f"How many grams are {tenth} kg?", f"{tenth} kg are {round(tenth * 1000)} g."),
        (f"What is {value} °C in °F?", f"{value} × 9 / 5 + 32 = {value * 9 / 5 + 32:g} °F"),
        (f"How many seconds are {value} minutes?", f"{value} × 60 = {value * 60} seconds."),
        (f"How many bytes are {value} KiB?", f"{value} × 1024 = {value * 1024} bytes."),
    ]
    return rng.sample(choices, rng.randint(1, 3))


def copying(rng: Random) -> list[Turn]:
    """Repeat a line exactly, reversed or in capitals."""
    code = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ23456789") for _ in range(rng.randint(6, 14)))
    line = ", ".join(rng.sample(words.CITIES + words.FIRST_NAMES, rng.randint(3, 7)))
    phone = f"+{rng.randint(20, 98)} {rng.randint(100, 999)} {rng.randint(100000, 999999)}"
    address = f"{words.full_name(rng)}, {rng.randint(1, 180)} {rng.choice(words.STREETS)}, {rng.choice(words.CITIES)}"
    choices = [
        (f"Repeat this exactly: {code}", code),
        (f"Spell the code {code} with a hyphen between its letters.", "-".join(code)),
        (f"Copy the following line without any change.\n{line}", line),
        (f"Write this list in reverse order: {line}", ", ".join(reversed(line.split(", ")))),
        (f"Write in capital letters: {line}", line.upper()),
        (f"Only give back the phone number: you can reach me under {phone} until noon.", phone),
        (f"Write the address on three lines: {address}", address.replace(", ", "\n")),
        (f"How many characters does {code} have?", f"{len(code)}"),
    ]
    return rng.sample(choices, rng.randint(1, 2))


def recall(rng: Random) -> list[Turn]:
    """Find facts again in a text about several people."""
    count = rng.randint(3, 5)
    people, cities = rng.sample(words.FIRST_NAMES, count), rng.sample(words.CITIES, count)
    jobs = rng.sample(["baker", "nurse", "carpenter", "teacher", "pilot", "gardener", "chemist", "painter"], count)
    pets = rng.sample(["a cat", "two dogs", "a parrot", "some hens", "a tortoise", "no pets", "a rabbit"], count)
    facts = [
        f"{p} works as a {j}, lives in {c} and has {t}." for p, j, c, t in zip(people, jobs, cities, pets, strict=True)
    ]
    i, j, k = (rng.randrange(count) for _ in range(3))
    questions = [
        (f"Where does {people[i]} live?", f"In {cities[i]}."),
        (f"Who works as a {jobs[j]}?", f"{people[j]}."),
        (f"Which animals does the {jobs[k]} have?", sentence(f"{pets[k]}.")),
        (f"Who lives in {cities[j]}, and with what pets?", f"{people[j]}, with {pets[j]}."),
        ("Name all people in the order of the text.", f"{listed(people)}."),
    ]
    (question, answer), *more = rng.sample(questions, rng.randint(1, 3))
    return [(f"{' '.join(facts)}\n\n{question}", answer), *more]


def lists(rng: Random) -> list[Turn]:
    """Sort, filter and count a list."""
    items = rng.sample(list(words.GROCERIES), rng.randint(4, 8))
    numbers = [rng.randint(1, 999) for _ in range(rng.randint(4, 8))]
    shown = ", ".join(items)
    letter = rng.choice("BCOT")
    starts = [item for item in items if item.startswith(letter)]
    even = [str(n) for n in numbers if n % 2 == 0]
    figures = ", ".join(map(str, numbers))
    choices = [
        (f"Sort alphabetically: {shown}", ", ".join(sorted(items))),
        (f"How many items are on this list? {shown}", f"{len(items)}"),
        (f"Which of these begin with {letter}? {shown}", f"{', '.join(starts)}" if starts else "None of them."),
        (f"Turn this into a bullet list: {shown}", "\n".join(f"- {item}" for item in items)),
        (f"Sort from small to large: {figures}", ", ".join(map(str, sorted(numbers)))),
        (f"Pick the even numbers: {figures}", ", ".join(even) if even else "There are none."),
        (f"What is the largest number? {figures}", f"{max(numbers)}"),
    ]
    return rng.sample(choices, rng.randint(1, 3))


def structured(rng: Random) -> list[Turn]:
    """Turn a sentence into JSON, CSV or a table, or read a value from it."""
    record = {
        "name": words.full_name(rng),
        "city": rng.choice(words.CITIES),
        "age": rng.randint(18, 90),
        "member": rng.random() < 0.5,
        "languages": rng.sample(["English", "French", "Hindi", "Spanish", "Turkish", "Arabic"], rng.randint(1, 3)),
    }
    spoken, is_member = listed(record["languages"]), "is" if record["member"] else "is not"
    text = f"{record['name']} from {record['city']} is {record['age']} years old and speaks {spoken}. "
    text += f"This person {is_member} a member."
    data = json.dumps(record, indent=2 if rng.random() < 0.5 else None)
    key = rng.choice(["name", "city", "age"])
    choices = [
        (f"Extract name, city, age, member and languages as JSON.\n\n{text}", data),
        (f"Describe this record in words.\n\n{data}", text),
        (f"What is the value of “{key}”?\n\n{data}", f"{record[key]}"),
        (
            f"Write as CSV with a header: name, city and age.\n\n{text}",
            f"name,city,age\n{record['name']},{record['city']},{record['age']}",
        ),
        (
            f"Make a Markdown table of it.\n\n{data}",
            "| key | value |\n|---|---|\n" + "\n".join(f"| {k} | {json.dumps(v)} |" for k, v in record.items()),
        ),
    ]
    return [rng.choice(choices)]


# A request, the code, and an expression with its value; {n} and {m} are filled in.
_CODE = (
    (
        "Write a Python function that returns the sum of the multiples of {n} below a limit.",
        "def sum_of_multiples(limit):\n    return sum(range(0, limit, {n}))",
        lambda n, m: (f"sum_of_multiples({m})", sum(range(0, m, n))),
    ),
    (
        "Write a Python function that counts the words of at least {n} letters in a text.",
        "def count_long_words(text):\n    return sum(len(word) >= {n} for word in text.split())",
        lambda n, m: (f'count_long_words("{"ab " * (m % 7)}{"x" * n}")', 1 + (m % 7 if n <= 2 else 0)),
    ),
    (
        "Write a Python function that splits a list into chunks of {n}.",
        "def chunks(items):\n    return [items[i : i + {n}] for i in range(0, len(items), {n})]",
        lambda n, m: (f"len(chunks(list(range({m}))))", -(-m // n)),
    ),
    (
        "Write a Python function that raises a number to the power of {n} without the operator **.",
        "def power(base):\n    result = 1\n    for _ in range({n}):\n        result *= base\n    return result",
        lambda n, m: (f"power({m % 9 + 2})", (m % 9 + 2) ** n),
    ),
    (
        "Write a Python function that returns True if a number has exactly {n} digits.",
        "def has_digits(value):\n    return len(str(abs(value))) == {n}",
        lambda n, m: (f"has_digits({m})", len(str(m)) == n),
    ),
    (
        "Write a Python class for a counter that starts at {m} and grows by {n}.",
        "class Counter:\n    def __init__(self):\n        self.value = {m}\n\n"
        "    def step(self):\n        self.value += {n}\n        return self.value",
        lambda n, m: ("Counter().step()", m + n),
    ),
)


def code(rng: Random) -> list[Turn]:
    """Write a small function, or say what it gives."""
    request, source, example = rng.choice(_CODE)
    n, m = rng.randint(2, 12), rng.randint(13, 999)
    fill = {"n": n, "m": m}
    source = source.format(**fill)
    call, value = example(n, m)
    block = f"```python\n{source}\n```"
    if rng.random() < 0.5:
        return [(request.format(**fill), block), (f"What does `{call}` return?", f"`{call}` returns {value}.")]
    return [(f"What is the value of `{call}`?\n\n{block}", f"It is {value}.")]


def calendar(rng: Random) -> list[Turn]:
    """Answer questions about days, months and appointments."""
    day, month, ahead = rng.randrange(7), rng.randrange(12), rng.randint(2, 30)
    start, length = rng.randrange(8 * 60, 18 * 60, 5), rng.randrange(15, 150, 5)
    end = start + length
    what = rng.choice(["meeting", "lesson", "film", "concert", "match", "lecture"])
    begin, finish = f"{start // 60}:{start % 60:02d}", f"{end // 60}:{end % 60:02d}"
    choices = [
        (
            f"Today is {words.WEEKDAYS[day]}. Which weekday is it in {ahead} days?",
            f"{ahead} days are {ahead // 7} weeks and {ahead % 7} days, so it is {words.WEEKDAYS[(day + ahead) % 7]}.",
        ),
        (f"The {what} starts at {begin} and takes {length} minutes. When does it end?", f"At {finish}."),
        (f"How long is a {what} from {begin} to {finish}?", f"It takes {length} minutes."),
        (
            f"Which month comes {number(ahead % 12 or 12)} months after {words.MONTHS[month]}?",
            f"{words.MONTHS[(month + (ahead % 12 or 12)) % 12]}.",
        ),
    ]
    return rng.sample(choices, rng.randint(1, 3))
