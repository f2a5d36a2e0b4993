"""Binarized vision-language models for transformers. Importing this package registers the quantization method `sab`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import SABQuantizationConfig
from .packed.linear import SABLinear
from .publish.report import report
from .quantizer import SABHfQuantizer
from .version import __version__

if TYPE_CHECKING:  # what is imported on first use, for editors and type checkers
    from transformers import AutoModelForImageTextToText as AutoModelForVision2Seq

    from .evaluate import evaluate
    from .make.binarize import quantize
    from .packed.decoding import decode_ahead
    from .packed.recorded import record_decoding
    from .prediction import estimate
    from .publish.gguf import export_gguf
    from .publish.open import load
    from .publish.save import save

__all__ = [
    "AutoModelForVision2Seq",
    "SABHfQuantizer",
    "SABLinear",
    "SABQuantizationConfig",
    "decode_ahead",
    "estimate",
    "export_gguf",
    "evaluate",
    "load",
    "quantize",
    "record_decoding",
    "report",
    "save",
    "__version__",
]


_ON_FIRST_USE = {
    "decode_ahead": ".packed.decoding",
    "estimate": ".prediction",
    "export_gguf": ".publish.gguf",
    "load": ".publish.open",
    "quantize": ".make.binarize",
    "record_decoding": ".packed.recorded",
    "save": ".publish.save",
}


def __getattr__(name: str) -> Any:
    """Import on first use what loading a packed checkpoint does not need."""
    if name == "evaluate":  # a room that can be called
        return import_module(".evaluate", __name__)
    if name in _ON_FIRST_USE:
        return getattr(import_module(_ON_FIRST_USE[name], __name__), name)
    if name == "AutoModelForVision2Seq":  # gone in transformers 5, where AutoModelForImageTextToText took its place
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
