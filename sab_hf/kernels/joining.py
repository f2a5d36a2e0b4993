"""A pass of PyTorch's compiler: products of one input (q, k, v; gate, up) become one `sab::linears`, which a device may fuse.

What a decoding step does before and after products then moves into their kernels, where a device has such: `folding.py`.
Attention of few queries becomes one op there too: `attention.py`. `SAB_FOLD=0` leaves both as they are.

Products on CPUs take their scales as modules store them in these graphs, without the views that other devices' kernels need.

`register` is called when a compiler first sees `sab::linear`, since importing the compiler takes longer than this package.
`SAB_JOIN=0` leaves the products apart. Eager mode knows nothing of it.
"""

from __future__ import annotations

import operator
import os
from collections import defaultdict
from typing import Any

import torch
from torch import fx
from torch._inductor import config, custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import stable_topological_sort

from . import attention, decoding, folding
from .attention import attend
from .cuda.linear import attends, folds
from .folding import fold
from .ops import sab_linear, sab_linears

MOST = 4
"""Products of one `sab::linears`; more of one input become several."""
_HOOK = "post_grad_custom_post_pass"
_Aware = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", CustomGraphPass)  # told `is_inference`; newer ones


class JoinProducts(_Aware):
    """Join the products of one input in a graph of Inductor.

    It runs after gradients are laid out, in forward and backward graphs alike, and a joined product gives what the single
    ones do; so nothing about gradients changes.

    Args:
        before: a pass that somebody else has set, which is called first, or None.
    """

    def __init__(self, before: Any = None):
        self.before = before

    def __call__(self, graph: fx.Graph, **told: bool) -> None:
        if self.before is not None:
            self.before(graph, **(told if isinstance(self.before, _Aware) else {}))
        use_stored_scales(graph)
        join(graph)
        if _folds() and _has_products(graph):
            fold(graph, folds)
            attend(graph, attends)

    def uuid(self) -> Any:
        """Return the pass in the keys of cached graphs; None, so that none are cached, where `before` has none."""
        files = __file__, decoding.__file__, folding.__file__, attention.__file__
        own = get_hash_for_files(files), _folds()
        if self.before is None:
            return own
        other = self.before.uuid() if isinstance(self.before, CustomGraphPass) else None
        return None if other is None else (own, other)


def _folds() -> bool:
    return os.environ.get("SAB_FOLD", "1") != "0"


def _has_products(graph: fx.Graph) -> bool:
    """Tell whether a graph is of a packed model: the attention of others is not touched."""
    return any(graph.find_nodes(op="call_function", target=op) for op in (sab_linear, sab_linears))


def register() -> None:
    """Have Inductor run the pass after its own ones, and after a pass that is there already; once is enough."""
    if os.environ.get("SAB_JOIN", "1") == "0" or not hasattr(config, _HOOK):
        return
    present = getattr(config, _HOOK)
    several = isinstance(present, (list, tuple))  # newer torches take those
    if any(isinstance(one, JoinProducts) for one in (present if several else [present])):
        return
    setattr(config, _HOOK, [*present, JoinProducts()] if several else JoinProducts(present))


def use_stored_scales(graph: fx.Graph) -> None:
    """Give products on CPUs the scales as modules store them, int16: their kernels read those, and a view takes 2 µs.

    Views that nothing needs any more are erased, and nothing else: other nodes without users may write in place.
    """
    for node in graph.find_nodes(op="call_function", target=sab_linear):
        x, *operands, _ = _arguments(node)
        if x.meta["val"].device.type == "cpu":
            for operand in operands:
                if isinstance(operand, fx.Node) and _views_stored_scales(operand):
                    node.replace_input_with(operand, operand.args[0])
                    if not operand.users:
                        graph.erase_node(operand)


def _views_stored_scales(node: fx.Node) -> bool:
    if node.target is not torch.ops.aten.view.dtype or node.args[1] != torch.float16:
        return False
    return node.args[0].meta["val"].dtype == torch.int16


def join(graph: fx.Graph) -> int:
    """Join products of the same node as input with the same `exact`, `MOST` at a time, in the order of the graph.

    Products whose packed tensors are themselves computed from a product stay alone.

    Returns:
        How many `sab::linears` there are now that were not.
    """
    groups: dict[tuple, list[tuple[fx.Node, tuple]]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=sab_linear):
        x, *operands, exact = _arguments(node)
        if not any(_depends_on_product(operand) for operand in operands if isinstance(operand, fx.Node)):
            groups[x, exact].append((node, tuple(operands)))
    count = 0
    for (x, exact), group in groups.items():
        for start in range(0, len(group) - 1, MOST):
            _replace(graph, x, group[start : start + MOST], exact)
            count += 1
    if count:
        stable_topological_sort(graph)
        graph.lint()
    return count


def _arguments(node: fx.Node) -> tuple:
    """Return all arguments of a `sab::linear` in the order of its schema, defaults included."""
    rest = sab_linear._schema.arguments[len(node.args) :]
    return (*node.args, *[node.kwargs.get(argument.name, argument.default_value) for argument in rest])


def _depends_on_product(node: fx.Node) -> bool:
    seen, todo = set(), [node]
    while todo:
        node = todo.pop()
        if node.target in (sab_linear, sab_linears):
            return True
        if node not in seen:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return False


def _replace(graph: fx.Graph, x: fx.Node, group: list[tuple[fx.Node, tuple]], exact: bool) -> None:
    """Put one `sab::linears` where the first product of the group is; the graph is sorted afterwards."""
    nodes = [node for node, _ in group]
    operands = [list(several) for several in zip(*[one for _, one in group], strict=True)]
    with graph.inserting_before(nodes[0]):
        joined = graph.call_function(sab_linears, (x, *operands, exact))
        joined.meta["val"] = [node.meta["val"] for node in nodes]
        for i, node in enumerate(nodes):
            item = graph.call_function(operator.getitem, (joined, i))
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item)
    for node in nodes:
        graph.erase_node(node)
