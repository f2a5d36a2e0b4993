"""Weights by the names of the Linears that become packed, wherever they are, one parameter in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import groupby

from torch import Tensor, nn

from ..packed.experts import experts_apart, fused_name, oriented
from .placement import check_finite, check_readable, read_parameter


def parameter_of(model: nn.Module, name: str) -> str:
    """Return the name of the parameter with the weight of the Linear called `name`; fused experts share one."""
    fused = fused_name(name)
    if fused is not None and _is_parameter(model, fused):
        return fused
    return f"{name}.weight"


def iter_weights(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and weight [out_features, in_features] of each Linear; a fused parameter is read once for its experts.

    Args:
        model: the model, in memory or offloaded; fused experts may be taken apart or not.
        names: names of Linears, the experts of a parameter one after the other.
    Raises:
        ValueError: a weight is on the meta device and no hook says from where to load it.
    """
    for parameter, own in groupby(names, key=lambda name: parameter_of(model, name)):
        values = read_parameter(model, parameter)
        for name in own:
            if parameter == fused_name(name):
                yield name, oriented(model, parameter, values[int(name.rpartition(".")[2])])
            else:
                yield name, values


def check_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Check what can be checked before work starts: weights in memory are finite, offloaded ones can be loaded.

    Raises:
        ValueError: one is not, or cannot be.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            check_readable(model, name)
    for name in dict.fromkeys(parameter_of(model, name) for name in names):
        parameter = model.get_parameter(name)
        if not parameter.is_meta:
            check_finite(name.removesuffix(".weight"), parameter)


def check_complete(model: nn.Module, missing: Iterable[str]) -> None:
    """Check that a dense checkpoint held every tensor of `model`: transformers fills the others with random values.

    Args:
        model: the model or its skeleton.
        missing: the tensors that the checkpoint lacks, except tied ones, as transformers tells them.
    Raises:
        ValueError: one is missing that the model's class does not declare as one that may be.
    """
    allowed = model._keys_to_ignore_on_load_missing or ()
    missing = sorted(name for name in missing if not any(re.search(pattern, name) for pattern in allowed))
    if missing:
        saved_by = f" ({model.config.architectures[0]})" if model.config.architectures else ""
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of the {len(model.state_dict())} tensors of {type(model).__name__}: "
            f"{_listed(missing)}. Random values would be binarized in their place. Load it with the class that saved "
            f"it{saved_by}, or download it again; if these tensors are meant to be new, load the model without "
            "`quantization_config` and call `sab_hf.quantize(model, processor)`"
        )


def check_sizes(model: nn.Module, mismatched: Iterable[str]) -> None:
    """Check that the tensors of a dense checkpoint have the sizes of `model`: transformers fills the others with random values.

    Args:
        model: the model or its skeleton.
        mismatched: the tensors that were not loaded, though the checkpoint has them.
    Raises:
        ValueError: there is one; `from_pretrained` was called with `ignore_mismatched_sizes=True`.
    """
    if mismatched := sorted(mismatched):
        raise ValueError(
            f"the checkpoint holds {len(mismatched)} tensors of another size than {type(model).__name__} has with this "
            f"config: {_listed(mismatched)}. With `ignore_mismatched_sizes=True` random values would be binarized in their "
            "place. Load it with its own config; if these tensors are meant to be new, load the model without "
            "`quantization_config`, train them, and call `sab_hf.quantize(model, processor)`"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:5]) + (", …" if len(names) > 5 else "")


def apart(model: nn.Module, names: Iterable[str]) -> AbstractContextManager[None]:
    """Take the fused parameters of the Linears called `names` apart for the time of a `with` statement."""
    fused = dict.fromkeys(p for name in names if (p := parameter_of(model, name)) == fused_name(name))
    return experts_apart(model, list(fused))


def _is_parameter(model: nn.Module, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    return model.get_submodule(owner)._parameters.get(attribute) is not None
