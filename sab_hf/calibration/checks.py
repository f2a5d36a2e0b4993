"""What may be wrong with a calibration set, said before hours are spent on it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .chat import ChatEncoder
from .modality import AUDIO, IMAGE, TEXT, VIDEO, placeholder_id, takes_audio, takes_images
from .origins import BUILTIN
from .samples import Sample

logger = logging.getLogger(__name__)


def check_number(usable: int, wanted: int, dropped: int) -> None:
    """Warn if there are fewer samples than were asked for."""
    if usable < wanted:
        logger.warning(
            "num_samples=%d was asked for, only %d calibration samples could be used (%d dropped as too long)",
            wanted,
            usable,
            dropped,
        )


def check_lengths(
    kept: list[Sample], too_long: list[tuple[Sample, int]], max_length: int, allow_text_only: bool
) -> None:
    """Warn of samples that were dropped.

    Args:
        kept: samples of at most `max_length` tokens.
        too_long: the others, with their lengths in tokens.
        max_length: tokens.
        allow_text_only: samples with images may all be lost.

    Raises:
        ValueError: no sample is left, or none with images.
    """
    if not too_long:
        return
    with_media = [length for sample, length in too_long if sample.num_media]
    if not kept:
        raise ValueError(all_dropped("", [length for _, length in too_long], max_length))
    if with_media and not allow_text_only and not any(sample.num_media for sample in kept):
        raise ValueError(all_dropped(" with images", with_media, max_length))
    logger.warning("%d samples longer than max_length=%d tokens were dropped", len(too_long), max_length)


def all_dropped(kind: str, lengths: list[int], max_length: int) -> str:
    """Say that every sample (of a kind) was too long, and what to do."""
    return (
        f"all {len(lengths)} calibration samples{kind} that were tried are longer than max_length={max_length} tokens "
        f"(the shortest has {min(lengths)}); raise `max_length` to at least {min(lengths)}, or use smaller images"
    )


def check_token_ids(input_ids: Tensor, modality: Tensor, where: str, vocabulary: int | None) -> None:
    """Check that the model has an embedding for each token of text, before it is asked for it.

    Args:
        input_ids: [batch, length] token ids.
        modality: [batch, length] int8; what stands for images, video and audio needs no embedding.
        where: name of the batch or sample.
        vocabulary: rows of the input embedding; None: not known.

    Raises:
        ValueError: a token is outside of the vocabulary.
    """
    if vocabulary is None:
        return
    wrong = ((input_ids < 0) | (input_ids >= vocabulary)) & (modality <= TEXT)
    if wrong.any():
        row, position = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{where}: 'input_ids' must be from 0 to {vocabulary - 1}, the model's vocabulary, got "
            f"{int(input_ids[row, position])} at row {row}, position {position}; process samples with the model's own processor"
        )


def warn_of_lost_images(processed: list[tuple[Sample, Mapping[str, Any]]], encoder: ChatEncoder) -> None:
    """Warn if samples had images and what they were processed to has no pixel values, and of media that is not read."""
    with_media = sum(bool(sample.num_media or sample.unread) for sample, _ in processed)
    if encoder.text_only and with_media:
        logger.warning(
            "%s is a tokenizer: of %d samples with images, video or audio only the text is used",
            type(encoder.processor).__name__,
            with_media,
        )
        return
    unread = sorted({key for sample, _ in processed for key in sample.unread})
    if unread:
        logger.warning("samples hold further media under the keys %s, which are not read", unread)
    with_images = [inputs for sample, inputs in processed if sample.num_images]
    lost = [inputs for inputs in with_images if not _has_pixels(inputs)]
    if lost:
        logger.warning(
            "%s returned no pixel values for %d of %d samples with images (got the keys %s)",
            type(encoder.processor).__name__,
            len(lost),
            len(with_images),
            sorted(lost[0]),
        )


def _has_pixels(inputs: Mapping[str, Any]) -> bool:
    return any("pixel_values" in key or "patches" in key for key in inputs)


def check_image_tokens(
    tokens: Mapping[int, int],
    batches: list[Mapping[str, Any]],
    processor: Any,
    model_config: Any,
    allow_text_only: bool,
) -> None:
    """Check that a model that takes images is calibrated with images, and one that takes sound alone with sound.

    Args:
        tokens: modality → number of tokens in the set.
        batches: the processed batches.
        processor: named in the error.
        model_config: config of the model.
        allow_text_only: warn in place of raising.

    Raises:
        ValueError: the model takes images and the set has neither image nor video tokens, or it takes sound only and the
            set has no audio tokens.
    """
    visual = tokens.get(IMAGE, 0) + tokens.get(VIDEO, 0)
    pixels = sum(_has_pixels(inputs) for inputs in batches)
    if visual and not pixels:
        logger.warning("the batches hold %d image and video tokens, but no pixel values: the images are lost", visual)
    deaf = takes_audio(model_config) and not tokens.get(AUDIO, 0)
    if deaf and (visual or allow_text_only):
        logger.warning("the calibration set has no audio tokens; that side of the model is calibrated on nothing")
    if visual:
        return
    if not takes_images(model_config):
        if deaf and not allow_text_only:
            raise ValueError(
                f"a calibration set for {type(model_config).__name__}, a model that takes sound, must have audio tokens, got 0; "
                "pass samples with parts {'type': 'audio', 'audio': <path or URL>}, or processed batches. To "
                "calibrate on text alone, set allow_text_only=True"
            )
        return
    if allow_text_only:
        logger.warning("the calibration set has no image tokens; the visual side of the model is calibrated on nothing")
        return
    raise ValueError(_no_images(pixels, processor, model_config))


def _no_images(pixels: int, processor: Any, model_config: Any) -> str:
    if pixels:
        token_id = placeholder_id(model_config, "image")
        found = (
            f"{pixels} batches have pixel values, but no position holds the image token of the config (id {token_id}); "
            "pass processed batches with 'modality', 1 at image positions"
        )
    else:
        found = (
            f"no sample has an image, or {type(processor).__name__} is not the model's full processor; pass samples "
            f"with images (calibration={BUILTIN!r} has them) and AutoProcessor.from_pretrained(...)"
        )
    return (
        f"a calibration set for {type(model_config).__name__}, a model that takes images, must have image tokens, got "
        f"0: {found}. To calibrate on text alone, set allow_text_only=True"
    )
