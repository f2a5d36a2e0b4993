"""Names of tensors in files and in models: what transformers makes of a file's names, and what saving makes of a model's.

transformers renames tensors between files and models, also inside blocks, and takes dense weights apart or joins them on the way
(`WeightConverter`). Packed tensors have names and shapes of their own, so no conversion may touch them; renaming them is harmless
where loading undoes it, and left out where it does not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..dotted import at_number
from ..packing import tensor_specs

PACKED_NAMES = frozenset(tensor_specs(1, 1, 1, 1))
"""Last name parts of packed tensors."""


def is_packed_name(name: str) -> bool:
    """Return whether a tensor is called as packed ones are."""
    return name.rpartition(".")[2] in PACKED_NAMES


def tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the tied tensors of a state dict, which a file holds once: every further name → the first.

    Args:
        state: tensors by name. On the meta device they have no place in memory: there the parameters themselves are
            needed, `model.state_dict(keep_vars=True)`.
    """
    first: dict[Any, str] = {}
    again = {}
    for name, tensor in state.items():
        if tensor.numel():
            place = id(tensor) if tensor.is_meta else (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.device)
            if first.setdefault(place, name) != name:
                again[name] = first[place]
    return again


def tail(name: str) -> str:
    """Return `name` from its first number on (the block's), or its last two parts: most loaders rename only what is before."""
    split = at_number(name)
    return ".".join(name.split(".")[-2:]) if split is None else ".".join(filter(None, split[1:]))


def loaded_names(
    model: nn.Module, names: Iterable[str], targets: Collection[str] | None = None
) -> dict[str, tuple[str, ...]]:
    """Return, for each tensor name in a checkpoint's files, the names under which transformers looks for its place in `model`.

    Args:
        model: the model or its skeleton.
        names: of all tensors in the files.
        targets: names that have a place; None: those of the model's state dict.
    """
    known = dict.fromkeys(model.state_dict() if targets is None else targets, True)
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # transformers 4.57
        return _renamed_by_4(model, list(names))
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    conversions = without_packed(get_model_conversion_mapping(model))
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in conversions if not isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix, found = model.base_model_prefix, {}
    for name in sorted(names, key=dot_natural_key):  # the loader's order, on which some renamings depend
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], prefix, known)
        parts = [renamed]
        if pattern is not None:
            first, *_ = patterns = by_pattern[pattern].target_patterns
            parts = [renamed.replace(first, part) for part in patterns]
        found[name] = tuple(parts)
    return found


def _renamed_by_4(model: nn.Module, names: list[str]) -> dict[str, tuple[str, ...]]:
    """`loaded_names` of transformers 4.57."""
    prefix = model.base_model_prefix
    in_file = bool(prefix) and any(name.startswith(prefix) for name in names)
    in_model = bool(prefix) and hasattr(model, prefix)
    mapping = model._checkpoint_conversion_mapping if is_vlm_of_4(model) else None
    renamed = model._get_key_renaming_mapping(names, mapping, in_file and not in_model, in_model and not in_file)
    return {name: (new,) for name, new in renamed.items()}


def is_vlm_of_4(model: nn.Module) -> bool:
    """Return whether transformers 4.57 renames this model's tensors as those of vision-language models."""
    from transformers.modeling_utils import VLMS

    classes = [cls.__name__.lower() for cls in type(model).__mro__[:-1]]
    return any(known in cls for cls in classes for known in VLMS)


