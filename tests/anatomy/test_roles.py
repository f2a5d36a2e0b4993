"""The parts of a model are found by structure, in families that name and nest them differently."""

from __future__ import annotations

import pytest
import torch
from helpers import build_llava
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    OPTConfig,
    OPTForCausalLM,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from sab_hf import SABLinear
from sab_hf.anatomy.roles import find_roles
from sab_hf.packed.linear import replace_module

# Three language blocks and four vision blocks: the longest list is not the language model.
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 300,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def llava(vision_config):
    return LlavaForConditionalGeneration(LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision_config))


def qwen():
    vision = {"depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    text = TEXT | {"rope_scaling": {"rope_type": "default", "type": "mrope", "mrope_section": [2, 3, 3]}}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def idefics():
    return Idefics3ForConditionalGeneration(
        Idefics3Config(text_config=LlamaConfig(**TEXT), vision_config=VISION, pad_token_id=0)
    )


def gemma():
    text = TEXT | {"head_dim": 16}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def internvl():
    vision = VISION | {"image_size": [16, 16], "patch_size": [8, 8]}
    return InternVLForConditionalGeneration(InternVLConfig(text_config=Qwen2Config(**TEXT), vision_config=vision))


def mistral():
    config = Mistral3Config(text_config=MistralConfig(**TEXT), vision_config=PixtralVisionConfig(**VISION))
    return Mistral3ForConditionalGeneration(config)


TEXT_MODEL = "model.language_model"
FAMILIES = {
    # family: (model, text model, vision tower, projector)
    "llava with SigLIP": (
        lambda: llava(SiglipVisionConfig(**VISION)), TEXT_MODEL, "model.vision_tower", "model.multi_modal_projector",
    ),
    "llava with CLIP": (
        lambda: llava(CLIPVisionConfig(**VISION)), TEXT_MODEL, "model.vision_tower", "model.multi_modal_projector",
    ),
    "qwen2_5_vl": (qwen, TEXT_MODEL, "model.visual", None),
    "idefics3": (idefics, "model.text_model", "model.vision_model", "model.connector"),
    "gemma3": (gemma, TEXT_MODEL, "model.vision_tower", "model.multi_modal_projector"),
    "internvl": (internvl, TEXT_MODEL, "model.vision_tower", "model.multi_modal_projector"),
    "mistral3": (mistral, TEXT_MODEL, "model.vision_tower", "model.multi_modal_projector"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_vision_language_models(family):
    build, text_model, tower, projector = FAMILIES[family]
    with torch.device("meta"):
        model = build()
    roles = find_roles(model)
    assert roles.blocks == tuple(f"{text_model}.layers.{i}" for i in range(3))
    assert roles.embedding == f"{text_model}.embed_tokens"
    assert roles.head == "lm_head"
    assert roles.vision == (tower,)
    for name, _ in model.named_parameters():
        if name.startswith("lm_head."):
            expected = "head"
        elif name.startswith(f"{text_model}.embed_tokens."):
            expected = "embedding"
        elif name.startswith(f"{text_model}."):
            expected = "language"
        elif projector and name.startswith(f"{projector}."):
            expected = "projector"
        else:
            assert name.startswith(f"{tower}."), name
            expected = "vision"
        assert roles.of(name) == expected, name
    assert roles.of("lm_head.weight") == "head"  # also where it is tied, and so no parameter of its own


def test_text_only_model_has_no_vision_and_no_projector():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**TEXT))
    roles = find_roles(model)
    assert roles.blocks == ("model.layers.0", "model.layers.1", "model.layers.2")
    assert roles.vision == ()
    assert {roles.of(name) for name, _ in model.named_parameters()} == {"language", "embedding", "head"}


def test_blocks_nested_under_a_decoder_are_found():
    with torch.device("meta"):
        config = OPTConfig(
            hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=2, word_embed_proj_dim=32
        )
        model = OPTForCausalLM(config)
    roles = find_roles(model)
    assert roles.blocks == tuple(f"model.decoder.layers.{i}" for i in range(3))
    assert roles.of("model.decoder.layers.2.fc1.weight") == "language"


def test_headless_model_has_no_head():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**TEXT)).model
    roles = find_roles(model)
    assert roles.head is None
    assert roles.blocks == ("layers.0", "layers.1", "layers.2")
    assert roles.of("layers.1.mlp.up_proj.weight") == "language"
    assert roles.of("norm.weight") == "language"
    assert roles.of("embed_tokens.weight") == "embedding"


def test_a_name_that_only_begins_like_a_part_is_not_of_it():
    roles = find_roles(build_llava())
    assert roles.of("model.vision_tower_extra.weight") == "projector"
    assert roles.of("lm_head_2.weight") == "projector"


def test_packed_model_has_the_same_roles():
    model = build_llava()
    expected = find_roles(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith(expected.blocks):
            replace_module(model, name, SABLinear.empty_like(module, 1, 0))
    assert find_roles(model) == expected


def test_model_without_linears_in_its_blocks_is_refused():
    """GPT-2 has its weights in `Conv1D`s."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2))
    with pytest.raises(
        ValueError, match=r"no list of blocks.*`transformer` of GPT2LMHeadModel; pass .*language_blocks=.*none"
    ):
        find_roles(model)


def test_list_of_bare_linears_is_no_list_of_blocks():
    model = build_llava()
    model.get_submodule("model.language_model.layers")[1] = nn.Linear(4, 4)
    with pytest.raises(
        ValueError, match=r"no list of blocks.*`model\.language_model` of LlavaFor.*'model\.vision_tower"
    ):
        find_roles(model)
