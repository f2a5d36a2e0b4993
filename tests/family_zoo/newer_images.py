"""Families with whole images at placeholders, their default configs made small by `shrunk`."""

from __future__ import annotations

import torch

from .common import AUDIO, HIDDEN, IMAGE, SIDE, VIDEO, Family, batches, build, get, pixels, tokens, typed
from .images import one_image
from .newer_grids import QWEN35, _flat
from .others import OPT, QFORMER
from .shrunk import shrunk

MAMBA = {"mamba_num_heads": 4, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8}


SIDES = torch.tensor([[SIDE, SIDE]])


def cohere2_vision() -> Family:
    config = shrunk("Cohere2VisionConfig", vision_config={"vision_use_head": False})
    return one_image(build("Cohere2VisionForConditionalGeneration", config), 4, 1, 3, SIDE, SIDE)


def deepseek_vl_hybrid() -> Family:
    config = shrunk(
        "DeepseekVLHybridConfig",
        vision_config={"vision_use_head": False},
        high_res_vision_config={"image_size": 32, "global_attn_indexes": [1], "window_size": 2, "num_pos_feats": 16},
    )
    model = build("DeepseekVLHybridForConditionalGeneration", config)
    return one_image(model, 16, 1, 3, SIDE, SIDE, high_res_pixel_values=pixels(1, 3, 32, 32))


def got_ocr2() -> Family:
    config = shrunk("GotOcr2Config", vision_config={"image_size": 64, "global_attn_indexes": [1], "window_size": 2})
    return one_image(build("GotOcr2ForConditionalGeneration", config), 16, 1, 3, 64, 64)


def granite4_vision() -> Family:
    config = shrunk(
        "Granite4VisionConfig",
        downsample_rate="1/2",
        vision_config={"hidden_size": 64},
        deepstack_layer_map=[[0, 0]],
        image_grid_pinpoints=[[SIDE, SIDE]],
    )
    return one_image(
        build("Granite4VisionForConditionalGeneration", config), 10, 1, 2, 3, SIDE, SIDE, image_sizes=SIDES
    )


def granite_docling() -> Family:
    config = shrunk(
        "GraniteDoclingConfig", vision_config={"deepstack_visual_indexes": [0], "scale_factor": 2}, scale_factor=2
    )
    return one_image(
        build("GraniteDoclingForConditionalGeneration", config),
        4,
        1,
        1,
        3,
        SIDE,
        SIDE,
        pixel_attention_mask=torch.ones(1, 1, dtype=torch.bool),
    )


def lighton_ocr() -> Family:
    return one_image(
        build("LightOnOcrForConditionalGeneration", shrunk("LightOnOcrConfig")), 4, 1, 3, SIDE, SIDE, image_sizes=SIDES
    )


def mistral_large4() -> Family:
    config = shrunk("MistralLarge4Config", text_config={"index_topk": 8})
    return one_image(build("MistralLarge4ForConditionalGeneration", config), 4, 1, 3, SIDE, SIDE, image_sizes=SIDES)


def mistral4() -> Family:
    model = build("Mistral4ForCausalLM", shrunk("Mistral4Config"))
    return Family(model, batches(lambda seed: tokens(seed=seed, words=20)))


def llava_next_video() -> Family:
    config = shrunk("LlavaNextVideoConfig", image_grid_pinpoints=[[SIDE, SIDE]], vision_feature_layer=-1)
    model = build("LlavaNextVideoForConditionalGeneration", config)

    def make(seed):
        return {**tokens((VIDEO, 8), seed=seed), "pixel_values_videos": pixels(1, 2, 3, SIDE, SIDE, seed=seed)}

    return Family(model, batches(make))


def video_llava() -> Family:
    model = build("VideoLlavaForConditionalGeneration", shrunk("VideoLlavaConfig", vision_feature_layer=-1))

    def make(seed):
        return {**tokens((IMAGE, 16), seed=seed), "pixel_values_images": pixels(1, 3, SIDE, SIDE, seed=seed)}

    return Family(model, batches(make))


