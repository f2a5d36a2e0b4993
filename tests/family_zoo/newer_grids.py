"""Families that take flattened patches with a grid, their default configs made small by `shrunk`."""

from __future__ import annotations

from typing import Any

import torch

from .common import END, HIDDEN, IMAGE, START, Family, batches, build, pixels, tokens, typed
from .grids import GLM_ROPE, MROPE, _grid, _images_only
from .images import one_image
from .shrunk import shrunk


def _flat(model, *shape: int, count: int = 4, **extra: Any) -> Family:
    """Return a family that takes an image of 4 × 4 patches, each of `shape`, which become `count` tokens."""

    def make(seed):
        inputs = typed(tokens((IMAGE, count), seed=seed, framed=True), model)
        return {
            **inputs,
            "pixel_values": pixels(*shape, seed=seed),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            **extra,
        }

    return Family(model, batches(make))


def cohere_compass() -> Family:
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = shrunk(
        "CohereCompassConfig",
        text_config={"rope_parameters": rope, "head_dim": 128},
        vision_config={"deepstack_visual_indexes": [0]},
    )
    return _images_only(_grid(build("CohereCompassForConditionalGeneration", config)))


def cosmos3_edge() -> Family:
    config = shrunk("Cosmos3EdgeConfig", text_config={"rope_parameters": MROPE})
    return _flat(build("Cosmos3EdgeForConditionalGeneration", config), 16, 48)


def cosmos3_omni() -> Family:
    config = shrunk(
        "Cosmos3OmniConfig", text_config={"rope_parameters": MROPE}, vision_config={"deepstack_visual_indexes": [0]}
    )
    return _images_only(_grid(build("Cosmos3OmniForConditionalGeneration", config)))


def exaone4_5() -> Family:
    config = shrunk("Exaone4_5_Config", vision_config={"fullatt_block_indexes": [1]})
    return _images_only(_grid(build("Exaone4_5_ForConditionalGeneration", config)))


def glm46v() -> Family:
    config = shrunk("Glm46VConfig", text_config={"rope_parameters": GLM_ROPE, "rope_scaling": GLM_ROPE})
    return _images_only(_grid(build("Glm46VForConditionalGeneration", config)))


def glm_ocr() -> Family:
    config = shrunk("GlmOcrConfig", text_config={"rope_parameters": GLM_ROPE})
    return _images_only(_grid(build("GlmOcrForConditionalGeneration", config)))


def glm5_next() -> Family:
    """Four streams of hidden states, mixed between the blocks."""
    config = shrunk(
        "Glm5NextConfig",
        text_config={"qk_rope_head_dim": 0, "head_dim": 0, "index_topk": 8, "index_kpool": 2, "hc_mult": 2},
    )
    return _images_only(_grid(build("Glm5NextForConditionalGeneration", config)))


def hyperclovax_vision_v2() -> Family:
    config = shrunk("HyperCLOVAXVisionV2Config", vision_config={"fullatt_block_indexes": [1]})
    return _images_only(_grid(build("HyperCLOVAXVisionV2ForConditionalGeneration", config)))


def hunyuan_vl() -> Family:
    config = shrunk(
        "HunYuanVLConfig",
        text_config={
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]},
        },
        vision_config={"max_image_size": 16},
    )
    return _flat(build("HunYuanVLForConditionalGeneration", config), 16, 48, count=8)


def hy_v4_vl() -> Family:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = shrunk("HYV4VLConfig", text_config={"rope_parameters": rope, "index_topk": 8, "hc_mult": 2})
    return _flat(build("HYV4VLForConditionalGeneration", config), 16, 48, count=6)


def lfm3_vl() -> Family:
    return _flat(build("Lfm3VlForConditionalGeneration", shrunk("Lfm3VlConfig")), 16, 96)


def minimax_m3_vl() -> Family:
    config = shrunk(
        "MiniMaxM3VLConfig", projector_hidden_size=HIDDEN, merged_hidden_size=4 * HIDDEN, text_config={"rotary_dim": 8}
    )
    return _flat(build("MiniMaxM3SparseForConditionalGeneration", config), 16, 96)


