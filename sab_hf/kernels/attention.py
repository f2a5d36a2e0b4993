"""The op `sab::attend`, attention of few queries, and the part of the compiler's pass that puts it into decoding steps.

PyTorch's fused kernels take a mask only without shared keys and values, so that a static cache is copied for all heads at
each token, and give a head to one processor. Kernels of the op read the cache in place and share its tokens.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_CUTS = (aten.alias.default, aten.expand.default, aten.slice.Tensor, aten.constant_pad_nd.default)
MOST_QUERIES = 8
"""Queries of a sequence up to which the pass looks at attention; kernels decide."""


def attend_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend with queries to keys and values that heads may share; sums are float32.

    Args:
        q: [batch, heads, queries, dim]; k, v: [batch, shared heads, tokens, dim], each for heads / shared heads in turn.
        mask: of a shape that [batch, heads, queries, tokens] can be made of: bool, True where a query sees, or what is added
            to the scaled scores.
        scale: of the scores.
    Returns:
        [batch, heads, queries, dim], in memory [batch, queries, heads, dim]; zeros for a query that sees nothing.
    Raises:
        ValueError: the sizes do not fit.
    """
    check_attention(q, k, v)
    groups = q.shape[1] // k.shape[1]
    keys, values = (one.float().repeat_interleave(groups, 1) for one in (k, v))
    scores = q.float() @ keys.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    y = torch.softmax(scores, -1).masked_fill(scores.isneginf().all(-1, keepdim=True), 0) @ values
    return empty_result(q).copy_(y)


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    shared = (q.shape[0], k.shape[1], k.shape[2], q.shape[3])
    if q.ndim != 4 or k.shape != shared or v.shape != shared or q.shape[1] % k.shape[1]:
        shapes = ", ".join(str(list(one.shape)) for one in (q, k, v))
        raise ValueError(
            f"queries, keys and values must be [batch, heads, queries, dim] and twice [batch, shared heads, tokens, dim], "
            f"heads a multiple of the shared ones, got {shapes}"
        )


def empty_result(q: Tensor) -> Tensor:
    """Return room for the result, in the order in which the next product reads it."""
    batch, heads, queries, dim = q.shape
    return q.new_empty(batch, queries, heads, dim).transpose(1, 2)


_NAME = "sab::attend"
torch.library.define(
    _NAME, torch.library.infer_schema(attend_reference, mutates_args=()), tags=torch.Tag.pt2_compliant_tag
)
torch.library.impl(_NAME, "default", attend_reference)
sab_attend = torch.ops.sab.attend.default


@torch.library.register_fake(_NAME)
def _(q, k, v, mask, scale) -> Tensor:
    check_attention(q, k, v)
    return empty_result(q)


def attentions() -> set[Any]:
    """Return the forms that PyTorch's attention has in compiled graphs; not every version has all."""
    names = ("efficient_attention", "flash_attention", "cudnn_attention", "flash_attention_for_cpu")
    packets = [getattr(aten, f"_scaled_dot_product_{name}", None) for name in names]
    return {packet.default for packet in packets if packet is not None}


def attend(graph: fx.Graph, suits: Callable[[Tensor, Tensor, Tensor], bool]) -> int:
    """Replace attention of few queries in a graph of Inductor by `sab::attend`, on keys and values that are not repeated.

    Args:
        suits: from queries, keys and values, tensors of a compiler, to whether there is a kernel for them.
    Returns:
        How many were replaced.
    """
    known, count = attentions(), 0
    for node in [node for node in graph.nodes if node.op == "call_function" and node.target in known]:
        given = _arguments(node)
        used = [user for user in node.users if user.target is not operator.getitem or user.args[1] != 0]
        if any(user.users or user.target is not operator.getitem for user in used) or not node.users:
            continue
        q, mask = given["query"], given.get("attn_bias", given.get("attn_mask"))
        k, v = _unrepeated(given["key"]), _unrepeated(given["value"])
        values = [one.meta["val"] for one in (q, k, v)]
        if given["dropout_p"] or given["is_causal"] or not _are_small(values) or not suits(*values):
            continue
        scale = given.get("scale")
        scale = 1 / math.sqrt(values[0].shape[-1]) if scale is None else scale
        with graph.inserting_before(node):
            found = graph.call_function(sab_attend, (q, k, v, None if mask is None else _unpadded(mask), scale))
        found.meta["val"] = empty_result(values[0])
        for user in list(node.users):
            if user not in used:
                user.replace_all_uses_with(found)
            graph.erase_node(user)
        graph.erase_node(node)
        count += 1
    return count


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return all arguments by name, defaults included."""
    arguments = node.target._schema.arguments
    found = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    return found | {argument.name: one for argument, one in zip(arguments, node.args, strict=False)} | node.kwargs


def _are_small(values: list[Tensor]) -> bool:
    q, k, v = values
    sizes = [size for value in values for size in value.shape]
    fits = all(isinstance(size, int) and size > 0 for size in sizes) and q.shape[2] <= MOST_QUERIES
    return fits and k.shape == v.shape and q.dtype == k.dtype == v.dtype


def _unrepeated(node: fx.Node) -> fx.Node:
    """Return the keys or values [batch, shared heads, tokens, dim] that `node` repeats for the heads, or `node`."""
    shape, chain = node.meta["val"].shape, node
    if chain.target in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        chain = chain.args[0]
        if chain.target is aten.clone.default:
            chain = chain.args[0]
        if chain.target is aten.expand.default and chain.args[0].target is aten.unsqueeze.default:
            repeated, single = chain.meta["val"].shape, chain.args[0].args[0]
            source = single.meta["val"].shape
            once = len(source) == 4 and chain.args[0].args[1] == 2 and (*repeated[:2], *repeated[3:]) == tuple(source)
            if once and shape == (source[0], source[1] * repeated[2], *source[2:]):
                return single
    return node


def _unpadded(mask: fx.Node) -> fx.Node:
    """Return what a mask is made of: without padding that is cut off again; bool where it is 0 for True and -inf for False."""
    shape = mask.meta["val"].shape
    inner = mask
    while inner.target in _CUTS:
        inner = inner.args[0]
    value = inner.meta["val"]
    same = value.ndim == len(shape) and all(own in (1, size) for own, size in zip(value.shape, shape, strict=True))
    if same and value.shape[-1] == shape[-1] and _is_uncut(mask):
        mask = inner
    if mask.target is aten.where.self and [_constant(one) for one in mask.args[1:]] == [0.0, -math.inf]:
        return mask.args[0]
    return mask


def _is_uncut(node: fx.Node) -> bool:
    """Tell whether the cuts before `node` begin at 0 and the padding is at the end of the last dimension."""
    while node.target in _CUTS:
        if node.target is aten.slice.Tensor and (
            (len(node.args) > 2 and node.args[2] not in (None, 0)) or len(node.args) > 4
        ):
            return False
        if node.target is aten.constant_pad_nd.default and (len(node.args[1]) > 2 or node.args[1][0] != 0):
            return False
        node = node.args[0]
    return True


def _constant(node: Any) -> float | None:
    """Return the number that a node has everywhere."""
    if isinstance(node, fx.Node):
        place = {aten.full.default: 1, aten.scalar_tensor.default: 0}.get(node.target)
        return None if place is None else node.args[place]
    return node
