"""What a decoding step does around its products: found in graphs by what it computes, and computed as before."""

import pytest
import torch
from helpers import inputs, random_planes
from torch import nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from sab_hf import SABLinear
from sab_hf.kernels import attention, decoding, folding, joining
from sab_hf.kernels.cuda.linear import folds
from sab_hf.kernels.ops import sab_linear, sab_linears

HIDDEN, WIDE = 40, 72
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def packed(out_features: int, in_features: int, seed: int, biased: bool = False, dtype=torch.float32) -> SABLinear:
    planes = random_planes(out_features, in_features, 1 + seed % 2, seed % 3 * 4, seed=seed)
    layer = SABLinear.from_planes(planes, inputs(out_features, seed=seed, dtype=dtype) if biased else None, dtype)
    layer.exact = False
    return layer


def llama_norm(x, weight):
    numbers = x.to(torch.float32)
    return weight * (numbers * torch.rsqrt(numbers.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gemma_norm(x, weight):
    numbers = x.float()
    return (numbers * torch.rsqrt(numbers.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight.float())).type_as(x)


def olmo_norm(x, weight):
    numbers = x.to(torch.float32)
    return (weight * (numbers / torch.sqrt((numbers * numbers).mean(-1, keepdim=True) + 1e-5))).to(x.dtype)


BEFORE = {
    "rms_norm": llama_norm,
    "rms_norm_plus_one": gemma_norm,
    "rms_norm_float32": olmo_norm,
    "silu": lambda x, up: functional.silu(x) * up,
    "gelu": lambda x, up: up * functional.gelu(x),
    "gelu_tanh": lambda x, up: functional.gelu(x, approximate="tanh") * up,
}
OTHERS = {
    "a norm of other powers": lambda x, weight: weight * (x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-6)),
    "a norm about the mean": lambda x, weight: functional.layer_norm(x, x.shape[-1:], weight),
    "another activation": lambda x, up: x * torch.sigmoid(1.702 * x) * up,
    "a sum": lambda x, up: functional.silu(x) + up,
}


def of_form(form: str, dtype: torch.dtype) -> torch.Tensor:
    shape = (HIDDEN,) if "norm" in form else (1, 1, HIDDEN)
    return inputs(*shape, seed=7).to(dtype)


def graph_of(function, *arguments):
    """Return the graph of a function as Inductor's passes see it."""
    with torch.no_grad():
        return make_fx(function, select_decomp_table())(*arguments)


def folded(module) -> list:
    return [node.args[2] for node in module.graph.find_nodes(op="call_function", target=decoding.sab_folded_linears)]


def joined_and_folded(module, suits=lambda *product: True) -> list:
    joining.join(module.graph)
    folding.fold(module.graph, suits)
    module.graph.lint()
    module.recompile()
    return folded(module)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", BEFORE)
def test_norms_and_gates_are_found_by_what_they_compute(form, dtype):
    layer, x, other = packed(9, HIDDEN, 4), inputs(1, 1, HIDDEN).to(dtype), of_form(form, dtype)

    def function(x, other):
        return layer(BEFORE[form](x, other))

    module = graph_of(function, x, other)
    same_at_float32 = {"rms_norm", "rms_norm_float32"} if dtype == torch.float32 else set()
    [found] = joined_and_folded(module)
    assert found == form or {found, form} == same_at_float32
    assert not module.graph.find_nodes(op="call_function", target=sab_linear)
    with torch.no_grad():
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(module(x, other), function(x, other), rtol=4 * eps, atol=16 * eps)


@pytest.mark.parametrize("other", OTHERS)
def test_what_only_looks_like_a_norm_or_gate_stays(other):
    layer, x = packed(9, HIDDEN, 4), inputs(1, 1, HIDDEN)
    second = of_form("norm" if "norm" in other else "gate", x.dtype)
    module = graph_of(lambda x, second: layer(OTHERS[other](x, second)), x, second)
    assert joined_and_folded(module) == []


@pytest.mark.parametrize("rows", [1, 3])
def test_a_block_folds_all_that_stands_around_its_products(rows):
    """Products of one input, biases, and a residual stream that two products add to."""
    q, k = packed(HIDDEN, HIDDEN, 1, biased=True), packed(16, HIDDEN, 2)
    shapes = [(HIDDEN, HIDDEN), (WIDE, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE)]
    o, gate, up, down = (packed(*shape, seed) for seed, shape in enumerate(shapes))
    weight = inputs(HIDDEN, seed=5)

    def block(x):
        normed = llama_norm(x, weight)
        x = x + o(torch.tanh(q(normed)) * k(normed).mean())
        normed = gemma_norm(x, weight)
        return down(functional.silu(gate(normed)) * up(normed)) + x

    x = inputs(rows, HIDDEN)
    module = graph_of(block, x)
    assert joined_and_folded(module) == ["rms_norm", "", "rms_norm_plus_one", "silu"]
    nodes = module.graph.find_nodes(op="call_function", target=decoding.sab_folded_linears)
    added = [[[one is not None for one in ones] for ones in node.args[-3:-1]] for node in nodes]
    assert added == [[[True, False], [False] * 2], [[False], [True]], [[False] * 2, [False] * 2], [[False], [True]]]
    with torch.no_grad():
        torch.testing.assert_close(module(x), block(x), rtol=1e-4, atol=1e-3)


def test_what_others_need_too_stays_outside():
    """A norm that something else reads, and a sum of two products of one input."""
    layer, left, right = (packed(HIDDEN, HIDDEN, seed) for seed in (1, 2, 4))
    weight = inputs(HIDDEN, seed=5)

    def reads_norm(x):
        normed = llama_norm(x, weight)
        return layer(normed) * normed

    def adds_products(x):
        return left(x) + right(x)

    x = inputs(1, HIDDEN)
    for function in (reads_norm, adds_products):
        module = graph_of(function, x)
        assert joined_and_folded(module) == []
        with torch.no_grad():
            torch.testing.assert_close(module(x), function(x))


def test_many_inputs_and_products_without_such_kernels_stay():
    layer, weight = packed(9, HIDDEN, 4), inputs(HIDDEN, seed=5)

    def function(x):
        return layer(llama_norm(x, weight))

    assert joined_and_folded(graph_of(function, inputs(9, HIDDEN))) == []
    assert joined_and_folded(graph_of(function, inputs(2, HIDDEN)), folds) == []  # on a CPU
    assert joined_and_folded(graph_of(function, inputs(2, HIDDEN))) == ["rms_norm"]


@pytest.fixture(params=[(None, True), ("1", True), ("0", False)], ids=["default", "SAB_FOLD=1", "SAB_FOLD=0"])
def is_on(request, monkeypatch) -> bool:
    """Set the variable, and let kernels do all that is asked of them; return whether the pass folds then."""
    value, on = request.param
    monkeypatch.delenv("SAB_FOLD", raising=False)
    if value is not None:
        monkeypatch.setenv("SAB_FOLD", value)
    monkeypatch.setattr(joining, "folds", lambda *product: True)
    monkeypatch.setattr(joining, "attends", lambda *tensors: True)
    return on


def with_attention(product):
    """Return what attends with the heads of a product."""

    def function(x, weight):
        heads = product(llama_norm(x, weight)).unflatten(-1, (2, 20)).transpose(1, 2)
        return functional.scaled_dot_product_attention(heads, heads, heads)

    return function


def test_the_pass_folds_unless_the_environment_forbids_it(is_on):
    module = graph_of(with_attention(packed(HIDDEN, HIDDEN, 4)), inputs(1, 2, HIDDEN), inputs(HIDDEN, seed=5))
    joining.JoinProducts()(module.graph)
    assert folded(module) == ["rms_norm"] * is_on
    assert len(module.graph.find_nodes(op="call_function", target=attention.sab_attend)) == is_on


def test_folded_graphs_are_not_taken_from_the_cache_of_others(is_on, monkeypatch):
    own = joining.JoinProducts().uuid()
    monkeypatch.delenv("SAB_FOLD", raising=False)
    assert (joining.JoinProducts().uuid() == own) == is_on


def test_models_without_products_keep_their_attention(is_on):
    module = graph_of(with_attention(lambda x: x), inputs(1, 2, HIDDEN), inputs(HIDDEN, seed=5))
    joining.JoinProducts()(module.graph)
    assert not module.graph.find_nodes(op="call_function", target=attention.sab_attend)


def test_on_a_cpu_the_pass_only_joins():
    module = graph_of(with_attention(packed(HIDDEN, HIDDEN, 4)), inputs(1, 2, HIDDEN), inputs(HIDDEN, seed=5))
    before = [node.target for node in module.graph.nodes]
    joining.JoinProducts()(module.graph)
    views = {torch.ops.aten.view.dtype}  # of scales, which kernels on CPUs take as they are stored
    assert [node.target for node in module.graph.nodes if node.target not in views] == [
        target for target in before if target not in views
    ]


def test_a_compiled_block_computes_the_same(monkeypatch):
    monkeypatch.delenv("SAB_FOLD", raising=False)
    monkeypatch.setattr(joining, "folds", lambda *product: True)
    torch.compiler.reset()
    layers = nn.ModuleList([packed(WIDE, HIDDEN, 1), packed(WIDE, HIDDEN, 2, biased=True), packed(HIDDEN, WIDE, 4)])
    weight, seen = inputs(HIDDEN, seed=5), []

    def block(x):
        normed = llama_norm(x, weight)
        return x + layers[2](functional.silu(layers[0](normed)) * layers[1](normed))

    class Watched(joining.JoinProducts):
        def __call__(self, graph, **told):
            super().__call__(graph, **told)
            seen.extend(node.args[2] for node in graph.nodes if node.target is decoding.sab_folded_linears)

        def uuid(self):
            return None

    x = inputs(1, 1, HIDDEN)
    with torch.no_grad(), torch._inductor.config.patch(post_grad_custom_post_pass=Watched()):
        found = torch.compile(block, fullgraph=True)(x)
        torch.testing.assert_close(found, block(x), rtol=1e-4, atol=1e-3)
    assert seen == ["rms_norm", "silu"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "rms"}, "`form` must be one of rms_norm"),
        ({"other": None}, "`other` must be there with a form"),
        ({"other": torch.ones(3)}, r"`other` must be torch.float32 \[40\] on cpu, got torch.float32 \[3\]"),
        ({"biases": [torch.ones(8)]}, r"`bias` must be torch.float32 \[9\] on cpu, got torch.float32 \[8\]"),
        ({"addends": [torch.ones(2, 9).half()]}, r"`addend` must be torch.float32 \[2, 9\] on cpu, got torch.float16"),
        ({"addends": []}, "`addend` must have an entry for each of 1 matrices, got 0"),
    ],
)
def test_the_op_refuses_what_does_not_fit(changes, message):
    layer, x = packed(9, HIDDEN, 4), inputs(2, HIDDEN)
    around = decoding.Around("rms_norm", 1e-6, torch.ones(HIDDEN), [None], [None])._replace(**changes)
    matrix = [[one] for one in layer.operands()]
    with pytest.raises(ValueError, match=message):
        decoding.sab_folded_linears(x, around.other, *around[:2], *matrix, *around[3:])


def test_the_op_is_the_sequence_of_its_parts():
    layers, x = [packed(9, HIDDEN, 4, biased=True), packed(5, HIDDEN, 2)], inputs(2, HIDDEN)
    weight, addend = inputs(HIDDEN, seed=3), inputs(2, 5, seed=4)
    lists = [list(one) for one in zip(*[layer.operands() for layer in layers], strict=True)]
    found = decoding.sab_folded_linears(x, weight, "rms_norm", 1e-6, *lists, [layers[0].bias, None], [None, addend])
    products = sab_linears(llama_norm(x, weight), *lists)
    assert torch.equal(found[0], products[0] + layers[0].bias)
    assert torch.equal(found[1], products[1] + addend)
