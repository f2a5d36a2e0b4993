"""Folding of column scales: the model stays the same function, and what is fitted, trained and stored needs none."""

from __future__ import annotations

import pytest
import torch
from portable_models import FAMILIES, build_portable
from transformers import AutoModelForCausalLM

import sab_hf
from sab_hf import SABQuantizationConfig
from sab_hf.anatomy.folds import Fold, find_folds
from sab_hf.anatomy.roles import find_roles
from sab_hf.anatomy.selection import language_linears
from sab_hf.calibration import CalibrationBatch
from sab_hf.make import binarize, fold
from sab_hf.passes.capture import BlockInputs

IDS = torch.randint(0, 500, (4, 20), generator=torch.Generator().manual_seed(1))
SAMPLES = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]


def folds_of(model):
    roles = find_roles(model)
    return find_folds(model, roles, language_linears(model, roles, []))


def inputs_of(model):
    batch = CalibrationBatch({"input_ids": IDS}, torch.zeros_like(IDS, dtype=torch.int8))
    return BlockInputs(model, find_roles(model).blocks, [batch])


def fold_all(model):
    folds, inputs = folds_of(model), inputs_of(model)
    for index, (name, own) in enumerate(folds.items()):
        fold.fold_block(model, name, index, own, inputs)
        inputs.advance(model.get_submodule(name), index)
    return folds


def quantize(model, **changes):
    values = {"alternations": 2, "refine_steps": 0, "distil_steps": 0, "num_samples": 4, "batch_size": 2}
    values |= {"fit": "elementwise", "significance": "none", "budget": "uniform"}
    return sab_hf.quantize(model, None, SAMPLES, SABQuantizationConfig(portable="gguf", **values | changes))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, "mistral", "gemma2"])
def test_folding_leaves_the_function_and_evens_the_columns(family, dtype):
    model = build_portable(family).to(dtype)
    for name, parameter in model.named_parameters():  # columns that differ, as in real models
        if name.endswith("proj.weight"):
            parameter.data *= torch.linspace(0.2, 3, parameter.shape[1])
    before = logits(model).float()
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    folds = fold_all(model)
    after = logits(model).float()
    assert (after - before).norm() / before.norm() < (1e-5 if dtype == torch.float32 else 0.05)
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, weight)
    for own in folds.values():
        for one in own:
            left = fold.column_scales([model.get_submodule(name).weight for name in one.readers], one)
            assert left.log().abs().max() < 0.05


def test_column_scales_are_those_of_an_exact_product():
    r, c = torch.rand(40) + 0.1, torch.rand(6) + 0.1
    one = Fold(("reader",), "giver", groups=2, times=3)
    W = r[:, None] * one.spread(c) * torch.where(torch.rand(40, 18) < 0.5, -1, 1)
    torch.testing.assert_close(fold.column_scales([W[:10], W[10:]], one), c / c.log().mean().exp())


def test_dead_columns_and_gains_of_zero_keep_the_function():
    model = build_portable("llama")
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.input_layernorm.weight[3] = 0
        layer.mlp.gate_proj.weight[:, 5] = 0
        layer.mlp.up_proj.weight[:, 5] = 0
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.up_proj.weight[7] = 0
    before = logits(model)
    fold_all(model)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_something_else_that_reads_a_norm_is_noticed():
    model = build_portable("llama")
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.q_proj.weight *= torch.linspace(0.2, 3, 128)
    last = {}
    layer.input_layernorm.register_forward_hook(lambda _, args, output: last.update(x=output))
    layer.mlp.register_forward_hook(lambda _, args, output: output + last["x"])
    with pytest.raises(
        RuntimeError, match=r"`model.layers.0` of LlamaForCausalLM computes something else .* squared error"
    ):
        fold_all(model)


def test_a_norm_that_does_not_multiply_by_its_weight_is_refused():
    model = build_portable("llama")
    model.model.layers[0].input_layernorm.forward = lambda x: x
    with pytest.raises(
        RuntimeError, match=r"`model.layers.0.input_layernorm`, a LlamaRMSNorm, does not multiply by its weight"
    ):
        fold_all(model)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "llama",
            {"hidden_size": 96},
            r"rows of a multiple of 128 weights, and `model.layers.0.self_attn.q_proj` has 96",
        ),
        ("mixtral", {"num_local_experts": 2}, r"has `(mlp|block_sparse_moe)\."),
        ("phi3", {"pad_token_id": 0}, r"Phi3ForCausalLM: `model.layers.0` has `mlp.gate_up_proj`"),
        ("olmo2", {}, r"of `input_layernorm` of Olmo2ForCausalLM: `model.layers.0` there is no such norm"),
        ("olmo", {}, r"of `input_layernorm` of OlmoForCausalLM: `model.layers.0` that OlmoLayerNorm has none"),
        ("gpt2", {}, r"GPT2LMHeadModel"),
    ],
)
def test_what_cannot_be_folded_is_refused_before_the_work(family, changes, message, monkeypatch):
    model = build_portable(family, **changes)
    monkeypatch.setattr(binarize, "run_plan", None)  # is not reached
    with pytest.raises(ValueError, match=message):
        quantize(model, allow_low_coverage=True)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"bits": 2}, "bits"), ({"rest_bits": 4}, "rest_bits"), ({"embedding_bits": 4}, "embedding_bits")],
)
def test_fields_that_conflict_are_refused(changes, field):
    with pytest.raises(ValueError, match=rf"`{field}` must be left out with portable="):
        SABQuantizationConfig(portable="gguf", **changes)
    with pytest.raises(ValueError, match="`portable` must be one of"):
        SABQuantizationConfig(portable="onnx")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("training", [{"refine_steps": 3}, {"distil_steps": 4}], ids=["refined", "distilled"])
def test_training_keeps_column_scales_of_one_and_lowers_the_loss(family, training, tmp_path):
    model = build_portable(family)
    record = quantize(model, **training)
    found = [*record.refinements, *record.distillations]
    assert found
    assert all(result.after < result.before for result in found)
    packed = {name: m for name, m in model.named_modules() if isinstance(m, sab_hf.SABLinear)}
    assert len(packed) == 14
    for module in packed.values():
        assert (module.num_planes, module.num_significant) == (1, 0)
        assert (module.col_scale.view(torch.float16) == 1).all()
        assert (module.row_scale.view(torch.float16) > 0).all()
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert again.config.quantization_config.portable == "gguf"
    assert torch.equal(logits(again), logits(model))


def test_folded_planes_are_better_than_row_scales_alone(monkeypatch):
    """Where columns differ, as they do in real models, what is folded is worth having."""
    errors = []
    for scales in (fold.column_scales, lambda weights, one: torch.ones_like(one.gather(weights[0][0]))):
        model = build_portable("qwen2")
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.data *= torch.linspace(0.1, 4, parameter.shape[1])
        monkeypatch.setattr(fold, "column_scales", scales)
        record = quantize(model)
        errors.append(sum(fit.error for fit in record.fits))
    assert errors[0] < 0.8 * errors[1]


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


def test_modules_that_stay_dense_are_folded_with_the_others():
    model = build_portable("llama")
    kept = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    quantize(model, modules_to_not_convert=["up_proj"], allow_low_coverage=True)
    assert isinstance(model.model.layers[1].mlp.up_proj, torch.nn.Linear)
    assert not torch.equal(model.model.layers[1].mlp.up_proj.weight, kept)
