"""Fewer tokens of a picture: the processor is set to fewer tiles, or gets smaller pictures, for calibration alone.

Processors of tiles make some thousand tokens of any picture, which on a CPU is most of a run. What can be set is found by the
attributes of the image processor and by trying: no model is known by name.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from PIL import Image

from ..brief import brief_error
from .chat import ChatEncoder
from .modality import IMAGE, takes_images, token_modality
from .samples import Sample

logger = logging.getLogger(__name__)

_SHAPES = ((1024, 1024), (1448, 724), (724, 1448))  # of the pictures that are tried
_COUNTS = ("max_patches", "max_tiles", "max_image_tiles", "dynamic_hd")  # most tiles of a picture
_SWITCHES = ("do_image_splitting", "do_pan_and_scan")  # tiles beside the whole picture
_SHRINKS = 8


def with_image_tokens(encoder: ChatEncoder, model_config: Any, most: int, strict: bool) -> ChatEncoder:
    """Return an encoder whose pictures become at most so many tokens each; the one that was given stays as it was.

    Args:
        encoder: as the processor is.
        model_config: names the placeholder tokens.
        most: image tokens of one picture.
        strict: raise where that cannot be; else come as near as the processor can.
    Raises:
        ValueError: the processor cannot be set to so few tokens, or makes none.
    """
    if encoder.text_only or not takes_images(model_config):
        if strict:
            raise ValueError(
                f"`image_tokens` must be left out: {type(encoder.processor).__name__} with {type(model_config).__name__} "
                "makes no image tokens"
            )
        return encoder
    try:
        before = _tokens(encoder, model_config)
    except Exception as error:  # processors raise what they like; samples will show what is wrong
        if strict:
            raise ValueError(
                f"`image_tokens` needs a picture to be tried, and that failed: {brief_error(error)}"
            ) from error
        return encoder
    if before <= most:
        return encoder
    found, now, how = _fewer_tiles(encoder, model_config, most, before)
    if now > most:
        found, now, how = _smaller(found, model_config, most, now, how)
    if strict and now > most:
        raise ValueError(
            f"`image_tokens` must be at least {now} with {type(encoder.processor).__name__}, which makes {before} tokens of a "
            f"large picture and knows no smaller ones, got {most}"
        )
    if now < before:
        logger.info(
            "calibration pictures become at most %s tokens each in place of %s (%s, for the calibration alone); `image_tokens` "
            "sets another limit",
            f"{now:,}",
            f"{before:,}",
            how,
        )
    return found


def _tokens(encoder: ChatEncoder, model_config: Any) -> int:
    """Return the most image tokens that one of the tried pictures becomes."""
    counts = []
    for shape in _SHAPES:
        parts = [{"type": "image", "image": Image.new("RGB", shape)}, {"type": "text", "text": "What is this?"}]
        inputs = encoder([Sample([{"role": "user", "content": parts}], "a picture that is tried")])
        counts.append(int((token_modality(inputs, model_config) == IMAGE).sum()))
    return max(counts)


def _fewer_tiles(encoder: ChatEncoder, model_config: Any, most: int, before: int) -> tuple[ChatEncoder, int, str]:
    """Return the encoder with as many tiles as give no more tokens than wanted, or with the fewest; its tokens; and how."""
    ways, known = tile_settings(getattr(encoder.processor, "image_processor", None)), {}

    def tokens(i: int) -> int:
        if i not in known:
            known[i] = _tokens(_set(encoder, ways[i]), model_config)
        return known[i]

    if not ways or tokens(len(ways) - 1) >= before:
        return encoder, before, ""
    low, high = 0, len(ways) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if tokens(middle) <= most else (middle + 1, high)
    return _set(encoder, ways[low]), tokens(low), ", ".join(f"{name}={value}" for name, value in ways[low].items())


def tile_settings(image_processor: Any) -> list[dict[str, Any]]:
    """Return attributes of an image processor with which it makes fewer tiles than it does, from many tiles to few."""
    edge, tile = (_longest_edge(image_processor, name) for name in ("size", "max_image_size"))
    if edge and tile and getattr(image_processor, "do_image_splitting", False):
        return [{"size": {"longest_edge": count * tile}} for count in range((edge - 1) // tile, 0, -1)]
    for name in _COUNTS:
        count = getattr(image_processor, name, None)
        if isinstance(count, int) and not isinstance(count, bool):
            least = getattr(image_processor, "min_patches", None) or 1
            return [{name: fewer} for fewer in range(count - 1, least - 1, -1)]
    return [{name: False} for name in _SWITCHES if getattr(image_processor, name, False)][:1]


def _longest_edge(image_processor: Any, name: str) -> int | None:
    """Return the side that the attribute `name` gives by its "longest_edge" alone."""
    size = getattr(image_processor, name, None)
    if size is None or isinstance(size, int):
        return None
    given = {key: value for key, value in dict(size if isinstance(size, Mapping) else vars(size)).items() if value}
    return given["longest_edge"] if given.keys() == {"longest_edge"} else None


def _set(encoder: ChatEncoder, attributes: dict[str, Any]) -> ChatEncoder:
    """Return a copy of an encoder whose image processor has other attributes."""
    processor, images = copy.copy(encoder.processor), copy.copy(encoder.processor.image_processor)
    for name, value in attributes.items():
        own = getattr(images, name)
        setattr(images, name, type(own)(**value) if isinstance(value, dict) else value)
    processor.image_processor = images
    return _with(encoder, processor=processor)


def _smaller(encoder: ChatEncoder, model_config: Any, most: int, tokens: int, how: str) -> tuple[ChatEncoder, int, str]:
    """Return the encoder with pictures shrunk until they give no more tokens than wanted, as far as that helps; as above."""
    best, pixels = (encoder, tokens, how), encoder.max_image_pixels or _SHAPES[0][0] * _SHAPES[0][1]
    for _ in range(_SHRINKS):
        pixels = max(1, int(pixels * min(0.9, most / tokens)))
        smaller = _with(encoder, max_image_pixels=pixels)
        tokens = _tokens(smaller, model_config)
        if tokens < best[1]:
            best = smaller, tokens, ", ".join([how] * bool(how) + [f"shrunk to {pixels:,} pixels"])
        if tokens <= most:
            break
    return best


def _with(encoder: ChatEncoder, **attributes: Any) -> ChatEncoder:
    changed = copy.copy(encoder)
    for name, value in attributes.items():
        setattr(changed, name, value)
    return changed
