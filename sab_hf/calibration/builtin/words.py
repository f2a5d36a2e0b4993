"""Names and things that fill the texts and documents of the built-in calibration set; all of them are invented."""

from __future__ import annotations

from random import Random

FIRST_NAMES = (
    "Amina", "Bjarne", "Chiara", "Dmitri", "Elena", "Farid", "Grace", "Hiro", "Ingrid", "Joana", "Katya", "Liam", "Mei",
    "Noah", "Olga", "Priya", "Quinn", "Rosa", "Samir", "Tomas", "Uma", "Victor", "Wanda", "Yusuf", "Zoe",
)  # fmt: skip
LAST_NAMES = (
    "Adler", "Brook", "Castillo", "Dubois", "Eriksen", "Fischer", "Garcia", "Hansen", "Ito", "Jansen", "Kumar", "Lopez",
    "Marsh", "Novak", "Okafor", "Petrov", "Rossi", "Silva", "Tanaka", "Weber",
)  # fmt: skip
CITIES = (
    "Ankara", "Bergen", "Chicago", "Dakar", "Edinburgh", "Florence", "Geneva", "Hanoi", "Izmir", "Jakarta", "Kyoto",
    "Lisbon", "Montreal", "Nairobi", "Oslo", "Porto", "Quito", "Riga", "Seville", "Tampere", "Utrecht", "Vienna",
)  # fmt: skip
RAILWAY_CITIES = ("Vienna", "Florence", "Geneva", "Utrecht", "Seville", "Porto", "Lisbon", "Montpellier", "Leipzig")
SAME_IN_MOST_LANGUAGES = ("Oslo", "Porto", "Utrecht", "Bergen", "Tampere", "Montpellier", "Nairobi", "Hanoi")
STREETS = (
    "Mill Lane",
    "Harbour Road",
    "Elm Street",
    "Castle Hill",
    "River Walk",
    "Station Road",
    "Chapel Street",
    "Park Row",
)
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# Goods with their usual price in cents.
GROCERIES = {
    "Bread": 320, "Butter": 275, "Milk": 129, "Eggs": 349, "Cheese": 489, "Apples": 260, "Bananas": 185,
    "Tomatoes": 310, "Rice": 219, "Pasta": 149, "Coffee": 699, "Tea": 399, "Honey": 545, "Olive oil": 899,
    "Yoghurt": 95, "Soap": 199, "Carrots": 139, "Onions": 119, "Chocolate": 245, "Orange juice": 279,
}  # fmt: skip
DISHES = {
    "Tomato soup": 650, "Green salad": 720, "Mushroom risotto": 1380, "Grilled fish": 1690, "Vegetable curry": 1240,
    "Lasagne": 1290, "Apple pie": 580, "Lemon cake": 540, "Mint tea": 350, "Espresso": 280, "Mineral water": 300,
}  # fmt: skip
DRINKS = ("Mint tea", "Espresso", "Mineral water")
SHOPS = (
    "Corner Market",
    "Green Basket",
    "The Daily Loaf",
    "Harbour Store",
    "Sunrise Grocery",
    "Old Town Deli",
    "Fresh & Co",
)


def full_name(rng: Random) -> str:
    """Return an invented person's name."""
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def date(rng: Random) -> str:
    """Return a date, as in 14 March 2023."""
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(2015, 2026)}"


def clock_time(rng: Random, first: int = 6, last: int = 22) -> str:
    """Return a time of day in steps of five minutes, as in 09:35."""
    return f"{rng.randint(first, last):02d}:{rng.randrange(0, 60, 5):02d}"


def money(cents: int) -> str:
    """Return an amount with two decimals."""
    return f"{cents // 100}.{cents % 100:02d}"


def price(rng: Random, usual: int) -> int:
    """Return a price in cents near the usual one."""
    return max(5, 5 * round(usual * rng.uniform(0.75, 1.3) / 5) - rng.choice([0, 0, 1]))
