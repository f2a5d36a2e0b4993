"""One calibration sample: a conversation whose every message holds a list of parts, read from any accepted form."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACCEPTED_FORMATS = """A sample is one of
  - a list of chat messages: [{"role": "user", "content": [{"type": "image", "image": <PIL image, path or URL>},
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
_REMOTE = ("http://", "https://", "data:")


@dataclass(frozen=True)
class Sample:
    """A conversation before processing.

    Attributes:
        messages: each with "role" and "content", a list of parts of type text, image, video or audio.
        where: how to name the sample in a message to the user, for example "data.jsonl, row 7".
        folder: where relative paths start; None: the working directory.
        answers: all accepted answers to the last question, where the data lists several.
    """

    messages: list[dict[str, Any]]
    where: str
    folder: Path | None = None
    answers: tuple[str, ...] = ()

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
        return Sample(_messages(row), where, folder, answers)
    except _SampleError as error:
        raise ValueError(f"{where}: {error}.\n{ACCEPTED_FORMATS}") from None


def load_media(sample: Sample, max_image_pixels: int | None) -> list[dict[str, Any]]:
    """Return the messages of a sample with every image opened, as RGB, and paths of video and audio resolved.

    Args:
        sample: a sample as parsed; it is not changed.
        max_image_pixels: larger images are shrunk to this many pixels, keeping their shape; None keeps them.

    Raises:
        ValueError: an image cannot be read; names the sample and the path.
    """
    messages = []
    for message in sample.messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                part = {"type": "image", "image": _open_image(part["image"], sample, max_image_pixels)}
            elif part["type"] in _MEDIA:
                part = {"type": part["type"], part["type"]: _resolve(part[part["type"]], sample.folder)}
            parts.append(part)
        messages.append({**message, "content": parts})
    return messages


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
        raise _SampleError(f"key 'answers' must be a list of at least one string, got {_shown(listed)}")
    return {**row, "answer": answers[0]}, tuple(answers)


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
        raise _SampleError(f"{key} must be a list of at least one chat message, got {_shown(messages)}")
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
            raise _SampleError(f"key {name!r} must be a string, got {_shown(row[name])}")
    question = {"role": "user", "content": [_text(row[key])]}
    messages = [question]
    if "answer" in row:
        messages.append({"role": "assistant", "content": [_text(row["answer"])]})
    return _fill_images(messages, _listed_images(row))


def _listed_images(row: dict[str, Any]) -> list[Any]:
    """Return the images beside the text: "images", "image", or "file_name" as in a folder's metadata.jsonl."""
    if "images" in row:
        if not isinstance(row["images"], (list, tuple)):
            raise _SampleError(f"key 'images' must be a list of images or paths, got {_shown(row['images'])}")
        return list(row["images"])
    return [row[key] for key in ("image", "file_name") if key in row][:1]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _SampleError(f"{where} must be a dict with 'role' and 'content', got {_shown(message)}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise _SampleError(f"{where}: key 'role' must be a string such as 'user', got {_shown(role)}")
    if isinstance(content, str):
        return {"role": role, "content": [_text(content)]}
    if not isinstance(content, (list, tuple)):
        raise _SampleError(f"{where}: key 'content' must be a string or a list of parts, got {_shown(content)}")
    return {"role": role, "content": [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]}


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return _text(part)
    if not isinstance(part, Mapping):
        raise _SampleError(f"{where} must be a dict with 'type', got {_shown(part)}")
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise _SampleError(f"{where}: key 'text' must be a string, got {_shown(part.get('text'))}")
        return _text(part["text"])
    if kind == "image_url":  # the form of the OpenAI interface
        url = part.get("image_url")
        return {"type": "image", "image": url.get("url") if isinstance(url, Mapping) else url}
    if kind not in _MEDIA:
        raise _SampleError(f"{where}: key 'type' must be 'text', 'image', 'video' or 'audio', got {_shown(kind)}")
    media = next((part[key] for key in (kind, *_MEDIA_KEYS) if key in part), None)
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


def _resolve(value: Any, folder: Path | None) -> Any:
    """Return a local path as seen from `folder`; anything else as it is."""
    if isinstance(value, Path) or (isinstance(value, str) and not value.startswith(_REMOTE)):
        path = Path(value).expanduser()
        return str(folder / path if folder else path)
    return value


def _open_image(value: Any, sample: Sample, max_pixels: int | None) -> Any:
    """Open an image from a path, URL, bytes or PIL image; arrays pass as they are."""
    from PIL import Image, ImageOps
    from transformers.image_utils import load_image

    if isinstance(value, Mapping) and (value.get("bytes") or value.get("path")):  # an undecoded `datasets.Image`
        value = io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"]
    value = _resolve(value, sample.folder)
    try:
        if isinstance(value, str) and value.startswith(_REMOTE):
            value = load_image(value)
        elif isinstance(value, (str, io.BytesIO)):
            with Image.open(value) as file:
                value = ImageOps.exif_transpose(file)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{sample.where}: cannot read the image {value!r} ({error})") from error
    if not isinstance(value, Image.Image):
        if hasattr(value, "shape"):
            return value
        raise ValueError(
            f"{sample.where}: an image must be a PIL image, an array, a path or a URL, got {_shown(value)}"
        )
    value = value.convert("RGB")
    if max_pixels is not None and value.width * value.height > max_pixels:
        scale = math.sqrt(max_pixels / (value.width * value.height))
        value = value.resize((max(1, int(value.width * scale)), max(1, int(value.height * scale))))
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
