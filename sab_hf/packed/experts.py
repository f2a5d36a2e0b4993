"""Fused mixture-of-experts weights, one 3-D parameter for all experts, taken apart into one Linear an expert, and back.

A model's own code goes on to run: a `FusedView` stands where the parameter was, under its name, and answers the operations that
code applies to it (`linear(x, W[e])`, `x @ W[e]`, `bmm(x, W)`) by calling the expert's Linear. So an expert is a module like
any other: hooks see the tokens that the router sends it, and it can be packed, refined and saved.

Expert 3 of the parameter `experts.gate_up_proj` is the module `experts.split.gate_up_proj.3`. The part `split` keeps the names
apart from those for which transformers 5 has rules that fuse and unfuse weights in files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..dotted import block_of

SPLIT = "split"
"""Name of the part that holds the experts of a module's fused parameters."""


class ExpertWeights(nn.Module):
    """The experts of a parameter `[experts, out_features, in_features]` (or transposed); its children "0", "1", … are Linears.

    Args:
        weight: the fused parameter; the Linears share its memory.
        transposed: whether it is stored as `[experts, in_features, out_features]`.
    """

    def __init__(self, weight: Tensor, transposed: bool):
        super().__init__()
        self.transposed = transposed
        self.shape = weight.shape
        for e, matrix in enumerate(weight.detach().unbind()):
            self.add_module(str(e), _linear(matrix.T if transposed else matrix))

    def __len__(self) -> int:
        return self.shape[0]

    def is_dense(self) -> bool:
        return all(isinstance(module, nn.Linear) for module in self.children())

    def fused(self) -> nn.Parameter:
        """Return the parameter that dense Linears stand for."""
        matrices = [module.weight.detach() for module in self.children()]
        return nn.Parameter(torch.stack([W.T for W in matrices] if self.transposed else matrices))


class FusedView:
    """What the model's code sees in place of the fused parameter W; `W[e]`, `W.shape`, `W.transpose(1, 2)` and `bmm(x, W)` work.

    Args:
        weights: the experts.
        flipped: whether this is the parameter with its last two axes exchanged.
    """

    _is_hf_initialized = True  # there is nothing for transformers to initialize: experts come from the file

    def __init__(self, weights: ExpertWeights, flipped: bool = False):
        self.weights, self.flipped = weights, flipped

    @property
    def shape(self) -> torch.Size:
        experts, rows, columns = self.weights.shape
        return torch.Size((experts, columns, rows) if self.flipped else (experts, rows, columns))

    def transpose(self, dim0: int, dim1: int) -> FusedView:
        """Return the parameter with its last two axes exchanged."""
        if {dim0 % 3, dim1 % 3} != {1, 2}:
            raise NotImplementedError(_unknown(Tensor.transpose))
        return FusedView(self.weights, not self.flipped)

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, expert: int | Tensor) -> ExpertMatrix:
        index = int(expert)
        if not -len(self) <= index < len(self):
            raise IndexError(f"expert {index} of {len(self)}")
        out_features = self.weights.shape[2 if self.weights.transposed else 1]
        transposed = self.weights.transposed != self.flipped
        return ExpertMatrix(self.weights._modules[str(index % len(self))], out_features, transposed)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.bmm and not kwargs and isinstance(args[1], cls):
            x, weights = args
            return torch.stack([x_e @ weights[e] for e, x_e in enumerate(x.unbind())])
        raise NotImplementedError(_unknown(func))


class ExpertMatrix:
    """One expert's matrix, as `W[e]` of the fused parameter; `linear(x, W[e])` or `x @ W[e]` run its module."""

    def __init__(self, module: nn.Module, out_features: int, transposed: bool):
        self.module, self.out_features, self.transposed = module, out_features, transposed

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
        y = W.module(x) if x.numel() else x.new_empty(*x.shape[:-1], W.out_features)  # empty: no token was sent here
        return y if bias is None else y + bias


def split_experts(model: nn.Module, names: Iterable[str]) -> None:
    """Take every fused parameter of which an expert is among `names` apart, in place.

    Args:
        model: the model or its skeleton on the meta device.
        names: module names as `…experts.split.gate_up_proj.3`; names of other modules are ignored.
    """
    wanted = {fused for name in names if (fused := fused_name(name))}
    modules = dict(model.named_modules())
    owners = {owner for fused in wanted if (owner := fused.rpartition(".")[0]) in modules}
    _split(model, [name for name in fused_parameters(model, tuple(sorted(owners))) if name in wanted])


