"""Cached hidden states are what the real model feeds its blocks in families that are no plain stack of blocks."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
import transformers
from family_zoo import FAMILIES, Family
from family_zoo.common import PATCH, SIDE, batches, build, pixels, text, tokens
from helpers import V5
from torch import nn

import sab_hf
from sab_hf import SABLinear, SABQuantizationConfig
from sab_hf.anatomy.roles import find_roles
from sab_hf.anatomy.selection import language_linears
from sab_hf.calibration import AUDIO, IMAGE, TEXT, CalibrationBatch, token_modality
from sab_hf.machine.workspace import Workspace
from sab_hf.packed.linear import replace_module
from sab_hf.passes.capture import BlockInputs
from sab_hf.passes.gradients import measure_sensitivity
from sab_hf.passes.order import in_running_order
from sab_hf.passes.rest_inputs import moments_after_blocks
from sab_hf.planes import SignPlanes

NAMES = ["mllama", "florence2", "blip_2_t5", "gemma3n", "qwen3_vl", "instructblip"]
NAMES += ["gemma4", "ernie4_5_vl_moe"] if V5 else []


def calibration(family) -> list[CalibrationBatch]:
    return [CalibrationBatch(inputs, token_modality(inputs, family.model.config)) for inputs in family.batches]


def one_plane(linear: nn.Linear) -> SABLinear:
    """Return a rough binarization, far from the dense Linear."""
    W = linear.weight.detach()
    planes = SignPlanes(W[None] >= 0, W.abs().mean(1)[None], torch.ones(1, W.shape[1]))
    return SABLinear.from_planes(planes, linear.bias)


def test_blocks_that_run_for_images_only_may_not_run_for_the_head_s_samples():
    family = FAMILIES["mllama"]()
    model, text = family.model, calibration(family)[:1]
    assert text[0].modality.unique().tolist() == [TEXT]
    roles, workspace = find_roles(model), Workspace.of(model)
    moments = moments_after_blocks(model, roles, {"lm_head": model.lm_head}, text, workspace)["lm_head"]
    assert moments.counts == {TEXT: text[0].modality.numel()}
    with pytest.raises(RuntimeError, match="calibrate with images"):
        BlockInputs(model, roles.blocks, text, workspace)


def test_sensitivity_of_few_samples_without_an_image_leaves_out_blocks_that_did_not_run():
    family = FAMILIES["mllama"]()
    model, batches = family.model, calibration(family)
    roles = find_roles(model)
    names = list(language_linears(model, roles, []))
    inputs = BlockInputs(model, roles.blocks, batches)
    found = measure_sensitivity(model, inputs, batches, roles.blocks, names, damping=0.01, num_samples=1, seed=0)
    ran = {name for index, name in enumerate(roles.blocks) if inputs.states[0].runs(index)}
    assert 0 < len(ran) < len(roles.blocks)
    assert set(found.outputs) == ran


@torch.no_grad()
def hidden_states_fed(model, block, batch) -> torch.Tensor | None:
    fed = []
    hook = block.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append((args[0] if args else kwargs["hidden_states"]).clone()), with_kwargs=True
    )
    model(**batch.inputs, use_cache=False)
    hook.remove()
    return fed[0] if fed else None


@pytest.mark.parametrize("name", NAMES)
def test_cached_hidden_states_are_what_the_model_feeds_its_blocks(name):
    """At every block of every stage, with the Linears of all blocks before it binarized."""
    family = FAMILIES[name]()
    model, batches = family.model, calibration(family)
    roles = find_roles(model)
    linears = language_linears(model, roles, [])
    compared = 0
    for stage in roles.stacks:
        inputs = BlockInputs(model, stage, batches)
        for index, block_name in enumerate(stage):
            block = model.get_submodule(block_name)
            for state, batch in zip(inputs.states, batches, strict=True):
                fed = hidden_states_fed(model, block, batch)
                assert (fed is None) == (state.calls[index] is None)
                if fed is not None:
                    torch.testing.assert_close(state.hidden, fed, rtol=1e-4, atol=1e-4)
                    compared += 1
            for linear in linears:
                if linear.startswith(f"{block_name}.") and "experts" not in linear:
                    replace_module(model, linear, one_plane(model.get_submodule(linear)))
            inputs.advance(block, index)
    assert compared > len(roles.blocks)


def test_blocks_of_cross_attention_run_for_images_only():
    family = FAMILIES["mllama"]()
    inputs = BlockInputs(family.model, find_roles(family.model).blocks, calibration(family))
    ran = [[call is not None for call in state.calls] for state in inputs.states]
    assert ran == [[True, False, True, False]] + [[True] * 4] * 3
    assert len(inputs.running(0)) == 4
    assert len(inputs.running(1)) == 3


def test_model_whose_cross_attention_never_runs_is_refused():
    family = FAMILIES["mllama"]()
    with pytest.raises(RuntimeError, match=r"MllamaForConditionalGeneration ran 2 of its 4.*calibrate with images"):
        BlockInputs(family.model, find_roles(family.model).blocks, calibration(family)[:1])


def test_keys_and_values_of_image_features_are_of_the_image():
    family = FAMILIES["mllama"]()
    roles = find_roles(family.model)
    inputs = BlockInputs(family.model, roles.blocks, calibration(family))
    block = family.model.get_submodule(roles.blocks[1])
    linears = {
        n: m for n, m in language_linears(family.model, roles, []).items() if n.startswith(f"{roles.blocks[1]}.")
    }
    moments = {name.rpartition(".")[2]: m for name, m in inputs.second_moments(block, 1, linears).items()}
    assert moments["k_proj"].counts.keys() == {IMAGE}
    features = family.model.config.vision_config.max_num_tiles * (
        1 + (16 // 8) ** 2
    )  # of one image, class token included
    assert moments["k_proj"].counts[IMAGE] == 3 * features
    assert moments["q_proj"].counts.keys() == {TEXT, IMAGE}


def test_decoder_reads_the_binarized_encoder():
    """Both lists of blocks are binarized, the decoder on what the encoder gives once it is."""
    family = FAMILIES["florence2"]()
    roles = find_roles(family.model)
    assert [len(stage) for stage in roles.stacks] == [2, 2]
    assert ".encoder." in roles.stacks[0][0]
    assert ".decoder." in roles.stacks[1][0]
    batches = calibration(family)
    before = BlockInputs(family.model, roles.stacks[1], batches).states[0]
    for linear in language_linears(family.model, roles, []):
        if linear.startswith(roles.stacks[0]):
            replace_module(family.model, linear, one_plane(family.model.get_submodule(linear)))
    after = BlockInputs(family.model, roles.stacks[1], batches).states[0]
    assert torch.equal(before.hidden, after.hidden)
    encoded = [
        next(v for v in (*s.calls[0][0], *s.calls[0][1].values()) if _is_encoded(v, batches[0]))
        for s in (before, after)
    ]
    assert not torch.allclose(*encoded, rtol=1e-2)
    assert after.modality.unique().tolist() == [TEXT]
    assert after.given.unique().tolist() == [TEXT, IMAGE]


def _is_encoded(value, batch) -> bool:
    return isinstance(value, torch.Tensor) and value.shape[:2] == batch.modality.shape and value.ndim == 3


def test_encoder_decoder_without_answers_is_refused():
    family = FAMILIES["florence2"]()
    for inputs in family.batches:
        del inputs["labels"]
    roles = find_roles(family.model)
    with pytest.raises(RuntimeError, match=r"'labels' or 'decoder_input_ids'"):
        BlockInputs(family.model, roles.stacks[1], calibration(family))


@pytest.mark.skipif(not V5, reason="gemma4 is not in transformers 4")
def test_blocks_that_share_keys_and_values_get_those_of_the_binarized_block():
    family = FAMILIES["gemma4"]()
    roles = find_roles(family.model)
    inputs = BlockInputs(family.model, roles.blocks, calibration(family)[:1])
    (state,) = inputs.states
    (name,) = (key for key, value in state.calls[-1][1].items() if isinstance(value, UserDict))
    before = state.hidden
    block = family.model.get_submodule(roles.blocks[0])
    inputs.advance_targets(block, 0)
    for linear in language_linears(family.model, roles, []):
        if linear.startswith(f"{roles.blocks[0]}."):
            replace_module(family.model, linear, one_plane(family.model.get_submodule(linear)))
    inputs.advance(block, 0)
    assert state.left[name].keys() == state.target_left[name].keys() != set()
    for key, kept in state.target_left[name].items():
        assert not torch.allclose(state.left[name][key][0], kept[0])
    for of_target, left in ((False, state.left), (True, state.target_left)):
        (piece,) = state.pieces(1, of_target)
        seen = piece.calls[1][1][name]
        assert isinstance(seen, UserDict)
        assert all(torch.equal(seen[key][0], left[name][key][0]) for key in left[name])
    assert not torch.equal(state.hidden, before)


@pytest.mark.skipif(not V5, reason="gemma4 is not in transformers 4")
def test_shared_keys_and_values_take_the_dtype_of_refinement():
    """Refinement runs a bfloat16 model's blocks in float32."""
    family = FAMILIES["gemma4"]()
    family.model.to(torch.bfloat16)
    config = SABQuantizationConfig(
        calibration=family.batches, num_samples=8, refine_steps=1, distil_steps=0, alternations=1
    )
    record = sab_hf.quantize(family.model, None, None, config)
    assert len(record.refinements) == 4


