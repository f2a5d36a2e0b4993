"""Which modality each position of a processed batch belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PADDING, TEXT, IMAGE, VIDEO, AUDIO = -1, 0, 1, 2, 3
"""Values of a modality map; from 0 on those of transformers' `mm_token_type_ids`."""

MODALITY_NAMES = {TEXT: "text", IMAGE: "image", VIDEO: "video", AUDIO: "audio"}


def token_modality(inputs: Mapping[str, Any], model_config: Any) -> Tensor:
    """Label every position of a processed batch with its modality.

    Args:
        inputs: "input_ids" [batch, length]; "mm_token_type_ids" and "attention_mask" of the same shape are used
            if present. "modality", the same shape and values as the result, goes before everything else.
        model_config: names the placeholder tokens: `image_token_id` or `image_token_index`, video and audio alike.

    Returns:
        [batch, length] int8: PADDING where the attention mask is 0, else TEXT, IMAGE, VIDEO or AUDIO.

    Raises:
        ValueError: the attention mask, or the modality that was given, has another shape than the tokens.
    """
    input_ids, given, mask = inputs["input_ids"], inputs.get("mm_token_type_ids"), inputs.get("attention_mask")
    stated = inputs.get("modality")
    if stated is not None:
        if stated.shape != input_ids.shape or not bool(((stated >= PADDING) & (stated <= AUDIO)).all()):
            raise ValueError(
                f"'modality' must have the shape of 'input_ids', {tuple(input_ids.shape)}, and values from {PADDING} to {AUDIO}, "
                f"got {tuple(stated.shape)}"
            )
        return stated.to(torch.int8, copy=True)
    modality = torch.zeros_like(input_ids, dtype=torch.int8) if given is None else given.to(torch.int8, copy=True)
    # Also where ids are given: on transformers 4.57 they mark images only.
    for kind in (IMAGE, VIDEO, AUDIO):
        token_id = placeholder_id(model_config, MODALITY_NAMES[kind])
        if token_id is not None:
            modality[(input_ids == token_id) & (modality == TEXT)] = kind
    if mask is not None:
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"'attention_mask' must have the shape of 'input_ids', {tuple(input_ids.shape)}, got "
                f"{tuple(mask.shape)}"
            )
        modality[mask == 0] = PADDING
    return modality


def media_modality(inputs: Mapping[str, Any]) -> int:
    """Return the modality of what a batch holds beside its tokens: of pixels, of video frames or of sound; else TEXT."""
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
            if "video" in key:
                return VIDEO
            return AUDIO if "input_features" in key or "audio" in key or "input_values" in key else IMAGE
    return TEXT


def placeholder_id(model_config: Any, name: str) -> int | None:
    """Return the id of the token in whose place image, video or audio features are put, or None."""
    for key in (f"{name}_token_id", f"{name}_token_index"):
        token_id = getattr(model_config, key, None)
        if token_id is not None:
            return token_id
    for key in getattr(model_config, "sub_configs", {}):  # Qwen-Omni has them in its `thinker_config`
        part = getattr(model_config, key, None)
        token_id = None if part is None else placeholder_id(part, name)
        if token_id is not None:
            return token_id
    return None


def takes_images(model_config: Any) -> bool:
    """Return whether the config is of a model that takes images: it has a vision part or an image token."""
    return hasattr(model_config, "vision_config") or placeholder_id(model_config, "image") is not None


def takes_audio(model_config: Any) -> bool:
    """Return whether the config is of a model that takes sound: it has an audio part or an audio token."""
    return hasattr(model_config, "audio_config") or placeholder_id(model_config, "audio") is not None
