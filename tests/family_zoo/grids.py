"""Qwen's and GLM's vision-language families: flattened patches with a grid, multimodal rotary positions."""

from __future__ import annotations

from .common import END, HIDDEN, IMAGE, INIT, START, VIDEO, Family, batches, build, get, pixels, text, tokens, typed

QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


def _grid(model) -> Family:
    """Return a family that takes an image, or a video, of 4 × 4 patches: 4 tokens after merging."""
    import torch

    def make(seed):
        kind, name, grid = ((VIDEO, "pixel_values_videos", "video_grid_thw") if seed == 0
                            else (IMAGE, "pixel_values", "image_grid_thw"))  # fmt: skip
        inputs = typed(tokens((kind, 4), seed=seed, framed=True), model)
        return {**inputs, name: pixels(16, 3 * 2 * 4 * 4, seed=seed), grid: torch.tensor([[1, 4, 4]])}

    return Family(model, batches(make, 4))


def qwen2_vl() -> Family:
    config = get("Qwen2VLConfig")(
        text_config=text(rope_scaling={**MROPE, "type": "mrope"}, rope_parameters={**MROPE}) ,
        vision_config={**QWEN_VISION, "embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2, "initializer_range": INIT},
        **QWEN_IDS,
    )  # fmt: skip
    return _grid(build("Qwen2VLForConditionalGeneration", config))


def qwen2_5_vl() -> Family:
    config = get("Qwen2_5_VLConfig")(
        text_config=text(rope_scaling={**MROPE, "type": "mrope"}, rope_parameters={**MROPE}),
        vision_config={**QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": HIDDEN,
                       "window_size": 16, "fullatt_block_indexes": [1], "initializer_range": INIT},
        **QWEN_IDS,
    )  # fmt: skip
    return _grid(build("Qwen2_5_VLForConditionalGeneration", config))


QWEN3_VISION = {**QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": HIDDEN,
                "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "initializer_range": INIT}  # fmt: skip


def qwen3_vl() -> Family:
    config = get("Qwen3VLConfig")(
        text_config=text(rope_scaling=MROPE, rope_parameters=MROPE), vision_config=QWEN3_VISION, **QWEN_IDS
    )
    return _grid(build("Qwen3VLForConditionalGeneration", config))


GLM_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2,
              "out_hidden_size": HIDDEN, "intermediate_size": 48, "image_size": 16, "initializer_range": INIT}  # fmt: skip
GLM_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START, "image_end_token_id": END,
           "video_start_token_id": 125, "video_end_token_id": 126}  # fmt: skip
GLM_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5, "rope_theta": 10000.0}


def glm4v() -> Family:
    config = get("Glm4vConfig")(
        text_config=text(rope_scaling=GLM_ROPE, rope_parameters=GLM_ROPE, partial_rotary_factor=0.5),
        vision_config=GLM_VISION, **GLM_IDS,
    )  # fmt: skip
    return _images_only(_grid(build("Glm4vForConditionalGeneration", config)))


def _images_only(family: Family) -> Family:
    """Leave out the video: this family writes its frames as images between timestamps."""
    return Family(family.model, [inputs for inputs in family.batches if "pixel_values" in inputs])


FAMILIES = {f.__name__: f for f in (qwen2_vl, qwen2_5_vl, qwen3_vl, glm4v)}
