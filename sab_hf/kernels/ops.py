"""The custom ops `sab::linear` and `sab::linears`: schema, fake and the PyTorch implementation, which specifies every kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.autograd import forward_ad

from ..packing import tensor_specs, unpack_bits, unpack_mask
from ..planes import signs_to


class Operands(NamedTuple):
    """The packed tensors of one matrix as the op takes them, in the order of its arguments after `x`.

    Attributes:
        signs: [K, out_features, ⌈in_features/8⌉] uint8, row_scale: [K, out_features] float16,
            col_scale: [K, in_features] float16: the full planes, as in `packing.py`. Scales may also be int16, the
            bits of float16 numbers, as modules store them; on CUDA devices they are float16 only.
        significant_columns: [⌈in_features/8⌉] uint8, residual_signs: [out_features, ⌈k/8⌉] uint8,
            residual_row_scale: [out_features] float16, residual_col_scale: [k] float16: the residual plane; all four or
            none of them.
    """

    signs: Tensor
    row_scale: Tensor
    col_scale: Tensor
    significant_columns: Tensor | None = None
    residual_signs: Tensor | None = None
    residual_row_scale: Tensor | None = None
    residual_col_scale: Tensor | None = None


def check_operands(x: Tensor, operands: Operands) -> None:
    """Hold input and packed tensors against each other: kernels read memory by the sizes that these tell.

    What a significance mask marks is not counted here, which on a GPU would wait for it: see `packing.unpack_mask`.

    Raises:
        ValueError: names the tensor, what it must be and what it is.
        RuntimeError: `x` has another number of features than the matrix.
    """
    if not x.is_floating_point():
        raise ValueError(f"the input must be floating point, got {x.dtype}")
    row_scale, col_scale = operands.row_scale, operands.col_scale
    for name, scale in (("row_scale", row_scale), ("col_scale", col_scale)):
        if scale.ndim != 2 or not scale.shape[0]:
            raise ValueError(f"`{name}` must be {_SCALE} [planes, features], got {_describe(scale)}")
    (num_planes, rows), columns = row_scale.shape, col_scale.shape[1]
    check_width(x, col_scale)
    specs = tensor_specs(rows, columns, num_planes, _num_significant(operands))
    device, scales = x.device, _SCALES_ON_CUDA if x.is_cuda else _SCALES
    for (name, (dtype, shape)), tensor in zip(specs.items(), operands, strict=False):  # both in the op's order
        dtypes = scales if dtype is torch.int16 else (dtype,)
        if tensor.device != device or tensor.dtype not in dtypes or tensor.shape != shape:
            raise ValueError(
                f"`{name}` must be {dtypes[0]} {list(shape)} on {device}, where the input is, got {_describe(tensor)}"
            )


def _num_significant(operands: Operands) -> int:
    """Return the columns of the residual plane, of whose tensors all are there or none is."""
    missing = [name for name in RESIDUAL if getattr(operands, name) is None]
    if len(missing) == len(RESIDUAL):
        return 0
    if missing:
        raise ValueError(f"a residual plane is `{'`, `'.join(RESIDUAL)}`, got no `{missing[0]}`")
    if not operands.residual_col_scale.numel():
        raise ValueError(
            "`residual_col_scale` must have a scale for each significant column, got none; a matrix without a residual plane "
            "has none of its four tensors"
        )
    return operands.residual_col_scale.numel()


RESIDUAL = tuple(Operands._field_defaults)
"""Names of the operands that are there with a residual plane only."""
_SCALE = torch.float16
_SCALES_ON_CUDA = (_SCALE,)
_SCALES = (_SCALE, torch.int16)  # the format stores the bits of the op's scales


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def linear_reference(
    x: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor,
    significant_columns: Tensor | None,
    residual_signs: Tensor | None,
    residual_row_scale: Tensor | None,
    residual_col_scale: Tensor | None,
    exact: bool = False,
) -> Tensor:
    """Multiply inputs by a matrix of sign planes, `y = x Wᵀ`, reading the packed planes one at a time.

    Each plane contributes `r ⊙ (B (c ⊙ x))`; sums are float32 and the result is rounded to the dtype of `x` once.

    Args:
        x: [..., in_features] floating point.
        signs, row_scale, col_scale, significant_columns, residual_signs, residual_row_scale, residual_col_scale: the matrix,
            see `Operands`.
        exact: compute in the dtype of `x`; otherwise a device's kernel may round the scaled activations to integers (with
            a scale per small group of columns) where that is faster. This implementation is exact either way.
    Returns:
        [..., out_features], dtype of `x`; a fresh tensor, never a view, which callers may write into.
    Raises:
        ValueError, RuntimeError: see `check_operands`; and a ValueError on CPUs if the mask marks another number of columns
            than the residual plane has. Where kernels compute, they count it when they see a matrix first.
    """
    residual = (significant_columns, residual_signs, residual_row_scale, residual_col_scale)
    check_operands(x, Operands(signs, row_scale, col_scale, *residual))
    in_features = col_scale.shape[1]
    inputs = x.reshape(-1, in_features).float()
    y = torch.zeros(*x.shape[:-1], signs.shape[1], dtype=torch.float32, device=x.device)
    sums = y.view(inputs.shape[0], signs.shape[1])
    for packed, r, c in zip(signs, row_scale, col_scale, strict=True):
        sums += _plane_matmul(inputs, packed, r, c)
    if significant_columns is not None:
        count = residual_col_scale.numel()
        counted = x.device.type == "cpu"  # elsewhere that would wait for the device
        mask = (
            unpack_mask(significant_columns, in_features, count)
            if counted
            else unpack_bits(significant_columns, in_features)
        )
        columns = marked_columns(mask, count)
        sums += _plane_matmul(inputs[:, columns], residual_signs, residual_row_scale, residual_col_scale)
    return y.to(x.dtype)


# Not `torch.library.custom_op`, whose wrappers cost 10 µs a call, as much as a small product takes; the op is the same.
_NAME = "sab::linear"
torch.library.define(
    _NAME, torch.library.infer_schema(linear_reference, mutates_args=()), tags=torch.Tag.pt2_compliant_tag
)
torch.library.impl(_NAME, "default", linear_reference)
sab_linear = torch.ops.sab.linear.default


def check_width(x: Tensor, col_scale: Tensor) -> None:
    features, in_features = x.shape[-1] if x.ndim else 0, col_scale.shape[1]
    torch._check(features == in_features, lambda: f"input has {features} features, not {in_features}")


def marked_columns(mask: Tensor, count: int) -> Tensor:
    """Return the columns that a mask [in_features] bool marks, [count] int64, without a wait for the device.

    Of a mask that marks more, the first ones; if it marks fewer, column 0 stands in: never one that is not there.
    """
    return torch.nonzero_static(mask, size=count, fill_value=0).squeeze(1)


def _plane_matmul(x: Tensor, packed: Tensor, row_scale: Tensor, col_scale: Tensor) -> Tensor:
    B = signs_to(torch.float32, unpack_bits(packed, col_scale.numel()))
    return (x * _numbers(col_scale)) @ B.T * _numbers(row_scale)


def _numbers(scale: Tensor) -> Tensor:
    """Return scales in float32, whether they are float16 or the bits of it."""
    return (scale.view(torch.float16) if scale.dtype == torch.int16 else scale).float()


@torch.library.register_fake(_NAME)
def _(
    x,
    signs,
    row_scale,
    col_scale,
    significant_columns,
    residual_signs,
    residual_row_scale,
    residual_col_scale,
    exact=False,
) -> Tensor:
    # PyTorch also comes here with weights on meta and an input that is elsewhere, and would return what this allocates.
    residual = (significant_columns, residual_signs, residual_row_scale, residual_col_scale)
    check_operands(x, Operands(signs, row_scale, col_scale, *residual))
    if TracingContext.try_get() is not None:  # a compiler looks at the model
        for act in _WHEN_COMPILED:
            act()
    return x.new_empty(*x.shape[:-1], signs.shape[1])


_WHEN_COMPILED: list[Callable[[], None]] = []


def when_compiled(act: Callable[[], None]) -> None:
    """Have `act` called whenever a compiler meets the op."""
    _WHEN_COMPILED.append(act)


def linears_reference(
    x: Tensor,
    signs: list[Tensor],
    row_scale: list[Tensor],
    col_scale: list[Tensor],
    significant_columns: list[Tensor | None],
    residual_signs: list[Tensor | None],
    residual_row_scale: list[Tensor | None],
    residual_col_scale: list[Tensor | None],
    exact: bool = False,
) -> list[Tensor]:
    """Multiply one input by several matrices of sign planes: the results of `sab::linear`, one after the other.

    `joining.py` puts the op into compiled graphs, after gradients are laid out: it records none itself.

    Args:
        x: [..., in_features] floating point.
        signs, row_scale, col_scale, significant_columns, residual_signs, residual_row_scale, residual_col_scale: for each
            matrix what `linear_reference` takes, lists of one length.
        exact: as in `linear_reference`.
    Returns:
        For each matrix [..., out_features], dtype of `x`, a fresh tensor.
    Raises:
        ValueError: the lists differ in length.
    """
    residual = (significant_columns, residual_signs, residual_row_scale, residual_col_scale)
    return [sab_linear(x, *one, exact) for one in zip(signs, row_scale, col_scale, *residual, strict=True)]


_NAME_OF_SEVERAL = "sab::linears"
torch.library.define(
    _NAME_OF_SEVERAL,
    "(Tensor x, Tensor[] signs, Tensor[] row_scale, Tensor[] col_scale, Tensor?[] significant_columns, "
    "Tensor?[] residual_signs, Tensor?[] residual_row_scale, Tensor?[] residual_col_scale, bool exact=False) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl(_NAME_OF_SEVERAL, "default", linears_reference)
torch.library.register_fake(_NAME_OF_SEVERAL, linears_reference)
sab_linears = torch.ops.sab.linears.default


def implement(device: str, products: Callable[[Tensor, list[Operands], bool], list[Tensor]]) -> None:
    """Have both ops computed by `products` on devices of a type.

    Args:
        device: "cpu" or "cuda".
        products: from `x`, the matrices and `exact` to the product of each.
    """

    def linear(x: Tensor, *arguments) -> Tensor:
        return products(x, [Operands._make(arguments[:_NUM_OPERANDS])], _is_exact(arguments))[0]

    def linears(x: Tensor, *arguments) -> list[Tensor]:
        lists = arguments[:_NUM_OPERANDS]
        return products(x, [Operands._make(one) for one in zip(*lists, strict=True)], _is_exact(arguments))

    torch.library.impl(_NAME, device, linear)
    torch.library.impl(_NAME_OF_SEVERAL, device, linears)


def _is_exact(arguments: tuple) -> bool:
    """Whether `exact` is true among the arguments after `x`; the dispatcher leaves it out where it is the default."""
    return arguments[_NUM_OPERANDS:] == (True,)


def _keep_planes(ctx, inputs, output) -> None:
    x, *planes = inputs
    ctx.dtype, ctx.num_options = x.dtype, len(planes) - _NUM_OPERANDS
    ctx.save_for_backward(*planes[:_NUM_OPERANDS])


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient of `x`; planes and scales are stored numbers and get none."""
    grad_x = input_gradient(grad, *ctx.saved_tensors).to(ctx.dtype) if ctx.needs_input_grad[0] else None
    return grad_x, *[None] * (_NUM_OPERANDS + ctx.num_options)