def fuse_experts(model: nn.Module) -> None:
    """Undo `split_experts` wherever all experts are dense Linears."""
    found = [name for name, module in model.named_modules() if isinstance(module, ExpertWeights) and module.is_dense()]
    for name in reversed(found):
        _put_back(model, fused_name(f"{name}.0"), model.get_submodule(name).fused())


def expert_name(fused: str, expert: int) -> str:
    """Return the name of an expert's module, given that of the fused parameter."""
    owner, _, attribute = fused.rpartition(".")
    return f"{owner}.{SPLIT}.{attribute}.{expert}".lstrip(".")


def fused_name(expert: str) -> str | None:
    """Return the name of the fused parameter that an expert's module was in; None if `expert` is no such name."""
    parts = expert.split(".")
    if len(parts) < 3 or parts[-3] != SPLIT or not parts[-1].isdigit():
        return None
    return ".".join([*parts[:-3], parts[-2]])


def oriented(model: nn.Module, fused: str, matrix: Tensor) -> Tensor:
    """Return an expert's `matrix`, a slice of the parameter called `fused`, as [out_features, in_features]."""
    return matrix.T if _is_transposed(model, fused) else matrix


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
    """Return the names of the fused expert parameters: 3-D, no kernel of a convolution, and it shows which axis is which.

    Args:
        model: the model.
        prefixes: modules to look in; None for all.
    """
    return [
        name
        for name in _stacks(model, ("",) if prefixes is None else prefixes)
        if _is_transposed(model, name) is not None
    ]


def _stacks(model: nn.Module, prefixes: tuple[str, ...]) -> list[str]:
    """Return the names of the parameters that are stacks of matrices, in the order of their definition."""
    return [
        ".".join(part for part in (prefix, name, attribute) if part)
        for prefix in prefixes
        for name, module in model.get_submodule(prefix).named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for attribute, parameter in module._parameters.items()
        if parameter is not None
        and parameter.ndim == 3
        and min(parameter.shape[1:]) > 1
        and parameter.is_floating_point()
    ]


def _split(model: nn.Module, names: list[str]) -> None:
    transposed = {name: _is_transposed(model, name) for name in names}  # before any of them is gone
    for name in names:
        owner, attribute = _owner(model, name)
        weights = ExpertWeights(owner._parameters.pop(attribute), transposed[name])
        if SPLIT not in owner._modules:
            owner.add_module(SPLIT, nn.Module())
        owner._modules[SPLIT].add_module(attribute, weights)
        owner._modules[SPLIT].train(owner.training)
        vars(owner)[attribute] = FusedView(weights)
        config = getattr(owner, "config", None)
        if getattr(config, "_experts_implementation", None) is not None and not hasattr(owner, "_config_of_fused"):
            # Kernels for fused weights need the one tensor; the class's own loop over the experts that are hit does not.
            owner._config_of_fused = config
            owner.config = copy.copy(config)
            owner.config._experts_implementation = "eager"


def _put_back(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Make `name` a parameter again, the first of its module: put back in reverse order, all are in their old order."""
    owner, attribute = _owner(model, name)
    del vars(owner)[attribute]
    del owner._modules[SPLIT]._modules[attribute]
    if not owner._modules[SPLIT]._modules:
        del owner._modules[SPLIT]
    others = dict(owner._parameters)
    owner._parameters.clear()
    owner._parameters.update({attribute: parameter} | others)
    if hasattr(owner, "_config_of_fused"):
        owner.config = vars(owner).pop("_config_of_fused")


def _is_transposed(model: nn.Module, name: str) -> bool | None:
    """Whether a fused parameter is `[experts, in, out]`: as its module says, else by the shapes; None if they do not tell.

    The first fused parameter of a block takes hidden states, the last gives them back.
    """
    stated = getattr(_owner(model, name)[0], "is_transposed", None)
    if isinstance(stated, bool):
        return stated
    hidden_size = model.get_input_embeddings().weight.shape[-1]
    shapes = [_get(model, other).shape[1:] for other in _stacks(model, (block_of(name) or name.rpartition(".")[0],))]
    for (rows, columns), takes_hidden_states in ((shapes[0], True), (shapes[-1], False)):
        if (rows == hidden_size) != (columns == hidden_size):
            return (rows == hidden_size) == takes_hidden_states
    return None


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
