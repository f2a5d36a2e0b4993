"""Vision-language families with a decoder-only text model: image features stand at placeholder positions."""

from __future__ import annotations

from .common import (
    BLOCKS,
    END,
    HIDDEN,
    IMAGE,
    INIT,
    PATCH,
    SIDE,
    START,
    VIDEO,
    Family,
    batches,
    build,
    get,
    pixels,
    text,
    tokens,
    vision,
)

NUM_PATCHES = (SIDE // PATCH) ** 2


def _siglip(**changes):
    return get("SiglipVisionConfig")(**vision(vision_use_head=False, **changes))


def _llama(**changes):
    return get("LlamaConfig")(**text(**changes))


def one_image(model, count, *shape, **extra) -> Family:
    """Return a family whose batches hold one image that becomes `count` tokens."""
    return Family(
        model,
        batches(lambda seed: {**tokens((IMAGE, count), seed=seed), "pixel_values": pixels(*shape, seed=seed), **extra}),
    )


def llava() -> Family:
    config = get("LlavaConfig")(
        vision_config=_siglip(), text_config=_llama(), image_token_index=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="full", image_seq_length=NUM_PATCHES,
    )  # fmt: skip
    return one_image(build("LlavaForConditionalGeneration", config), NUM_PATCHES, 1, 3, SIDE, SIDE)


def llava_next() -> Family:
    config = get("LlavaNextConfig")(
        vision_config=_siglip(), text_config=_llama(), image_token_index=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="full", image_grid_pinpoints=[[SIDE, SIDE]],
    )  # fmt: skip
    model = build("LlavaNextForConditionalGeneration", config)
    count = 2 * NUM_PATCHES + SIDE // PATCH  # the whole image, its one tile, and a newline for each row
    return Family(
        model,
        batches(
            lambda seed: {
                **tokens((IMAGE, count), seed=seed),
                "pixel_values": pixels(1, 2, 3, SIDE, SIDE, seed=seed),
                "image_sizes": _sizes(),
            }
        ),
    )


def _sizes():
    import torch

    return torch.tensor([[SIDE, SIDE]])


def llava_onevision() -> Family:
    config = get("LlavaOnevisionConfig")(
        vision_config=_siglip(), text_config=get("Qwen2Config")(**text()), image_token_index=IMAGE, video_token_index=VIDEO,
        vision_feature_layer=-1, vision_feature_select_strategy="full", image_grid_pinpoints=[[SIDE, SIDE]],
    )  # fmt: skip
    model = build("LlavaOnevisionForConditionalGeneration", config)
    count = 2 * NUM_PATCHES + SIDE // PATCH

    def make(seed):
        if seed == 0:  # two frames of video, each pooled to one token, and a newline
            return {**tokens((VIDEO, 3), seed=seed), "pixel_values_videos": pixels(1, 2, 3, SIDE, SIDE)}
        inputs = tokens((IMAGE, count), seed=seed)
        return {**inputs, "pixel_values": pixels(1, 2, 3, SIDE, SIDE, seed=seed), "image_sizes": _sizes()}

    return Family(model, batches(make, 4))


def vipllava() -> Family:
    config = get("VipLlavaConfig")(
        vision_config=get("CLIPVisionConfig")(**vision()), text_config=_llama(), image_token_index=IMAGE,
        vision_feature_layers=[-1, -2], image_seq_length=NUM_PATCHES,
    )  # fmt: skip
    return one_image(build("VipLlavaForConditionalGeneration", config), NUM_PATCHES, 1, 3, SIDE, SIDE)


def paligemma() -> Family:
    import torch

    config = get("PaliGemmaConfig")(
        vision_config=_siglip(projection_dim=HIDDEN), text_config=get("GemmaConfig")(**text()), image_token_index=IMAGE,
        projection_dim=HIDDEN, hidden_size=HIDDEN,
    )  # fmt: skip
    model = build("PaliGemmaForConditionalGeneration", config)

    def make(seed):
        inputs = tokens((IMAGE, NUM_PATCHES), seed=seed)
        types = torch.zeros_like(inputs["input_ids"])
        return {**inputs, "token_type_ids": types, "pixel_values": pixels(1, 3, SIDE, SIDE, seed=seed)}

    return Family(model, batches(make))


def gemma3() -> Family:
    config = get("Gemma3Config")(
        vision_config=_siglip(), text_config=get("Gemma3TextConfig")(**text(sliding_window=4)), image_token_index=IMAGE,
        mm_tokens_per_image=NUM_PATCHES, boi_token_index=START, eoi_token_index=END,
    )  # fmt: skip
    model = build("Gemma3ForConditionalGeneration", config)

    def make(seed):
        inputs = tokens((IMAGE, NUM_PATCHES), seed=seed)
        types = (inputs["input_ids"] == IMAGE).long()
        return {**inputs, "token_type_ids": types, "pixel_values": pixels(1, 3, SIDE, SIDE, seed=seed)}

    return Family(model, batches(make))


def aya_vision() -> Family:
    config = get("AyaVisionConfig")(
        vision_config=_siglip(), text_config=get("Cohere2Config")(**text(sliding_window=4)), image_token_index=IMAGE,
        downsample_factor=2, adapter_layer_norm_eps=1e-6, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return one_image(build("AyaVisionForConditionalGeneration", config), 1, 1, 3, SIDE, SIDE)


def mistral3() -> Family:
    config = get("Mistral3Config")(
        vision_config=get("PixtralVisionConfig")(**vision(head_dim=12, patch_size=4)), text_config=get("MistralConfig")(**text()),
        image_token_index=IMAGE, spatial_merge_size=2, vision_feature_layer=-1,
    )  # fmt: skip
    return one_image(build("Mistral3ForConditionalGeneration", config), 4, 1, 3, SIDE, SIDE, image_sizes=_sizes())


def internvl() -> Family:
    config = get("InternVLConfig")(
        vision_config=vision(image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH]), text_config=get("Qwen2Config")(**text()),
        image_token_id=IMAGE, image_seq_length=1, downsample_ratio=0.5, vision_feature_layer=-1,
    )  # fmt: skip
    return one_image(build("InternVLForConditionalGeneration", config), 1, 1, 3, SIDE, SIDE)


def idefics2() -> Family:
    config = get("Idefics2Config")(
        vision_config=vision(), text_config=get("MistralConfig")(**text()), image_token_id=IMAGE,
        perceiver_config={"hidden_size": HIDDEN, "resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 2,
                          "resampler_head_dim": 16, "num_key_value_heads": 1, "initializer_range": INIT},
        pad_token_id=0,
    )  # fmt: skip
    return one_image(build("Idefics2ForConditionalGeneration", config), 3, 1, 1, 3, SIDE, SIDE)


def idefics3() -> Family:
    config = get("Idefics3Config")(
        vision_config=vision(), text_config=_llama(), image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    return one_image(build("Idefics3ForConditionalGeneration", config), 1, 1, 1, 3, SIDE, SIDE)


def smolvlm() -> Family:
    config = get("SmolVLMConfig")(
        vision_config=vision(), text_config=_llama(), image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    return one_image(build("SmolVLMForConditionalGeneration", config), 1, 1, 1, 3, SIDE, SIDE)


def deepseek_vl() -> Family:
    config = get("DeepseekVLConfig")(
        text_config=text(model_type="llama"),
        vision_config=vision(model_type="siglip_vision_model", vision_use_head=False),
        image_token_id=IMAGE,
    )
    return one_image(build("DeepseekVLForConditionalGeneration", config), NUM_PATCHES, 1, 3, SIDE, SIDE)


def janus() -> Family:
    config = get("JanusConfig")(
        text_config=_llama(),
        vision_config=vision(projection_dim=HIDDEN, num_image_tokens=NUM_PATCHES, depth=2),
        vq_config={"embed_dim": 4, "num_embeddings": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1],
                   "num_res_blocks": 1, "num_patches": 2, "projection_dim": HIDDEN, "image_token_embed_dim": HIDDEN},
        image_token_id=IMAGE,
    )  # fmt: skip
    return one_image(build("JanusForConditionalGeneration", config), NUM_PATCHES, 1, 3, SIDE, SIDE)


def kosmos2() -> Family:
    config = get("Kosmos2Config")(
        text_config={"vocab_size": 128, "embed_dim": HIDDEN, "ffn_dim": 64, "layers": BLOCKS, "attention_heads": 2,
                     "max_position_embeddings": 128, "init_std": INIT, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
        vision_config=vision(),
        latent_query_num=3,
    )  # fmt: skip
    model = build("Kosmos2ForConditionalGeneration", config)

    def make(seed):
        inputs = tokens((IMAGE, 3), seed=seed)
        places = (inputs["input_ids"] == IMAGE).long()
        return {
            **inputs,
            "modality": places,
            "image_embeds_position_mask": places,
            "pixel_values": pixels(1, 3, SIDE, SIDE, seed=seed),
        }

    return Family(model, batches(make))


def phi4_multimodal() -> Family:
    config = get("Phi4MultimodalConfig")(
        **{**text(), "original_max_position_embeddings": 256},
        vision_config=vision(image_token_id=IMAGE, crop_size=SIDE, image_size=SIDE, patch_size=4, feature_layer=-1),
        audio_config={"hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 2,
                      "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32,
                      "input_size": 16, "audio_token_id": 122, "feature_layer": -1, "initializer_range": INIT},
    )  # fmt: skip
    model = build("Phi4MultimodalForCausalLM", config)
    import torch

    # 4 × 4 patches pooled to 2 × 2, in a whole image and one crop; a separator for each row and between the two
    count = 2 * 2 * (2 + 1) + 1

    def make(seed):
        return {
            **tokens((IMAGE, count), seed=seed),
            "image_pixel_values": pixels(1, 2, 3, SIDE, SIDE, seed=seed),
            "image_sizes": _sizes(),
            "image_attention_mask": torch.ones(1, 2, 4, 4, dtype=torch.bool),
        }

    return Family(model, batches(make))


FAMILIES = {
    f.__name__: f
    for f in (
        llava, llava_next, llava_onevision, vipllava, internvl, smolvlm, idefics2, idefics3,
        paligemma, gemma3, mistral3, aya_vision, kosmos2, deepseek_vl, janus, phi4_multimodal,
    )
}  # fmt: skip
