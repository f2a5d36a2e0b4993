"""Give the column scales of a block to what makes its Linears' inputs, before the block is fitted.

The block computes what it did, and the planes that are fitted to it afterwards need no column scales. See `anatomy/folds.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..anatomy.folds import Fold
from ..passes.capture import BlockInputs
from ..passes.states import block_output

ROUNDS = 10
"""Rounds of row and column scales in turn; the scales hardly change after five."""

MOST_CHANGE = 1e-3
"""Squared error of a block's output after folding, relative to its size, that rounding of bfloat16 weights stays far below."""


@torch.no_grad()
def fold_block(
    model: nn.Module, name: str, index: int, folds: tuple[Fold, ...], inputs: BlockInputs
) -> dict[str, Tensor]:
    """Fold the column scales of a block's Linears in place; it computes the same as before, up to rounding.

    The scales follow from the weights alone, so that a run that goes on later finds the same ones.

    Args:
        model: the model, with the dense block on the compute device.
        name: of the block, which is number `index`.
        folds: from `find_folds`.
        inputs: of the block; one batch is held against the folded block.
    Returns:
        The folded weights by the names of their Linears.
    Raises:
        RuntimeError: the folded block computes something else.
    """
    block = model.get_submodule(name)
    state = next(iter(inputs.running(index)), None)  # none on a process without samples
    piece = None if state is None else next(state.pieces(index))
    wanted = None if piece is None else block_output(block, index, piece, piece.hidden).float()
    for fold in folds:
        fold_columns(model, fold)
    weights = {reader: model.get_submodule(reader).weight.data for fold in folds for reader in fold.readers}
    if piece is None:
        return weights
    error = (block_output(block, index, piece, piece.hidden).float() - wanted).square().sum() / wanted.square().sum()
    if not error <= MOST_CHANGE:
        raise RuntimeError(
            f'portable="gguf": `{name}` of {type(model).__name__} computes something else once column scales are folded '
            f"(relative squared error {float(error):.2g}), so something reads its norms or values that was not expected there; "
            "this model is not supported, leave `portable` out"
        )
    return weights


@torch.no_grad()
def fold_columns(model: nn.Module, fold: Fold) -> None:
    """Give the column scales of some Linears to what makes their input."""
    readers = [model.get_submodule(reader) for reader in fold.readers]
    c = column_scales([reader.weight for reader in readers], fold)
    c = _multiply(model.get_submodule(fold.giver), fold.giver, c)
    for reader in readers:
        reader.weight.data = (reader.weight.float() / fold.spread(c)).to(reader.weight.dtype)


def column_scales(weights: list[Tensor], fold: Fold) -> Tensor:
    """Return the column scales that several matrices share, those that make all their rows most even.

    `|W| ≈ r c` is fitted by turns, `r_i = Σ_j c_j |W_ij| / Σ_j c_j²` and `c_j = mean_i |W_ij| / r_i`, all rows alike. Under
    second moments without correlations these are the scales of least output error.

    Args:
        weights: [out_features, in_features] each.
        fold: says which columns share a scale.
    Returns:
        [features of the giver] float32, positive, with a geometric mean of 1; 1 where all columns are zero.
    """
    sizes = torch.cat([weight.float().abs() for weight in weights])
    c = torch.ones_like(sizes[0])
    for _ in range(ROUNDS):
        r = (sizes @ c) / c.square().sum()
        shared = fold.gather((sizes / torch.where(r > 0, r, 1)[:, None]).mean(0)) / fold.times
        some = shared > 0
        shared = torch.where(some, shared, 1)
        shared = torch.where(some, shared / shared[some].log().mean().exp(), 1) if some.any() else shared
        c = fold.spread(shared)
    return shared


def _multiply(giver: nn.Module, name: str, c: Tensor) -> Tensor:
    """Multiply what a module gives by c, and return by what it was multiplied: weights of few bits round it."""
    if isinstance(giver, nn.Linear):
        giver.weight.data = (giver.weight.float() * c[:, None]).to(giver.weight.dtype)
    else:
        offset = _offset(giver, name)
        gain = giver.weight.float() + offset
        weight = (gain * c - offset).to(giver.weight.dtype)
        rounded = (weight.float() + offset) / gain
        kept = (rounded > 0) & rounded.isfinite()  # a gain of zero gives nothing, whatever c is
        c = torch.where(kept, rounded, 1)
        giver.weight.data = torch.where(kept, weight, giver.weight)
    if getattr(giver, "bias", None) is not None:
        giver.bias.data = (giver.bias.float() * c).to(giver.bias.dtype)
    return c


def _offset(norm: nn.Module, name: str) -> float:
    """Return what a norm adds to its weight to get its gain: 0, or 1 in Gemma's norms.

    Raises:
        RuntimeError: it does something else with it.
    """
    weight, bias = norm.weight.data, getattr(norm, "bias", None)
    x = torch.linspace(-1, 1, len(weight), device=weight.device, dtype=weight.dtype)[None]
    try:
        for offset in (0.0, 1.0):
            norm.weight.data = torch.full_like(weight, -offset)
            output = norm(x)
            if not (output if bias is None else output - bias).any():
                return offset
    finally:
        norm.weight.data = weight
    raise RuntimeError(
        f'portable="gguf": `{name}`, a {type(norm).__name__}, does not multiply by its weight, so column scales cannot be folded '
        "into it; this model is not supported, leave `portable` out"
    )
