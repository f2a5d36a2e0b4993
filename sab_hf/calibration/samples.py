"""One calibration sample: a conversation whose every message holds a list of parts, read from any accepted form."""

from __future__ import annotations

import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..brief import brief, brief_error, shortened
from .pictures import REMOTE, check_regular, open_picture, require_allowed, resolve
from .urls import MAX_MEDIA_BYTES, fetch

ACCEPTED_FORMATS = """A sample is one of
  - a list of chat messages: [{"role": "user", "content": [{"type": "image", "image": <PIL image, path, URL or base64>},
    {"type": "text", "text": "What is this?"}]}, {"role": "assistant", "content": "A lighthouse."}];
  - {"messages": [...]}, optionally with "images": [...], which fills the {"type": "image"} parts, or the "<image>" in
    the text, in order;
  - {"image": ..., "question": ..., "answer": ...}: "image" and "answer" are optional, "prompt" or "text" may stand for
    "question"; "answers" may list several accepted answers, of which the first is used as the reply;
  - a plain string, for text alone.
A list of already processed batches holds what the processor returned with return_tensors="pt", "input_ids" included."""

_MEDIA = ("image", "video", "audio")
_MEDIA_KEYS = ("url", "path", "base64")  # beside the part's own type: {"type": "image", "url": ...}
_TEXT_KEYS = ("question", "prompt", "text")
_IMAGE_MARKER = "<image>"
_KEYS = {*_TEXT_KEYS, "answer", "answers", "messages", "images", "image", "file_name"}
_MAX_TEXT = 2_000_000  # characters of a sample; a tokenizer needs minutes for more


