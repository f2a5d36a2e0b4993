"""Fused mixture-of-experts weights, one 3-D parameter for all experts, taken apart into one Linear an expert, and back.

A model's own code goes on to run: `ExpertWeights` stands where the parameter was, under its name, and answers the operations
that code applies to it (`linear(x, W[e])`, `x @ W[e]`, `bmm(x, W)`) by calling the expert's Linear. So an expert is a module
like any other: hooks see the tokens that the router sends it, and it can be packed, refined and saved.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ExpertWeights(nn.Module):
    """Stands for a parameter `[experts, out_features, in_features]` (or transposed); its children "0", "1", … are Linears.

    Args:
        weight: the fused parameter; the Linears share its memory.
        transposed: whether it is stored as `[experts, in_features, out_features]`.
    """

    def __init__(self, weight: Tensor, transposed: bool):
        super().__init__()
        self.transposed = transposed
        self.shape = weight.shape
        self._is_hf_initialized = True  # there is nothing for transformers to initialize: experts come from the file
        for e, matrix in enumerate(weight.detach().unbind()):
            self.add_module(str(e), _linear(matrix.T if transposed else matrix))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int | Tensor) -> ExpertMatrix:
        index = int(expert)
        if not -len(self) <= index < len(self):
            raise IndexError(f"expert {index} of {len(self)}")
        return ExpertMatrix(self._modules[str(index % len(self))], self.transposed)

    def __iter__(self) -> Iterator[ExpertMatrix]:
        return (self[e] for e in range(len(self)))

    def is_dense(self) -> bool:
        return all(isinstance(module, nn.Linear) for module in self.children())

    def fused(self) -> nn.Parameter:
        """Return the parameter that dense Linears stand for."""
        matrices = [module.weight.detach() for module in self.children()]
        return nn.Parameter(torch.stack([W.T for W in matrices] if self.transposed else matrices))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.bmm and not kwargs and isinstance(args[1], cls):
            x, weights = args
            return torch.stack([x_e @ W_e for x_e, W_e in zip(x, weights, strict=True)])
        raise NotImplementedError(_unknown(func))


class ExpertMatrix:
    """One expert's matrix, as `W[e]` of the fused parameter; `linear(x, W[e])` or `x @ W[e]` run its module."""

    def __init__(self, module: nn.Module, transposed: bool):
        self.module, self.transposed = module, transposed

    @property
    def mT(self) -> ExpertMatrix:  # noqa: N802 (the tensor's own name for it)
        return ExpertMatrix(self.module, not self.transposed)

    T = mT

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x, W = (*args, kwargs.get("weight"))[:2]
        bias = kwargs.get("bias", args[2] if len(args) > 2 else None)
        is_linear = func is nn.functional.linear
        if not (is_linear or func in (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)):
            raise NotImplementedError(_unknown(func))
        if W.transposed == is_linear:
            raise RuntimeError(
                "a fused expert weight is used the other way round than its shape says: pass a model whose experts are "
                "[experts, out, in] under `linear`, or [experts, in, out] under `@`"
            )
        if not x.numel():  # no token was sent to this expert
            return x.new_empty(*x.shape[:-1], W.module.out_features)
        y = W.module(x)
        return y if bias is None else y + bias


def split_experts(model: nn.Module, names: Iterable[str]) -> None:
    """Replace every fused parameter of which an expert is among `names` by `ExpertWeights`, in place.

    Args:
        model: the model or its skeleton on the meta device.
        names: module names as `…experts.gate_up_proj.3`; names of other modules are ignored.
    Raises:
        ValueError: the shape of a fused parameter does not tell which axis its inputs have.
    """
    wanted = {name.rpartition(".")[0] for name in names}
    _split(model, [name for name in fused_parameters(model) if name in wanted])


