"""Families of transformers 5 and others that are built from their default configs, made small by `shrunk`."""

from __future__ import annotations

from typing import Any

import torch

from .common import AUDIO, END, HIDDEN, IMAGE, SIDE, START, VIDEO, Family, batches, build, get, pixels, tokens, typed
from .grids import GLM_ROPE, MROPE, _grid, _images_only
from .images import one_image
from .others import OPT, QFORMER, _with_answers
from .shrunk import shrunk

SIDES = torch.tensor([[SIDE, SIDE]])


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


def _sound(model, count: int, name: str, *shape: int, mask: str | None = None, frames: int | None = None) -> Family:
    """Return a family that takes a sound, which becomes `count` tokens."""

    def make(seed):
        inputs = {**tokens((AUDIO, count), seed=seed), name: pixels(*shape, seed=seed)}
        return inputs | ({mask: torch.ones(shape[0], frames or shape[-1], dtype=torch.long)} if mask else {})

    return Family(model, batches(make))


MAMBA = {"mamba_num_heads": 4, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8}


# ---- images of Qwen's and GLM's kind


def cohere_compass() -> Family:
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = shrunk(
        "CohereCompassConfig", text_config={"rope_parameters": rope}, vision_config={"deepstack_visual_indexes": [0]}
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
        text_config={"rope_parameters": MROPE},
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


# ---- whole images at placeholders


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
    return Family(model, batches(lambda seed: tokens(seed=seed, words=20)), generates=False)


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


# ---- images in other ways


def blip() -> Family:
    """A BERT-like text model that attends to the image: no placeholders."""
    return _beside("BlipForConditionalGeneration", "BlipConfig", image_text_hidden_size=HIDDEN, projection_dim=HIDDEN)


def git() -> Family:
    """Image features before the text, without placeholders."""
    return _beside("GitForCausalLM", "GitConfig")


def _beside(model_class: str, config_class: str, **changes) -> Family:
    model = build(model_class, shrunk(config_class, **changes))
    return Family(
        model,
        batches(lambda seed: {**tokens(seed=seed, words=20), "pixel_values": pixels(1, 3, SIDE, SIDE, seed=seed)}),
        settings={"allow_text_only": True},
    )


def udop() -> Family:
    """Patches of the page joined with the text by their boxes, in an encoder-decoder."""
    model = build(
        "UdopForConditionalGeneration", shrunk("UdopConfig", decoder_start_token_id=0, max_2d_position_embeddings=64)
    )

    def make(seed):
        inputs = tokens(seed=seed)
        boxes = (
            torch.rand(1, inputs["input_ids"].shape[1], 4, generator=torch.Generator().manual_seed(seed))
            .sort(-1)
            .values
        )
        return {**inputs, "bbox": boxes, "pixel_values": pixels(1, 3, SIDE, SIDE, seed=seed)}

    return _with_answers(Family(model, batches(make)))


def pix2struct() -> Family:
    """An image encoder and a text decoder: no `input_ids`."""
    config = shrunk("Pix2StructConfig", vision_config={"patch_embed_hidden_size": 48, "seq_len": 32})
    model = build("Pix2StructForConditionalGeneration", config)

    def make(seed):
        rows = torch.tensor([[[r + 1, c + 1] for r in range(4) for c in range(4)]])
        return {
            "flattened_patches": torch.cat([rows.float(), pixels(1, 16, 48, seed=seed)], -1),
            "attention_mask": torch.ones(1, 16),
        }

    return _with_answers(Family(model, batches(make)))


def vision_encoder_decoder() -> Family:
    """Donut's and TrOCR's shape: an image encoder and a text decoder, no `input_ids`."""
    config = get("VisionEncoderDecoderConfig").from_encoder_decoder_configs(shrunk("ViTConfig"), shrunk("BertConfig"))
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = build("VisionEncoderDecoderModel", config)
    return _with_answers(Family(model, batches(lambda seed: {"pixel_values": pixels(1, 3, SIDE, SIDE, seed=seed)})))


def pp_formulanet() -> Family:
    config = shrunk(
        "PPFormulaNetConfig",
        vision_config={
            "image_size": 64,
            "global_attn_indexes": [1],
            "window_size": 2,
            "post_conv_in_channels": HIDDEN,
            "post_conv_out_channels": HIDDEN,
            "post_conv_mid_channels": HIDDEN,
            "decoder_hidden_size": HIDDEN,
        },
    )
    model = build("PPFormulaNetForConditionalGeneration", config)
    answers = [tokens(words=9, seed=100 + seed)["input_ids"] for seed in range(3)]
    return Family(
        model,
        batches(lambda seed: {"pixel_values": pixels(1, 3, 64, 64, seed=seed), "decoder_input_ids": answers[seed]}),
    )


def idefics() -> Family:
    """Cross-attention blocks in a list of their own, which run between those of the text model."""
    config = shrunk("IdeficsConfig", alpha_initializer="ones", vision_config={"embed_dim": HIDDEN})
    model = build("IdeficsForVisionText2Text", config)

    def make(seed):
        inputs = tokens(seed=seed, words=20)
        mask = torch.ones(1, inputs["input_ids"].shape[1], 1, dtype=torch.long)
        return {**inputs, "pixel_values": pixels(1, 1, 3, SIDE, SIDE, seed=seed), "image_attention_mask": mask}

    return Family(model, batches(make), settings={"allow_text_only": True})


def chameleon() -> Family:
    """Images become tokens of the vocabulary, by a convolutional tower."""
    config = shrunk(
        "ChameleonConfig",
        vocabulary_map={"<image>": IMAGE, **{f"IMGIMG{c}Z": 90 + i for i, c in enumerate("ABCDEFGH")}},
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 8,
            "latent_channels": 8,
            "resolution": SIDE,
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
        },
    )
    family = one_image(build("ChameleonForConditionalGeneration", config), 64, 1, 3, SIDE, SIDE)
    return Family(
        family.model, [{**inputs, "modality": (inputs["input_ids"] == IMAGE).long()} for inputs in family.batches]
    )


