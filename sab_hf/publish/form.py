"""The form of JSON files that pages are made from: what has another form is an error that names file and place."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that move a terminal's cursor, change its state or the order of the text; new lines and tabs are none."""

_PICTURES = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff"}
"""Formats of pictures that pages show, and the bytes that their files begin with."""
_MOST_PICTURE = 500_000  # letters of base64
_ROLES = ("language", "vision", "projector", "embedding", "head")
_MODALITIES = ("text", "image", "video", "audio")


def printable(text: str) -> str:
    """Return text for a terminal: characters that would do more than to be shown are written as escapes."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


Form = Callable[[Any, str], None]
"""Takes a value and its place; raises a ValueError that names the place if the value has another form."""


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is no text in UTF-8, or no JSON; names the file.
        OSError: it cannot be read.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: it is no JSON ({error})") from error


def read_evaluation(file: Path) -> dict[str, Any]:
    """Read what `sab-hf eval --output` wrote: an evaluation, or scores of tasks.

    Raises:
        ValueError: it holds something else; names file and place.
        OSError: it is not there, or cannot be read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file `{file}`; name one that `sab-hf eval --output` wrote")
    try:
        content = read_json(file)
        form = TASKS if isinstance(content, dict) and "scores" in content else EVALUATION
        form(content, f"{file}: the evaluation")
    except ValueError as error:
        raise ValueError(f"{error}; it must be a file that `sab-hf eval --output` wrote") from error
    return content


def check_summary(summary: Any, file: Path) -> None:
    """Hold the content of a `report.json` against the form of `summary.summarize`.

    Raises:
        ValueError: names file and place.
    """
    SUMMARY(summary, f"{file}: the report")


def _refuse(required: str, value: Any, place: str) -> None:
    shown = repr(value)
    raise ValueError(f"{place} must be {required}, got {shown if len(shown) <= 60 else shown[:57] + '...'}")


def _text(value: Any, place: str) -> None:
    if not isinstance(value, str) or CONTROL.search(value):
        _refuse("text without control characters", value, place)


def _identifier(value: Any, place: str) -> None:
    if not isinstance(value, str) or not value.isidentifier():
        _refuse("the name of a class", value, place)


