"""Running text of the built-in calibration set: explanations, stories, letters, instructions, translations."""

from __future__ import annotations

from random import Random

from . import words
from .drawing import Turn, a, listed, number, sentence
from .topics import HOW_TO, TOPICS

_ASKS = (
    "Explain {1} {0}.",
    "Describe {1} {0}.",
    "Write a short paragraph {1}: {0}.",
    "I need a text {1}. The subject: {0}.",
    "Summarize {1} {0}.",
)
_AUDIENCES = (
    "for a school class",
    "for a newspaper",
    "in plain words",
    "for someone in a hurry",
    "for a visitor of a museum",
    "for my grandfather",
    "for an encyclopedia",
    "without technical terms",
    "in a few sentences",
    "for the radio",
    "for a travel guide",
    "for a blog",
)


def explanation(rng: Random) -> list[Turn]:
    """Explain one or two topics in a paragraph or a list, or ask for a sentence of such a text."""
    (topic, facts), (other, more) = rng.sample(TOPICS, 2)
    facts, more = facts[: rng.randint(3, len(facts))], more[: rng.randint(3, len(more))]
    audience, style, last = rng.choice(_AUDIENCES), rng.random(), facts[-1]
    if style < 0.35:
        turns = [(rng.choice(_ASKS).format(topic, audience), " ".join(facts))]
    elif style < 0.6:
        turns = [(f"Explain {audience} {topic}, and then {other}.", f"{' '.join(facts)}\n\n{' '.join(more)}")]
        last = more[-1]
    elif style < 0.8:
        numbered = rng.random() < 0.6
        marks = [f"{i + 1}." if numbered else "-" for i in range(len(facts))]
        request = f"Explain {audience} {topic}, as {'a numbered list' if numbered else 'bullet points'}."
        turns = [(request, "\n".join(f"{mark} {fact}" for mark, fact in zip(marks, facts, strict=True)))]
    else:
        at = rng.randrange(len(facts) + 1)
        text = " ".join([*facts[:at], more[0], *facts[at:]])
        question = f"One sentence does not belong in this text about {topic}. Which one is it?\n\n{text}"
        turns = [(question, more[0])]
    if style < 0.8 and rng.random() < 0.35:
        turns.append(
            rng.choice(
                [
                    ("Say the most important thing in one sentence.", facts[0]),
                    ("Thank you!", "You're welcome."),
                    (
                        "How does your text end?",
                        f"With the sentence: “{last}”",
                    ),
                ]
            )
        )
    return turns


_PLACES = ("market", "library", "harbour", "old mill", "railway station", "botanical garden", "lighthouse", "town hall")
_OBJECTS = (
    "a silver key",
    "a torn map",
    "an old violin",
    "a letter without a sender",
    "a small clock",
    "a box of seeds",
)
_WEATHER = (
    "It was raining",
    "Snow lay on the roofs",
    "The morning was clear and cold",
    "A warm wind blew from the sea",
)
_ENDINGS = (
    "and nobody ever asked where it had come from",
    "and from that day on the two of them met every week",
    "but the secret stayed between them",
    "and the whole town talked about it for a month",
)


def story(rng: Random) -> list[Turn]:
    """Tell a very short story and ask about it."""
    hero, friend = rng.sample(words.FIRST_NAMES, 2)
    place, thing, day, city = (
        rng.choice(_PLACES),
        rng.choice(_OBJECTS),
        rng.choice(words.WEEKDAYS),
        rng.choice(words.CITIES),
    )
    hour = rng.randint(5, 11)
    text = (
        f"{rng.choice(_WEATHER)} when {hero} came to the {place} of {city} on {day}, shortly after {number(hour)}. "
        f"On a bench lay {thing}. {hero} waited for its owner until noon, then took it home and showed it to {friend}. "
        f"“I have seen this before,” said {friend}, “in my grandmother's house.” They kept it, {rng.choice(_ENDINGS)}."
    )
    if rng.random() < 0.4:
        return [(f"Write a very short story in which {hero} finds {thing} near the {place} of {city}.", text)]
    questions = [
        ("What was found?", sentence(f"{thing}.")),
        ("Who had seen it before?", f"{friend} had."),
        ("On which day does the story happen, and in which city?", f"On {day}, in {city}."),
        (f"How long did {hero} wait?", "Until noon."),
        (
            "Retell the story in one sentence.",
            f"{hero} finds {thing} at the {place} of {city}, and {friend} recognizes it.",
        ),
    ]
    (first, answer), *more = rng.sample(questions, rng.randint(1, 3))
    return [(f"{text}\n\n{first}", answer), *more]


