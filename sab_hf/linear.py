"""`SABLinear`, a Linear that holds packed sign planes only, and swapping it in and out of a model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import packing
from .experts import fuse_experts, split_experts
from .ops import sab_linear
from .planes import SignPlanes


class PackedWeight(NamedTuple):
    """Shape, dtype of storage and device of a packed weight. It is no tensor, and models that ask (T5) leave it alone."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @property
    def _is_hf_initialized(self) -> bool:
        return True  # transformers 5 initializes what has no such flag


class SABLinear(nn.Module):
    """`y = x Wᵀ + bias` with W as packed sign planes (`packing.py`); no dense weight exists at any time.

    The packed tensors are parameters without gradient, under the names of the file format, so that `state_dict` is the
    format, and device maps, offloading and sharding treat them as any weight. All of them are integers, which `.to(dtype)`
    and dtype casts at loading leave alone.

    Args:
        tensors: the packed tensors by name, as `packing.to_tensors` gives them.
        in_features: columns of the matrix.
        bias: [out_features] floating point, or None.
    """

    def __init__(self, tensors: dict[str, Tensor], in_features: int, bias: Tensor | None = None):
        super().__init__()
        out_features, num_planes, num_significant = _sizes(tensors)
        self.in_features, self.out_features = in_features, out_features
        self.num_planes, self.num_significant = num_planes, num_significant
        specs = packing.tensor_specs(out_features, in_features, num_planes, num_significant)
        for name, (dtype, shape) in specs.items():
            tensor = tensors.get(name)
            if tensor is None or tensor.dtype != dtype or tensor.shape != shape:
                got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(
                    f"`{name}` must be {dtype} {list(shape)} for a {out_features}×{in_features} matrix, got {got}"
                )
            self.register_parameter(name, nn.Parameter(tensor.contiguous(), requires_grad=False))
        if bias is not None and bias.shape != (out_features,):
            raise ValueError(f"`bias` must be [{out_features}], got {list(bias.shape)}")
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_planes(cls, planes: SignPlanes, bias: Tensor | None = None) -> SABLinear:
        """Pack `planes` into a module; scales are rounded to float16."""
        return cls(packing.to_tensors(planes), planes.shape[1], bias)

    @classmethod
    def empty_like(cls, linear: nn.Linear, num_planes: int, num_significant: int) -> SABLinear:
        """Return a module of the shape of `linear`, on its device, with uninitialised planes for a loader to fill."""
        specs = packing.tensor_specs(linear.out_features, linear.in_features, num_planes, num_significant)
        device = linear.weight.device
        tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, (dtype, shape) in specs.items()}
        return cls(tensors, linear.in_features, linear.bias)

    @property
    def weight(self) -> PackedWeight:
        """What models and adapters may ask of a Linear's weight; the values are in the packed tensors only."""
        return PackedWeight((self.out_features, self.in_features), self.signs.dtype, self.signs.device)

    def packed_tensors(self) -> dict[str, Tensor]:
        """Return the packed tensors by their names in the file, bias excluded."""
        return {name: parameter for name, parameter in self.named_parameters() if name != "bias"}

    def planes(self) -> SignPlanes:
        """Unpack into sign planes (scales float16)."""
        return packing.from_tensors(self.packed_tensors(), self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        residual: tuple[Tensor | None, ...] = (None, None, None, None)
        if self.num_significant:
            residual = (
                self.significant_columns,
                self.residual_signs,
                self.residual_row_scale.view(torch.float16),
                self.residual_col_scale.view(torch.float16),
            )
        y = sab_linear(x, self.signs, self.row_scale.view(torch.float16), self.col_scale.view(torch.float16), *residual)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        residual = f", {self.num_significant} significant columns" if self.num_significant else ""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.num_planes} planes{residual}"
        )


def _sizes(tensors: dict[str, Tensor]) -> tuple[int, int, int]:
    """Return out_features, full planes and significant columns as the tensors' shapes tell them."""
    row_scale, residual = tensors.get("row_scale"), tensors.get("residual_col_scale")
    if row_scale is None or row_scale.ndim != 2:
        got = "nothing" if row_scale is None else f"{row_scale.dtype} {list(row_scale.shape)}"
        raise ValueError(f"`row_scale` must be torch.int16 [planes, out_features], got {got}")
    if "significant_columns" in tensors and (residual is None or not residual.numel()):
        raise ValueError("`residual_col_scale` must be torch.int16 [significant columns], got nothing")
    return row_scale.shape[1], row_scale.shape[0], 0 if residual is None else residual.numel()


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` (dotted) is in `model`, in the training mode of the module it replaces."""
    parent = model.get_submodule(name.rpartition(".")[0])
    attribute = name.rpartition(".")[2]
    module.train(getattr(parent, attribute).training)
    setattr(parent, attribute, module)


def swap_in_empty(model: nn.Module, modules: dict[str, list[int]]) -> None:
    """Replace the Linears of `model` that a checkpoint holds packed by empty `SABLinear`s of the recorded size.

    Args:
        model: the skeleton, usually on the meta device.
        modules: name → [K, k], as recorded in `config.json`.
    Raises:
        ValueError: no modules are recorded, or one is not a Linear of this model.
    """
    if not modules:
        raise ValueError(
            "the checkpoint's quantization_config says `sab` but lists no quantized modules; it is damaged or was written by "
            "hand. To quantize a dense checkpoint, remove quantization_config from its config.json"
        )
    split_experts(model, modules)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unknown = [name for name in modules if name not in linears]
    if unknown:
        raise ValueError(
            f"the checkpoint's quantization_config lists {len(unknown)} modules that are no Linear of "
            f"{type(model).__name__}, first `{unknown[0]}`; load it with the class that saved it (and, for mixtures of "
            "experts, with a transformers version that names them so: versions 4 and 5 differ)"
        )
    for name, (num_planes, num_significant) in modules.items():
        replace_module(model, name, SABLinear.empty_like(linears[name], num_planes, num_significant))


def dequantize_modules(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every `SABLinear` of `model` by a dense `nn.Linear` of the weights that it stands for."""
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, SABLinear)]
    if any(module.signs.is_meta for _, module in packed):
        raise ValueError("some packed weights are offloaded; to dequantize, load the model with device_map='cpu'")
    for name, module in packed:
        with torch.device("meta"):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, dtype=dtype)
        linear.weight = nn.Parameter(module.planes().dense(dtype))
        if module.bias is not None:
            linear.bias = nn.Parameter(module.bias.to(dtype))
        replace_module(model, name, linear)
    fuse_experts(model)
