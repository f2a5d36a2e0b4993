"""Binarized vision-language models for transformers. Importing this package registers the quantization method `sab`."""

from .config import SABQuantizationConfig
from .linear import SABLinear
from .quantizer import SABHfQuantizer
from .report import report
from .version import __version__

__all__ = [
    "AutoModelForVision2Seq",
    "SABHfQuantizer",
    "SABLinear",
    "SABQuantizationConfig",
    "decode_ahead",
    "estimate",
    "load",
    "quantize",
    "report",
    "save",
    "__version__",
]


def __getattr__(name: str):
    """Import on first use what loading a packed checkpoint does not need."""
    if name == "decode_ahead":
        from .decoding import decode_ahead

        return decode_ahead
    if name == "estimate":
        from .binarize import estimate

        return estimate
    if name == "quantize":
        from .binarize import quantize

        return quantize
    if name == "load":
        from .loading import load

        return load
    if name == "AutoModelForVision2Seq":  # gone in transformers 5, where AutoModelForImageTextToText took its place
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText
    if name == "save":
        from .hub import save

        return save
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