def fuse_experts(model: nn.Module) -> None:
    """Undo `split_experts` wherever all experts are dense Linears."""
    found = [name for name, module in model.named_modules() if isinstance(module, ExpertWeights) and module.is_dense()]
    for name in reversed(found):
        _put_back(model, name, _get(model, name).fused())


@contextmanager
def experts_apart(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Take the fused parameters called `names` apart for a look at the experts; afterwards everything is as it was."""
    parameters = {name: _get(model, name) for name in names}
    _split(model, names)
    try:
        yield
    finally:
        for name in reversed(names):
            _put_back(model, name, parameters[name])


def fused_parameters(model: nn.Module, prefixes: tuple[str, ...] | None = None) -> list[str]:
    """Return the names of the fused expert parameters: 3-D, and not the kernel of a convolution.

    Args:
        model: the model.
        prefixes: modules to look in; None for all.
    """
    inside = [(prefix, model.get_submodule(prefix)) for prefix in prefixes] if prefixes is not None else [("", model)]
    return [
        ".".join(part for part in (prefix, name, attribute) if part)
        for prefix, top in inside
        for name, module in top.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for attribute, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and min(parameter.shape[1:]) > 1 and parameter.is_floating_point()
    ]


def _split(model: nn.Module, names: list[str]) -> None:
    transposed = {name: _is_transposed(model, name) for name in names}  # before any of them is gone
    for name in names:
        owner, attribute = _owner(model, name)
        weights = ExpertWeights(owner._parameters[attribute], transposed[name])
        weights.train(owner.training)
        delattr(owner, attribute)
        owner.add_module(attribute, weights)
        config = getattr(owner, "config", None)
        if getattr(config, "_experts_implementation", None) is not None and not hasattr(owner, "_config_of_fused"):
            # Kernels for fused weights need the one tensor; the class's own loop over the experts that are hit does not.
            owner._config_of_fused = config
            owner.config = copy.copy(config)
            owner.config._experts_implementation = "eager"


def _put_back(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Make `name` a parameter again, the first of its module: put back in reverse order, all are in their old order."""
    owner, attribute = _owner(model, name)
    delattr(owner, attribute)
    others = dict(owner._parameters)
    owner._parameters.clear()
    owner._parameters.update({attribute: parameter} | others)
    if hasattr(owner, "_config_of_fused"):
        owner.config = vars(owner).pop("_config_of_fused")


def _is_transposed(model: nn.Module, name: str) -> bool:
    """Whether a fused parameter is `[experts, in, out]`: as its module says, else by the shapes.

    The first fused parameter of a block takes hidden states, the last gives them back.
    """
    stated = getattr(_owner(model, name)[0], "is_transposed", None)
    if isinstance(stated, bool):
        return stated
    hidden_size = model.get_input_embeddings().weight.shape[-1]
    shapes = [_get(model, other).shape[1:] for other in fused_parameters(model, (_block_of(name),))]
    for (rows, columns), takes_hidden_states in ((shapes[0], True), (shapes[-1], False)):
        if (rows == hidden_size) != (columns == hidden_size):
            return (rows == hidden_size) == takes_hidden_states
    raise ValueError(
        f"`{name}` has the shape {list(_get(model, name).shape)} and cannot be told from its transpose (hidden size "
        f"{hidden_size}); name the experts in `modules_to_not_convert`"
    )


def _block_of(name: str) -> str:
    """Return the part of a dotted name up to its first number: the block."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: first + 1])


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, attribute = name.rpartition(".")
    return model.get_submodule(parent), attribute


def _get(model: nn.Module, name: str) -> Any:
    owner, attribute = _owner(model, name)
    return getattr(owner, attribute)


def _linear(matrix: Tensor) -> nn.Linear:
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=matrix.is_floating_point())
    return linear


def _unknown(func: Any) -> str:
    return (
        f"the model applies {getattr(func, '__name__', func)} to its fused expert weights, which packed experts do not "
        "support; name the experts in `modules_to_not_convert`, or call `model.dequantize()`"
    )