def instructblipvideo() -> Family:
    config = get("InstructBlipVideoConfig")(
        vision_config=shrunk("InstructBlipVideoVisionConfig").to_dict(),
        qformer_config={**QFORMER, "encoder_hidden_size": HIDDEN},
        text_config=OPT,
        num_query_tokens=3,
        video_token_index=VIDEO,
    )
    words = tokens(words=6)
    extra = {"qformer_input_ids": words["input_ids"], "qformer_attention_mask": words["attention_mask"]}
    model = build("InstructBlipVideoForConditionalGeneration", config)

    def make(seed):
        return {**tokens((VIDEO, 12), seed=seed), "pixel_values": pixels(1, 4, 3, SIDE, SIDE, seed=seed), **extra}

    return Family(model, batches(make))


def ovis2() -> Family:
    config = shrunk(
        "Ovis2Config",
        visual_indicator_token_ids=[110, 111, 112, 113, 114],
        vision_config={"hidden_stride": 2, "vocab_size": 40, "num_visual_indicator_tokens": 5},
    )
    return one_image(build("Ovis2ForConditionalGeneration", config), 4, 1, 3, SIDE, SIDE)


def qianfan_ocr() -> Family:
    config = shrunk(
        "QianfanOCRConfig", vision_config={"image_size": [SIDE, SIDE], "patch_size": [4, 4]}, downsample_ratio=0.5
    )
    return one_image(build("QianfanOCRForConditionalGeneration", config), 4, 1, 3, SIDE, SIDE)


def fuyu() -> Family:
    model = build("FuyuForCausalLM", shrunk("FuyuConfig"))

    def make(seed):
        return {**tokens((IMAGE, 16), seed=seed), "image_patches": pixels(1, 16, 48, seed=seed)}

    return Family(model, batches(make))


