"""Families with mixtures of experts, and text-only families."""

from __future__ import annotations

from .common import END, IMAGE, INIT, START, VIDEO, Family, batches, build, get, pixels, text, tokens, vision
from .grids import GLM_IDS, GLM_ROPE, GLM_VISION, MROPE, QWEN3_VISION, QWEN_IDS, _grid, _images_only
from .images import NUM_PATCHES, SIDE, one_image

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def _text_only(model) -> Family:
    return Family(model, batches(lambda seed: tokens(seed=seed, words=20)))


def llama() -> Family:
    return _text_only(build("LlamaForCausalLM", get("LlamaConfig")(**text())))


def mistral() -> Family:
    return _text_only(build("MistralForCausalLM", get("MistralConfig")(**text(sliding_window=4))))


def qwen3() -> Family:
    return _text_only(build("Qwen3ForCausalLM", get("Qwen3Config")(**text())))


def qwen3_moe() -> Family:
    return _text_only(build("Qwen3MoeForCausalLM", get("Qwen3MoeConfig")(**text(**EXPERTS, decoder_sparse_step=1))))


def qwen3_vl_moe() -> Family:
    config = get("Qwen3VLMoeConfig")(
        text_config=text(**EXPERTS, decoder_sparse_step=1, rope_scaling=MROPE, rope_parameters=MROPE),
        vision_config=QWEN3_VISION, **QWEN_IDS,
    )  # fmt: skip
    return _grid(build("Qwen3VLMoeForConditionalGeneration", config))


def glm4v_moe() -> Family:
    config = get("Glm4vMoeConfig")(
        text_config=text(
            n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_shared_experts=1, n_group=1, topk_group=1,
            first_k_dense_replace=1, rope_scaling=GLM_ROPE, rope_parameters=GLM_ROPE, partial_rotary_factor=0.5,
        ),
        vision_config=GLM_VISION, **GLM_IDS,
    )  # fmt: skip
    return _images_only(_grid(build("Glm4vMoeForConditionalGeneration", config)))


LLAMA4 = text(intermediate_size=48, intermediate_size_mlp=64, num_local_experts=4, num_experts_per_tok=1,
              attention_chunk_size=32, interleave_moe_layer_step=1)  # fmt: skip


def llama4_text() -> Family:
    return _text_only(build("Llama4ForCausalLM", get("Llama4TextConfig")(**LLAMA4)))


def llama4() -> Family:
    config = get("Llama4Config")(
        text_config=LLAMA4,
        vision_config={"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": SIDE, "patch_size": 4, "pixel_shuffle_ratio": 0.5, "vision_output_dim": 32,
                       "projector_input_dim": 32, "projector_output_dim": 32, "initializer_range": INIT},
        boi_token_index=START, eoi_token_index=END, image_token_index=IMAGE,
    )  # fmt: skip
    model = build("Llama4ForConditionalGeneration", config)
    return one_image(model, 4, 1, 3, SIDE, SIDE)


def aria() -> Family:
    config = get("AriaConfig")(
        vision_config={**vision(), "model_type": "idefics3_vision"},
        text_config=get("AriaTextConfig")(**text(intermediate_size=24, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)),
        image_token_index=IMAGE, projector_patch_to_query_dict={NUM_PATCHES: 3}, vision_feature_layer=-1,
    )  # fmt: skip
    return one_image(build("AriaForConditionalGeneration", config), 3, 1, 3, SIDE, SIDE)


def kimi_k25() -> Family:
    import torch

    config = get("Kimi_K25Config")(
        text_config=text(
            model_type="deepseek_v3", num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
            n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, head_dim=8,
        ),
        vision_config={"patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 2, "num_attention_heads": 2,
                       "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48},
        projection_hidden_size=32, image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
        vision_end_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    model = build("Kimi_K25ForConditionalGeneration", config)

    def make(seed):
        inputs = tokens((IMAGE, 4), seed=seed)
        return {**inputs, "pixel_values": pixels(16, 3, 4, 4, seed=seed), "image_grid_thw": torch.tensor([[1, 4, 4]])}

    return Family(model, batches(make))


def ernie4_5_vl_moe() -> Family:
    import torch

    from .common import typed

    config = get("Ernie4_5_VLMoeConfig")(
        text_config=text(moe_intermediate_size=[24, 16], moe_k=2, moe_num_experts=4, moe_num_shared_experts=1,
                         mlp_layer_types=["dense", "sparse"], tie_word_embeddings=False,
                         rope_parameters={"rope_type": "default", "mrope_section": [3, 3, 2], "rope_theta": 10000.0}),
        vision_config={"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
                       "intermediate_size": 48, "temporal_merge_size": 2, "initializer_range": INIT},
        image_token_id=IMAGE, video_token_id=VIDEO, image_start_token_id=START, image_end_token_id=END,
        video_start_token_id=START, video_end_token_id=END,
    )  # fmt: skip
    model = build("Ernie4_5_VLMoeForConditionalGeneration", config)

    def make(seed):
        inputs = typed(tokens((IMAGE, 4), seed=seed, framed=True), model)
        inputs["moe_mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
        return {**inputs, "pixel_values": pixels(16, 3 * 4 * 4, seed=seed), "image_grid_thw": torch.tensor([[1, 4, 4]])}

    return Family(model, batches(make))


def gemma4() -> Family:
    return _gemma4({})


def gemma4_moe() -> Family:
    return _gemma4({"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24})


def _gemma4(changes) -> Family:
    import torch

    from .common import typed

    config = get("Gemma4Config")(
        text_config=text(num_hidden_layers=4, intermediate_size=128, vocab_size_per_layer_input=128,
                         hidden_size_per_layer_input=16, num_kv_shared_layers=0 if changes else 2, sliding_window=4,
                         layer_types=["sliding_attention", "full_attention"] * 2, **changes),
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2, "patch_size": 4,
                       "position_embedding_size": 16, "initializer_range": INIT},
        audio_config=None, image_token_id=IMAGE, video_token_id=VIDEO, boi_token_id=START, eoi_token_id=END,
        audio_token_id=122, initializer_range=INIT,
    )  # fmt: skip
    model = build("Gemma4ForConditionalGeneration", config)
    grid = torch.tensor([[[x, y] for y in range(4) for x in range(4)]])

    def make(seed):
        inputs = typed(tokens((IMAGE, 4), seed=seed), model)
        return {**inputs, "pixel_values": pixels(1, 16, 3 * 4 * 4, seed=seed).abs(), "image_position_ids": grid}

    return Family(model, batches(make))


def gemma3n() -> Family:
    config = get("Gemma3nTextConfig")(
        **text(num_hidden_layers=4, intermediate_size=256, vocab_size_per_layer_input=128,
               hidden_size_per_layer_input=16, num_kv_shared_layers=2,
               laurel_rank=16, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2,
               activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0])
    )  # fmt: skip
    return _text_only(build("Gemma3nForCausalLM", config))


FAMILIES = {
    f.__name__: f
    for f in (
        llama, mistral, qwen3, qwen3_moe, qwen3_vl_moe, glm4v_moe, llama4, llama4_text, aria, kimi_k25,
        ernie4_5_vl_moe, gemma4, gemma4_moe,
        gemma3n,
    )
}  # fmt: skip
