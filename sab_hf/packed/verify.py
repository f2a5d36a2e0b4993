"""Checks of a packed checkpoint while it loads: everything is there, nothing is left over, every size and dtype is right.

A loader leaves what a file lacks as uninitialised memory, ignores what it has no place for, and casts what has another
dtype. Each of these would be a silently different model, so each is an error here.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from ..packing import tensor_specs, unpack_mask
from .linear import SABModule
from .names import PACKED_NAMES, is_packed_name, loaded_names, tail

_SMALL_NAMES = PACKED_NAMES - {"signs", "residual_signs"}
_HEADER_DTYPES = {torch.uint8: "U8", torch.int16: "I16"}


def packed_names(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of all packed modules, biases too, by their names in the state dict."""
    return {
        f"{name}.{tensor_name}": tensor
        for name, module in model.named_modules()
        if isinstance(module, SABModule)
        for tensor_name, tensor in module.named_parameters(recurse=False)
    }


def read_entries(checkpoint_files: Iterable[str | os.PathLike]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Read the headers of a checkpoint's files, see `header_entries`."""
    return [entry for file in checkpoint_files for entry in header_entries(file)]


def header_entries(file: str | os.PathLike) -> list[tuple[str, str, tuple[int, ...]]]:
    """Read a file's header: name, dtype (as safetensors writes it) and shape of each tensor.

    Raises:
        ValueError: the file is cut off or damaged.
    """
    try:
        with safe_open(file, framework="pt") as reader:
            slices = [(name, reader.get_slice(name)) for name in reader.keys()]  # noqa: SIM118 (a reader is no dict)
            return [(name, stored.get_dtype(), tuple(stored.get_shape())) for name, stored in slices]
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut off ({error}); download or quantize it again") from error


def check_entries(model: nn.Module, entries: Iterable[tuple[str, str, tuple[int, ...]]], partial: bool = False) -> None:
    """Compare packed tensors by name, dtype and shape with what the skeleton expects.

    A tensor belongs where transformers' loader will put it. What that does not find (a loader may be given further names,
    with `key_mapping`) is matched by the rest of its name behind the first number, dtype and shape.

    Args:
        partial: the model is a part of the one that was saved: what the files hold besides is left out.
    Raises:
        ValueError: a packed tensor is missing, left over, or has another dtype or shape.
    """
    entries = list(entries)
    expected = {
        name: _Entry(tail(name), _HEADER_DTYPES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in packed_names(model).items()
        if is_packed_name(name)
    }
    places = loaded_names(model, [name for name, *_ in entries])
    others = Counter()
    for name, *stored in entries:
        place = next((part for part in places.get(name, ()) if part in expected), None)
        if place is not None:
            entry = expected.pop(place)
            raise_if_altered(place, entry.dtype, entry.shape, *stored)
        elif is_packed_name(name):
            others[_Entry(tail(name), *stored)] += 1
    surplus = others - Counter(expected.values())
    missing = []
    for name, entry in expected.items():
        if others[entry]:
            others[entry] -= 1
            continue
        other = next((e for e in surplus if e.tail == entry.tail), None)
        if other:
            raise_if_altered(name, entry.dtype, entry.shape, other.dtype, other.shape)
        missing.append(name)
    raise_if_missing(missing)
    if not partial:
        raise_if_unlisted([entry.tail for entry in surplus])


class PackedSize(NamedTuple):
    """Sizes of a packed matrix, as the shapes of its tensors in a file tell them."""

    out_features: int
    in_features: int
    num_planes: int
    num_significant: int


def packed_sizes(entries: Iterable[tuple[str, str, tuple[int, ...]]]) -> dict[str, PackedSize]:
    """Return the packed modules in a checkpoint's headers, name in the files → sizes, each checked to be whole.

    For readers that have no skeleton to compare with (`check_entries`): the tensors of a module must agree with each other.

    Raises:
        ValueError: a packed tensor is missing, left over, or has another dtype or shape than the others of its module ask for.
    """
    modules: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = defaultdict(dict)
    for name, dtype, shape in entries:
        if is_packed_name(name):
            module, _, part = name.rpartition(".")
            modules[module][part] = dtype, shape
    sizes = {}
    for module, found in modules.items():
        raise_if_missing([f"{module}.{part}" for part in ("row_scale", "col_scale") if part not in found])
        (_, rows), (_, columns) = found["row_scale"], found["col_scale"]
        if len(rows) != 2 or len(columns) != 2:
            raise ValueError(
                f"`{module}` must have scales [planes, features], the checkpoint has {list(rows)} and {list(columns)}; it was "
                "altered: download or quantize it again"
            )
        significant = found.get("residual_col_scale", ("", (0,)))[1]
        size = PackedSize(rows[1], columns[1], rows[0], significant[0] if significant else 0)
        specs = tensor_specs(*size)
        raise_if_missing([f"{module}.{part}" for part in specs if part not in found])
        raise_if_unlisted([f"{module}.{part}" for part in found if part not in specs])
        for part, (dtype, shape) in specs.items():
            raise_if_altered(f"{module}.{part}", _HEADER_DTYPES[dtype], shape, *found[part])
        sizes[module] = size
    return sizes


def check_contents(checkpoint_files: Iterable[str | os.PathLike]) -> None:
    """Check what shows without checksums, after `check_entries`: scales are finite, masks mark as many columns as there are.

    Raises:
        ValueError: names the tensor.
    """
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for file in checkpoint_files:
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (a reader is no dict)
                module, _, part = name.rpartition(".")
                if part in _SMALL_NAMES and (tensor := reader.get_tensor(name)).dtype in _HEADER_DTYPES:
                    if tensor.dtype == torch.int16 and not tensor.view(torch.float16).isfinite().all():
                        raise ValueError(
                            f"`{name}` in {file} holds scales that are not finite; the checkpoint is damaged: download or "
                            "quantize it again"
                        )
                    modules[module][part] = tensor
    for name, tensors in modules.items():
        if "significant_columns" in tensors:
            check_mask(name, tensors["significant_columns"], tensors["col_scale"], tensors["residual_col_scale"])


def check_mask(module: str, mask: Tensor, col_scale: Tensor, residual_col_scale: Tensor) -> None:
    """Check that the significance mask of the module called `module` marks as many columns as its residual plane has."""
    try:
        unpack_mask(mask, col_scale.shape[-1], residual_col_scale.numel())
    except ValueError as error:
        raise ValueError(f"`{module}`: {error}; download or quantize the checkpoint again") from error


class _Entry(NamedTuple):
    """What a file's header tells of a packed tensor; `tail` is the part of its name that loaders seldom change."""

    tail: str
    dtype: str
    shape: tuple[int, ...]


def check_loaded(model: nn.Module) -> None:
    """Check the packed modules of a loaded model. Tensors that are offloaded to disk were checked by their headers.

    Raises:
        ValueError: a tensor was not in the checkpoint, has another dtype or shape, or a significance mask does not fit.
    """
    # transformers 4.57 reports missing tensors to the quantizer; 5 flags each parameter that it has loaded
    if not hasattr(HfQuantizer, "update_missing_keys"):
        raise_if_missing(
            [
                name
                for name, tensor in packed_names(model).items()
                if not (tensor.is_meta or getattr(tensor, "_is_hf_initialized", False))
            ]
        )
    for name, module in model.named_modules():
        if isinstance(module, SABModule):
            _check_module(name, module)


def _check_module(name: str, module: SABModule) -> None:
    tensors = module.packed_tensors()
    specs = tensor_specs(module.out_features, module.in_features, module.num_planes, module.num_significant)
    for tensor_name, (dtype, shape) in specs.items():
        tensor = tensors[tensor_name]
        raise_if_altered(f"{name}.{tensor_name}", dtype, shape, tensor.dtype, tensor.shape)
    mask = tensors.get("significant_columns")
    if mask is not None and not mask.is_meta:
        check_mask(name, mask, tensors["col_scale"], tensors["residual_col_scale"])


@contextmanager
def naming_stale_files(files: Iterable[str | os.PathLike]) -> Iterator[None]:
    """Let an error of a check say which of the files being loaded is left from an older save, if one is.

    `save_pretrained` with several weights files leaves an older single one beside them, and loaders take that one.
    """
    try:
        yield
    except ValueError as error:
        single = next((Path(file) for file in files if Path(file).name == "model.safetensors"), None)
        index = single and single.with_name("model.safetensors.index.json")
        if single is None or not index.is_file() or index.stat().st_mtime < single.stat().st_mtime:
            raise
        raise ValueError(
            f"{single} is left from an older save, and loaders take it in place of what {index.name} beside it lists: "
            f"remove {single.name}, or move it away. What does not fit: {error}"
        ) from error


def raise_if_altered(
    name: str, dtype: object, shape: Sequence[int], got_dtype: object, got_shape: Sequence[int]
) -> None:
    """Raise a ValueError if the checkpoint has a tensor of another dtype or shape than its config says."""
    if (dtype, tuple(shape)) != (got_dtype, tuple(got_shape)):
        raise ValueError(
            f"`{name}` must be {dtype} {list(shape)}, the checkpoint has {got_dtype} {list(got_shape)}; it was altered: "
            "download or quantize it again"
        )


def raise_if_missing(names: list[str]) -> None:
    """Raise a ValueError if packed tensors called `names` are not in the checkpoint."""
    if names:
        raise ValueError(
            f"the checkpoint says `sab` but lacks packed tensors: {len(names)} in all, first `{names[0]}`; it is incomplete, or "
            "its weights are those of another save: download or quantize it again"
        )


def raise_if_unlisted(names: list[str]) -> None:
    """Raise a ValueError if the checkpoint has packed tensors called `names` that its config does not list."""
    if names:
        raise ValueError(
            f"the checkpoint has packed tensors that its config.json does not list: {len(names)}, first `{names[0]}`; its "
            "quantization_config was altered: download or quantize it again"
        )
