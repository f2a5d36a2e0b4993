"""Triton: `divergence`, a row of logits at a time, with the gradient in the place of the wanted logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def divergence_kernel(given_ptr, wanted_ptr, counted_ptr, row_ptr, vocabulary, BLOCK: tl.constexpr):
    """One row: counted · KL goes to `row`, counted · (softmax(given) − softmax(wanted)) to `wanted`."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * vocabulary
    most_given, most_wanted = float("-inf"), float("-inf")
    sum_given, sum_wanted = 0.0, 0.0
    for first in range(0, vocabulary, BLOCK):
        at = first + tl.arange(0, BLOCK)
        here = at < vocabulary
        given = tl.load(given_ptr + start + at, mask=here, other=float("-inf")).to(tl.float32)
        wanted = tl.load(wanted_ptr + start + at, mask=here, other=float("-inf")).to(tl.float32)
        most = tl.maximum(most_given, tl.max(given, 0))
        sum_given = sum_given * tl.exp(most_given - most) + tl.sum(tl.exp(given - most), 0)
        most_given = most
        most = tl.maximum(most_wanted, tl.max(wanted, 0))
        sum_wanted = sum_wanted * tl.exp(most_wanted - most) + tl.sum(tl.exp(wanted - most), 0)
        most_wanted = most
    log_given, log_wanted = most_given + tl.log(sum_given), most_wanted + tl.log(sum_wanted)
    counted = tl.load(counted_ptr + row)
    total = 0.0
    for first in range(0, vocabulary, BLOCK):
        at = first + tl.arange(0, BLOCK)
        here = at < vocabulary
        given = tl.load(given_ptr + start + at, mask=here, other=0.0).to(tl.float32) - log_given
        wanted = tl.load(wanted_ptr + start + at, mask=here, other=0.0).to(tl.float32) - log_wanted
        p = tl.where(here, tl.exp(wanted), 0.0)
        total += tl.sum(tl.where(p > 0, p * (wanted - given), 0.0), 0)
        gradient = counted * (tl.exp(given) - p)
        tl.store(wanted_ptr + start + at, gradient.to(wanted_ptr.dtype.element_ty), mask=here)
    tl.store(row_ptr + row, counted * total)


def divergence(given: Tensor, wanted: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """As `method.divergence.divergence`; the gradient is `wanted`, overwritten."""
    given, wanted = given.contiguous(), wanted.to(given.dtype).contiguous()
    rows = torch.empty(counted.shape, dtype=torch.float32, device=given.device)
    with torch.cuda.device_of(given):  # Triton launches on the current device
        divergence_kernel[(rows.numel(),)](
            given, wanted, counted.float().contiguous(), rows, given.shape[-1], BLOCK=_BLOCK
        )
    return rows.sum(), wanted
