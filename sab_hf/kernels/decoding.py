"""The op `sab::folded_linears`: products of one input with what a decoding step does before and after them.

`folding.py` puts it into compiled graphs where a device has a kernel for it. What is here specifies that kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .ops import Operands, sab_linears


def _norm(x: Tensor, eps: float) -> Tensor:
    numbers = x.float()
    return numbers * torch.rsqrt(numbers.pow(2).mean(-1, keepdim=True) + eps)


NORMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "rms_norm": lambda x, weight, eps: weight * _norm(x, eps).to(x.dtype),
    "rms_norm_float32": lambda x, weight, eps: (weight.float() * _norm(x, eps)).to(x.dtype),
    "rms_norm_plus_one": lambda x, weight, eps: (_norm(x, eps) * (1 + weight.float())).to(x.dtype),
}
"""Root mean square norms of `x` [..., m] with a weight [m], by how they round and what the weight is."""
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
"""Activations of the gate of a gated network."""


class Around(NamedTuple):
    """What stands before and after the products of an input.

    Attributes:
        form: what the input is made of: "" as it is, one of NORMS, or one of GATES.
        eps: of a norm.
        other: the weight of a norm, [in_features], or what a gate multiplies, of the shape of the input; None if plain.
        biases: for each matrix [out_features] or None.
        addends: for each matrix what is added after the bias, of the product's shape, or None.
    """

    form: str
    eps: float
    other: Tensor | None
    biases: Sequence[Tensor | None]
    addends: Sequence[Tensor | None]

    def of(self, members: Sequence[int]) -> Around:
        """Return what stands around some of the matrices."""
        return self._replace(biases=[self.biases[i] for i in members], addends=[self.addends[i] for i in members])

    def before(self, x: Tensor) -> Tensor:
        """Return the input of the products."""
        if self.form in NORMS:
            return NORMS[self.form](x, self.other, self.eps)
        return GATES[self.form](x) * self.other if self.form else x

    def after(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Return the products with biases and addends."""
        return [
            sum((one for one in (bias, addend) if one is not None), start=y)
            for y, bias, addend in zip(results, self.biases, self.addends, strict=True)
        ]


def plain(count: int) -> Around:
    """Return the surroundings of `count` products that stand alone."""
    return Around("", 0.0, None, [None] * count, [None] * count)


def folded_linears_reference(
    x: Tensor, other: Tensor | None, form: str, eps: float, *arguments: list[Tensor | None] | bool
) -> list[Tensor]:
    """Multiply what `form` makes of an input by several matrices of sign planes, and add to each product.

    The op records no gradients; it is in graphs in which they are laid out.

    Args:
        x: [..., in_features] floating point.
        other, form, eps: see `Around`; dtype of `x`.
        arguments: the lists of `ops.linears_reference`, then biases and addends (see `Around`), and `exact` if it is given.
    Returns:
        For each matrix [..., out_features], dtype of `x`, a fresh tensor.
    """
    lists, around, exact = _told(x, other, form, eps, arguments)
    return around.after(sab_linears(around.before(x), *lists, exact))


def _told(
    x: Tensor, other: Tensor | None, form: str, eps: float, arguments: tuple
) -> tuple[tuple[list[Tensor | None], ...], Around, bool]:
    """Return the lists of packed tensors, what stands around the products, checked, and `exact`, from the op's arguments."""
    count = len(Operands._fields)
    lists, (biases, addends, *rest) = arguments[:count], arguments[count:]
    rows = [scale.shape[-1] for scale in lists[Operands._fields.index("row_scale")]]
    return lists, checked(x, Around(form, eps, other, biases, addends), rows), rest == [True]


def checked(x: Tensor, around: Around, rows: Sequence[int]) -> Around:
    """Hold what stands around products against their input `x` and the matrices' rows: kernels read memory by these.

    Raises:
        ValueError: names the tensor, what it must be and what it is.
    """
    form, other = around.form, around.other
    if form and form not in NORMS and form not in GATES:
        raise ValueError(f"`form` must be one of {', '.join([*NORMS, *GATES])} or empty, got {form!r}")
    if (other is None) != (form == ""):
        raise ValueError("`other` must be there with a form, and only then")
    named = [("other", other, x.shape[-1:] if form in NORMS else x.shape)]
    for name, tensors, before in (("bias", around.biases, ()), ("addend", around.addends, tuple(x.shape[:-1]))):
        if len(tensors) != len(rows):
            raise ValueError(f"`{name}` must have an entry for each of {len(rows)} matrices, got {len(tensors)}")
        named += [(name, tensor, (*before, n)) for tensor, n in zip(tensors, rows, strict=True)]
    for name, tensor, shape in named:
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != x.device):
            got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"`{name}` must be {x.dtype} {list(shape)} on {x.device}, got {got}")
    return around


_NAME = "sab::folded_linears"
torch.library.define(
    _NAME,
    "(Tensor x, Tensor? other, str form, float eps, Tensor[] signs, Tensor[] row_scale, Tensor[] col_scale, "
    "Tensor?[] significant_columns, Tensor?[] residual_signs, Tensor?[] residual_row_scale, Tensor?[] residual_col_scale, "
    "Tensor?[] bias, Tensor?[] addend, bool exact=False) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl(_NAME, "default", folded_linears_reference)
sab_folded_linears = torch.ops.sab.folded_linears.default


@torch.library.register_fake(_NAME)
def _(x, other, form, eps, signs, row_scale, *arguments) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], scale.shape[1]) for scale in row_scale]


def implement(device: str, products: Callable[[Tensor, list[Operands], Around, bool], list[Tensor]]) -> None:
    """Have the op computed by `products` on devices of a type, "cuda"."""

    def folded(x: Tensor, other: Tensor | None, form: str, eps: float, *arguments) -> list[Tensor]:
        lists, around, exact = _told(x, other, form, eps, arguments)
        return products(x, [Operands._make(one) for one in zip(*lists, strict=True)], around, exact)

    torch.library.impl(_NAME, device, folded)
