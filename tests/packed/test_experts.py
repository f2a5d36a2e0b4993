"""Fused experts taken apart compute what the fused ones do, get the moments of the tokens that were sent to them, and return."""

from __future__ import annotations

import copy

import pytest
import torch
from family_zoo import FAMILIES
from helpers import V5
from safetensors.torch import load_file
from torch import nn

import sab_hf
from sab_hf import SABLinear, SABQuantizationConfig
from sab_hf.anatomy.roles import find_roles
from sab_hf.anatomy.selection import coverage, language_linears
from sab_hf.calibration import CalibrationBatch, token_modality
from sab_hf.method.hessian import SecondMoments
from sab_hf.packed.experts import (
    ExpertWeights,
    FusedView,
    expert_name,
    experts_apart,
    fuse_experts,
    fused_name,
    fused_parameters,
    split_experts,
)
from sab_hf.passes.capture import BlockInputs
from sab_hf.passes.routing import with_fallback

# family → whether its fused weights are [experts, in, out]
FUSED = {"llama4_text": True, "aria": True, "qwen3_vl_moe": not V5}
if V5:
    FUSED |= {"qwen3_moe": False, "gemma4_moe": False, "ernie4_5_vl_moe": False}


def make(name: str):
    family = FAMILIES[name]()
    if V5:
        family.model.set_experts_implementation("eager")
    return family


def split(model: nn.Module) -> list[str]:
    names = fused_parameters(model, find_roles(model).blocks)
    split_experts(model, [expert_name(name, 0) for name in names])
    return names


def config(batches, **changes) -> SABQuantizationConfig:
    values = {"calibration": batches, "num_samples": 8, "refine_steps": 0, "distil_steps": 0, "alternations": 1}
    return SABQuantizationConfig(**values | changes)


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


