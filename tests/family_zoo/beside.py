"""Families that take images in other ways than at placeholders: tokens, features beside the text, encoders."""

from __future__ import annotations

import torch

from .common import HIDDEN, IMAGE, SIDE, Family, batches, build, get, pixels, tokens
from .images import one_image
from .others import _with_answers
from .shrunk import shrunk

SIDES = torch.tensor([[SIDE, SIDE]])


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


FAMILIES = {
    name: f
    for name, f in list(globals().items())
    if callable(f) and getattr(f, "__module__", "") == __name__ and not name.startswith("_")
}
