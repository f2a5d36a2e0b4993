"""Questions about pictures with their answers, for card and report."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..calibration.pictures import open_picture
from ..publish.form import printable
from .questions import Question

_PIXELS = 320 * 320


@dataclass(frozen=True)
class Example:
    """A question about a picture for card and report.

    Attributes:
        question, accepted, given, given_by_original: as in `compare.Answer`, without characters that move a cursor.
        right, original_right: whether the first scorer gives at least a half.
        picture: PNG or JPEG in base64, shrunk.
    """

    question: str
    accepted: list[str]
    given: str
    given_by_original: str | None
    right: bool
    original_right: bool | None
    picture: str


def has_picture(question: Question) -> bool:
    """Whether a question shows a picture, and not an array of numbers, of which it is not known what they are."""
    return any(not hasattr(picture, "shape") for picture in _pictures(question))


def example(
    question: Question, given: str, given_by_original: str | None, scorer: Callable, allow_urls: bool = False
) -> Example:
    """Return a question with its last picture and its answers.

    Args:
        question: one that `has_picture`.
        given, given_by_original: answers of model and original; None: there was no original.
        scorer: (answer, accepted answers) → 0 to 1.
        allow_urls: whether a picture that is named by URL is fetched.
    Raises:
        ValueError: the picture cannot be read.
    """
    shown = next(picture for picture in reversed(_pictures(question)) if not hasattr(picture, "shape"))
    return Example(
        printable(question.text),
        [printable(text) for text in question.accepted],
        printable(given),
        None if given_by_original is None else printable(given_by_original),
        scorer(given, question.accepted) >= 0.5,
        None if given_by_original is None else scorer(given_by_original, question.accepted) >= 0.5,
        _encoded(open_picture(shown, question.sample.folder, _PIXELS, allow_urls)),
    )


def _pictures(question: Question) -> list[Any]:
    parts = [part for message in question.prompt.messages for part in message["content"]]
    return [part["image"] for part in parts if part["type"] == "image"]


def _encoded(picture: Any) -> str:
    """Return a picture in base64, as PNG or as JPEG, whichever is smaller."""
    files = []
    for kind, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 85})):
        file = io.BytesIO()
        picture.save(file, kind, **options)
        files.append(file.getvalue())
    return base64.b64encode(min(files, key=len)).decode()