@dataclass(frozen=True)
class Sample:
    """A conversation before processing.

    Attributes:
        messages: each with "role" and "content", a list of parts of type text, image, video or audio.
        where: how to name the sample in a message to the user, for example "data.jsonl, row 7".
        folder: where relative paths start; None: the working directory.
        answers: all accepted answers to the last question, where the data lists several.
        unread: keys of the row that hold pictures, video or audio and are not read.
    """

    messages: list[dict[str, Any]]
    where: str
    folder: Path | None = None
    answers: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def num_media(self) -> int:
        return sum(part["type"] in _MEDIA for message in self.messages for part in message["content"])

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of media in the sample, sorted."""
        return tuple(sorted({part["type"] for message in self.messages for part in message["content"]} & set(_MEDIA)))

    @property
    def num_images(self) -> int:
        return len(_image_parts(self.messages))


def parse_sample(row: Any, where: str, folder: Path | None = None) -> Sample:
    """Read one sample in any of the accepted forms; files are not opened yet.

    Args:
        row: a list of messages, a dict with "messages", a dict with "image"/"question"/"answer", or a string.
        where: name of the sample in errors.
        folder: where relative paths start.

    Raises:
        ValueError: names `where`, the offending key, what was required and what was got.
    """
    try:
        row, answers = _first_answer(row)
        messages = _messages(row)
        _check_length(messages)
        return Sample(messages, where, folder, answers, _unread(row))
    except _SampleError as error:
        raise ValueError(f"{where}: {error}.\n{ACCEPTED_FORMATS}") from None


def load_media(
    sample: Sample, max_image_pixels: int | None, allow_urls: bool = False, scratch: Path | None = None
) -> list[dict[str, Any]]:
    """Return the messages of a sample with every image opened, as RGB, and paths of video and audio resolved.

    Args:
        sample: a sample as parsed; it is not changed.
        max_image_pixels: larger images are shrunk to this many pixels, keeping their shape; None keeps them.
        allow_urls: whether files are fetched from http(s) URLs.
        scratch: folder for video and audio that is fetched.

    Raises:
        ValueError: a file cannot be read; names the sample and the file.
    """
    messages = []
    for message in sample.messages:
        parts = []
        for part in message["content"]:
            kind = part["type"]
            try:
                if kind == "image":
                    part = {"type": kind, kind: open_picture(part[kind], sample.folder, max_image_pixels, allow_urls)}
                elif kind in _MEDIA:
                    part = {"type": kind, kind: _media_file(part[kind], sample.folder, allow_urls, scratch)}
            except ValueError as error:
                raise ValueError(f"{sample.where}: {error}") from error
            parts.append(part)
        messages.append({**message, "content": parts})
    return messages


def _media_file(value: Any, folder: Path | None, allow_urls: bool, scratch: Path | None) -> Any:
    """Return video or audio for the processor: arrays as they are, files as paths, what is fetched as a file in `scratch`.

    Raises:
        ValueError: the file is not there or cannot be fetched.
    """
    try:
        if isinstance(value, str) and value.startswith(REMOTE):
            content = fetch(require_allowed(value, allow_urls), MAX_MEDIA_BYTES)
            if scratch is None:
                raise ValueError("there is no folder to put it into")
            path = scratch / f"{len(list(scratch.iterdir()))}{Path(urlsplit(value).path).suffix}"
            path.write_bytes(content)
            return str(path)
        value = resolve(value, folder)
        if isinstance(value, str) and not value.startswith("data:"):
            check_regular(value)
        return value
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {shortened(value)} ({brief_error(error)})") from error


class _SampleError(ValueError):
    """What is wrong with a sample, without its place."""


def _first_answer(row: Any) -> tuple[Any, tuple[str, ...]]:
    """Return the row with one answer in place of a list, and the list: VQA data has several, as text or as {"answer": ...}."""
    if not isinstance(row, Mapping) or "messages" in row or row.get("answers") is None:
        return row, ()
    listed = row["answers"]
    rows = listed if isinstance(listed, (list, tuple)) else ()
    answers = [entry.get("answer") if isinstance(entry, Mapping) else entry for entry in rows]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise _SampleError(f"key 'answers' must be a list of at least one string, got {brief(listed)}")
    return {**row, "answer": answers[0]}, tuple(answers)


def _check_length(messages: list[dict[str, Any]]) -> None:
    length = sum(len(part.get("text", "")) for message in messages for part in message["content"])
    if length > _MAX_TEXT:
        raise _SampleError(f"a sample must have at most {_MAX_TEXT:,} characters of text, got {length:,}; split it")


def _unread(row: Any) -> tuple[str, ...]:
    """Return the keys of a row under which there are pictures, video or audio that no accepted form has."""
    if not isinstance(row, Mapping):
        return ()
    others = [
        (key, value) for key, value in row.items() if isinstance(key, str) and key not in _KEYS and value is not None
    ]
    return tuple(key for key, value in others if key.removesuffix("s") in _MEDIA or _is_media(value))


def _is_media(value: Any) -> bool:
    """Whether a value is a picture, video or sound: an object of Pillow or `datasets`, or the name of such a file."""
    if isinstance(value, (list, tuple)):
        return bool(value) and _is_media(value[0])
    if isinstance(value, str):
        kind = mimetypes.guess_type(value)[0] if len(value) < 1000 else value[:20]
        return value.startswith("data:image") or (kind or "").partition("/")[0] in _MEDIA
    if isinstance(value, Mapping):
        return "bytes" in value or "sampling_rate" in value
    return isinstance(value, bytes) or all(hasattr(value, name) for name in ("mode", "size", "convert"))


def _messages(row: Any) -> list[dict[str, Any]]:
    if isinstance(row, str):
        row = {"text": row}
    if isinstance(row, Mapping):
        row = {key: value for key, value in row.items() if value is not None}  # Arrow rows fill missing keys with None
        if "messages" not in row:
            return _simple_messages(row)
        messages, images = row["messages"], _listed_images(row)
    else:
        messages, images = row, []
    if not isinstance(messages, (list, tuple)) or not messages:
        key = "key 'messages'" if isinstance(row, Mapping) else "the sample"
        raise _SampleError(f"{key} must be a list of at least one chat message, got {brief(messages)}")
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    return _fill_images(messages, images)


def _simple_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    key = next((key for key in _TEXT_KEYS if key in row), None)
    if key is None:
        raise _SampleError(
            f"one of the keys 'messages', 'question', 'prompt', 'text' is required, got the keys "
            f"{sorted(map(str, row))}"
        )
    for name in (key, "answer"):
        if name in row and not isinstance(row[name], str):
            raise _SampleError(f"key {name!r} must be a string, got {brief(row[name])}")
    question = {"role": "user", "content": [_text(row[key])]}
    messages = [question]
    if "answer" in row:
        messages.append({"role": "assistant", "content": [_text(row["answer"])]})
    return _fill_images(messages, _listed_images(row))


def _listed_images(row: dict[str, Any]) -> list[Any]:
    """Return the images beside the text: "images", "image", or "file_name" as in a folder's metadata.jsonl."""
    if "images" in row:
        if not isinstance(row["images"], (list, tuple)):
            raise _SampleError(f"key 'images' must be a list of images or paths, got {brief(row['images'])}")
        return list(row["images"])
    return [row[key] for key in ("image", "file_name") if key in row][:1]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _SampleError(f"{where} must be a dict with 'role' and 'content', got {brief(message)}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise _SampleError(f"{where}: key 'role' must be a string such as 'user', got {brief(role)}")
    if isinstance(content, str):
        return {"role": role, "content": [_text(content)]}
    if not isinstance(content, (list, tuple)):
        raise _SampleError(f"{where}: key 'content' must be a string or a list of parts, got {brief(content)}")
    return {"role": role, "content": [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]}


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return _text(part)
    if not isinstance(part, Mapping):
        raise _SampleError(f"{where} must be a dict with 'type', got {brief(part)}")
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise _SampleError(f"{where}: key 'text' must be a string, got {brief(part.get('text'))}")
        return _text(part["text"])
    if kind == "image_url":  # the form of the OpenAI interface
        url = part.get("image_url")
        return {"type": "image", "image": url.get("url") if isinstance(url, Mapping) else url}
    if kind not in _MEDIA:
        raise _SampleError(f"{where}: key 'type' must be 'text', 'image', 'video' or 'audio', got {brief(kind)}")
    media = next((part[key] for key in (kind, *_MEDIA_KEYS) if key in part), None)
    if kind == "image" and isinstance(media, str) and media is part.get("base64") and not media.startswith("data:"):
        media = f"data:image;base64,{media}"
    if media is None and kind != "image":  # an image may still come from the "images" list
        raise _SampleError(f"{where}: key {kind!r} is required in a part of type {kind!r}, got the keys {sorted(part)}")
    return {"type": kind, kind: media}


def _fill_images(messages: list[dict[str, Any]], images: list[Any]) -> list[dict[str, Any]]:
    """Give each empty image part, or "<image>" in the text, its image; without any, images go before the question."""
    if images and not _image_parts(messages):
        for message in messages:
            message["content"] = [piece for part in message["content"] for piece in _split_markers(part)]
    parts = _image_parts(messages)
    empty = [part for part in parts if part["image"] is None]
    if images and not parts:
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"] = [{"type": "image", "image": image} for image in images] + first["content"]
    elif len(empty) != len(images):
        raise _SampleError(
            f"key 'images' must hold one image for each image part without one: {len(empty)} required, got "
            f"{len(images)}"
        )
    else:
        for part, image in zip(empty, images, strict=True):
            part["image"] = image
    return messages


def _image_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [part for message in messages for part in message["content"] if part["type"] == "image"]


def _split_markers(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Split a text part at each "<image>" into text and empty image parts."""
    first, *rest = part.get("text", "").split(_IMAGE_MARKER)
    if not rest:
        return [part]
    pieces = [_text(first)]
    for text in rest:
        pieces += [{"type": "image", "image": None}, _text(text.lstrip("\n"))]
    return [piece for piece in pieces if piece.get("text", True)]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
