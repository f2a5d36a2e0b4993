"""`sab_hf.load`: a packed checkpoint and its processor in one call, which fails where transformers would only warn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from ..processors import processor_of
from .locate import read_config, require_packed

_BY_CONFIG = {
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING",  # transformers 5: audio and omni models too
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
}
_HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def load(path_or_id: str | os.PathLike, **kwargs: Any) -> tuple[Any, Any]:
    """Load a packed checkpoint with the class that its config names, and its processor.

    A model that brings its own code needs `trust_remote_code=True`, as with `from_pretrained`.

    Args:
        path_or_id: a local folder or a Hub repository.
        kwargs: arguments of `from_pretrained`, for example `device_map="auto"`, `dtype=torch.bfloat16`, `revision="main"`.
    Returns:
        The model in evaluation mode, and its processor (a tokenizer for a text-only model).
    Raises:
        ValueError: the checkpoint is not packed by this package, or is damaged.
        OSError: there is no such checkpoint, or it lacks the processor's files.
    """
    hub = hub_options(kwargs)
    config = read_config(path_or_id, **hub)
    require_packed(config, path_or_id)
    model = opening_class(config).from_pretrained(path_or_id, **kwargs)
    try:
        processor = processor_of(path_or_id, None, "a checkpoint needs", "save one beside the weights", **hub)
    except ValueError as error:
        raise OSError(
            f"`{path_or_id}` has no processor beside its weights ({error.__cause__}); save one there: "
            f"`AutoProcessor.from_pretrained(<base model>).save_pretrained({str(Path(path_or_id))!r})`"
        ) from error
    return model.eval(), processor


def hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return those keyword arguments of `from_pretrained` that say where files come from: configs and processors too."""
    return {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}


def opening_class(config: Any) -> Any:
    """Return the class that opens a checkpoint: what `sab_hf.load`, the command line and the card use.

    That is the auto class of a model that brings its own code (`auto_map`; pass `trust_remote_code=True`), else the class that
    the config names as the one that saved it, else the auto class for this type of config: image-text-to-text, any-to-any, or
    text only.

    Raises:
        ValueError: transformers has no such class.
    """
    names = getattr(config, "architectures", None)
    saved_by = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    saver = getattr(transformers, saved_by, None) if saved_by else None
    if not (isinstance(saver, type) and issubclass(saver, transformers.PreTrainedModel)):
        saver = None
    own = remote_auto_class(config)
    if own is not None and not (saver and _is_native(type(config))):
        return getattr(transformers, own)
    if saver:
        return saver
    for name, mapping in _BY_CONFIG.items():
        if type(config) in getattr(modeling_auto, mapping, ()):  # a mapping's length or truth would import every config
            return getattr(modeling_auto, name)
    named = f"no class {saved_by!r}" if saved_by else "no generating model"
    raise ValueError(
        f"transformers {transformers.__version__} has {named} for a {type(config).__name__}; "
        "upgrade transformers, or load the checkpoint with the class that saved it"
    )


def remote_auto_class(config: Any) -> str | None:
    """Return the name of the auto class that opens a model with code of its own; None if the config names no such code."""
    known = getattr(config, "auto_map", None) or {}
    names = (*_BY_CONFIG, "AutoModelForVision2Seq", "AutoModelForSeq2SeqLM", "AutoModel")
    return next((name for name in names if name in known and hasattr(transformers, name)), None)


def _is_native(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "transformers"
