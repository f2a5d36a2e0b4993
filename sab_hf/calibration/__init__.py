"""Calibration: samples of any form → processed batches with the modality of every token."""

from .modality import AUDIO, IMAGE, MODALITY_NAMES, PADDING, TEXT, VIDEO, media_modality, token_modality
from .prepare import CalibrationBatch, CalibrationSet, holds_batches, prepare_calibration

__all__ = [
    "AUDIO",
    "IMAGE",
    "MODALITY_NAMES",
    "PADDING",
    "TEXT",
    "VIDEO",
    "CalibrationBatch",
    "CalibrationSet",
    "holds_batches",
    "media_modality",
    "prepare_calibration",
    "token_modality",
]
