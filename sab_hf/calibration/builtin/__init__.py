"""The built-in calibration set: conversations about drawn images and texts, made by the package at run time.

Nothing is downloaded, and nothing is taken from another data set. Sample i depends on the seed and on i alone: a larger
set begins with the smaller one.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from . import charts, documents, messages, objects, prose, scenes, tasks, textures

_DRAWERS: tuple[Callable, ...] = (
    scenes.shapes,
    documents.receipt,
    scenes.landscape,
    charts.bars,
    objects.sign,
    textures.texture,
    documents.table,
    scenes.shapes,
    objects.clock,
    charts.lines,
    messages.letter,
    scenes.landscape,
    documents.form,
    charts.pie,
    textures.pattern,
    messages.timetable,
    objects.dice,
    scenes.shapes,
    documents.menu,
    objects.thermometer,
    messages.chat,
    objects.board,
    textures.texture,
)
_WRITERS: tuple[Callable, ...] = (
    prose.explanation,
    tasks.word_problem,
    prose.story,
    tasks.structured,
    prose.translation,
    tasks.code,
    prose.mail,
    tasks.arithmetic,
    prose.instructions,
    tasks.recall,
    prose.explanation,
    tasks.lists,
    prose.review,
    tasks.copying,
    tasks.calendar,
    prose.story,
    tasks.units,
)
_TEXT_EVERY = 4  # each fourth sample is text alone


def builtin_samples(num_samples: int, seed: int = 0, *, with_images: bool = True) -> list[list[dict[str, Any]]]:
    """Make the first samples of the built-in set.

    Args:
        num_samples: how many; three quarters of them have an image of 224 to 448 pixels.
        seed: seed of the set.
        with_images: False makes text alone, for models that take no images.

    Returns:
        Conversations, each a list of messages whose content is a list of parts; images are PIL images in RGB.
    """
    return [builtin_sample(seed, i, with_images=with_images) for i in range(num_samples)]


def builtin_sample(seed: int, index: int, *, with_images: bool = True) -> list[dict[str, Any]]:
    """Make sample `index` of the built-in set, see `builtin_samples`."""
    rng = Random(f"sab_hf {seed} {index} {with_images}")
    group, place = divmod(index, _TEXT_EVERY)
    if with_images and place < _TEXT_EVERY - 1:
        image, turns = _DRAWERS[(group * (_TEXT_EVERY - 1) + place) % len(_DRAWERS)](rng)
        return _conversation(rng.sample(turns, min(len(turns), rng.choice([1, 2, 3, 3, 4, 5]))), image, rng)
    first = (group if with_images else index) % len(_WRITERS)
    turns = _WRITERS[first](rng)
    for _ in range(rng.choice([0, 1, 1, 2])):  # people change the subject
        turns += rng.choice(_WRITERS)(rng)
    return _conversation(turns, None, rng)


def _conversation(turns: list[tuple[str, str]], image: Any, rng: Random) -> list[dict[str, Any]]:
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    if image is not None:
        messages[0]["content"].insert(0 if rng.random() < 0.9 else 1, {"type": "image", "image": image})
    return messages
