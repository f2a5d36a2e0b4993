"""The portable mode: one plane with row scales alone, in every family whose rows Q1_0 can hold."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers import V5
from portable_models import FAMILIES, OTHER_FAMILIES, build_portable
from transformers import AutoModelForCausalLM

import sab_hf
from sab_hf import SABQuantizationConfig
from sab_hf.anatomy.llama_cpp import ARCHITECTURES
from sab_hf.make import binarize
from sab_hf.make.plan import make_plan
from sab_hf.packed.experts import split_experts

IDS = torch.randint(0, 500, (4, 20), generator=torch.Generator().manual_seed(1))
SAMPLES = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
NUM_LINEARS = {"phi3": 8, "gpt_neox": 8, "mixtral": 16 if V5 else 20}
"""Packed Linears of two blocks, where they are not 14; transformers 5 holds two matrices of an expert as one."""


def quantize(model, **changes):
    values = {"alternations": 2, "refine_steps": 0, "distil_steps": 0, "num_samples": 4, "batch_size": 2}
    values |= {"fit": "elementwise", "significance": "none", "budget": "uniform"}
    return sab_hf.quantize(model, None, SAMPLES, SABQuantizationConfig(portable="gguf", **values | changes))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def packed_in(model) -> dict[str, sab_hf.SABLinear]:
    """Return the packed Linears by name; each must have one plane, whose column scales are 1."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, sab_hf.SABLinear)}
    for name, module in packed.items():
        assert (module.num_planes, module.num_significant) == (1, 0), name
        assert (module.col_scale.view(torch.float16) == 1).all(), name
        assert (module.row_scale.view(torch.float16) > 0).all(), name
    return packed


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_the_fit_gives_signs_and_mean_sizes_of_rows_and_leaves_all_else(family):
    """Without second moments these are the best one plane with row scales, in closed form."""
    model, dense = build_portable(family), build_portable(family)
    quantize(model)
    packed = packed_in(model)
    assert len(packed) == NUM_LINEARS.get(family, 14)
    split_experts(dense, packed)
    for name, module in packed.items():
        W = dense.get_submodule(name).weight.detach()
        best = torch.where(W < 0, -1, 1) * W.abs().mean(1, keepdim=True)
        torch.testing.assert_close(module.planes().dense(), best, rtol=1e-3, atol=0)
    kept = dict(model.named_parameters())
    kept = {name: p for name, p in kept.items() if name.endswith(".bias") or name.rpartition(".")[0] not in packed}
    assert any("norm" in name for name in kept) or family == "olmo"  # whose norms have no gains
    assert all(torch.equal(p, dense.get_parameter(name)) for name, p in kept.items())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", *OTHER_FAMILIES])
@pytest.mark.parametrize("training", [{"refine_steps": 3}, {"distil_steps": 4}], ids=["refined", "distilled"])
def test_training_keeps_column_scales_of_one_and_lowers_the_loss(family, training, tmp_path):
    model = build_portable(family)
    record = quantize(model, **training)
    found = [*record.refinements, *record.distillations]
    assert found
    assert all(result.after < result.before for result in found)
    assert len(packed_in(model)) == NUM_LINEARS.get(family, 14)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert again.config.quantization_config.portable == "gguf"
    assert torch.equal(logits(again), logits(model))


def test_the_default_fit_and_budget_keep_one_plane_with_row_scales():
    model = build_portable("qwen2")
    record = quantize(model, fit="hessian", significance="gradient", budget="sensitivity", distil_steps=4)
    assert record.measured
    assert len(packed_in(model)) == 14


@pytest.mark.parametrize(
    ("changes", "name", "width"),
    [
        ({"hidden_size": 96}, "self_attn.q_proj", 96),
        ({"intermediate_size": 192}, "mlp.down_proj", 192),
        ({"head_dim": 48}, "self_attn.o_proj", 192),
    ],
)
def test_rows_that_128_does_not_divide_are_refused_before_the_work(changes, name, width, monkeypatch):
    model = build_portable("llama", **changes)
    monkeypatch.setattr(binarize, "run_plan", None)  # is not reached
    with pytest.raises(
        ValueError, match=rf"rows of a multiple of 128 weights, and `model.layers.0.{name}` has {width};"
    ):
        quantize(model)
    with pytest.raises(ValueError, match="rows of a multiple of 128 weights"):
        sab_hf.estimate(model, None, SAMPLES, SABQuantizationConfig(portable="gguf"))


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"bits": 2}, "bits"), ({"rest_bits": 4}, "rest_bits"), ({"embedding_bits": 4}, "embedding_bits")],
)
def test_fields_that_conflict_are_refused(changes, field):
    with pytest.raises(ValueError, match=rf"`{field}` must be left out with portable="):
        SABQuantizationConfig(portable="gguf", **changes)
    with pytest.raises(ValueError, match="`portable` must be one of"):
        SABQuantizationConfig(portable="onnx")


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_a_type_that_cannot_be_exported_is_named_at_the_start(family, caplog):
    with caplog.at_level(logging.WARNING, "sab_hf"):
        make_plan(build_portable(family), SABQuantizationConfig(portable="gguf"), None, SAMPLES)
    told = [line for line in caplog.messages if "`sab-hf export gguf` will refuse it" in line]
    assert len(told) == (family not in ARCHITECTURES)
    assert all(f"is of the type {family!r}" in line for line in told)


def test_a_run_that_was_cut_off_goes_on_to_the_same_model(monkeypatch, tmp_path):
    changes = {"distil_steps": 4}
    straight = build_portable("qwen2")
    quantize(straight, **changes)
    model = build_portable("qwen2")
    whole = binarize.distil_window
    monkeypatch.setattr(binarize, "distil_window", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize(model, checkpoint_dir=str(tmp_path), **changes)
    monkeypatch.setattr(binarize, "distil_window", whole)
    model = build_portable("qwen2")
    quantize(model, checkpoint_dir=str(tmp_path), **changes)
    assert all(
        torch.equal(a, b) for a, b in zip(straight.state_dict().values(), model.state_dict().values(), strict=True)
    )
