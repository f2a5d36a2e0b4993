"""`SABLinear` against the dense `nn.Linear` of the weights that it stands for."""

import copy
import pickle

import pytest
import torch
from helpers import random_planes
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from sab_hf.kernels.cpu import library
from sab_hf.packed.linear import SABLinear, replace_module
from sab_hf.packed.swap import dequantize_modules, swap_in_empty
from sab_hf.packing import tensor_specs, to_tensors

IN, OUT = 21, 10
FULL = {"signs", "row_scale", "col_scale"}
RESIDUAL = {"significant_columns", "residual_signs", "residual_row_scale", "residual_col_scale"}


def packed(num_planes: int = 2, num_significant: int = 9, bias: bool = True) -> SABLinear:
    generator = torch.Generator().manual_seed(1)
    return SABLinear.from_planes(
        random_planes(OUT, IN, num_planes, num_significant),
        torch.randn(OUT, generator=generator) if bias else None,
    )


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_significant", [0, 9])
def test_sab_linear_equals_dense_linear(num_significant, bias):
    module = packed(2, num_significant, bias)
    x = inputs(3, 4, IN)
    expected = nn.functional.linear(x, module.planes().dense(), module.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("num_significant", "bias"), [(0, False), (0, True), (9, False), (9, True)])
def test_state_dict_is_the_file_format(num_significant, bias):
    module = packed(2, num_significant, bias)
    expected = FULL | (RESIDUAL if num_significant else set()) | ({"bias"} if bias else set())
    assert module.state_dict().keys() == expected
    assert module.packed_tensors().keys() == expected - {"bias"}
    for name, tensor in to_tensors(random_planes(OUT, IN, 2, num_significant)).items():
        assert torch.equal(module.state_dict()[name], tensor), name
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("name", sorted(FULL | RESIDUAL))
@pytest.mark.parametrize("damage", ["dtype", "shape", "rank"])
def test_sab_linear_names_the_tensor_it_rejects(name, damage):
    tensors = to_tensors(random_planes(OUT, IN, 2, 9))
    tensor = tensors[name]
    tensors[name] = {
        "dtype": tensor.to(torch.int32),
        "shape": torch.cat([tensor, tensor[..., :1]], -1),
        "rank": tensor[None],
    }[damage]
    # rows are read off `row_scale`, significant columns off `residual_col_scale`: one too many contradicts the signs
    blamed = {"row_scale": "signs", "residual_col_scale": "residual_signs"}.get(name, name)
    if (name, damage) == ("residual_col_scale", "shape"):
        tensors[name] = torch.zeros(17, dtype=torch.int16)  # one more column would fit the bytes of `residual_signs`
    with pytest.raises(ValueError, match=f"`{blamed if damage == 'shape' else name}` must be"):
        SABLinear(tensors, IN)


@pytest.mark.parametrize("name", sorted(FULL | RESIDUAL))
def test_sab_linear_names_the_tensor_it_lacks(name):
    tensors = to_tensors(random_planes(OUT, IN, 2, 9))
    del tensors[name]
    with pytest.raises(ValueError, match=f"`{name}` must be .* got nothing"):
        SABLinear(tensors, IN)


def test_sab_linear_rejects_a_bias_of_another_size():
    with pytest.raises(ValueError, match="`bias` must be"):
        SABLinear(to_tensors(random_planes(OUT, IN)), IN, torch.zeros(1))


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu", torch.float16)],
    ids=["bfloat16", "half", "double", "device and dtype"],
)
def test_dtype_casts_leave_packed_tensors_alone(cast):
    module = packed()
    cast_module = cast(copy.deepcopy(module))
    for name, tensor in module.packed_tensors().items():
        assert cast_module.packed_tensors()[name].dtype == tensor.dtype, name
        assert torch.equal(cast_module.packed_tensors()[name], tensor), name
    assert cast_module.bias.dtype != torch.float32


