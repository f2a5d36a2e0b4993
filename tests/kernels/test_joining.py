"""Products of one input in a compiled model: joined where they may be, and with the results that they have apart."""

import pytest
import torch
from helpers import inputs, random_planes
from torch import fx, nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

from sab_hf import SABLinear
from sab_hf.kernels import joining
from sab_hf.kernels.ops import sab_linear, sab_linears

HIDDEN, KEYS, WIDE = 40, 16, 72


def packed(out_features: int, in_features: int, num_significant: int, seed: int, biased: bool = False) -> SABLinear:
    planes = random_planes(out_features, in_features, 1 + seed % 2, num_significant, seed=seed)
    return SABLinear.from_planes(planes, inputs(out_features, seed=seed) if biased else None)


class Block(nn.Module):
    """Attention and a gated network as Llama has them, q, k, v with biases and residual planes of different sizes."""

    def __init__(self):
        super().__init__()
        self.q, self.k = packed(HIDDEN, HIDDEN, 5, 1, biased=True), packed(KEYS, HIDDEN, 0, 2, biased=True)
        self.v, self.o = packed(KEYS, HIDDEN, HIDDEN, 3, biased=True), packed(HIDDEN, HIDDEN, 5, 4)
        self.gate, self.up, self.down = (
            packed(WIDE, HIDDEN, 5, 5),
            packed(WIDE, HIDDEN, 9, 6),
            packed(HIDDEN, WIDE, 5, 7),
        )

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        k, v = (y.repeat_interleave(q.shape[1], 1)[:, : q.shape[1]] for y in (k, v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Watch(CustomGraphPass):
    """Keeps what products the graphs had when it was called."""

    def __init__(self, version: str = ""):
        self.version, self.seen = version, []

    def __call__(self, graph: fx.Graph) -> None:
        self.seen.append(products(graph))

    def uuid(self):
        return self.version or None  # None: graphs are compiled, not taken from a cache


def products(graph: fx.Graph) -> tuple[list[int], int]:
    """Return how many products each `sab::linears` of a graph has, and the number of single ones."""
    joined = [len(node.args[1]) for node in graph.find_nodes(op="call_function", target=sab_linears)]
    return joined, len(graph.find_nodes(op="call_function", target=sab_linear))


@pytest.fixture
def watched(monkeypatch):
    """Compile from scratch, with a pass before and one after the joining, which folds nothing; return them."""
    monkeypatch.setenv("SAB_FOLD", "0")  # on a GPU, joined products would become folded ones
    before, after = Watch(), Watch()
    torch.compiler.reset()
    with config.patch(post_grad_custom_post_pass=before):
        joining.register()
        chain = [config.post_grad_custom_post_pass, after]
        with config.patch(post_grad_custom_post_pass=lambda graph: [one(graph) for one in chain]):
            yield before, after
    torch.compiler.reset()


@pytest.fixture
def hook():
    """Set Inductor's hook for the time of a test."""
    with config.patch(post_grad_custom_post_pass=None):
        yield lambda value: setattr(config, "post_grad_custom_post_pass", value)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_a_compiled_block_joins_products_of_one_input(watched, device, shape):
    before, after = watched
    block = Block().to(device)
    x = inputs(*shape, HIDDEN).to(device)
    with torch.no_grad():
        found = torch.compile(block, fullgraph=True)(x)
        torch.testing.assert_close(found, block(x))
    assert before.seen == [([], 7)]
    assert after.seen == [([3, 2], 2)]


def test_the_compiler_registers_the_pass_by_itself(hook):
    torch.compiler.reset()
    before = Watch()
    hook(before)
    layer = packed(8, 13, 0, 1)
    with torch.no_grad():
        torch.compile(layer, fullgraph=True)(inputs(2, 13))
    assert before.seen == [([], 1)]
    chain = config.post_grad_custom_post_pass
    assert isinstance(chain, joining.JoinProducts)
    joining.register()
    assert config.post_grad_custom_post_pass is chain


def test_the_environment_turns_joining_off(monkeypatch, hook):
    monkeypatch.setenv("SAB_JOIN", "0")
    joining.register()
    assert config.post_grad_custom_post_pass is None


def test_lists_of_passes_are_kept(hook):
    before = Watch()
    hook([before])
    joining.register()
    joining.register()
    first, second = config.post_grad_custom_post_pass
    assert first is before
    assert isinstance(second, joining.JoinProducts)


def test_cached_graphs_know_the_passes():
    alone = joining.JoinProducts()
    assert alone.uuid()
    assert joining.JoinProducts(Watch()).uuid() is None
    assert joining.JoinProducts(lambda graph: None).uuid() is None
    names = [joining.JoinProducts(Watch(version)).uuid() for version in "ab"]
    assert len({alone.uuid(), *names}) == 3


def test_training_keeps_its_gradients(watched):
    """Products before and after a trained layer: the graphs record gradients, and joined ones give the same."""
    _, after = watched
    left, right, last = packed(24, 13, 3, 1), packed(24, 13, 0, 2), packed(5, 24, 4, 3)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(13, 13)

        def forward(self, x):
            hidden = self.first(x)
            return last(torch.tanh(left(hidden)) * right(hidden))

    model, x = Model(), inputs(4, 13)
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert after.seen[0] == ([2], 1)
    for found, expected in zip(*reversed(gradients), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def traced(function, *arguments) -> fx.Graph:
    return torch.fx.experimental.proxy_tensor.make_fx(function)(*arguments).graph


@pytest.mark.parametrize(("count", "expected"), [(2, ([2], 0)), (4, ([4], 0)), (5, ([4], 1)), (6, ([4, 2], 0))])
def test_many_products_of_one_input_are_joined_by_four(count, expected):
    layers = [packed(3 + i, 13, i, i) for i in range(count)]
    with torch.no_grad():
        graph = traced(lambda x: [layer(x) for layer in layers], inputs(2, 13))
    joining.join(graph)
    assert products(graph) == expected


def test_products_of_other_inputs_or_exactness_stay_apart():
    left, right = packed(5, 13, 3, 1), packed(5, 13, 3, 2)
    exact = packed(5, 13, 3, 4)
    exact.exact, left.exact, right.exact = True, False, False
    with torch.no_grad():
        other_input = traced(lambda x: left(x) + right(x + 1), inputs(2, 13))
        other_exactness = traced(lambda x: left(x) + exact(x), inputs(2, 13))
    assert joining.join(other_input) == joining.join(other_exactness) == 0


def test_a_product_whose_scales_come_from_a_product_stays_alone():
    first, second = packed(13, 13, 0, 2), packed(5, 13, 0, 4)

    def function(x):
        y = first(x)
        scale = second.col_scale.view(torch.float16) * y.sum().half()
        return sab_linear(
            x, second.signs, second.row_scale.view(torch.float16), scale, None, None, None, None, y is None
        )

    first.exact = False
    with torch.no_grad():
        graph = traced(function, inputs(2, 13))
    assert products(graph) == ([], 2)
    assert joining.join(graph) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_on_cpus_take_scales_as_they_are_stored(hook, dtype):
    """A float16 input stays what it is, though it is a view of integers as the scales are."""
    seen = []

    def watch(graph: fx.Graph) -> None:
        joining.use_stored_scales(graph)
        [node] = graph.find_nodes(op="call_function", target=sab_linear)
        seen.append([operand.meta["val"].dtype for operand in node.all_input_nodes])

    hook(watch)
    torch.compiler.reset()
    layer, bits = packed(8, 13, 3, 2), inputs(2, 13, dtype=dtype).view(torch.int16)
    with torch.no_grad():
        found = torch.compile(lambda bits: layer(bits.view(dtype)), fullgraph=True)(bits)
        assert torch.equal(found, layer(bits.view(dtype)))
    planes, residual = [torch.uint8, torch.int16, torch.int16], [torch.uint8, torch.uint8, torch.int16, torch.int16]
    assert seen == [[dtype, *planes, *residual]]


def test_the_pass_erases_views_of_scales_and_nothing_else():
    """A kernel that writes in place has no users, and looks dead; graphs may hold such nodes, and need not be ours."""
    layer, graph = packed(8, 13, 0, 2), fx.Graph()
    values = {"x": inputs(2, 13), **layer.packed_tensors()}
    x, signs, *stored = given = [graph.placeholder(name) for name in values]
    for node, value in zip(given, values.values(), strict=True):
        node.meta["val"] = value
    views = [graph.call_function(torch.ops.aten.view.dtype, (scale, torch.float16)) for scale in stored]
    without_users = graph.call_function(torch.ops.aten.sin.default, (x,))
    product = graph.call_function(sab_linear, (x, signs, *views, None, None, None, None))
    output = graph.output((product, views[1]))
    joining.JoinProducts()(graph)
    assert list(graph.nodes) == [*given, views[1], without_users, product, output]
    assert product.args[2:4] == tuple(stored)
