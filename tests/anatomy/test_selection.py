"""What is binarized, what stays dense and why, and that too little of it is refused."""

from __future__ import annotations

import pytest
import torch
from family_zoo import FAMILIES
from helpers import NUM_BLOCKS, V5, build_llama, build_llava
from torch import nn

import sab_hf
from sab_hf import SABQuantizationConfig
from sab_hf.anatomy.roles import find_roles
from sab_hf.anatomy.selection import coverage, is_plain_linear, is_worth_packing, language_linears

BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def covered(model: nn.Module, skipped: list[str] | None = None):
    roles = find_roles(model)
    return coverage(model, roles, language_linears(model, roles, skipped or []), skipped or [])


def test_all_language_weights_of_a_plain_model_are_covered():
    model = build_llava()
    result = covered(model)
    assert result.share == 1
    assert result.dense == []
    language = [p for n, p in model.named_parameters() if ".layers." in n and "language_model" in n and p.ndim == 2]
    assert result.num_quantized == sum(p.numel() for p in language)
    result.check(allow_low_coverage=False)


def test_low_coverage_is_refused_with_what_stays_dense_and_why(make_config, processor):
    model = build_llava()
    with pytest.raises(
        ValueError,
        match=r"at least 90 %.*only 77\.1 %.*22\.9 % named in `modules_to_not_convert`, such as `.*0\.mlp\.down_proj`",
    ):
        sab_hf.quantize(model, processor, None, make_config(modules_to_not_convert=["down_proj"]))
    record = sab_hf.quantize(
        model, processor, None, make_config(modules_to_not_convert=["down_proj"], allow_low_coverage=True)
    )
    assert len(record.fits) == 6 * NUM_BLOCKS


def test_share_counts_weights():
    model = build_llama()
    result = covered(model, ["down_proj"])
    down = sum(p.numel() for n, p in model.named_parameters() if "down_proj" in n)
    every = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2)
    assert result.share == pytest.approx(1 - down / every)
    assert {weight.name for weight in result.dense} == {f"model.layers.{i}.mlp.down_proj" for i in range(NUM_BLOCKS)}


def test_weights_that_are_no_linear_are_counted_and_named():
    model = build_llama()
    model.model.layers[0].mixer = nn.RNNCell(8, 8)
    model.model.extra = nn.Linear(24, 24)
    reasons = {weight.name: weight.reason for weight in covered(model).dense}
    assert reasons == {
        "model.layers.0.mixer.weight_ih": "in RNNCell, which is no nn.Linear",
        "model.layers.0.mixer.weight_hh": "in RNNCell, which is no nn.Linear",
        "model.extra": "outside of the language blocks",
    }


def test_report_tells_coverage(make_config, processor):
    model = build_llava()
    config = make_config(modules_to_not_convert=["down_proj"], allow_low_coverage=True)
    sab_hf.quantize(model, processor, None, config)
    report = sab_hf.report(model)
    assert report.coverage == covered(build_llava(), ["down_proj"])
    assert "77.1 % of the language weights" in str(report)
    assert "named in `modules_to_not_convert`" in str(report)
    assert report.to_dict()["coverage"]["share"] == pytest.approx(report.coverage.share)
    assert report.fallback_experts == 0


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4_text", "aria", "qwen3_vl_moe"])
def test_routers_stay_dense(name):
    family = FAMILIES[name]()
    config = SABQuantizationConfig(
        calibration=family.batches, num_samples=8, refine_steps=0, distil_steps=0, alternations=1
    )
    before = {n: p.clone() for n, p in family.model.named_parameters() if _is_router(n)}
    assert before
    sab_hf.quantize(family.model, None, None, config)
    after = dict(family.model.named_parameters())
    assert all(torch.equal(after[n], weight) for n, weight in before.items())


def _is_router(name: str) -> bool:
    return ".layers." in name and name.endswith((".gate.weight", ".router.weight"))


def test_key_projection_with_as_many_outputs_as_experts_is_no_router():
    """A router is alone in its part; routers large enough to be worth packing stay dense all the same."""
    block = nn.Module()
    block.attention = nn.ModuleDict({"k_proj": nn.Linear(64, 16), "q_proj": nn.Linear(64, 64)})
    block.mlp = nn.Module()
    block.mlp.gate = nn.Linear(64, 16)
    block.mlp.experts = nn.ModuleList(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)) for _ in range(16))
    model = build_llama()
    model.model.layers = nn.ModuleList([block])
    assert is_worth_packing(block.mlp.gate)
    names = language_linears(model, find_roles(model), [])
    assert "model.layers.0.attention.k_proj" in names
    assert "model.layers.0.mlp.gate" not in names
    assert len(names) == 2 + 2 * 16
    (weight,) = covered(model).dense
    assert (weight.name, weight.reason) == ("model.layers.0.mlp.gate", "in a router")


def test_linears_that_would_hardly_shrink_stay_dense():
    assert not is_worth_packing(nn.Linear(4096, 1))
    assert not is_worth_packing(nn.Linear(4, 16))
    assert is_worth_packing(nn.Linear(32, 32))


def test_linear_that_computes_something_else_is_not_plain():
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    class Named(nn.Linear):
        pass

    assert not is_plain_linear(Router(4, 4))
    assert is_plain_linear(Named(4, 4))


def test_entry_that_matches_nothing_is_refused():
    model = build_llama()
    with pytest.raises(ValueError, match=r"'up' matches nothing that would be binarized, such as `model\.layers\.0"):
        language_linears(model, find_roles(model), ["up"])
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no Linear left"):
        language_linears(model, find_roles(model), list(BLOCK_LINEARS))


@pytest.mark.skipif(not V5, reason="experts are fused in transformers 5")
def test_fused_experts_can_be_named_by_their_parameter():
    model = FAMILIES["qwen3_moe"]().model
    names = language_linears(model, find_roles(model), ["gate_up_proj"])
    assert any("down_proj" in name for name in names)
    assert not any("gate_up_proj" in name for name in names)


def test_blocks_can_be_named(make_config, processor, tmp_path):
    """A text model with two lists of blocks side by side, of which one is no language model."""
    model = build_llava()
    model.model.language_model.helpers = nn.ModuleList([nn.Sequential(nn.Linear(24, 24))])
    with pytest.raises(
        ValueError, match=r"`nowhere` is no list of blocks.*language_blocks=.*'model\.language_model\.layers'"
    ):
        find_roles(model, ["nowhere"])
    config = make_config(language_blocks=["model.language_model.layers"])
    sab_hf.quantize(model, processor, None, config)
    assert isinstance(model.model.language_model.helpers[0][0], nn.Linear)
    assert find_roles(model).blocks == tuple(f"model.language_model.layers.{i}" for i in range(NUM_BLOCKS))
    assert sab_hf.report(model).coverage.share > 0.9