@pytest.mark.parametrize("name", FUSED)
def test_split_experts_compute_what_fused_ones_do(name):
    family = make(name)
    expected = logits(family.model, family.batches[-1])
    names = split(family.model)
    assert names
    assert not fused_parameters(family.model, find_roles(family.model).blocks)
    torch.testing.assert_close(logits(family.model, family.batches[-1]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not V5, reason="transformers 4 has one implementation")
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_kernels_for_fused_weights_are_left_alone_elsewhere(implementation):
    """A model with such a kernel runs, the split experts with the class's own loop; the config stays as it was."""
    family = make("qwen3_moe")
    family.model.set_experts_implementation(implementation)
    expected = logits(family.model, family.batches[-1])
    split(family.model)
    torch.testing.assert_close(logits(family.model, family.batches[-1]), expected, rtol=1e-4, atol=1e-4)
    assert family.model.config._experts_implementation == implementation
    fuse_experts(family.model)
    owners = [m for m in family.model.modules() if type(m).__name__ == "Qwen3MoeExperts"]
    assert owners
    assert all(owner.config is family.model.config for owner in owners)


@pytest.mark.parametrize("name", FUSED)
def test_each_expert_is_its_slice_the_right_way_round(name):
    model = make(name).model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for fused in split(model):
        for e in range(len(before[fused])):
            matrix = before[fused][e].T if FUSED[name] else before[fused][e]
            assert torch.equal(model.get_submodule(expert_name(fused, e)).weight, matrix)


@pytest.mark.parametrize("name", FUSED)
def test_fusing_gives_the_same_state_dict_in_the_same_order(name):
    model = make(name).model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    split(model)
    assert model.state_dict().keys() != before.keys()
    fuse_experts(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_look_at_experts_changes_nothing_even_after_an_error():
    model = make("qwen3_vl_moe").model
    parameters = {name: id(p) for name, p in model.named_parameters()}
    names = fused_parameters(model)
    with pytest.raises(AttributeError, match="nothing"), experts_apart(model, names):
        model.get_submodule(expert_name(names[0], 0)).nothing  # noqa: B018
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert list(parameters) == [name for name, _ in model.named_parameters()]


def test_names_of_experts():
    assert expert_name("a.experts.up", 3) == "a.experts.split.up.3"
    assert fused_name("a.experts.split.up.3") == "a.experts.up"
    assert fused_name("a.experts.3.up") is None
    assert fused_name("split.up") is None


def test_unknown_operation_on_fused_weights_says_what_to_do():
    view = FusedView(ExpertWeights(torch.randn(2, 3, 4), transposed=False))
    with pytest.raises(NotImplementedError, match=r"einsum.*`modules_to_not_convert`"):
        torch.einsum("ti,eoi->eto", torch.randn(5, 4), view)
    with pytest.raises(NotImplementedError, match="add"):
        torch.add(torch.randn(3, 4), view[0])
    with pytest.raises(RuntimeError, match="the other way round"):
        torch.randn(5, 3) @ view[0]
    with pytest.raises(IndexError, match="expert 2 of 2"):
        view[2]


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_weight_with_its_axes_exchanged_is_what_bmm_takes(transposed):
    """Inkling's shared experts compute `bmm(x, W.transpose(1, 2))`."""
    torch.manual_seed(0)
    W, x = torch.randn(3, 5, 7), torch.randn(3, 4, 7)
    weights = ExpertWeights(W.transpose(1, 2).contiguous() if transposed else W, transposed)
    view = FusedView(weights) if transposed else FusedView(weights).transpose(1, 2)
    assert view.shape == (3, 7, 5)
    torch.testing.assert_close(torch.bmm(x, view), torch.bmm(x, W.transpose(1, 2)))
    back = view.transpose(-1, -2)
    torch.testing.assert_close(nn.functional.linear(x[1], back[1]), x[1] @ W[1].T)
    with pytest.raises(NotImplementedError, match="modules_to_not_convert"):
        view.transpose(0, 1)


def test_expert_without_tokens_gives_no_rows():
    view = FusedView(ExpertWeights(torch.randn(2, 3, 4), transposed=False))
    assert nn.functional.linear(torch.empty(0, 4), view[1]).shape == (0, 3)


def test_stack_that_could_be_either_way_round_stays_dense_and_is_named():
    model = make("llama4_text").model
    for owner in model.modules():
        if type(owner).__name__ == "Llama4TextExperts":
            owner.gate_up_proj = nn.Parameter(torch.zeros(4, 32, 32))
            owner.down_proj = nn.Parameter(torch.zeros(4, 32, 32))
    roles = find_roles(model)
    linears = language_linears(model, roles, [])
    assert not any("experts" in name for name in linears)
    with pytest.raises(ValueError, match=r"in Llama4TextExperts, which is no nn\.Linear, such as `.*gate_up_proj`"):
        coverage(model, roles, linears, []).check(allow_low_coverage=False)


# ---- the tokens that the router sends


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_moe", "aria"])
def test_expert_moments_are_those_of_the_tokens_sent_to_it(name):
    """Against the router's own choice: rows of the layer's input that it sends to the expert, by modality."""
    family = make(name)
    batches = [CalibrationBatch(inputs, token_modality(inputs, family.model.config)) for inputs in family.batches]
    roles = find_roles(family.model)
    split(family.model)
    block_name = roles.blocks[0]
    layer = family.model.get_submodule(block_name).mlp
    router = layer.router if hasattr(layer, "router") else layer.gate
    rows: dict[tuple[int, int], list[torch.Tensor]] = {}
    for batch in batches:
        x, choice = _routing(family.model, layer, router, batch)
        for e in range(4):
            for m in batch.modality.unique().tolist():
                sent = (choice == e).any(-1) & (batch.modality.flatten() == m)
                if sent.any():
                    rows.setdefault((e, m), []).append(x[sent])
    linears = language_linears(family.model, roles, [])
    first = {n: m for n, m in linears.items() if n.startswith(f"{block_name}.") and _takes_hidden_states(n)}
    second = {n: m for n, m in linears.items() if n.startswith(f"{block_name}.") and ("down_proj" in n or "fc2" in n)}
    assert len(first) >= 4
    moments = BlockInputs(family.model, roles.stacks[0], batches).second_moments(
        family.model.get_submodule(block_name), 0, first | second
    )
    for linear in (*first, *second):
        e = (
            next(int(part) for part in reversed(linear.split(".")) if part.isdigit())
            if "shared" not in linear
            else None
        )
        if e is None:
            continue
        expected = {m: torch.cat(parts) for (expert, m), parts in rows.items() if expert == e}
        got = moments[linear].counts if linear in moments else {}
        assert got == {m: len(X) for m, X in expected.items()}, linear
        if linear in first and got:
            for m, X in expected.items():
                torch.testing.assert_close(moments[linear].matrices()[m], X.T @ X / len(X), rtol=1e-4, atol=1e-5)


def _takes_hidden_states(name: str) -> bool:
    return any(part in name for part in ("gate_up_proj", "fc1", "gate_proj")) and "shared" not in name


@torch.no_grad()
def _routing(model, layer, router, batch):
    """Return the layer's input rows [tokens, width] and the experts that its router chooses [tokens, 2]."""
    noted = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: noted.update(x=args[0].flatten(0, -2))),
        router.register_forward_hook(lambda _, args, output: noted.update(router=output)),
    ]
    model(**batch.inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    output = noted["router"]
    scores = output if isinstance(output, torch.Tensor) else output[0]
    return noted["x"], scores.reshape(-1, 4).topk(2, dim=-1).indices


def test_zero_rows_of_dense_dispatch_are_not_counted():
    """Llama 4 sends each expert every token, zeroed where it was not chosen; each token is sent once."""
    family = make("llama4_text")
    batches = [CalibrationBatch(inputs, token_modality(inputs, family.model.config)) for inputs in family.batches]
    roles = find_roles(family.model)
    names = [n for n in split(family.model) if n.startswith(roles.blocks[0])]
    linears = {
        n: m for n, m in language_linears(family.model, roles, []).items() if n.startswith(f"{roles.blocks[0]}.")
    }
    block = family.model.get_submodule(roles.blocks[0])
    moments = BlockInputs(family.model, roles.stacks[0], batches).second_moments(block, 0, linears)
    total = sum(batch.modality.numel() for batch in batches)
    for fused in names:
        counts = [sum(moments[expert_name(fused, e)].counts.values()) for e in range(4)]
        assert sum(counts) == total
        assert max(counts) < total


# ---- experts with few tokens


def test_experts_with_few_tokens_get_the_moments_of_all():
    family = make("qwen3_moe")
    roles = find_roles(family.model)
    split(family.model)
    batches = [CalibrationBatch(inputs, token_modality(inputs, family.model.config)) for inputs in family.batches]
    linears = {
        n: m for n, m in language_linears(family.model, roles, []).items() if n.startswith(f"{roles.blocks[0]}.")
    }
    block = family.model.get_submodule(roles.blocks[0])
    moments = BlockInputs(family.model, roles.stacks[0], batches).second_moments(block, 0, linears)
    filled, fallbacks = with_fallback(family.model, moments, linears)
    few = {
        n for n, m in linears.items()
        if "experts" in n and (n not in moments or sum(moments[n].counts.values()) < m.in_features)
    }  # fmt: skip
    assert fallbacks == few
    assert few  # 60 tokens, each to 2 of 4 experts, for 32 inputs
    name = next(n for n in sorted(few) if "gate" in n)
    experts = {id(moments[n]): moments[n] for n in linears if _takes_hidden_states(n) and n in moments}
    total = sum(m.counts[0] for m in experts.values())
    expected = sum(m.matrices()[0] * m.counts[0] for m in experts.values()) / total
    assert filled[name].counts == {0: total}
    torch.testing.assert_close(filled[name].matrices()[0], expected)
    assert all(filled[n] is moments[n] for n in moments if n not in few)


def test_few_tokens_are_no_reason_where_there_is_no_group():
    """Members of a list are experts; parts of a sequence are different Linears that follow each other."""
    model = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "q": nn.Linear(8, 8)})
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    moments = {name: SecondMoments(8, torch.device("cpu")) for name in linears}
    for moment in moments.values():
        moment.add(torch.randn(3, 8), torch.zeros(3))
    assert with_fallback(model, moments, linears) == (moments, set())
    assert with_fallback(model, {}, linears) == ({}, set())
    model = nn.ModuleDict({"experts": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8)}) for _ in range(2))})
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    moments = {"experts.0.up": moments["q"]}
    assert with_fallback(model, moments, linears)[1] == {"experts.0.up", "experts.1.up"}


