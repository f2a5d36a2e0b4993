"""Families of other shapes: cross-attention, Q-formers, encoder-decoders, audio, and the thinker of an omni model."""

from __future__ import annotations

import torch

from .common import (
    AUDIO,
    BLOCKS,
    END,
    HIDDEN,
    IMAGE,
    INIT,
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
from .grids import MROPE, QWEN_VISION
from .images import one_image


def mllama() -> Family:
    """Image features come through cross-attention blocks, which a sample without an image leaves out."""
    config = get("MllamaConfig")(
        text_config=text(num_hidden_layers=4, cross_attention_layers=[1, 3], rope_scaling={"rope_type": "default"}),
        vision_config=vision(image_size=SIDE, patch_size=8, num_global_layers=1, attention_heads=2, max_num_tiles=2,
                             intermediate_layers_indices=[0], supported_aspect_ratios=[[1, 1], [1, 2]], vision_output_dim=48),
        image_token_index=IMAGE,
    )  # fmt: skip
    model = build("MllamaForConditionalGeneration", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.5)  # zero in a new model, which shuts image features out

    def make(seed):
        inputs = tokens((IMAGE, 1), seed=seed)
        if seed == 0:
            return tokens(seed=seed)
        length = inputs["input_ids"].shape[1]
        return {
            **inputs,
            "pixel_values": pixels(1, 1, 2, 3, SIDE, SIDE, seed=seed),
            "aspect_ratio_ids": torch.tensor([[1]]),
            "aspect_ratio_mask": torch.tensor([[[1, 1]]]),
            "cross_attention_mask": torch.ones(1, length, 1, 2, dtype=torch.long),
        }

    return Family(model, batches(make, 4))


QFORMER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 128,
           "encoder_hidden_size": 24, "cross_attention_frequency": 1, "initializer_range": INIT}  # fmt: skip
OPT = {"model_type": "opt", "hidden_size": HIDDEN, "ffn_dim": 64, "num_hidden_layers": BLOCKS, "num_attention_heads": 2,
       "word_embed_proj_dim": HIDDEN, "vocab_size": 128, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
       "eos_token_id": 2, "init_std": INIT}  # fmt: skip