def muse_glimmer() -> Family:
    config = shrunk(
        "MuseGlimmerConfig", out_hidden_size=4 * HIDDEN, vision_config={"pos_emb_height": 4, "pos_emb_width": 4}
    )
    return _flat(build("MuseGlimmerForConditionalGeneration", config), 16, 96)


def muse_spark() -> Family:
    config = shrunk(
        "MuseSparkConfig",
        out_hidden_size=4 * HIDDEN,
        vision_config={"pos_emb_height": 4, "pos_emb_width": 4},
        audio_config={"patch_sizes": [4, 2], "hidden_sizes": [8, 16], "depths": [1, 1], "num_hidden_layers": 2},
    )
    return _flat(build("MuseSparkForConditionalGeneration", config), 16, 96)


def paddleocr_vl() -> Family:
    config = shrunk("PaddleOCRVLConfig", text_config={"rope_parameters": MROPE})
    model = build("PaddleOCRVLForConditionalGeneration", config)

    def make(seed):
        inputs = typed(tokens((IMAGE, 4), seed=seed, framed=True), model)
        return {**inputs, "pixel_values": pixels(16, 3, 4, 4, seed=seed), "image_grid_thw": torch.tensor([[1, 4, 4]])}

    return Family(model, batches(make))


QWEN35 = {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}


def qwen3_5() -> Family:
    return _images_only(_grid(build("Qwen3_5ForConditionalGeneration", shrunk("Qwen3_5Config", text_config=QWEN35))))


def qwen3_5_moe() -> Family:
    return _images_only(
        _grid(build("Qwen3_5MoeForConditionalGeneration", shrunk("Qwen3_5MoeConfig", text_config=QWEN35)))
    )


def qwen4_exp() -> Family:
    config = shrunk(
        "Qwen4ExpConfig",
        text_config=QWEN35
        | {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
    )
    return _images_only(_grid(build("Qwen4ExpForConditionalGeneration", config)))


def qwen3_omni_moe_thinker() -> Family:
    config = shrunk(
        "Qwen3OmniMoeThinkerConfig",
        vision_start_token_id=START,
        vision_end_token_id=END,
        audio_start_token_id=125,
        text_config={"rope_parameters": MROPE, "rope_scaling": MROPE},
        vision_config={"deepstack_visual_indexes": [0]},
        audio_config={"n_window": 4, "n_window_infer": 8, "conv_chunksize": 4},
    )
    return _images_only(_grid(build("Qwen3OmniMoeThinkerForConditionalGeneration", config)))


def video_llama_3() -> Family:
    return _flat(
        build("VideoLlama3ForConditionalGeneration", shrunk("VideoLlama3Config")),
        16,
        48,
        image_merge_sizes=torch.tensor([2]),
    )


def inkling2() -> Family:
    return _flat(
        build("Inkling2ForConditionalGeneration", shrunk("Inkling2Config", text_config={"d_rel": 4, "rel_extent": 16})),
        4,
        8,
        8,
        3,
        image_grid_thw=torch.tensor([[1, 2, 2]]),
    )


def inkling2_loop() -> Family:
    config = shrunk(
        "Inkling2LoopConfig",
        text_config={
            "num_hidden_layers": 3,
            "layer_types": ["hybrid_sliding"] * 3,
            "d_rel": 4,
            "rel_extent": 16,
            "loop_layer_index_start": 1,
            "loop_layer_index_end": 2,
            "n_layers_per_attn_res_block": 1,
        },
    )
    return _flat(
        build("Inkling2LoopForConditionalGeneration", config), 4, 8, 8, 3, image_grid_thw=torch.tensor([[1, 2, 2]])
    )


def inkling() -> Family:
    return one_image(
        build("InklingForConditionalGeneration", shrunk("InklingConfig", text_config={"d_rel": 4, "rel_extent": 16})),
        4,
        4,
        2,
        4,
        4,
        3,
    )


FAMILIES = {
    name: f
    for name, f in list(globals().items())
    if callable(f) and getattr(f, "__module__", "") == __name__ and not name.startswith("_")
}