def _names_in_files(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict under the names, and in the layout, in which transformers will write it."""
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4.57
        state = {_name_in_file_of_4(model, name): tensor for name, tensor in state.items()}
        return model._fix_state_dict_keys_on_save(state)
    return revert_weight_conversion(model, state)


def _name_in_file_of_4(model: nn.Module, name: str) -> str:
    """Undo the renaming of loading, as `save_pretrained` of transformers 4.57 does for vision-language models."""
    if is_vlm_of_4(model):
        reverse = {pattern: replacement for replacement, pattern in model._checkpoint_conversion_mapping.items()}
        for pattern, replacement in reverse.items():
            renamed, count = re.subn(pattern, re.sub(r"\(.*\)", "", replacement.lstrip("^")), name)
            if count:
                return renamed
    return name


def settle_names(
    model: nn.Module, state: Mapping[str, Tensor], modules: Collection[str], marker: str
) -> dict[str, Tensor]:
    """Make sure that `model` can be loaded from the names under which it will be saved, and return its tensors by those.

    Where transformers' renaming is not undone by its loading, the tensors concerned keep the names that they have in the
    model: its loader takes these too.

    Args:
        model: a packed model that is about to be saved; the conversions that it carries are adapted.
        state: its state dict, `marker` included.
        modules: its packed modules, as its config lists them.
        marker: a name in `state` that the model has no place for (see `checksums.py`).
    Raises:
        ValueError: a tensor would not be found again.
    """
    packed = {name.removesuffix(".signs") for name in state if name.endswith(".signs")}
    if packed != set(modules):
        raise ValueError(
            f"{type(model).__name__} has {len(packed)} packed modules and its quantization_config lists {len(modules)}; first "
            f"that is in one of them only: `{min(packed ^ set(modules))}`. The model was changed after it was "
            "quantized, so its checkpoint could not be loaded: take adapters off (`model.unload()`), or save it as it was"
        )
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # not loaded by `from_pretrained`
        conversions = _known_conversions(model, prefixes=False)
    stored, lost = _settled(model, state, marker, conversions)
    if lost:
        raise ValueError(
            f"{type(model).__name__} cannot be saved so that this version of transformers loads it again: {len(lost)} tensors "
            f"would not be found, first `{min(lost)}`. Call `model.dequantize()` and save the dense model, or use another version"
        )
    return stored


def names_when_saved(
    model: nn.Module, state: Mapping[str, Tensor], marker: str, prefixes: bool = False
) -> dict[str, Tensor]:
    """Return tensors that have the names of a skeleton's under the names that `settle_names` gave them.

    Args:
        prefixes: put back the prefixes that loading removes from names: a skeleton does not know whether they were there.
    """
    return _settled(model, state, marker, _known_conversions(model, prefixes))[0]


def _settled(
    model: nn.Module, state: Mapping[str, Tensor], marker: str, conversions: list[Any]
) -> tuple[dict[str, Tensor], set[str]]:
    """Return the tensors by the names under which they are saved, and the names in the model that will not be found again."""
    if conversions:
        model._weight_conversions = without_packed(conversions, {marker})
    stored = _names_in_files(model, dict(state))
    lost = _lost(model, stored, state, marker)
    if lost and conversions:
        own = lost | {name for name in state if is_packed_name(name)} | {marker}
        model._weight_conversions = [_sparing(entry, frozenset(own)) for entry in conversions]
        stored = _names_in_files(model, dict(state))
        lost = _lost(model, stored, state, marker)
    return stored, lost


def _lost(model: nn.Module, stored: Mapping[str, Tensor], state: Mapping[str, Tensor], marker: str) -> set[str]:
    """Return the tensors that would not be loaded from the names in `stored`, or only together with ones that do not exist."""
    places = state.keys() - {marker}
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    found, partial = set(), set()
    for parts in loaded_names(model, stored, places).values():
        found.update(parts)
        if not all(part in places for part in parts):
            partial.update(parts)
    return (places - found - ignored) | (partial & places)


def _known_conversions(model: nn.Module, prefixes: bool) -> list[Any]:
    """Return what transformers converts for this class of model; nothing on transformers 4.57, which only renames.

    Args:
        prefixes: with those that remove a prefix, of which only loading a checkpoint tells whether it had one.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange
    except ImportError:
        return []
    known = get_model_conversion_mapping(model, add_legacy=False)
    return [entry for entry in known if prefixes or not isinstance(entry, PrefixChange)]


def without_packed(conversions: list[Any], others: Collection[str] = ()) -> list[Any]:
    """Return transformers' weight conversions with converters that leave packed tensors alone, and those called `others`."""
    from transformers.core_model_loading import WeightConverter

    return [
        _sparing(entry, frozenset(others), packed=True) if isinstance(entry, WeightConverter) else _plain(entry)
        for entry in conversions
    ]


def _sparing(entry: Any, names: frozenset[str], packed: bool = False) -> Any:
    """Return a copy of a conversion that leaves `names` alone, and with `packed` all names of packed tensors."""
    kind = getattr(type(entry), "spares_for", type(entry))

    class Sparing(kind):
        __slots__ = ()  # the same layout in memory, so that the copy may take this class
        spares_for = kind

        def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
            if source_key in names or (packed and is_packed_name(source_key)):
                return source_key, None
            return super().rename_source_key(source_key)

        def reverse_transform(self) -> Any:
            return _sparing(super().reverse_transform(), names, packed)

        def __reduce__(self) -> tuple:  # a class in a function has no name by which `pickle` would find it
            return _sparing, (_plain(self), names, packed)

    entry = _plain(entry)
    entry.__class__ = Sparing
    return entry


def _plain(entry: Any) -> Any:
    """Return a copy of a conversion that leaves no name alone."""
    kind = getattr(type(entry), "spares_for", type(entry))
    plain = kind.__new__(kind)
    for name in {slot for cls in kind.__mro__ for slot in getattr(cls, "__slots__", ())}:
        if hasattr(entry, name):
            object.__setattr__(plain, name, getattr(entry, name))
    return plain