T5 = {"model_type": "t5", "d_model": HIDDEN, "d_ff": 64, "d_kv": 16, "num_layers": BLOCKS, "num_decoder_layers": BLOCKS,
      "num_heads": 2, "vocab_size": 128, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
      "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0}  # fmt: skip


def blip_2() -> Family:
    config = get("Blip2Config")(
        vision_config=vision(), qformer_config=QFORMER, text_config=OPT, num_query_tokens=3, image_token_index=IMAGE
    )
    return one_image(build("Blip2ForConditionalGeneration", config), 3, 1, 3, SIDE, SIDE)


def blip_2_t5() -> Family:
    config = get("Blip2Config")(
        vision_config=vision(), qformer_config=QFORMER, text_config=T5, num_query_tokens=3, image_token_index=IMAGE
    )
    return _with_answers(one_image(build("Blip2ForConditionalGeneration", config), 3, 1, 3, SIDE, SIDE))


def instructblip() -> Family:
    config = get("InstructBlipConfig")(
        vision_config=vision(), qformer_config=QFORMER, text_config=OPT, num_query_tokens=3, image_token_index=IMAGE
    )
    words = tokens(words=6)
    extra = {"qformer_input_ids": words["input_ids"], "qformer_attention_mask": words["attention_mask"]}
    return one_image(build("InstructBlipForConditionalGeneration", config), 3, 1, 3, SIDE, SIDE, **extra)


def florence2() -> Family:
    bart = {"model_type": "bart", "d_model": HIDDEN, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": BLOCKS,
            "decoder_layers": BLOCKS, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 128,
            "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "init_std": INIT,
            "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip
    config = get("Florence2Config")(
        text_config=bart,
        vision_config={"embed_dim": [16, 24], "depths": [1, 1], "num_heads": [2, 2], "num_groups": [2, 2], "patch_size": [7, 3],
                       "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True], "window_size": 2,
                       "projection_dim": HIDDEN, "initializer_range": INIT, "max_position_embeddings": 8,
                       "max_temporal_embeddings": 8},
        image_token_id=IMAGE,
    )  # fmt: skip
    return _with_answers(one_image(build("Florence2ForConditionalGeneration", config), 5, 1, 3, SIDE, SIDE))


def _with_answers(family: Family) -> Family:
    """Give each batch an answer for the decoder to read."""
    for seed, inputs in enumerate(family.batches):
        inputs["labels"] = tokens(words=9, seed=100 + seed)["input_ids"]
    return family


# ---- audio

WHISPER = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 16,
           "max_source_positions": 8, "init_std": INIT, "initializer_range": INIT}  # fmt: skip


def qwen2_audio() -> Family:
    config = get("Qwen2AudioConfig")(
        audio_config={"model_type": "qwen2_audio_encoder", **WHISPER}, text_config={"model_type": "qwen2", **text()},
        audio_token_index=AUDIO, audio_token_id=AUDIO,
    )  # fmt: skip
    model = build("Qwen2AudioForConditionalGeneration", config)

    def make(seed):
        return {
            **tokens((AUDIO, 4), seed=seed),
            "input_features": pixels(1, 16, 16, seed=seed),
            "feature_attention_mask": torch.ones(1, 16, dtype=torch.long),
        }

    return Family(model, batches(make))


def voxtral() -> Family:
    config = get("VoxtralConfig")(
        audio_config={"model_type": "voxtral_encoder", "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
                      "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_mel_bins": 16,
                      "max_source_positions": 8, "initializer_range": INIT},
        text_config={"model_type": "llama", **text()}, audio_token_id=AUDIO,
    )  # fmt: skip
    model = build("VoxtralForConditionalGeneration", config)
    return Family(
        model, batches(lambda seed: {**tokens((AUDIO, 2), seed=seed), "input_features": pixels(1, 16, 16, seed=seed)})
    )


def qwen2_5_omni_thinker() -> Family:
    """Text, image and audio in one set: three modalities."""
    config = get("Qwen2_5OmniThinkerForConditionalGeneration").config_class(
        audio_config={**WHISPER, "n_window": 4, "output_dim": HIDDEN},
        vision_config={**QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": HIDDEN, "window_size": 16,
                       "fullatt_block_indexes": [1], "initializer_range": INIT},
        text_config=text(rope_scaling={**MROPE, "type": "default"}, rope_parameters=MROPE),
        audio_token_index=AUDIO, image_token_index=IMAGE, video_token_index=VIDEO, audio_token_id=AUDIO, image_token_id=IMAGE,
        video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END, audio_start_token_id=125,
        audio_end_token_id=126, position_id_per_seconds=25, seconds_per_chunk=2, user_token_id=3, initializer_range=INIT,
        pad_token_id=0,
    )  # fmt: skip
    model = build("Qwen2_5OmniThinkerForConditionalGeneration", config)

    def make(seed):
        if seed == 0:
            inputs = tokens((AUDIO, 4), seed=seed)
            sound = {"input_features": pixels(1, 16, 16), "feature_attention_mask": torch.ones(1, 16, dtype=torch.long)}
            return {**inputs, **sound}
        inputs = tokens((IMAGE, 4), seed=seed, framed=True)
        return {**inputs, "pixel_values": pixels(16, 96, seed=seed), "image_grid_thw": torch.tensor([[1, 4, 4]])}

    return Family(model, batches(make, 4))


FAMILIES = {
    f.__name__: f
    for f in (mllama, blip_2, blip_2_t5, instructblip, florence2, qwen2_audio, voxtral, qwen2_5_omni_thinker)
}
