"""Modules that hold packed sign planes only: what all have in common, and `SABLinear`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import packing
from ..kernels.cpu.linear import Direct
from ..kernels.ops import RESIDUAL, Operands, is_plain_cpu, sab_linear
from ..planes import SignPlanes


class PackedWeight(NamedTuple):
    """Shape, dtype and device that a packed weight stands for. It is no tensor, and models that ask (T5) leave it alone.

    The dtype is a floating-point one, as that of the dense weight would be: models cast their inputs to it.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @property
    def _is_hf_initialized(self) -> bool:
        return True  # transformers 5 initializes what has no such flag


class SABModule(nn.Module):
    """A matrix [out_features, in_features] held as packed sign planes (`packing.py`); no dense weight exists at any time.

    The packed tensors are parameters without gradient, under the names of the file format, so that `state_dict` is the
    format, and device maps, offloading and sharding treat them as any weight. All of them are integers, which `.to(dtype)`
    and dtype casts at loading leave alone.

    Args:
        tensors: the packed tensors by name, as `packing.to_tensors` gives them.
        in_features: columns of the matrix.
        dtype: floating point, that of the dense weight; `.to(dtype)` and its like change it.
    """

    def __init__(self, tensors: dict[str, Tensor], in_features: int, dtype: torch.dtype):
        super().__init__()
        if not dtype.is_floating_point:
            raise ValueError(f"`dtype` must be a floating-point dtype, got {dtype}")
        self.dtype = dtype
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
        self._direct = Direct()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SABModule:
        """Follow a change of dtype, such as `.to(dtype)`, of which integers take no notice."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return super()._apply(fn, recurse)

    @property
    def weight(self) -> PackedWeight:
        """What models and adapters may ask of a matrix's weight; the values are in the packed tensors only."""
        return PackedWeight((self.out_features, self.in_features), self.dtype, self.signs.device)

    def packed_tensors(self) -> dict[str, Tensor]:
        """Return the packed tensors by their names in the file, bias excluded."""
        return {name: parameter for name, parameter in self.named_parameters() if name != "bias"}

    def planes(self) -> SignPlanes:
        """Unpack into sign planes (scales float16)."""
        return packing.from_tensors(self.packed_tensors(), self.in_features)

    def multiply(self, x: Tensor, exact: bool) -> Tensor:
        """Return `x Wᵀ` [..., out_features], in the dtype of x; `exact` as in `ops.linear_reference`.

        Where a gradient of `x` will be asked for, the product is exact in any case: its gradient is that of the exact one.
        """
        recorded = x.requires_grad and torch.is_grad_enabled()
        exact = exact or recorded
        if not recorded and is_plain_cpu(x):
            y = self._direct(x, self._parameters, exact)
            if y is not None:
                return y
        return sab_linear(x, *self.operands(), exact)

    def operands(self) -> Operands:
        """Return the packed tensors as the ops take them, scales in float16."""
        full = self.signs, self.row_scale.view(torch.float16), self.col_scale.view(torch.float16)
        if not self.num_significant:
            return Operands(*full)
        return Operands(
            *full,
            self.significant_columns,
            self.residual_signs,
            self.residual_row_scale.view(torch.float16),
            self.residual_col_scale.view(torch.float16),
        )

    def extra_repr(self) -> str:
        planes = f"{self.num_planes} plane{'s' if self.num_planes > 1 else ''}"
        residual = f" and {self.num_significant} significant columns" if self.num_significant else ""
        sizes = self.out_features, self.in_features, self.num_planes, self.num_significant
        bits = 8 * packing.stored_bytes(*sizes) / (self.out_features * self.in_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, {bits:.3f} bits ({planes}{residual})"


class SABLinear(SABModule):
    """`y = x Wᵀ + bias` with W as packed sign planes.

    Args:
        tensors, in_features, dtype: see `SABModule`. None: the dtype of the bias, or PyTorch's default one.
        bias: [out_features] floating point, or None.

    Attributes:
        exact: compute in the dtype of the input; otherwise kernels may round activations to int8 where that is faster.
            False, unless the environment variable `SAB_EXACT` is 1 when the module is made. In training, where gradients
            of the input are recorded, products are exact in any case: so are their gradients.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        in_features: int,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(tensors, in_features, dtype or (torch.get_default_dtype() if bias is None else bias.dtype))
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"`bias` must be [{self.out_features}], got {list(bias.shape)}")
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.exact = exact_by_default()

    @classmethod
    def from_planes(cls, planes: SignPlanes, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> SABLinear:
        """Pack `planes` into a module; scales are rounded to float16."""
        return cls(packing.to_tensors(planes), planes.shape[1], bias, dtype)

    @classmethod
    def empty_like(cls, linear: nn.Linear, num_planes: int, num_significant: int) -> SABLinear:
        """Return a module of the shape of `linear`, on its device, with uninitialised planes for a loader to fill."""
        tensors = empty_tensors(linear.weight, num_planes, num_significant)
        return cls(tensors, linear.in_features, linear.bias, linear.weight.dtype)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """Return a Linear of the weights that the planes make."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, dtype=dtype, device="meta")
        linear.weight = nn.Parameter(self.planes().dense(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype))
        return linear

    def forward(self, input: Tensor) -> Tensor:  # named as `nn.Linear` names it: some models pass it by name
        y = self.multiply(input, self.exact)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}"


def exact_by_default() -> bool:
    """Return whether the environment variable `SAB_EXACT` asks for products without rounded activations."""
    return os.environ.get("SAB_EXACT", "0") == "1"


def empty_tensors(weight: Tensor, num_planes: int, num_significant: int) -> dict[str, Tensor]:
    """Return uninitialised packed tensors for a dense `weight` [out_features, in_features], on its device."""
    specs = packing.tensor_specs(*weight.shape, num_planes, num_significant)
    return {name: torch.empty(shape, dtype=dtype, device=weight.device) for name, (dtype, shape) in specs.items()}


def _sizes(tensors: dict[str, Tensor]) -> tuple[int, int, int]:
    """Return out_features, full planes and significant columns as the tensors' shapes tell them."""
    row_scale, residual = tensors.get("row_scale"), tensors.get("residual_col_scale")
    if row_scale is None or row_scale.ndim != 2:
        got = "nothing" if row_scale is None else f"{row_scale.dtype} {list(row_scale.shape)}"
        raise ValueError(f"`row_scale` must be torch.int16 [planes, out_features], got {got}")
    if any(name in tensors for name in RESIDUAL) and (residual is None or not residual.numel()):
        raise ValueError("`residual_col_scale` must be torch.int16 [significant columns], got nothing")
    return row_scale.shape[1], row_scale.shape[0], 0 if residual is None else residual.numel()


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` (dotted) is in `model`, in the training mode of the module it replaces."""
    parent = model.get_submodule(name.rpartition(".")[0])
    attribute = name.rpartition(".")[2]
    module.train(getattr(parent, attribute).training)
    setattr(parent, attribute, module)