def test_fallbacks_are_in_the_record_and_in_the_report():
    family = make("qwen3_moe")
    record = sab_hf.quantize(family.model, None, None, config(family.batches))
    assert record.fallbacks
    assert all("experts" in name for name in record.fallbacks)
    report = sab_hf.report(family.model)
    assert report.fallback_experts == len(record.fallbacks)
    assert f"{len(record.fallbacks)} experts saw too few tokens" in str(report)


# ---- there and back


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4_text"])
def test_dequantized_experts_are_fused_again(name, tmp_path):
    family = make(name)
    dense_names = list(family.model.state_dict())
    sab_hf.quantize(family.model, None, None, config(family.batches))
    expected = logits(family.model, family.batches[-1])
    family.model.dequantize()
    assert list(family.model.state_dict()) == dense_names
    torch.testing.assert_close(logits(family.model, family.batches[-1]), expected, rtol=1e-4, atol=1e-4)
    family.model.save_pretrained(tmp_path)
    again = type(family.model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again, family.batches[-1]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4_text"])
@pytest.mark.parametrize("skipped", [["down_proj"], ["layers.0"], ["experts"]])
def test_experts_that_stay_dense_survive_the_round_trip(name, skipped, tmp_path):
    family = make(name)
    sab_hf.quantize(
        family.model, None, None, config(family.batches, modules_to_not_convert=skipped, allow_low_coverage=True)
    )
    packed = {n for n, m in family.model.named_modules() if isinstance(m, SABLinear)}
    assert packed
    assert not any(f".{skipped[0]}." in f".{n}." for n in packed)
    expected = logits(family.model, family.batches[-1])
    family.model.save_pretrained(tmp_path)
    again = type(family.model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    if V5:
        again.set_experts_implementation("eager")
    assert torch.equal(logits(again, family.batches[-1]), expected)


def test_file_holds_each_expert_under_its_own_name(tmp_path):
    family = make("qwen3_vl_moe")
    sab_hf.quantize(family.model, None, None, config(family.batches))
    family.model.save_pretrained(tmp_path)
    names = [name for name in load_file(tmp_path / "model.safetensors") if "split.gate_up_proj" in name]
    assert len([name for name in names if name.endswith(".3.signs")]) == 2


def test_copy_of_split_experts_is_independent():
    family = make("qwen3_vl_moe")
    split(family.model)
    copied = copy.deepcopy(family.model)
    expected = logits(family.model, family.batches[-1])
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if "split" in name:
                parameter.zero_()
    assert torch.equal(logits(family.model, family.batches[-1]), expected)
    assert not torch.equal(logits(copied, family.batches[-1]), expected)
