"""The built-in calibration set: conversations about drawn images and texts, made by the package at run time.

Nothing is downloaded, and nothing is taken from another data set. Sample i depends on the seed and on i alone: a larger
set begins with the smaller one.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from . import (
    builtin_charts,
    builtin_documents,
    builtin_messages,
    builtin_objects,
    builtin_prose,
    builtin_scenes,
    builtin_tasks,
    builtin_textures,
)

_DRAWERS: tuple[Callable, ...] = (
    builtin_scenes.shapes,
    builtin_documents.receipt,
    builtin_scenes.landscape,
    builtin_charts.bars,
    builtin_objects.sign,
    builtin_textures.texture,
    builtin_documents.table,
    builtin_scenes.shapes,
    builtin_objects.clock,
    builtin_charts.lines,
    builtin_messages.letter,
    builtin_scenes.landscape,
    builtin_documents.form,
    builtin_charts.pie,
    builtin_textures.pattern,
    builtin_messages.timetable,
    builtin_objects.dice,
    builtin_scenes.shapes,
    builtin_documents.menu,
    builtin_objects.thermometer,
    builtin_messages.chat,
    builtin_objects.board,
    builtin_textures.texture,
)
_WRITERS: tuple[Callable, ...] = (
    builtin_prose.explanation,
    builtin_tasks.word_problem,
    builtin_prose.story,
    builtin_tasks.structured,
    builtin_prose.translation,
    builtin_tasks.code,
    builtin_prose.mail,
    builtin_tasks.arithmetic,
    builtin_prose.instructions,
    builtin_tasks.recall,
    builtin_prose.explanation,
    builtin_tasks.lists,
    builtin_prose.review,
    builtin_tasks.copying,
    builtin_tasks.calendar,
    builtin_prose.story,
    builtin_tasks.units,
)
_TEXT_EVERY = 4  # each fourth sample is text alone


def builtin_samples(num_samples: int, seed: int = 0, *, with_images: bool = True) -> list[list[dict[str, Any]]]:
    """Make the first samples of the built-in set.

    Args:
        num_samples: how many; three quarters of them have an image of 224 to 448 pixels.
        seed: of the set.
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