def test_three_modalities_are_told_apart():
    """Text, image and sound in one calibration set: the map has z = 3."""
    family = FAMILIES["qwen2_5_omni_thinker"]()
    config = SABQuantizationConfig(
        calibration=family.batches, num_samples=8, refine_steps=0, distil_steps=0, alternations=1
    )
    record = sab_hf.quantize(family.model, None, None, config)
    assert all(fit.tokens.keys() == {"text", "image", "audio"} for fit in record.fits)
    expected = {m: sum(int((b.modality == m).sum()) for b in calibration(family)) for m in (TEXT, IMAGE, AUDIO)}
    assert record.fits[0].tokens == {"text": expected[TEXT], "image": expected[IMAGE], "audio": expected[AUDIO]}


def test_video_is_a_modality_of_its_own():
    family = FAMILIES["qwen2_5_vl"]()
    config = SABQuantizationConfig(
        calibration=family.batches, num_samples=8, refine_steps=1, distil_steps=0, alternations=1
    )
    record = sab_hf.quantize(family.model, None, None, config)
    assert {"text", "image", "video"} == set(record.fits[0].tokens)
    assert record.fits[0].tokens["video"] == 4


def test_given_modality_goes_before_placeholders_and_never_to_the_model():
    family = FAMILIES["llava"]()
    for inputs in family.batches:
        inputs["modality"] = torch.full_like(inputs["input_ids"], IMAGE)
    config = SABQuantizationConfig(
        calibration=family.batches, num_samples=8, refine_steps=0, distil_steps=0, alternations=1
    )
    record = sab_hf.quantize(family.model, None, None, config)
    assert record.fits[0].tokens.keys() == {"image"}


