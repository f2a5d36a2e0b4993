"""Triton: attention of few queries to a cache, whose tokens are shared among programs; heads that share keys are one program.

Programs skip blocks of tokens that no query sees: the unused part of a static cache, and what lies before a window. A second
kernel adds the parts, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from ..attention import empty_result
from .launch import _capability, _launch, _pdl, _processors
from .tiles import power_of_two

BLOCK, MOST_ROWS = 64, 64


@triton.jit
def attend_kernel(
    q_ptr, q_batch, q_head, q_query, k_ptr, k_batch, k_head, k_token, v_ptr, v_batch, v_head, v_token,
    mask_ptr, mask_batch, mask_head, mask_query, mask_token, part_ptr, most_ptr, sum_ptr, y_ptr,
    heads, shared_heads, queries, tokens, chunk, scale,
    DIM: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, MASK: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attend with all queries of the heads that share keys, the rows, to `chunk` tokens, TOKENS at a time.

    Writes for each program its rows' part of the result, divided by nothing, and what the parts are added by: the greatest
    exponent and the sum of powers of 2. WHOLE: there is one program for all tokens, which writes the result.
    """
    shared, split = tl.program_id(0), tl.program_id(1)
    batch = (shared // shared_heads).to(tl.int64)
    shared_head = shared % shared_heads
    row = tl.arange(0, ROWS)
    inside = row < heads // shared_heads * queries
    head, query = shared_head * (heads // shared_heads) + row // queries, row % queries
    dim = tl.arange(0, DIM)
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    q_ptr += batch * q_batch + (head * q_head + query * q_query)[:, None] + dim[None, :]
    q = tl.load(q_ptr, mask=inside[:, None], other=0.0)
    k_ptr += batch * k_batch + shared_head * k_head
    v_ptr += batch * v_batch + shared_head * v_head
    mask_ptr += batch * mask_batch + (head * mask_head + query * mask_query)[:, None]
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(split * chunk, tl.minimum(split * chunk + chunk, tokens), TOKENS):
        token = start + tl.arange(0, TOKENS)
        exists = token < tokens
        bias = tl.where(inside[:, None] & exists[None, :], 0.0, float("-inf"))
        if MASK is not None:
            seen = tl.load(mask_ptr + token[None, :] * mask_token, mask=bias == 0.0, other=0)
            if MASK == "bool":
                bias = tl.where(seen != 0, bias, float("-inf"))
            else:
                bias += seen.to(tl.float32) * 1.4426950408889634
        if tl.max(tl.max(bias, axis=1), axis=0) > float("-inf"):
            place = token.to(tl.int64)[:, None]
            k = tl.load(k_ptr + place * k_token + dim[None, :], mask=exists[:, None], other=0.0)
            v = tl.load(v_ptr + place * v_token + dim[None, :], mask=exists[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634) + bias
            now = tl.maximum(most, tl.max(scores, axis=1))
            base = tl.where(now == float("-inf"), 0.0, now)
            power = tl.exp2(scores - base[:, None])
            less = tl.exp2(most - base)
            total = total * less + tl.sum(power, axis=1)
            acc = acc * less[:, None] + tl.dot(power.to(v.dtype), v, input_precision="ieee")
            most = now
    if WHOLE:
        acc /= tl.where(total == 0.0, 1.0, total)[:, None]
        y_ptr += ((batch * queries + query) * heads + head)[:, None] * DIM + dim[None, :]
        tl.store(y_ptr, acc.to(y_ptr.dtype.element_ty), mask=inside[:, None])
    else:
        place = (shared * tl.num_programs(1) + split) * ROWS + row
        tl.store(part_ptr + place[:, None] * DIM + dim[None, :], acc, mask=inside[:, None])
        tl.store(most_ptr + place, most, mask=inside)
        tl.store(sum_ptr + place, total, mask=inside)


@triton.jit
def add_parts_kernel(
    part_ptr, most_ptr, sum_ptr, y_ptr, heads, shared_heads, queries, splits,
    DIM: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add the parts of one row, whose programs are `splits`."""
    shared, row = tl.program_id(0), tl.program_id(1)
    head, query = shared % shared_heads * (heads // shared_heads) + row // queries, row % queries
    split = tl.arange(0, SPLITS)
    exists = split < splits
    place = (shared * splits + split) * ROWS + row
    dim = tl.arange(0, DIM)
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    most = tl.load(most_ptr + place, mask=exists, other=float("-inf"))
    total = tl.load(sum_ptr + place, mask=exists, other=0.0)
    parts = tl.load(part_ptr + place[:, None] * DIM + dim[None, :], mask=exists[:, None], other=0.0)
    greatest = tl.max(most, axis=0)
    share = tl.exp2(most - tl.where(greatest == float("-inf"), 0.0, greatest))
    whole = tl.sum(total * share, axis=0)
    y = tl.sum(parts * share[:, None], axis=0) / tl.where(whole == 0.0, 1.0, whole)
    y_ptr += ((shared // shared_heads * queries + query).to(tl.int64) * heads + head) * DIM + dim
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return what `attention.attend_reference` does; `fits` tells for which tensors."""
    (batch, heads, queries, dim), (_, shared_heads, tokens, _) = q.shape, k.shape
    q, k, v = (one if one.stride(3) == 1 else one.contiguous() for one in (q, k, v))
    y = empty_result(q)
    rows, programs = _rows(q, k), batch * shared_heads
    blocks = triton.cdiv(tokens, BLOCK)
    chunk = triton.cdiv(blocks, max(1, min(blocks, _processors(q) // programs))) * BLOCK
    splits = triton.cdiv(tokens, chunk)
    parts = q.new_empty(programs * splits * rows, dim + 2, dtype=torch.float32).view(-1)
    parts, most, total = parts.split([programs * splits * rows * size for size in (dim, 1, 1)])
    kind, given, strides = None, q, (0,) * 4
    if mask is not None:
        kind, given = "float", mask.expand(batch, heads, queries, tokens)
        strides = given.stride()
        if mask.dtype == torch.bool:
            kind, given = "bool", given.view(torch.uint8)
    _launch(
        attend_kernel, (programs, splits), q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], given, *strides,
        parts, most, total, y, heads, shared_heads, queries, tokens, chunk, scale,
        DIM=dim, ROWS=rows, TOKENS=BLOCK, MASK=kind, WHOLE=splits == 1, PDL=_pdl(q), num_warps=8 if rows * dim > 4096 else 4,
    )  # fmt: skip
    if splits > 1:
        _launch(
            add_parts_kernel, (programs, heads // shared_heads * queries), parts, most, total, y, heads, shared_heads,
            queries, splits, DIM=dim, ROWS=rows, SPLITS=power_of_two(splits, 1, 1 << 20), PDL=_pdl(q), num_warps=4,
        )  # fmt: skip
    return y


def fits(q: Tensor, k: Tensor) -> bool:
    """Tell whether the kernels take queries and keys; tensors may be those of a compiler."""
    dim = q.shape[3]
    one_size = 16 <= dim <= 256 and dim & (dim - 1) == 0
    return one_size and q.element_size() == 2 and _rows(q, k) <= MOST_ROWS and _capability(q) >= (8, 0)


def _rows(q: Tensor, k: Tensor) -> int:
    """Return the rows of a program: the queries of the heads that share keys, a power of two."""
    return power_of_two(q.shape[1] // k.shape[1] * q.shape[2], 16, 1 << 20)