def _number(value: Any, place: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e300 < value < 1e300:
        _refuse("a number", value, place)


def _count(value: Any, place: str) -> None:
    if type(value) is not int or not 0 <= value < 2**63:
        _refuse("a whole number from 0 on", value, place)


def _size(value: Any, place: str) -> None:
    if type(value) is not int or not 0 < value < 2**63:
        _refuse("a whole number above 0", value, place)


def _choice(*names: str) -> Form:
    def check(value: Any, place: str) -> None:
        if value not in names:
            _refuse(f"one of {list(names)}", value, place)

    return check


def _optional(form: Form) -> Form:
    def check(value: Any, place: str) -> None:
        if value is not None:
            form(value, place)

    return check


def _list(form: Form, length: int | None = None, least: int = 0) -> Form:
    def check(value: Any, place: str) -> None:
        if not isinstance(value, list) or len(value) < least or length not in (None, len(value)):
            _refuse("a list" + (f" of {length}" if length else f" of at least {least}" if least else ""), value, place)
        for i, entry in enumerate(value):
            form(entry, f"{place}[{i}]")

    return check


def _mapping(key: Form, form: Form) -> Form:
    def check(value: Any, place: str) -> None:
        if not isinstance(value, dict):
            _refuse("an object", value, place)
        for name, entry in value.items():
            key(name, f"{place}, a key,")
            form(entry, f"{place}.{name}")

    return check


def _object(optional: dict[str, Form] | None = None, **required: Form) -> Form:
    """The form of an object with these keys; others are not looked at."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, dict):
            _refuse("an object", value, place)
        for name, form in required.items():
            if name not in value:
                raise ValueError(f"{place} must have the key {name!r}")
            form(value[name], f"{place}.{name}")
        for name, form in (optional or {}).items():
            form(value.get(name), f"{place}.{name}")

    return check


def picture_format(encoded: str) -> str:
    """Return the format of a picture in base64, "png" or "jpeg".

    Raises:
        ValueError: it is neither.
    """
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"a picture must be base64, got {encoded[:20]!r}…") from error
    for name, beginning in _PICTURES.items():
        if content.startswith(beginning):
            return name
    raise ValueError(f"a picture must be one of {list(_PICTURES)}, got a file that begins with {content[:8]!r}")


def _picture(value: Any, place: str) -> None:
    if not isinstance(value, str) or len(value) > _MOST_PICTURE:
        _refuse(f"a picture in at most {_MOST_PICTURE:,} letters of base64", value, place)
    try:
        picture_format(value)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _truth(value: Any, place: str) -> None:
    if not isinstance(value, bool):
        _refuse("true or false", value, place)


def _share(value: Any, place: str) -> None:
    _number(value, place)
    if not 0 <= value <= 1:
        _refuse("a number from 0 to 1", value, place)


def _anything(value: Any, place: str) -> None:
    """Accept plain data, whose text is escaped where it is shown."""
    if isinstance(value, dict):
        _mapping(_text, _anything)(value, place)
    elif isinstance(value, list):
        _list(_anything)(value, place)
    elif isinstance(value, str):
        _text(value, place)


_SPEED = _object(device=_text, prompt_tokens=_count, first_token_ms=_number, token_ms=_number)
_SCORES = _object({"speed": _optional(_SPEED)}, metrics=_mapping(_text, _optional(_number)), nll=_optional(_number))
_EXAMPLE = _object(
    {"given_by_original": _optional(_text), "original_right": _optional(_truth)},
    question=_text,
    accepted=_list(_text),
    given=_text,
    right=_truth,
    picture=_picture,
)
EVALUATION = _object(
    {name: _optional(_number) for name in ("token_agreement", "kl")}
    | {"answer_agreement": _optional(_share), "num_questions": _optional(_count)}
    | {"original": _optional(_SCORES), "examples": _optional(_list(_EXAMPLE))},
    data=_text,
    seed=_count,
    num_samples=_count,
    model=_SCORES,
)
_TASK_SCORE = _object(
    {name: _optional(_number) for name in ("original", "model_error", "original_error")}
    | {"higher_is_better": _optional(_truth)},
    task=_text,
    dataset=_text,
    metric=_text,
    num_samples=_count,
    model=_optional(_number),
)
TASKS = _object(
    harness=_text,
    seed=_count,
    num_samples=_optional(_count),
    scores=_list(_TASK_SCORE, least=1),
)
_ROLE = _object(num_quantized=_count, quantized_bytes=_count, dense_bytes=_count, bits=_optional(_number))
_MODULE = _object(
    name=_text,
    role=_choice(*_ROLES),
    out_features=_size,
    in_features=_size,
    num_planes=_count,
    num_significant=_count,
    stored_bytes=_count,
    bits=_number,
    stored=_mapping(_text, _count),
    significant_columns=_list(_number, least=1),
    error=_optional(_number),
    unimodal_share=_optional(_number),
    column_share=_optional(_mapping(_choice(*_MODALITIES), _optional(_number))),
)
_DISTILLATION = _object(steps=_count, before=_optional(_number), after=_optional(_number))
_RECORD = _object(
    {"distillations": _optional(_list(_DISTILLATION))},
    calibration=_text,
    seconds=_number,
    refinements=_list(_list(_optional(_number), length=2)),
    stages=_mapping(_text, _object(seconds=_number)),
)
SUMMARY = _object(
    {
        "evaluation": _optional(EVALUATION),
        "tasks": _optional(TASKS),
        "record": _optional(_RECORD),
        "base_model": _optional(_text),
    }
    | {"pipeline_tag": _optional(_choice("image-text-to-text", "text-generation")), "device": _optional(_text)},
    created=_text,
    versions=_mapping(_text, _text),
    model_class=_identifier,
    format_version=_count,
    config=_mapping(_text, _anything),
    bits=_number,
    total_bytes=_size,
    bytes_at_16_bits=_size,
    roles=_mapping(_choice(*_ROLES), _ROLE),
    modules=_list(_MODULE, least=1),
)