def lfm2_vl() -> Family:
    config = shrunk("Lfm2VlConfig", text_config={"full_attn_idxs": None, "layer_types": ["conv", "full_attention"]})
    model = build("Lfm2VlForConditionalGeneration", config)
    extra = {"spatial_shapes": torch.tensor([[4, 4]]), "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long)}

    def make(seed):
        return {**tokens((IMAGE, 4), seed=seed), "pixel_values": pixels(1, 16, 48, seed=seed), **extra}

    return Family(model, batches(make))


def _minicpm(model_class: str, config_class: str, count: int = 1) -> Family:
    config = shrunk(
        config_class,
        text_config=QWEN35,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_config={"insert_layer_id": 0},
        insert_layer_id=0,
    )
    family = one_image(build(model_class, config), count, 1, 3, 4, 64, target_sizes=torch.tensor([[4, 4]]))
    return Family(family.model, [typed(inputs, family.model) for inputs in family.batches])


def minicpm_ocr() -> Family:
    return _minicpm("MiniCPMOcrForConditionalGeneration", "MiniCPMOcrConfig", 4)


def minicpmv4_6() -> Family:
    return _minicpm("MiniCPMV4_6ForConditionalGeneration", "MiniCPMV4_6Config")


def minicpmv4_7() -> Family:
    return _minicpm("MiniCPMV4_7ForConditionalGeneration", "MiniCPMV4_7Config")


def molmo2() -> Family:
    config = shrunk(
        "Molmo2Config",
        adapter_config={"vision_feature_layer": [1, 0], "text_hidden_size": HIDDEN},
        vision_config={"image_size": [SIDE, SIDE]},
        text_config={"additional_vocab_size": 8},
    )
    model = build("Molmo2ForConditionalGeneration", config)
    pooling = torch.arange(16).view(4, 4)

    def make(seed):
        inputs = typed(tokens((IMAGE, 4), seed=seed), model)
        return {
            **inputs,
            "pixel_values": pixels(1, 16, 48, seed=seed),
            "image_token_pooling": pooling,
            "image_grids": torch.tensor([[2, 2, 0, 0]]),
            "image_num_crops": torch.tensor([1]),
        }

    return Family(model, batches(make))


def step3p7() -> Family:
    config = shrunk(
        "Step3p7Config",
        text_config={"sliding_window": 8},
        vision_config={"image_size": 16, "max_position_embeddings": 16},
    )
    return one_image(build("Step3p7ForConditionalGeneration", config), 1, 1, 3, SIDE, SIDE)


def deepseek_ocr2() -> Family:
    config = shrunk(
        "DeepseekOcr2Config",
        text_config={"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
        vision_config={
            "sam_config": {
                "image_size": 64,
                "global_attn_indexes": [1],
                "window_size": 2,
                "downsample_channels": [32, 32],
            }
        },
    )
    return one_image(build("DeepseekOcr2ForConditionalGeneration", config), 145, 1, 3, 64, 64)


def unlimited_ocr() -> Family:
    config = shrunk(
        "UnlimitedOcrConfig",
        vision_config={
            "sam_config": {
                "image_size": 64,
                "global_attn_indexes": [1],
                "window_size": 2,
                "downsample_channels": [32, 32],
            }
        },
    )
    return one_image(build("UnlimitedOcrForConditionalGeneration", config), 21, 1, 3, 64, 64)


def nemotron_h_omni() -> Family:
    config = shrunk(
        "NemotronH_Omni_Reasoning_V3_Config",
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        vision_hidden_size=HIDDEN,
        vision_config={"patch_dim": 48, "video_patch_dim": 96, "max_img_size": 16},
        text_config=MAMBA,
    )
    return one_image(build("NemotronH_Omni_Reasoning_V3", config), 4, 16, 48, image_grid_hw=torch.tensor([[4, 4]]))


def gemma4_unified() -> Family:
    model = build(
        "Gemma4UnifiedForConditionalGeneration",
        shrunk(
            "Gemma4UnifiedConfig",
            vision_config={
                "model_patch_size": 4,
                "patch_size": 4,
                "pooling_kernel_size": 1,
                "mm_embed_dim": HIDDEN,
                "mm_posemb_size": 16,
                "output_proj_dims": HIDDEN,
            },
        ),
    )
    grid = torch.tensor([[[x, y] for y in range(4) for x in range(4)]])

    def make(seed):
        inputs = typed(tokens((IMAGE, 16), seed=seed), model)
        return {**inputs, "pixel_values": pixels(1, 16, 48, seed=seed).abs(), "image_position_ids": grid}

    return Family(model, batches(make))


def diffusion_gemma() -> Family:
    model = build(
        "DiffusionGemmaForBlockDiffusion",
        shrunk(
            "DiffusionGemmaConfig",
            canvas_length=8,
            text_config={"per_layer_config": {}, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
        ),
    )
    return Family(
        model, batches(lambda seed: tokens(seed=seed, words=20)), generates=False, settings={"allow_text_only": True}
    )


def dots3_note() -> Family:
    config = shrunk(
        "Dots3NoteConfig",
        text_config={"index_topk": 8, "head_dim": 24, "per_layer_config": {}},
        vision_config={"adapter_in_dim": HIDDEN},
        audio_config={"conv_output_size": 64, "hop_length": 16, "feature_size": 16, "samples_per_token": 128},
    )
    return _flat(build("Dots3NoteForConditionalGeneration", config), 16, 48)


def kosmos2_5() -> Family:
    config = shrunk(
        "Kosmos2_5Config",
        latent_query_num=3,
        vision_config={"max_num_patches": 64, "patch_embed_hidden_size": 48, "patch_size": 4},
        text_config={"max_position_embeddings": 128, "attention_heads": 2},
    )
    model = build("Kosmos2_5ForConditionalGeneration", config)

    def make(seed):
        inputs = tokens((IMAGE, 3), seed=seed)
        places = (inputs["input_ids"] == IMAGE).long()
        rows = torch.tensor([[[r + 1, c + 1] for r in range(4) for c in range(4)]])
        return {
            **inputs,
            "modality": places,
            "image_embeds_position_mask": places,
            "flattened_patches": torch.cat([rows.float(), pixels(1, 16, 48, seed=seed)], -1),
        }

    return Family(model, batches(make))


FAMILIES = {
    name: f
    for name, f in list(globals().items())
    if callable(f) and getattr(f, "__module__", "") == __name__ and not name.startswith("_")
}
