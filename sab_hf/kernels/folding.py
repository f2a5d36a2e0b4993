"""A part of the compiler's pass: what a decoding step does before and after its products moves into their kernels.

Before: the norm of a layer's input, or the gate of a gated network. After: the bias, and the sum with the residual stream.
What a piece of graph computes is found by computing it, on random numbers, and comparing: models and versions of PyTorch
spell the same norm in many ways. Pieces that are something else stay where they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from .decoding import GATES, NORMS, Around, sab_folded_linears
from .ops import Operands, sab_linear, sab_linears

MOST_INPUTS = 8
"""Inputs up to which the pass looks at products; kernels decide."""
_MOST_NODES = 32
aten, prims = torch.ops.aten, torch.ops.prims
_BY_ELEMENTS = {
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.rsub.Scalar, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor,
    aten.neg.default, aten.exp.default, aten.reciprocal.default, aten.sigmoid.default, aten.tanh.default, aten.erf.default,
    aten.rsqrt.default, aten.sqrt.default, aten.square.default, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor,
    aten.silu.default, aten.gelu.default, aten.mean.dim, aten.sum.dim_IntList, aten.unsqueeze.default, aten.expand.default,
    aten.full.default, prims.convert_element_type.default,
}  # fmt: skip
_SCALES = (1.0, 1e-3)  # of a norm's inputs: at the second one its eps shows


class _Form(NamedTuple):
    """What an input is made of: see `Around`. nodes: the graph's that compute it, the last one first."""

    form: str
    eps: float
    x: fx.Node
    other: fx.Node | None
    nodes: list[fx.Node]


def fold(graph: fx.Graph, suits: Callable[[Tensor, list[Operands], bool], bool]) -> int:
    """Replace products of few inputs and what stands around them by `sab::folded_linears`.

    Args:
        suits: from input, matrices and `exact` of a product, tensors of a compiler, to whether its kernels do that.
    Returns:
        How many there are now that were not.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    count = 0
    for node in [node for node in place if node.target in (sab_linear, sab_linears)]:
        x, matrices, exact = _product(node)
        if not _is_small(x) or not suits(_value(x), [_values(operands) for operands in matrices], exact):
            continue
        outputs = _outputs(node, len(matrices))
        after = [_after(output, node, place) for output in outputs]
        form = _form(x) if list(x.users) == [node] else None
        if form is None and not any(bias or addend for bias, addend, _ in after):
            continue
        form = form or _Form("", 0.0, x, None, [])
        around = Around(form.form, form.eps, form.other, [one[0] for one in after], [one[1] for one in after])
        with graph.inserting_before(node):
            folded = graph.call_function(
                sab_folded_linears,
                (form.x, around.other, *around[:2], *map(list, zip(*matrices, strict=True)), *around[3:], exact),
            )
            folded.meta["val"] = [_value(output) for output in outputs]
            items = [graph.call_function(operator.getitem, (folded, i)) for i in range(len(matrices))]
        for item, output, (*_, last) in zip(items, outputs, after, strict=True):
            item.meta = dict(last.meta)
            place[item] = place[node]
            last.replace_all_uses_with(item)
            _erase(graph, [last, *_inputs_between(last, output)])
        if node.target is sab_linears:
            graph.erase_node(node)
        _erase(graph, form.nodes)
        count += 1
    return count


def _product(node: fx.Node) -> tuple[fx.Node, list[Operands], bool]:
    """Return input, matrices and `exact` of one of the two ops."""
    rest = node.target._schema.arguments[len(node.args) :]
    x, *operands, exact = (
        *node.args,
        *[node.kwargs.get(argument.name, argument.default_value) for argument in rest],
    )
    if node.target is sab_linear:
        return x, [Operands._make(operands)], exact
    return x, [Operands._make(one) for one in zip(*operands, strict=True)], exact


def _values(operands: Operands) -> Operands:
    return Operands._make(None if one is None else _value(one) for one in operands)


def _value(node: fx.Node) -> Any:
    """Return the tensor of a compiler, or the model's own one, that a node stands for."""
    if node.op == "get_attr" and "val" not in node.meta:
        return operator.attrgetter(node.target)(node.graph.owning_module)
    return node.meta.get("val")


def _is_small(x: fx.Node) -> bool:
    shape = _value(x).shape
    if not all(isinstance(size, int) for size in shape):
        return False
    return 0 < shape[:-1].numel() <= MOST_INPUTS


def _outputs(node: fx.Node, count: int) -> list[fx.Node]:
    """Return the products; several have a node each, which is made where nothing needs one."""
    if node.target is sab_linear:
        return [node]
    found = {user.args[1]: user for user in node.users}
    with node.graph.inserting_after(node):
        for i in range(count):
            if i not in found:
                found[i] = node.graph.call_function(operator.getitem, (node, i))
                found[i].meta["val"] = _value(node)[i]
    return [found[i] for i in range(count)]