# What the mail is for: its subject and its body.
_MAIL = {
    "ask for a day off": (
        "{day} off",
        "I would like to take {day} off, because {why}. {cover} has agreed to take over my work.",
    ),
    "cancel an appointment": (
        "Our appointment on {day}",
        "Unfortunately I cannot come on {day}, because {why}. {cover} could come in my place.",
    ),
    "invite a colleague to a talk": (
        "Talk in {city}",
        "On {day} I will give a talk in {city}, and I would be glad if you came. {cover} will be there as well.",
    ),
    "say thanks for help": (
        "Thank you",
        "Thank you for your help on {day}. Without you and {cover} I would not have finished in time.",
    ),
    "report a delay": (
        "Delivery from {city}",
        "The delivery from {city} will arrive on {day} at the earliest, because of heavy snow. {cover} knows about it.",
    ),
}
_WHYS = (
    "my parents are visiting",
    "my daughter is ill",
    "I am moving house",
    "the heating has to be repaired",
    "I have to see a doctor",
)


def mail(rng: Random) -> list[Turn]:
    """Write an e-mail for a purpose, and perhaps change its tone."""
    purpose, reader, writer = rng.choice(list(_MAIL)), rng.choice(words.LAST_NAMES), rng.choice(words.FIRST_NAMES)
    slots = {
        "day": rng.choice(words.WEEKDAYS),
        "why": rng.choice(_WHYS),
        "cover": words.full_name(rng),
        "city": rng.choice(words.CITIES),
    }
    subject, body = (text.format(**slots) for text in _MAIL[purpose])
    request = f"Write a polite e-mail to Dr {reader} to {purpose}. The day is {slots['day']}; mention {slots['cover']}."
    turns = [(request, f"Subject: {subject}\n\nDear Dr {reader},\n\n{body}\n\nKind regards\n{writer}")]
    if rng.random() < 0.4:
        turns.append(("Shorter, and less formal, please.", f"Hi,\n\n{body.split('. ')[0]}.\n\nBest, {writer}"))
    return turns


def instructions(rng: Random) -> list[Turn]:
    """Give steps for a task, and answer what comes next or what is needed."""
    task, needs, steps = rng.choice(HOW_TO)
    amount = rng.randint(3, len(steps))
    who, place = (
        rng.choice(words.FIRST_NAMES),
        rng.choice(("at home", "with friends", "in the evening", "for the first time", "without help")),
    )
    day = rng.choice(words.WEEKDAYS)
    full = "\n".join(f"{i + 1}. {step}" for i, step in enumerate(steps[:amount]))
    turns = [(f"{who} wants to {task} {place} on {day}. What are the first {number(amount)} steps?", full)]
    i = rng.randrange(amount - 1)
    follow = [
        ("What is needed for it?", sentence(f"{listed(list(needs))}.")),
        (f"What comes after step {i + 1}?", steps[i + 1]),
        ("Write it as one paragraph.", " ".join(steps[:amount])),
    ]
    return turns + rng.sample(follow, rng.randint(0, 2))


