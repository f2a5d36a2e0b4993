"""`sab_hf.estimate`: what quantizing a model will need, from the model or from its config alone."""

from __future__ import annotations

import itertools
import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig

from .config import SABQuantizationConfig
from .trust import trusting

if TYPE_CHECKING:
    from .calibration import CalibrationSet
    from .make.preflight import Estimate

logger = logging.getLogger(__name__)

SAMPLES_LOOKED_AT = 16
"""Samples of the data that are processed to learn how many tokens one has."""

TEXT_TOKENS, IMAGE_TOKENS = 160, 256
"""Tokens of a sample of the built-in set in words, and of its image, which three of four have, where no processor tells."""


def estimate(
    model: nn.Module | PretrainedConfig | str | os.PathLike,
    processor: Any = None,
    samples: Any = None,
    config: SABQuantizationConfig | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    processes: int | None = None,
    trust_remote_code: bool = False,
) -> Estimate:
    """Predict what `quantize` needs: bytes of the file by role, memory and minutes by stage, tokens, disk. Nothing is changed.

    Of a Hub id or a folder only config and processor are read, no weights. Without calibration samples, tokens are counted in a
    few samples of the local data that `config` names, or of the built-in set.

    Args:
        model: a model, with weights or on the meta device; its config; or a Hub id or folder.
        processor, samples, config: as in `quantize`; without samples, a data set of the Hub that `config` names is not read.
        dtype: of the weights as they will be loaded, as in `from_pretrained`; "auto": that of the config.
        device_map: where they will be loaded, as in `from_pretrained`; None: in RAM. A model that is given stays where it is.
        revision: of the Hub repository.
        processes: that share the run, each on a device like this one's; memory is then that of one of them. None: as many as
            `torchrun` or `accelerate launch` has started.
        trust_remote_code: whether code that the model brings may be run.
    Returns:
        The prediction: `print` it for one line, `table()` for all, `to_dict()` for plain data.
    Raises:
        ValueError: as `quantize` does; the model is of a family that this version of transformers does not know, or is quantized.
        OSError: there is no such model, or it may not be read.

    Example:
        >>> print(sab_hf.estimate("Qwen/Qwen2.5-VL-7B-Instruct").table())  # doctest: +SKIP
    """
    from .machine.threads import free_threads
    from .machine.workspace import Workspace
    from .make.plan import make_plan, plan_with
    from .make.preflight import estimate_run

    config = SABQuantizationConfig.of(config)
    code = trusting(trust_remote_code)
    source = processor or config.processor
    if not isinstance(model, nn.Module):
        source = source or (None if isinstance(model, PretrainedConfig) else model)
        model = without_weights(model, dtype, revision, **code)
        model.hf_device_map = _device_map_of(model, device_map)
    given = samples if samples is not None else config.calibration
    tokens_from = None
    if isinstance(given, (str, os.PathLike)):
        found = _read_processor(source or getattr(model, "name_or_path", None), revision, **code)
        calibration, tokens_from = from_few_samples(model, found, config)
        plan = plan_with(model, config, lambda: calibration)
    else:
        plan = make_plan(model, config, processor, samples)
    workspace = Workspace.of(model, config)
    with free_threads(workspace.device):
        return estimate_run(model, plan, config, workspace, tokens_from, processes)


def file_bytes(model: nn.Module, config: SABQuantizationConfig) -> int:
    """Return the bytes of all tensors that a packed model will have in its file.

    Args:
        model: with weights, or on the meta device in the dtype that it will be loaded in.
    """
    from .calibration import CalibrationSet
    from .make.plan import plan_with
    from .make.preflight import stored_sizes

    return sum(stored_sizes(model, plan_with(model, config, lambda: CalibrationSet([], 0, 0, {}))).values())