def _after(
    output: fx.Node, product: fx.Node, place: dict[fx.Node, int]
) -> tuple[fx.Node | None, fx.Node | None, fx.Node]:
    """Return bias and addend of a product, where its only use is a sum with such, and the last node of these."""
    value = _value(output)
    found: list[fx.Node | None] = [None, None]
    last = output
    for i, shape in enumerate((value.shape[-1:], value.shape)):
        users = list(last.users)
        if len(users) != 1 or users[0].target is not aten.add.Tensor or users[0].kwargs or len(users[0].args) != 2:
            continue
        others = [one for one in users[0].args if one is not last]
        if len(others) != 1 or not isinstance(others[0], fx.Node):
            continue
        other = _value(others[0])
        known = place.get(others[0], len(place)) < place[product]  # so it depends on no product of the node
        if known and (other.shape, other.dtype, other.device) == (shape, value.dtype, value.device):
            found[i], last = others[0], users[0]
    return (*found, last)


def _inputs_between(last: fx.Node, output: fx.Node) -> list[fx.Node]:
    """Return the nodes that lead from `last` back to `output`, which each have that use only."""
    between = []
    while last is not output:
        last = next(one for one in last.all_input_nodes if one is output or output in one.all_input_nodes)
        between.append(last)
    return between


def _erase(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Erase nodes, users first, unless something else needs them."""
    for node in nodes:
        if not node.users:
            graph.erase_node(node)


def _form(x: fx.Node) -> _Form | None:
    """Return what an input is made of, or None if it is nothing that kernels make."""
    nodes, leaves = _piece(x)
    value = _value(x)
    if len(leaves) != 2 or any(not _is_like(leaf, value) for leaf in leaves):
        return None
    wide = [leaf for leaf in leaves if _value(leaf).shape == value.shape]
    if len(wide) == 2:
        choices = [(leaves, form, 0.0) for form in GATES] + [(leaves[::-1], form, 0.0) for form in GATES]
    elif len(wide) == 1 and all(leaf in wide or _value(leaf).shape == value.shape[-1:] for leaf in leaves):
        leaves.sort(key=lambda leaf: leaf not in wide)
        choices = [(leaves, form, eps) for eps in _small_constants(nodes) for form in NORMS]
    else:
        return None
    with _disable_current_modes(), torch.no_grad():
        errors = [_error(nodes, *choice) for choice in choices]
    best = min(range(len(errors)), key=errors.__getitem__, default=None)
    if best is None or not errors[best] <= 1:
        return None
    (first, other), form, eps = choices[best]
    return _Form(form, eps, first, other, nodes)


def _piece(x: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the nodes that compute `x` element by element or row by row and nothing else, users first, and their inputs."""
    nodes: dict[fx.Node, None] = {}
    todo = [x]
    while todo and len(nodes) < _MOST_NODES:
        node = todo.pop()
        exclusive = node is x or all(user in nodes for user in node.users)
        constant = node.target is aten.full.default
        if node.op == "call_function" and node.target in _BY_ELEMENTS and (exclusive or constant):
            nodes.pop(node, None)
            nodes[node] = None
            todo += [one for one in node.all_input_nodes if one not in nodes]
    leaves = dict.fromkeys(one for node in nodes for one in node.all_input_nodes if one not in nodes)
    order = {node: i for i, node in enumerate(x.graph.nodes)}
    return sorted(nodes, key=order.get, reverse=True), list(leaves)


def _is_like(leaf: fx.Node, value: Tensor) -> bool:
    other = _value(leaf)
    return isinstance(other, Tensor) and (other.dtype, other.device) == (value.dtype, value.device)


def _small_constants(nodes: Sequence[fx.Node]) -> list[float]:
    """Return the numbers that may be the eps of a norm."""
    numbers = [one for node in nodes for one in node.args if isinstance(one, float)]
    return sorted({one for one in numbers if 0 < one < 1e-2})


def _error(nodes: Sequence[fx.Node], leaves: Sequence[fx.Node], form: str, eps: float) -> float:
    """Return by how many times the allowed error a piece of graph is another function than `form`, on random numbers."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for scale in _SCALES if form in NORMS else (3.0,):
        given = {leaf: torch.randn(_value(leaf).shape, generator=generator) for leaf in leaves}
        given[leaves[0]] *= scale
        given = {leaf: value.to(_value(leaf).dtype) for leaf, value in given.items()}
        found = _computed(nodes, given)
        x, other = given.values()
        expected = Around(form, eps, other, [], []).before(x)
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return float("inf")
        allowed = 2 * torch.finfo(x.dtype).eps * expected.abs().float() + 1e-6
        ratio = (found.float() - expected.float()).abs() / allowed
        worst = max(worst, ratio.max().item() + 1e-3 * ratio.mean().item())
    return worst


def _computed(nodes: Sequence[fx.Node], given: dict[fx.Node, Tensor]) -> Tensor:
    """Compute nodes, users first, on the CPU from the values of their inputs."""
    known: dict[fx.Node, Any] = dict(given)
    for node in reversed(nodes):
        arguments, options = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        known[node] = node.target(*arguments, **options | ({"device": "cpu"} if "device" in options else {}))
    return known[nodes[0]]