@pytest.mark.parametrize("wrong", [torch.zeros(1, 3, dtype=torch.long), None])
def test_given_modality_of_another_shape_or_value_is_refused(wrong):
    inputs = {"input_ids": torch.ones(1, 5, dtype=torch.long)}
    inputs["modality"] = torch.full((1, 5), 9) if wrong is None else wrong
    with pytest.raises(ValueError, match="'modality' must have the shape of 'input_ids'"):
        token_modality(inputs, None)


WIDE = ["gemma3n", "mllama", "blip_2_t5", "florence2", "qwen2_5_vl", "llava"] + (["gemma4"] if V5 else [])


def together(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the batches of the most common shape as one batch."""
    shapes = [{key: value.shape for key, value in batch.items()} for batch in batches]
    common = max(shapes, key=shapes.count)
    alike = [batch for batch, shape in zip(batches, shapes, strict=True) if shape == common]
    assert len(alike) > 1
    return {key: torch.cat([batch[key] for batch in alike]) for key in common}


@pytest.mark.parametrize("name", WIDE)
@torch.no_grad()
def test_samples_one_at_a_time_give_what_they_give_together(name):
    """Several streams, features by tile, what an encoder gave, keys that blocks share: all are cut by sample."""
    family = FAMILIES[name]()
    batch = together(family.batches)
    batches = [CalibrationBatch(batch, token_modality(batch, family.model.config))]
    roles = find_roles(family.model)
    for stage in roles.stacks:
        together_, apart = (BlockInputs(family.model, stage, batches) for _ in range(2))
        apart.workspace.limit.samples = 1
        compared = 0
        for index, block_name in enumerate(stage):
            block = family.model.get_submodule(block_name)
            for inputs in (together_, apart):
                inputs.advance_targets(block, index)
                inputs.advance(block, index)
            (one,), (other,) = together_.states, apart.states
            torch.testing.assert_close(other.hidden, one.hidden, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(other.target, one.target, rtol=1e-4, atol=1e-4)
            assert other.left.keys() == one.left.keys()
            compared += one.runs(index)
        assert compared > 1
        assert one.rows > 1


def idefics() -> Family:
    vision = {"embed_dim": 24, "image_size": SIDE, "patch_size": PATCH, "intermediate_size": 48}
    config = transformers.IdeficsConfig(
        **text(num_hidden_layers=4, cross_layer_interval=2, alpha_initializer="ones", use_resampler=False),
        additional_vocab_size=0,
        vision_config=vision | {"num_attention_heads": 2, "num_hidden_layers": 2},
    )

    def make(seed: int) -> dict[str, torch.Tensor]:
        inputs = tokens(seed=seed)
        seen = torch.ones(*inputs["input_ids"].shape, 1, dtype=torch.long)
        return inputs | {"pixel_values": pixels(1, 1, 3, SIDE, SIDE, seed=seed), "image_attention_mask": seen}

    return Family(build("IdeficsForVisionText2Text", config), batches(make))


ALTERNATE = tuple(f"model.{name}" for name in (
    "gated_cross_attn_layers.0", "layers.0", "layers.1", "gated_cross_attn_layers.1", "layers.2", "layers.3"
))  # fmt: skip


def test_lists_of_blocks_that_run_alternately_are_one_stack():
    family = idefics()
    model, samples = family.model, calibration(family)
    roles = find_roles(model)
    assert len(roles.stacks) == 2
    assert in_running_order(model, roles, samples, Workspace.of(model)).stacks == (ALTERNATE,)
    inputs = BlockInputs(model, ALTERNATE, samples)
    for index, name in enumerate(ALTERNATE):
        block = model.get_submodule(name)
        torch.testing.assert_close(inputs.states[0].hidden, hidden_states_fed(model, block, samples[0]))
        inputs.advance(block, index)


def test_lists_that_run_one_after_the_other_stay_stacks():
    family = FAMILIES["florence2"]()
    roles = find_roles(family.model)
    assert in_running_order(family.model, roles, calibration(family), Workspace.of(family.model)) == roles


def test_lists_that_run_alternately_are_not_calibrated_one_after_the_other():
    family = idefics()
    first, second = find_roles(family.model).stacks
    with pytest.raises(RuntimeError, match="alternately"):
        BlockInputs(family.model, first, calibration(family), later=second)
    with pytest.raises(RuntimeError, match=r"more than an addition.*another block.*before block 2 of 4"):
        BlockInputs(family.model, first, calibration(family))


def test_idefics_is_quantized_in_running_order():
    family = idefics()
    config = SABQuantizationConfig(
        calibration=family.batches, num_samples=3, refine_steps=0, distil_steps=1, alternations=1
    )
    config.sensitivity_samples, config.allow_text_only = 1, True
    record = sab_hf.quantize(family.model, config=config)
    blocks = dict.fromkeys(".".join(fit.name.split(".")[:3]) for fit in record.fits)
    assert tuple(blocks) == ALTERNATE


@pytest.mark.parametrize("change", [lambda x: 0.8 * x, lambda x: x / x.norm(dim=-1, keepdim=True), torch.tanh])
def test_what_is_no_addition_between_blocks_is_refused(change):
    family = FAMILIES["llama"]()
    blocks = find_roles(family.model).blocks
    family.model.get_submodule(blocks[0]).register_forward_hook(lambda module, args, output: change(output))
    with pytest.raises(RuntimeError, match=r"more than an addition.*before block 1 of 2"):
        BlockInputs(family.model, blocks, calibration(family))


def test_argument_that_depends_on_hidden_states_is_refused(monkeypatch):
    family = FAMILIES["llama"]()
    blocks = find_roles(family.model).blocks
    first, second = (family.model.get_submodule(name) for name in blocks)
    seen = []
    first.register_forward_hook(lambda module, args, output: seen.append(output))
    second.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"stream": seen[-1]}), with_kwargs=True
    )
    with pytest.raises(RuntimeError, match="arguments that depend on what earlier blocks compute to block 1 of 2"):
        BlockInputs(family.model, blocks, calibration(family))