def emu3() -> Family:
    """Images become tokens of the vocabulary, by a convolutional tower."""
    codes = {f"<|visual token {i:06d}|>": 90 + i for i in range(8)}
    config = shrunk(
        "Emu3Config",
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": 89, **codes},
        image_token_id=IMAGE,
        vq_config={
            "codebook_size": 8,
            "embed_dim": 4,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
            "attn_resolutions": [],
        },
    )
    return one_image(build("Emu3ForConditionalGeneration", config), 72, 1, 3, SIDE, SIDE, image_sizes=SIDES)


def apertus1p5() -> Family:
    config = shrunk(
        "Apertus1p5Config",
        image_token_offset=90,
        audio_token_offset=98,
        vision_config={
            "codebook_size": 8,
            "embed_dim": 32,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "resolution": SIDE,
            "spatial_scale_factor": 2,
        },
        audio_config={
            "codebook_size": 8,
            "codebook_dim": 32,
            "num_filters": 4,
            "upsampling_ratios": [2, 2],
            "decoder_num_layers": 1,
            "decoder_attention_num_groups": 4,
        },
    )
    return one_image(build("Apertus1p5ForConditionalGeneration", config), 64, 1, 3, SIDE, SIDE, image_sizes=SIDES)


def t5gemma2() -> Family:
    config = shrunk("T5Gemma2Config", encoder={"mm_tokens_per_image": 4, "vision_config": {"vision_use_head": False}})
    return _with_answers(one_image(build("T5Gemma2ForConditionalGeneration", config), 4, 1, 3, SIDE, SIDE))


def evolla() -> Family:
    config = shrunk(
        "EvollaConfig",
        protein_encoder_config={
            "model_type": "evolla_saprot",
            "vocab_size": 40,
            "max_position_embeddings": 64,
            "mask_token_id": 4,
            "pad_token_id": 1,
        },
        aligner_num_add_layers=1,
        resampler_heads=2,
        resampler_num_latents=4,
    )
    model = build("EvollaForProteinText2Text", config)

    def make(seed):
        protein = torch.randint(5, 30, (1, 8), generator=torch.Generator().manual_seed(seed))
        return {
            **tokens(seed=seed, words=20),
            "protein_input_ids": protein,
            "protein_attention_mask": torch.ones_like(protein),
        }

    return Family(model, batches(make), settings={"modules_to_not_convert": ["key_protein", "value_protein"]})


# ---- sound