def test_bfloat16_module_computes_in_bfloat16():
    module = packed().to(torch.bfloat16)
    x = inputs(4, IN).bfloat16()
    exact = x.float() @ module.planes().dense().T + module.bias.float()
    assert module(x).dtype == torch.bfloat16
    torch.testing.assert_close(module(x).float(), exact, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_weights_answer_the_dtype_of_the_dense_ones(dtype):
    """Models cast pixels and hidden states to `weight.dtype`: to uint8, every pixel would become 0."""
    planes = random_planes(OUT, IN)
    module = SABLinear.from_planes(planes, dtype=dtype)
    assert module.weight.dtype == dtype
    assert SABLinear.from_planes(planes, torch.zeros(OUT, dtype=dtype)).weight.dtype == dtype
    assert SABLinear.empty_like(nn.Linear(IN, OUT, bias=False, dtype=dtype), 1, 0).weight.dtype == dtype
    for cast in (copy.deepcopy(module).bfloat16(), nn.Sequential(copy.deepcopy(module)).to("meta", torch.bfloat16)[0]):
        assert cast.weight.dtype == torch.bfloat16
        assert not list(cast.buffers())
    assert module.to("meta").weight.dtype == dtype
    assert pickle.loads(pickle.dumps(module)).weight.dtype == dtype


def test_a_packed_linear_refuses_integers_as_its_dtype():
    with pytest.raises(ValueError, match=r"`dtype` must be a floating-point dtype, got torch\.uint8"):
        SABLinear.from_planes(random_planes(OUT, IN), dtype=torch.uint8)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("num_significant", [0, 9])
def test_torch_compile_meets_no_graph_break(backend, num_significant):
    torch._dynamo.reset()
    module = packed(2, num_significant)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for shape in [(3, IN), (5, IN), (2, 3, IN)]:
        torch.testing.assert_close(compiled(inputs(*shape)), module(inputs(*shape)))


@pytest.mark.parametrize("kernels", ["compiled", "torch"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_callers_may_write_into_what_a_linear_returns(monkeypatch, kernels, requires_grad):
    """Llama 4's attention does; of a view made inside a custom op PyTorch would refuse it while gradients are recorded."""
    if kernels == "torch":
        monkeypatch.setattr(library, "load", lambda: None)
    module = packed(bias=False)
    y = module(inputs(2, 3, IN).requires_grad_(requires_grad))
    assert not y._is_view()
    expected = y.detach() * 2
    y[0] *= 2
    y[1:].mul_(2)
    assert torch.equal(y, expected)


@pytest.mark.skipif(library.load() is None, reason="without kernels every product is exact")
@pytest.mark.parametrize("recorded", [False, True])
def test_products_are_exact_where_gradients_are_recorded(recorded):
    module, x = SABLinear.from_planes(random_planes(70, 300, 1)), inputs(3, 300).requires_grad_()
    expected = {}
    for module.exact in (True, False):
        expected[module.exact] = module(x.detach())
    assert not torch.equal(expected[True], expected[False])
    with torch.set_grad_enabled(recorded):
        y = module(x)
    assert y.requires_grad == recorded
    assert torch.equal(y, expected[recorded])


class OpsSeen(TorchDispatchMode):
    """Collects the names of the operations that run under it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_modes_and_tracers_see_the_op():
    """Outside of them a CPU kernel is called without the dispatcher."""
    module, x = packed(), inputs(3, IN)
    with OpsSeen() as mode, torch.no_grad():
        y = module(x)
    assert "sab::linear" in mode.names
    assert torch.equal(module(x), y)
    traced = make_fx(module)(x)
    assert torch.equal(traced(x + 1), module(x + 1))


def test_products_follow_tensors_that_are_written_or_replaced():
    module, other, x = packed(bias=False), packed(bias=False), inputs(3, IN)
    for name, tensor in other.packed_tensors().items():
        if tensor.dtype == torch.int16:
            tensor.copy_((tensor.view(torch.float16) * 2).view(torch.int16))
        elif name != "significant_columns":
            tensor.bitwise_xor_(0b1010)
    expected = other(x)
    first = module(x)
    assert not torch.equal(first, expected)
    written, replaced, moved = (copy.deepcopy(module) for _ in range(3))
    for name, tensor in other.packed_tensors().items():
        getattr(written, name).copy_(tensor)
        setattr(replaced, name, nn.Parameter(tensor.clone(), requires_grad=False))
        getattr(moved, name).data = tensor.clone()
    for changed in (written, replaced, moved):
        assert torch.equal(changed(x), expected)
    assert torch.equal(module(x), first)


def test_modules_that_have_computed_can_be_copied_and_pickled():
    module, x = packed(), inputs(3, IN)
    y = module(x)
    assert torch.equal(copy.deepcopy(module)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), y)


class Model(nn.Module):
    """Two Linears at different depths, one of them without a bias."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"proj": nn.Linear(IN, OUT, bias=False)})
        self.head = nn.Linear(OUT, 3)

    def forward(self, x):
        return self.head(self.block["proj"](x).relu())


def test_dequantize_modules_keeps_the_function():
    model = Model().eval()
    replace_module(model, "block.proj", packed(bias=False))
    replace_module(model, "head", SABLinear.from_planes(random_planes(3, OUT), torch.ones(3)))
    weights = {name: model.get_submodule(name).planes().dense() for name in ("block.proj", "head")}
    expected = model(inputs(4, IN))
    dequantize_modules(model, torch.float32)
    for name, weight in weights.items():
        linear = model.get_submodule(name)
        assert type(linear) is nn.Linear
        assert torch.equal(linear.weight, weight)
        assert not linear.training
    assert model.block["proj"].bias is None
    assert torch.equal(model.head.bias, torch.ones(3))
    torch.testing.assert_close(model(inputs(4, IN)), expected, rtol=1e-5, atol=1e-4)


def test_dequantize_modules_gives_the_dtype_that_was_asked_for():
    model = nn.Sequential(packed())
    planes = model[0].planes()
    dequantize_modules(model, torch.bfloat16)
    assert model[0].bias.dtype == torch.bfloat16
    assert torch.equal(model[0].weight, planes.dense(torch.bfloat16))


def test_swap_in_empty_makes_room_for_what_was_saved():
    saved = Model()
    replace_module(saved, "block.proj", packed(3, 5, bias=False))
    with torch.device("meta"):
        model = Model().eval()
    swap_in_empty(model, {"block.proj": [3, 5]})
    module = model.block["proj"]
    assert {n: (t.dtype, tuple(t.shape)) for n, t in module.packed_tensors().items()} == tensor_specs(OUT, IN, 3, 5)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not module.training
    assert type(model.head) is nn.Linear
    model.load_state_dict(saved.state_dict(), assign=True)
    assert torch.equal(model(inputs(2, IN)), saved(inputs(2, IN)))


@pytest.mark.parametrize("name", ["block.other", "block", ""])
def test_swap_in_empty_rejects_what_is_no_linear(name):
    model = Model()
    with pytest.raises(ValueError, match=f"lists 1 modules that are no Linear of Model, first `{name}`"):
        swap_in_empty(model, {"head": [1, 0], name: [1, 0]})
    assert type(model.head) is nn.Linear  # nothing is swapped before everything is checked


def test_swap_in_empty_rejects_a_checkpoint_without_modules():
    with pytest.raises(ValueError, match="lists no quantized modules"):
        swap_in_empty(Model(), {})


def test_dequantize_modules_rejects_offloaded_weights_before_it_starts():
    model = nn.Sequential(packed(), packed().to("meta"))
    with pytest.raises(ValueError, match=r"offloaded.*device_map='cpu'"):
        dequantize_modules(model, torch.float32)
    assert all(isinstance(module, SABLinear) for module in model)


@pytest.mark.parametrize("training", [False, True])
def test_replace_module_keeps_the_training_mode(training):
    model = Model().train(training)
    replace_module(model, "block.proj", packed(bias=False).train(not training))
    assert model.block["proj"].training == training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_reach_a_packed_patch_embedding(dtype):
    """SigLIP2, whose patch embedding is a Linear, casts pixels to the dtype of its weight."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Siglip2VisionModel(Siglip2VisionConfig(**sizes, patch_size=2, num_patches=16)).eval().to(dtype)
    name = next(name for name, _ in model.named_modules() if name.endswith("patch_embedding"))
    linear = model.get_submodule(name)
    replace_module(model, name, SABLinear.from_planes(random_planes(24, 12, 2), linear.bias, linear.weight.dtype))
    inputs = {
        "pixel_values": torch.rand(1, 16, 12),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]]),
    }
    with torch.no_grad():
        packed = model(**inputs).last_hidden_state
        dequantize_modules(model, dtype)
        torch.testing.assert_close(packed, model(**inputs).last_hidden_state, rtol=2e-2, atol=2e-2)