def without_weights(
    source: Any, dtype: str | torch.dtype = "auto", revision: str | None = None, **code: bool
) -> nn.Module:
    """Return the model of a config, Hub id or folder on the meta device; arguments and errors as of `estimate`."""
    from .publish.inspect import empty_model
    from .publish.locate import read_config, require_dense

    config = source if isinstance(source, PretrainedConfig) else read_config(source, revision=revision, **code)
    name = getattr(config, "_name_or_path", None) or type(config).__name__
    require_dense(config, name)
    model = empty_model(config, name, **code)
    return model if dtype == "auto" else model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def _device_map_of(model: nn.Module, device_map: str | dict[str, Any] | None) -> dict[str, Any]:
    """Return part of the model → device, as `from_pretrained` would load it on this machine."""
    if device_map is None or isinstance(device_map, dict):
        return device_map or {}
    if device_map not in ("auto", "balanced", "balanced_low_0", "sequential"):
        return {"": torch.device(device_map)}
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = {"dtype": model.dtype, "no_split_module_classes": list(getattr(model, "_no_split_modules", None) or ())}
    memory = None
    if device_map != "sequential":
        memory = get_balanced_memory(model, low_zero=device_map == "balanced_low_0", **whole)
    return dict(infer_auto_device_map(model, max_memory=memory, **whole))


def _read_processor(source: Any, revision: str | None, **code: bool) -> Any:
    """Return a processor, or the one of a Hub id or folder; None, with a warning, if there is none."""
    from transformers import AutoProcessor

    if not isinstance(source, (str, os.PathLike)) or not str(source):
        return source or None
    try:
        return AutoProcessor.from_pretrained(source, revision=revision, **code)
    except (OSError, ValueError, ImportError) as error:
        logger.warning("the processor of `%s` cannot be read (%s): tokens are assumed", source, error)
        return None


def from_few_samples(model: nn.Module, processor: Any, config: SABQuantizationConfig) -> tuple[CalibrationSet, str]:
    """Return a calibration set of as many samples as asked for, by a few of them, and how it is known.

    Those are of the local data that the config names, else of the built-in set.
    """
    from .calibration import CalibrationSet, prepare_calibration
    from .calibration.origins import BUILTIN, is_builtin
    from .machine.placement import compute_device
    from .make.settings import image_tokens

    most = image_tokens(config, compute_device(model, config.compute_device))
    wanted, looked_at = config.num_samples, min(config.num_samples, SAMPLES_LOOKED_AT)
    if processor is None:
        assumed = min(IMAGE_TOKENS, most)
        batches, tokens = _assumed(model, config, assumed), {}
        how = f"{TEXT_TOKENS} tokens of text and {assumed} of an image a sample, assumed"
    else:
        local = os.path.exists(config.calibration)
        few = prepare_calibration(
            config.calibration if local else BUILTIN,
            processor,
            model.config,
            num_samples=looked_at,
            seed=config.seed,
            max_length=config.max_length,
            batch_size=config.batch_size,
            allow_text_only=True,
            image_tokens=most,
            strict_image_tokens=config.image_tokens is not None,
        )
        batches, tokens = few.batches, few.tokens
        how = f"{few.num_samples} samples of {f'`{config.calibration}`' if local else 'the built-in set'}"
        wanted = few.num_samples if few.num_samples < looked_at else wanted  # there are no more
    taken, count = [], 0
    for batch in itertools.cycle(batches):
        if count >= wanted:
            break
        taken.append(batch)
        count += len(batch.modality)
    return CalibrationSet(taken, count, 0, tokens or _modalities(taken), is_builtin(config.calibration)), how


def _assumed(model: nn.Module, config: SABQuantizationConfig, image_tokens: int) -> list[Any]:
    """Return four batches like those of the built-in set: three with images, one of text alone."""
    from .calibration import IMAGE, TEXT, CalibrationBatch

    takes_images = getattr(model.config, "vision_config", None) is not None
    text = torch.full((config.batch_size, TEXT_TOKENS), TEXT, dtype=torch.int8)
    images = torch.full((config.batch_size, image_tokens * takes_images), IMAGE, dtype=torch.int8)
    with_image = torch.cat([images, text], 1)[:, : config.max_length]
    return [CalibrationBatch({}, modality) for modality in (with_image, with_image, with_image, text)]


def _modalities(batches: list[Any]) -> dict[int, int]:
    """Return modality → tokens."""
    counts: dict[int, int] = {}
    for batch in batches:
        for kind, count in zip(*(t.tolist() for t in batch.modality.unique(return_counts=True)), strict=True):
            if kind >= 0:
                counts[kind] = counts.get(kind, 0) + count
    return counts
