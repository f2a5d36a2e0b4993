"""The calibration set: samples → processed batches with the modality of every token."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..brief import brief_error
from ..config import check_seed
from .chat import ChatEncoder, borrowed
from .checks import (
    all_dropped,
    check_image_tokens,
    check_lengths,
    check_number,
    check_token_ids,
    warn_of_lost_images,
)
from .modality import IMAGE, MODALITY_NAMES, PADDING, token_modality
from .origins import is_builtin, read_samples, shuffled_order
from .picture_tokens import with_image_tokens
from .samples import ACCEPTED_FORMATS, Sample

logger = logging.getLogger(__name__)

_TOKEN_DTYPES = (torch.int64, torch.int32)
_TRIES = 4  # samples looked at for each one wanted, where some are too long


@dataclass(frozen=True)
class CalibrationBatch:
    """One forward pass.

    Attributes:
        inputs: every key that the processor returned, for `model(**inputs)`.
        modality: [batch, length] int8, PADDING, TEXT, IMAGE, VIDEO or AUDIO at each position.
    """

    inputs: dict[str, Any]
    modality: Tensor


@dataclass(frozen=True)
class CalibrationSet:
    """What a model is calibrated on.

    Attributes:
        batches: the batches in the order in which they run.
        num_samples: rows of all batches.
        num_dropped: samples left out because they were longer than the limit.
        tokens: modality → number of tokens, padding left out.
        builtin: whether these are the built-in samples.
    """

    batches: list[CalibrationBatch]
    num_samples: int
    num_dropped: int
    tokens: dict[int, int]
    builtin: bool = False

    def image_token_share(self) -> float:
        """Return the share of image tokens, 0 to 1."""
        return self.tokens.get(IMAGE, 0) / max(1, sum(self.tokens.values()))

    def summary(self) -> str:
        """Return one line for the log: samples, tokens, the share of each modality, what was dropped."""
        total = max(1, sum(self.tokens.values()))
        shares = ", ".join(
            f"{MODALITY_NAMES[m]} {100 * count / total:.1f} %" for m, count in sorted(self.tokens.items())
        )
        longest = max(batch.modality.shape[1] for batch in self.batches)
        return (
            f"calibration set: {self.num_samples} samples in {len(self.batches)} batches, {total:,} tokens ({shares}), "
            f"longest batch {longest} tokens, {self.num_dropped} over-long samples dropped"
        )


_Processed = tuple[Sample, CalibrationBatch]  # a sample and what it became, alone


def prepare_calibration(
    calibration: Any,
    processor: Any,
    model_config: Any,
    *,
    num_samples: int = 128,
    seed: int = 0,
    max_length: int = 2048,
    batch_size: int = 1,
    allow_text_only: bool = False,
    max_image_pixels: int | None = 1024 * 1024,
    allow_urls: bool = False,
    vocabulary: int | None = None,
    image_tokens: int | None = None,
    strict_image_tokens: bool = True,
) -> CalibrationSet:
    """Read, process and label a calibration set. The processor and its tokenizer are left as they were.

    Args:
        calibration: "builtin"; a Hub dataset id, "org/name", "org/name:config" or "org/name:config:split"; a local
            folder or JSONL file; a dataset or iterable of samples; or a list of processed batches, passed on unchanged.
        processor: the model's processor; a tokenizer for a text-only model; not needed for processed batches.
        model_config: the model's config, which names the placeholder tokens.
        num_samples: samples to take; fewer with a warning where there are not enough.
        seed: seed of the shuffle before taking them, and of the built-in set.
        max_length: tokens; longer samples are dropped and counted, never truncated.
        batch_size: samples per batch; above 1 they are padded on the right, those of like length together.
        allow_text_only: accept a set without image tokens for a model that takes images.
        max_image_pixels: larger images are shrunk to this many pixels, keeping their shape; None keeps them.
        allow_urls: whether files that samples name by URL are fetched.
        vocabulary: rows of the model's input embedding, to which token ids are held; None: they are not checked.
        image_tokens: most tokens that an image becomes, by fewer tiles or fewer pixels; None: as the processor makes them.
        strict_image_tokens: raise where the processor cannot make so few; else it makes the fewest that it can.

    Raises:
        ValueError: a sample has none of the accepted forms, an image cannot be read, every sample is too long, the processor
            cannot make so few image tokens, or a vision-language model would be calibrated on text alone.
        ImportError: the source needs the `datasets` package.

    Source: SAB-LVLM, multimodal calibration set; method §2.
    """
    for name, value in (("num_samples", num_samples), ("max_length", max_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    check_seed(seed)
    if holds_batches(calibration):
        if image_tokens is not None and strict_image_tokens:
            raise ValueError("`image_tokens` must be left out for processed batches, whose pictures are tokens already")
        batches, num_dropped = _take_batches(calibration, model_config, num_samples, seed, max_length, vocabulary)
    elif processor is None:
        raise ValueError("calibration samples need the model's processor to become model inputs, got `processor=None`")
    else:
        with borrowed(getattr(processor, "tokenizer", processor)):
            encoder = ChatEncoder(processor, max_image_pixels, allow_urls)
            if image_tokens is not None:
                encoder = with_image_tokens(encoder, model_config, image_tokens, strict_image_tokens)
            samples, too_long = _take_samples(
                calibration, encoder, model_config, num_samples, seed, max_length, vocabulary
            )
            num_dropped = len(too_long)
            check_lengths([sample for sample, _ in samples], too_long, max_length, allow_text_only)
            warn_of_lost_images([(sample, batch.inputs) for sample, batch in samples], encoder)
            batches = _encode_batches(samples, encoder, model_config, batch_size)
            batches = [batches[i] for i in shuffled_order(len(batches), seed)]  # the first ones stand for all
    calibration_set = _count(batches, num_dropped, is_builtin(calibration))
    check_number(calibration_set.num_samples, num_samples, num_dropped)
    inputs = [batch.inputs for batch in batches]
    check_image_tokens(calibration_set.tokens, inputs, processor, model_config, allow_text_only)
    logger.info(calibration_set.summary())
    return calibration_set


def holds_batches(calibration: Any) -> bool:
    return (
        isinstance(calibration, (list, tuple))
        and len(calibration) > 0
        and isinstance(calibration[0], Mapping)
        and ("input_ids" in calibration[0] or all(isinstance(value, Tensor) for value in calibration[0].values()))
    )


def _take_batches(
    given: list[Any], model_config: Any, num_samples: int, seed: int, max_length: int, vocabulary: int | None
) -> tuple[list[CalibrationBatch], int]:
    """Take processed batches, in shuffled order, until they hold `num_samples` rows."""
    batches, taken, dropped = [], 0, 0
    for i in shuffled_order(len(given), seed):
        if taken >= num_samples:
            break
        inputs = given[i]
        input_ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.dtype not in _TOKEN_DTYPES:
            shown = (
                f"{input_ids.dtype} {tuple(input_ids.shape)}"
                if isinstance(input_ids, Tensor)
                else type(input_ids).__name__
            )
            raise ValueError(
                f"batch {i}: key 'input_ids' must be a tensor of integers [batch, length], got {shown}; process with "
                f'return_tensors="pt". Models that read no tokens before their decoder (Donut, Pix2Struct) are not supported.\n'
                f"{ACCEPTED_FORMATS}"
            )
        modality = token_modality(inputs, model_config)
        check_token_ids(input_ids, modality, f"batch {i}", vocabulary)
        if input_ids.shape[1] > max_length:
            dropped += len(input_ids)
            continue
        batches.append(CalibrationBatch({k: v for k, v in inputs.items() if k != "modality"}, modality))
        taken += len(input_ids)
    if not batches:
        raise ValueError(all_dropped("", [inputs["input_ids"].shape[1] for inputs in given], max_length))
    return batches, dropped


def _take_samples(
    calibration: Any,
    encoder: ChatEncoder,
    model_config: Any,
    num_samples: int,
    seed: int,
    max_length: int,
    vocabulary: int | None,
) -> tuple[list[_Processed], list[tuple[Sample, int]]]:
    """Process samples one by one until `num_samples` fit into `max_length`.

    Returns those that fit, and those that do not, with their lengths.
    """
    needs_image = encoder.needs_image(model_config)
    kept, too_long, skipped = [], [], 0
    for sample in read_samples(calibration, seed=seed, limit=_TRIES * num_samples, with_images=not encoder.text_only):
        if needs_image and not sample.num_media:
            skipped += 1
            continue
        inputs = _encode_one(encoder, sample)
        modality = token_modality(inputs, model_config)
        check_token_ids(inputs["input_ids"], modality, sample.where, vocabulary)
        length = inputs["input_ids"].shape[1]
        if length > max_length:
            too_long.append((sample, length))
            continue
        kept.append((sample, CalibrationBatch(inputs, modality)))
        if len(kept) == num_samples:
            break
    if skipped:
        logger.warning("%d text-only samples were skipped: this model and its processor need an image in each", skipped)
    if not kept and not too_long:
        raise ValueError(f"none of the {skipped} calibration samples has an image, and this model needs one in each")
    return kept, too_long


def _encode_one(encoder: ChatEncoder, sample: Sample) -> dict[str, Any]:
    """Process one sample; what a processor raises for it then names the sample."""
    try:
        return encoder([sample])
    except ImportError:  # a package that video or audio needs
        raise
    except Exception as error:  # processors and templates raise what they like
        if str(error).startswith(f"{sample.where}: "):
            raise
        name = type(encoder.processor).__name__
        raise ValueError(
            f"{sample.where}: {name} cannot process the sample ({type(error).__name__}: {brief_error(error)})"
        ) from error


def _encode_batches(
    samples: list[_Processed], encoder: ChatEncoder, model_config: Any, batch_size: int
) -> list[CalibrationBatch]:
    """Process the samples again in padded batches of alike kind and length; singles are ready."""
    if batch_size > 1 and encoder.tokenizer.pad_token is None:
        logger.warning("the tokenizer has no pad token: calibrating with batch_size=1 in place of %d", batch_size)
        batch_size = 1
    if batch_size == 1:
        return [batch for _, batch in samples]
    batches = []
    for kinds in sorted({sample.kinds for sample, _ in samples}, reverse=True):
        # Some processors refuse batches in which only some samples have images.
        group = [(sample, batch) for sample, batch in samples if sample.kinds == kinds]
        group.sort(key=lambda pair: pair[1].modality.shape[1])
        for start in range(0, len(group), batch_size):
            inputs = encoder([sample for sample, _ in group[start : start + batch_size]], padding=True)
            batches.append(CalibrationBatch(inputs, token_modality(inputs, model_config)))
    return batches


def _count(batches: list[CalibrationBatch], num_dropped: int, builtin: bool) -> CalibrationSet:
    tokens: dict[int, int] = {}
    for batch in batches:
        kinds, counts = batch.modality[batch.modality != PADDING].unique(return_counts=True)
        for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
            tokens[kind] = tokens.get(kind, 0) + count
    return CalibrationSet(batches, sum(len(batch.modality) for batch in batches), num_dropped, tokens, builtin)
