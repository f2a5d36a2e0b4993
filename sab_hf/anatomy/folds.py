"""Where the column scales of a Linear can go: into what makes its input, so that the model computes the same without them.

A Linear `W diag(c)` reads the same from an input x as W from `c ⊙ x`. What gives x takes c over: the gain of a norm, the rows of
the up projection before the product that the down projection reads, the rows of the value projection before attention. Runtimes
that store one scale for a group of weights in a row (GGUF's Q1_0) can then hold planes with row scales alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .roles import Roles

GROUP = 128
"""Weights of a row that share a scale in GGUF's Q1_0."""

_ATTENTION = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
_MLP = {f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
_NORMS = {
    f"{name}_layernorm" for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
}  # Gemma has all four


@dataclass(frozen=True)
class Fold:
    """Linears that read the same features, and the module that gives these features.

    Attributes:
        readers: names of the Linears; c divides their columns.
        giver: name of the norm, whose gain c multiplies, or of the Linear, whose rows and bias it multiplies.
        groups, times: runs of features, and how often the readers see each run: under grouped-query attention the output
            projection reads the values of a key-value head once for each of its query heads.
    """

    readers: tuple[str, ...]
    giver: str
    groups: int = 1
    times: int = 1

    def spread(self, c: Tensor) -> Tensor:
        """Return what belongs to the columns of the readers [in_features] for what belongs to the giver's features."""
        return c.unflatten(0, (self.groups, -1)).repeat_interleave(self.times, 0).flatten()

    def gather(self, at_columns: Tensor) -> Tensor:
        """Return the sums over the columns that read the same feature, on the last axis."""
        return at_columns.unflatten(-1, (self.groups, self.times, -1)).sum(-2).flatten(-2)


def find_folds(model: nn.Module, roles: Roles, linears: Mapping[str, nn.Linear]) -> dict[str, tuple[Fold, ...]]:
    """Find the folds of every language block, those inside attention and feed-forward network first.

    Args:
        model: the model, or its skeleton on the meta device.
        roles: its parts.
        linears: the Linears that will be binarized, by name.
    Returns:
        name of the block → its folds.
    Raises:
        ValueError: a block is not made of attention and a gated feed-forward network with norms before them, a norm has no
            gain, or a Linear's rows cannot be cut into groups.
    """
    for name, linear in linears.items():
        if linear.in_features % GROUP:
            raise ValueError(
                f'portable="gguf" needs rows of a multiple of {GROUP} weights, and `{name}` has {linear.in_features}; llama.cpp '
                "has no one-bit type for them. Leave `portable` out and use the packed checkpoint in transformers, or take a "
                "model of other widths"
            )
    return {block: _folds_of(model, block) for block in roles.blocks}


def _folds_of(model: nn.Module, name: str) -> tuple[Fold, ...]:
    block = model.get_submodule(name)
    kind = f"{type(model).__name__}: `{name}`"
    parts = {
        inner for inner, module in block.named_modules() if next(module.parameters(recurse=False), None) is not None
    }
    required = (_ATTENTION | _MLP) - {"self_attn.q_norm", "self_attn.k_norm"}
    unknown, missing = sorted(parts - _ATTENTION - _MLP - _NORMS), sorted(required - parts)
    if unknown or missing:
        what = f"has `{unknown[0]}`" if unknown else f"has no `{missing[0]}`"
        raise ValueError(
            f'portable="gguf" needs language blocks of `self_attn` with q_proj, k_proj, v_proj and o_proj, and `mlp` with '
            f"gate_proj, up_proj and down_proj, and {kind} {what}; column scales of other blocks (mixtures of experts, fused "
            "projections, networks without a gate) cannot be folded into what comes before. Leave `portable` out"
        )
    linears = {inner: block.get_submodule(inner) for inner in required}
    other = next((inner for inner, module in linears.items() if type(module).forward is not nn.Linear.forward), None)
    if other:
        raise ValueError(
            f'portable="gguf" needs plain Linears, and {kind} has `{other}`, a {type(linears[other]).__name__}'
        )
    before_mlp = "pre_feedforward_layernorm" if "pre_feedforward_layernorm" in parts else "post_attention_layernorm"
    for inner in ("input_layernorm", before_mlp):
        norm = getattr(block, inner, None)
        if getattr(norm, "weight", None) is None:
            what = "there is no such norm" if norm is None else f"that {type(norm).__name__} has none"
            raise ValueError(
                f'portable="gguf" needs a gain in the norm before each projection, and of `{inner}` of {kind} {what}: column '
                "scales cannot be folded. Leave `portable` out"
            )
    values, output = linears["self_attn.v_proj"].out_features, linears["self_attn.o_proj"].in_features
    width = getattr(block.self_attn, "head_dim", None)
    if not isinstance(width, int) or values % width or output % values:
        raise ValueError(
            f'portable="gguf" needs heads of one width, and of {kind} attention gives {values} values to {output} columns, '
            f"with heads of {width}; column scales of `self_attn.o_proj` cannot be folded. Leave `portable` out"
        )

    def fold(readers: tuple[str, ...], giver: str, **shape: int) -> Fold:
        return Fold(tuple(f"{name}.{reader}" for reader in readers), f"{name}.{giver}", **shape)

    return (
        fold(("self_attn.o_proj",), "self_attn.v_proj", groups=values // width, times=output // values),
        fold(("mlp.down_proj",), "mlp.up_proj"),
        fold(tuple(f"self_attn.{part}_proj" for part in "qkv"), "input_layernorm"),
        fold(("mlp.gate_proj", "mlp.up_proj"), before_mlp),
    )