def input_gradient(
    grad: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor,
    significant_columns: Tensor | None,
    residual_signs: Tensor | None,
    residual_row_scale: Tensor | None,
    residual_col_scale: Tensor | None,
) -> Tensor:
    """Multiply an output's gradient by the matrix of sign planes, `grad_x = grad W`, one plane at a time.

    Args:
        grad: [..., out_features] floating point; the planes as in `sab_linear`.
    Returns:
        [..., in_features] float32.
    """
    rows = grad.reshape(-1, grad.shape[-1]).float()
    grad_x = torch.zeros(rows.shape[0], col_scale.shape[1], dtype=torch.float32, device=grad.device)
    for packed, r, c in zip(signs, row_scale, col_scale, strict=True):
        grad_x += _plane_transposed(rows, packed, r, c)
    if significant_columns is not None:
        mask = unpack_bits(significant_columns, col_scale.shape[1])
        columns = marked_columns(mask, residual_col_scale.numel())
        residual = _plane_transposed(rows, residual_signs, residual_row_scale, residual_col_scale)
        grad_x.index_add_(1, columns, residual)
    return grad_x.reshape(*grad.shape[:-1], -1)


def _plane_transposed(grad: Tensor, packed: Tensor, row_scale: Tensor, col_scale: Tensor) -> Tensor:
    B = signs_to(torch.float32, unpack_bits(packed, col_scale.numel()))
    return (grad * _numbers(row_scale)) @ B * _numbers(col_scale)


_NUM_OPERANDS = len(Operands._fields)
torch.library.register_autograd(_NAME, _backward, setup_context=_keep_planes)


def is_plain_cpu(x: Tensor) -> bool:
    """Tell whether an operation on `x` would do nothing but compute on the CPU: no tracing, mode, transform or subclass.

    Where that is so, and no gradient of `x` is recorded, a kernel may be called as a function instead of through the op.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._dispatch_keys(x).raw_repr() in _PLAIN_KEYS
        and torch._C._dispatch_tls_local_include_set().raw_repr() in _PLAIN_MODES
        and forward_ad._current_level < 0
    )


def _plain_keys() -> tuple[set[int], set[int]]:
    """Return what the dispatcher adds to a plain tensor and to a plain thread, in and out of `torch.inference_mode`."""
    keys, modes = set(), set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            keys.add(torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr())
            modes.add(torch._C._dispatch_tls_local_include_set().raw_repr())
    return keys, modes


_PLAIN_KEYS, _PLAIN_MODES = _plain_keys()