def fun_asr_nano() -> Family:
    return _sound(
        build(
            "FunAsrNanoForConditionalGeneration",
            shrunk("FunAsrNanoConfig", adaptor_config={"intermediate_size": HIDDEN // 4}),
        ),
        4,
        "input_features",
        1,
        4,
        112,
        mask="input_features_mask",
        frames=4,
    )


def glmasr() -> Family:
    return _sound(
        build("GlmAsrForConditionalGeneration", shrunk("GlmAsrConfig")),
        2,
        "input_features",
        1,
        16,
        16,
        mask="input_features_mask",
    )


def _granite_speech(model_class: str, config_class: str) -> Family:
    config = shrunk(
        config_class,
        has_lora_adapter=False,
        downsample_rate=2,
        window_size=4,
        encoder_config={"input_dim": 16, "context_size": 8, "max_pos_emb": 16},
        projector_config={"encoder_hidden_size": HIDDEN},
    )
    return _sound(build(model_class, config), 8, "input_features", 1, 16, 16)


def granite_speech() -> Family:
    return _granite_speech("GraniteSpeechForConditionalGeneration", "GraniteSpeechConfig")


def granite_speech_plus() -> Family:
    return _granite_speech("GraniteSpeechPlusForConditionalGeneration", "GraniteSpeechPlusConfig")


def moss_transcribe_diarize() -> Family:
    model = build(
        "MossTranscribeDiarizeForConditionalGeneration", shrunk("MossTranscribeDiarizeConfig", audio_merge_size=2)
    )
    return _sound(model, 4, "input_features", 1, 16, 16, mask="input_features_mask")


def omniasr() -> Family:
    config = shrunk(
        "OmniASRConfig",
        audio_config={
            "conv_dim": [8, 8],
            "conv_kernel": [4, 4],
            "conv_stride": [4, 4],
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
    )
    return _sound(build("OmniASRForConditionalGeneration", config), 4, "input_values", 1, 1, 64)


def qwen3_asr() -> Family:
    config = shrunk("Qwen3ASRConfig", audio_config={"max_position_embeddings": 13})
    return _sound(
        build("Qwen3ASRForConditionalGeneration", config), 13, "input_features", 1, 16, 100, mask="input_features_mask"
    )


def vibevoice_asr() -> Family:
    part = {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1], "hidden_size": 16}
    config = shrunk(
        "VibeVoiceAsrConfig",
        acoustic_tokenizer_encoder_config=part,
        semantic_tokenizer_encoder_config=part,
        acoustic_tokenizer_chunk_size=64,
    )
    return _sound(build("VibeVoiceAsrForConditionalGeneration", config), 4, "input_values", 1, 1, 16)


def voxtral_realtime() -> Family:
    model = build("VoxtralRealtimeForConditionalGeneration", shrunk("VoxtralRealtimeConfig"))
    # four frames of the encoder for each token, of two of the spectrogram: features are added to all tokens' embeddings
    return Family(
        model,
        batches(lambda seed: {**tokens(seed=seed, words=20), "input_features": pixels(1, 16, 160, seed=seed)}),
        generates=False,
    )


MIMI = {
    "num_filters": 4,
    "upsampling_ratios": [2, 2],
    "num_quantizers": 2,
    "codebook_size": 16,
    "codebook_dim": 16,
    "vector_quantization_hidden_dimension": 16,
    "upsample_groups": 32,
}


def kyutai_speech_to_text() -> Family:
    config = shrunk(
        "KyutaiSpeechToTextConfig",
        codebook_vocab_size=20,
        num_codebooks=2,
        audio_pad_token_id=19,
        audio_bos_token_id=18,
        codec_config=MIMI,
    )
    model = build("KyutaiSpeechToTextForConditionalGeneration", config)
    columns = [tokens(seed=10 + c, words=20)["input_ids"] % 18 for c in range(2)]

    def make(seed):
        inputs = tokens(seed=seed, words=20)
        return {**inputs, "input_ids": torch.stack([inputs["input_ids"], *columns], -1)}

    return Family(model, batches(make), generates=False)


def nemo_speechlm() -> Family:
    config = shrunk("Nemotron3_5TranscribeConfig", word_timestamp_config={"blank_token_id": 5}, text_config=MAMBA)
    return _sound(
        build("Nemotron3_5TranscribeForConditionalGeneration", config),
        2,
        "input_features",
        1,
        16,
        16,
        mask="input_features_mask",
    )


FAMILIES = {
    name: f
    for name, f in list(globals().items())
    if callable(f) and getattr(f, "__module__", "") == __name__ and not name.startswith("_")
}
