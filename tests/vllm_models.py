"""Packed checkpoints for the checks with vLLM: the example VLM, and a Qwen2.5-VL of random weights with everything packed."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tiny_processor import make_tokenizer
from tiny_vlm import world
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

import sab_hf
from sab_hf import SABQuantizationConfig

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny_vlm" / "checkpoint"
QUICK = {"num_samples": 16, "alternations": 2, "refine_steps": 0, "distil_steps": 0, "sensitivity_samples": 8}
QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] in ('image', 'image_url') %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def example(folder: Path) -> Path:
    """Save the example VLM packed: language blocks, projector, embedding and head; its tower stays dense.

    vLLM packs no MLP of a SigLIP whose widths are no multiples of 64, and this one's are 160.
    """
    samples = [sample.messages() for sample in world.samples(64, seed="calibration")]
    config = SABQuantizationConfig(
        calibration=samples, projector_bits=4, embedding_bits=4, head_bits=4, **QUICK | {"num_samples": 64}
    )
    model = AutoModelForImageTextToText.from_pretrained(EXAMPLE, dtype=torch.float32, quantization_config=config)
    sab_hf.save(model, AutoProcessor.from_pretrained(EXAMPLE), folder)
    return folder


def qwen(folder: Path) -> Path:
    """Save a random Qwen2.5-VL with packed blocks, tower, projector and an embedding that is the head; one v stays dense."""
    processor = qwen_processor()
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in zip(
        ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), QWEN_TOKENS, strict=True
    )}  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 1024, "rope_parameters": rope,
            "tie_word_embeddings": True, "initializer_range": 0.2, "eos_token_id": None, "bos_token_id": None,
        },
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "patch_size": 4, "out_hidden_size": 128,
            "window_size": 16, "fullatt_block_indexes": [1], "initializer_range": 0.2,
        },
        tie_word_embeddings=True, **ids,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    samples = [
        [{"role": "user", "content": [{"type": "image", "image": picture(i)}, {"type": "text", "text": f"What is {i}?"}]},
         {"role": "assistant", "content": [{"type": "text", "text": f"A box, number {i}."}]}]
        for i in range(16)
    ]  # fmt: skip
    config = SABQuantizationConfig(
        calibration=samples,
        rest_bits=4,
        modules_to_not_convert=["model.language_model.layers.0.self_attn.v_proj"],
        **QUICK,
    )
    sab_hf.quantize(model, processor, samples, config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id  # at which vLLM stops in any case
    sab_hf.save(model, processor, folder)
    return folder


def qwen_processor() -> Qwen2_5_VLProcessor:
    """Return the processor of a Qwen2.5-VL over bytes, with patches of 4 pixels."""
    tokenizer = make_tokenizer(pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN_TOKENS})
    sizes = {"patch_size": 4, "size": {"shortest_edge": 256, "longest_edge": 4096}}
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes), chat_template=QWEN_TEMPLATE
    )


def picture(number: int, side: int = 32) -> Image.Image:
    """Return a drawn picture."""
    image = Image.new("RGB", (side, side), (37 * number % 256, 255 - 29 * number % 256, 90))
    ImageDraw.Draw(image).rectangle(
        (number % side // 2, 4, number % side // 2 + 9, 20), fill=(255, 30, 20 * number % 256)
    )
    return image


MODELS = {"example": example, "qwen": qwen}
