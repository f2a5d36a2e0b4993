"""Triton: what a decoding step does before and after its products, inside their kernels.

Before a product: a root mean square norm of its input, or the gate of a gated network. After it: the bias, and the residual
stream. Both round where PyTorch's operations would (`decoding.py` has them), so that a launch less is all that changes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_factor(squares, in_features, EPS: tl.constexpr):
    """Return 1 / √(mean + EPS) for the sum of the squares of a row."""
    return 1 / tl.sqrt_rn(squares / in_features + EPS)


@triton.jit
def row_factor(x_ptr, stride_column, in_features, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the factor of the norm of a row in memory."""
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, in_features, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + column * stride_column, mask=column < in_features, other=0.0).to(tl.float32)
        squares += x * x
    return norm_factor(tl.sum(squares, axis=0), in_features, EPS)


@triton.jit
def rounded(value, x_ptr):
    """Return `value`, float32, rounded to the dtype that `x_ptr` points to."""
    return value.to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def normed(x, factor, weight, x_ptr, NORM: tl.constexpr):
    """Return the norm of a row's elements `x`, float32, with its weight, in one of the ways in which models round it."""
    if NORM == "rms_norm":
        return rounded(rounded(x * factor, x_ptr) * weight, x_ptr)
    elif NORM == "rms_norm_float32":
        return rounded(x * factor * weight, x_ptr)
    else:
        return rounded(x * factor * (1 + weight), x_ptr)


@triton.jit
def gated(x, up, x_ptr, GATE: tl.constexpr):
    """Return the activation of the gate `x` times `up`, float32."""
    if GATE == "silu":
        y = x / (1 + tl.exp(-x))
    elif GATE == "gelu":
        y = x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * (x * x * x))
        y = 0.5 * x * (2 - 2 / (1 + tl.exp(2 * inner)))  # 1 + tanh
    return rounded(rounded(y, x_ptr) * up, x_ptr)


@triton.jit
def finished(y, row, inside, y_ptr, bias_ptr, addend_ptr, BIAS: tl.constexpr, ADDEND: tl.constexpr):
    """Return a product's elements `y` of the rows `row`, float32, with bias and addend, each sum rounded.

    addend_ptr: the addends of the same input; bias_ptr: the biases of all rows.
    """
    y = y.to(y_ptr.dtype.element_ty)
    if BIAS:
        bias = tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)
        y = (y.to(tl.float32) + bias).to(y_ptr.dtype.element_ty)
    if ADDEND:
        addend = tl.load(addend_ptr + row, mask=inside, other=0.0).to(tl.float32)
        y = (y.to(tl.float32) + addend).to(y_ptr.dtype.element_ty)
    return y
