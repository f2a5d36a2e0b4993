"""The processor of a model: the one that was given, or the one that lies where it, or the model, came from."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoProcessor


def processor_of(model: Any, processor: Any, needed_for: str, remedy: str, **options: Any) -> Any:
    """Return `processor`, loading it if it is a path or Hub id, and from where the model came if it is None.

    Args:
        model: a transformers model, or the path or Hub id of one.
        processor: a processor, a tokenizer, a path, a Hub id, or None.
        needed_for: what needs it, as the subject of the error's sentence.
        remedy: what to do without one, for the error.
        options: of `from_pretrained`; those that hold for one repository only (`revision`, `subfolder`) are for the model's.
    Raises:
        ValueError: none could be loaded.
    """
    if processor is not None and not isinstance(processor, (str, os.PathLike)):
        return processor
    source = processor
    if processor is None:
        source = model if isinstance(model, (str, os.PathLike)) else getattr(model, "name_or_path", "")
    else:
        options = {name: value for name, value in options.items() if name not in ("revision", "subfolder")}
    try:
        return AutoProcessor.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"{needed_for} the model's processor, and none could be loaded from {str(source)!r}; {remedy}"
        ) from error