# One sentence in several languages; {n} is a number written in digits, {c} a city.
_PHRASES = (
    {
        "English": "The train to {c} leaves in {n} minutes.",
        "German": "Der Zug nach {c} fährt in {n} Minuten ab.",
        "French": "Le train pour {c} part dans {n} minutes.",
        "Spanish": "El tren a {c} sale en {n} minutos.",
        "Italian": "Il treno per {c} parte tra {n} minuti.",
        "Portuguese": "O trem para {c} parte em {n} minutos.",
        "Dutch": "De trein naar {c} vertrekt over {n} minuten.",
    },
    {
        "English": "We stayed in {c} for {n} days.",
        "German": "Wir sind {n} Tage in {c} geblieben.",
        "French": "Nous sommes restés {n} jours à {c}.",
        "Spanish": "Nos quedamos {n} días en {c}.",
        "Italian": "Siamo rimasti {n} giorni a {c}.",
        "Portuguese": "Ficamos {n} dias em {c}.",
        "Chinese": "我们在{c}住了{n}天。",
    },
    {
        "English": "A ticket to {c} costs {n} euros.",
        "German": "Eine Fahrkarte nach {c} kostet {n} Euro.",
        "French": "Un billet pour {c} coûte {n} euros.",
        "Spanish": "Un billete a {c} cuesta {n} euros.",
        "Italian": "Un biglietto per {c} costa {n} euro.",
        "Russian": "Билет до города {c} стоит {n} евро.",
        "Japanese": "{c}までの切符は{n}ユーロです。",
    },
    {
        "English": "My grandmother was born in {c} and is {n} years old.",
        "German": "Meine Großmutter ist in {c} geboren und ist {n} Jahre alt.",
        "French": "Ma grand-mère est née à {c} et elle a {n} ans.",
        "Spanish": "Mi abuela nació en {c} y tiene {n} años.",
        "Polish": "Moja babcia urodziła się w mieście {c} i ma {n} lat.",
        "Swedish": "Min mormor är född i {c} och är {n} år gammal.",
        "Turkish": "Büyükannem {c} doğumlu ve {n} yaşında.",
    },
)


def translation(rng: Random) -> list[Turn]:
    """Translate a sentence between languages."""
    phrase = rng.choice(_PHRASES)
    slots = {"n": rng.randint(61, 97), "c": rng.choice(words.SAME_IN_MOST_LANGUAGES)}
    source, target = rng.sample(list(phrase), 2)
    text, result = phrase[source].format(**slots), phrase[target].format(**slots)
    turns = [(f"Translate from {source} into {target}: {text}", result)]
    others = [name for name in phrase if name not in (source, target)]
    turns.append((f"And in {(third := rng.choice(others))}?", phrase[third].format(**slots)))
    if rng.random() < 0.3:
        turns.append(("Which number appears in the sentence?", f"{slots['n']}"))
    return turns


_GOODS = ("backpack", "kettle", "desk lamp", "pair of headphones", "raincoat", "coffee grinder", "tent", "keyboard")
_PRAISE = (
    "It feels solid and works exactly as described.",
    "I use it every day.",
    "Delivery took only two days.",
    "The price is fair.",
)
_COMPLAINTS = (
    "After a week a part broke off.",
    "It is louder than promised.",
    "The colour is not the one in the picture.",
)


def review(rng: Random) -> list[Turn]:
    """Judge a customer's review and answer it."""
    thing, name, good = rng.choice(_GOODS), rng.choice(words.FIRST_NAMES), rng.random() < 0.5
    months, city = rng.randint(2, 18), rng.choice(words.CITIES)
    points = rng.sample(_PRAISE if good else _COMPLAINTS, 2)
    text = f"I bought this {thing} {number(months)} months ago in {city}. {' '.join(points)} "
    text += "I would buy it again." if good else "I would not buy it again."
    mood = "positive" if good else "negative"
    answer = f"The review is {mood}: {name} would {'' if good else 'not '}buy the {thing} again."
    turns = [(f"Is this review by {name} positive or negative?\n\n{text}", answer)]
    reply = f"Dear {name}, {'thank you for your kind words' if good else 'we are sorry to read this'}. "
    reply += f"{'We are glad that the' if good else 'Please send us a photo, and we will replace the'} {thing}"
    reply += " serves you well." if good else "."
    follow = [
        ("Write a short reply from the shop.", reply),
        ("What was bought, and how long ago?", sentence(f"{a(thing)}, {number(months)} months ago.")),
    ]
    return turns + rng.sample(follow, rng.randint(0, 2))
