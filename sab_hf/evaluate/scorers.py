"""The usual scorers of visual question answering: exact match, ANLS, relaxed accuracy. Pure text, no model."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = str.maketrans(dict.fromkeys(set(string.punctuation) - set(".-"), " "))
_ANLS_THRESHOLD = 0.5
_TOLERANCE = 0.05  # relative, of numbers in relaxed accuracy


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """Return 1.0 if an answer equals an accepted one after normalization, else 0.0.

    Normalization: lower case, articles and punctuation removed (not the point or sign of a number), single spaces.
    Source: VQA, arXiv 1505.00468 (its evaluation). Deviation: number words are not turned into digits, and an answer
    that one annotator gave counts fully.
    """
    return float(normalize(answer) in {normalize(text) for text in accepted})


def anls(answer: str, accepted: Sequence[str]) -> float:
    """Return the average normalized Levenshtein similarity: 1 − edits/length to the nearest accepted answer, 0 below 0.5.

    Source: ST-VQA, arXiv 1905.13648, §4; case and outer spaces do not count.
    """
    return max((_similarity(_plain(answer), _plain(text)) for text in accepted), default=0.0)


def relaxed_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """Return 1.0 if a numeric answer is within 5 % of an accepted one, or text equals it but for case, else 0.0.

    A percentage counts as its hundredth, and zero must be met exactly.
    Source: ChartQA, arXiv 2203.10244, §5.
    """
    return float(any(_relaxed_match(answer, text) for text in accepted))


SCORERS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
}
"""Scorers by name: (answer, accepted answers) → 0 to 1."""


def normalize(text: str) -> str:
    """Return the form in which `exact_match` compares answers."""
    plain = _plain(text)
    text = re.sub(r"(?<=\d),(?=\d)", "", plain)  # 1,000
    text = re.sub(r"\.(?!\d)|(?<!\d)\.(?=\D|$)", " ", text)  # a point stays inside a number
    text = re.sub(r"-(?!\d)|(?<=\w)-", " ", text)  # a hyphen stays as the sign of a number
    text = text.translate(_PUNCTUATION)
    return " ".join(word for word in text.split() if word not in _ARTICLES) or plain


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: least number of inserted, deleted or replaced characters."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(a: str, b: str) -> float:
    distance = edit_distance(a, b) / max(len(a), len(b), 1)
    return 1 - distance if distance < _ANLS_THRESHOLD else 0.0


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text.replace(",", ""))
    except ValueError:
        return None


def _relaxed_match(answer: str, target: str) -> bool:
    given, wanted = _number(answer), _number(target)
    if given is not None and wanted:
        return abs(given - wanted) <= _TOLERANCE * abs(wanted)
    if given is not None and wanted is not None:
        return given == wanted
    return _plain(answer) == _plain(target)
