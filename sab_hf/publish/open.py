"""`sab_hf.load`: a packed checkpoint and its processor in one call, which fails where transformers would only warn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoProcessor
from transformers import __version__ as transformers_version
from transformers.models.auto import modeling_auto

from .locate import read_config, require_packed

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
    model = model_class(config).from_pretrained(path_or_id, **kwargs)
    try:
        processor = AutoProcessor.from_pretrained(path_or_id, **hub)
    except (OSError, ValueError) as error:
        raise OSError(
            f"`{path_or_id}` has no processor beside its weights ({error}); save one there: "
            f"`AutoProcessor.from_pretrained(<base model>).save_pretrained({str(Path(path_or_id))!r})`"
        ) from error
    return model.eval(), processor


def hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return those keyword arguments of `from_pretrained` that say where files come from: configs and processors too."""
    return {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}


def model_class(config: Any) -> Any:
    """Return the auto class that loads a model of this config: image-text-to-text, any-to-any, or text only.

    Raises:
        ValueError: transformers knows no generating model of this type.
    """
    names = (
        ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"),
        ("AutoModelForMultimodalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING"),  # transformers 5: audio and omni models too
        ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    )
    for name, mapping in names:
        if type(config) in (getattr(modeling_auto, mapping, None) or ()):
            return getattr(modeling_auto, name)
    raise ValueError(
        f"transformers {transformers_version} has no generating model for a {type(config).__name__}; upgrade transformers, or "
        "load the checkpoint with the class that saved it"
    )
