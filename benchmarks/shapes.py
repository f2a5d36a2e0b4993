"""Configs of published models, and Qwen2.5-VL models of these and of small sizes with random weights and processed batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    Idefics3Config,
    LlamaConfig,
    LlavaOnevisionConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
)

VISION_START, VISION_END, IMAGE, VIDEO = 151652, 151653, 151655, 151656
"""Token ids of Qwen2.5-VL; a smaller vocabulary has them at its end."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2.5-VL model, as in the `config.json` of the published checkpoints."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 152064
    vision_layers: int = 32
    vision_hidden: int = 1280
    vision_intermediate: int = 3420
    vision_heads: int = 16
    grid: tuple[int, int] = (32, 44)  # patches of 14 pixels; 2 × 2 of them make a token
    tied: bool = False  # head and embedding are one matrix

    @property
    def image_tokens(self) -> int:
        return self.grid[0] * self.grid[1] // 4


SHAPES = {
    "3b": Shape(2048, 11008, 36, 16, 2, 151936, tied=True),
    "7b": Shape(3584, 18944, 28, 28, 4),
    "32b": Shape(5120, 27648, 64, 40, 8, vision_intermediate=3456),
    "72b": Shape(8192, 29568, 80, 64, 8, vision_intermediate=3456),
    "tiny": Shape(64, 160, 4, 4, 2, 512, 2, 32, 48, 2, (4, 8)),
}


def config(shape: Shape, layers: int) -> Qwen2_5_VLConfig:
    """Return the config of `shape` with only `layers` language blocks."""
    head = shape.hidden // shape.heads
    quarter = head // 8
    small = shape.vocabulary <= VIDEO
    special = [shape.vocabulary - 4 + i if small else (VISION_START, VISION_END, IMAGE, VIDEO)[i] for i in range(4)]
    text = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [quarter, 3 * quarter // 2, head // 2 - 5 * quarter // 2]},
        "tie_word_embeddings": shape.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    vision = {
        "depth": shape.vision_layers,
        "hidden_size": shape.vision_hidden,
        "intermediate_size": shape.vision_intermediate,
        "num_heads": shape.vision_heads,
        "out_hidden_size": shape.hidden,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [i for i in (7, 15, 23, 31) if i < shape.vision_layers] or [shape.vision_layers - 1],
        "hidden_act": "silu",
        "tokens_per_second": 2,
    }
    start, end, image, video = special
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=shape.tied,
    )


def qwen_config(name: str) -> Qwen2_5_VLConfig:
    """Return the config of the Qwen2.5-VL of that name in `SHAPES`."""
    return config(SHAPES[name], SHAPES[name].layers)


def smolvlm_config(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> Idefics3Config:
    """Return the config of a SmolVLM: Idefics3 with SigLIP base, patches of 16 in 512 pixels."""
    text = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        vocab_size=49280,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    }
    ids = {"image_token_id": 49190, "pad_token_id": 2}
    return Idefics3Config(text_config=text, vision_config=vision, scale_factor=4, tie_word_embeddings=False, **ids)


def onevision_config() -> LlavaOnevisionConfig:
    """Return the config of LLaVA-OneVision-0.5B."""
    text = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=152000,
        tie_word_embeddings=True,
    )
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    }
    ids = {"image_token_index": 151646}
    return LlavaOnevisionConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


PUBLISHED: dict[str, Callable[[], PretrainedConfig]] = {
    "SmolVLM-256M": lambda: smolvlm_config(576, 1536, 30, 9, 3),
    "SmolVLM-500M": lambda: smolvlm_config(960, 2560, 32, 15, 5),
    "LLaVA-OneVision-0.5B": onevision_config,
    "Qwen2.5-VL-3B": lambda: qwen_config("3b"),
    "Qwen2.5-VL-7B": lambda: qwen_config("7b"),
    "Qwen2.5-VL-32B": lambda: qwen_config("32b"),
    "Qwen2.5-VL-72B": lambda: qwen_config("72b"),
}
"""Name → the config of the published checkpoint."""


@torch.no_grad()
def build(shape: Shape, layers: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Return a model in RAM whose weights are spread as trained ones are: rows and columns differ, some columns stand out.

    Args:
        layers: language blocks.
        device: where the weights are drawn.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config(shape, layers), dtype=dtype)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            n, m = module.weight.shape
            rows, columns = (torch.empty(size, device=device).log_normal_(0, 0.3) for size in (n, m))
            columns[torch.randperm(m, device=device)[: max(1, m // 500)]] *= 4  # outlier channels
            module.weight.mul_(rows[:, None].to(dtype)).mul_(columns.to(dtype))
    return model.to("cpu").eval()


def batches(
    model: nn.Module, shape: Shape, samples: int, batch_size: int, text_tokens: int = 160
) -> list[dict[str, Tensor]]:
    """Return processed batches of one image and `text_tokens` of text a sample."""
    generator = torch.Generator().manual_seed(0)
    ids, takes = model.config, inspect.signature(model.forward).parameters
    made = []
    for start in range(0, samples, batch_size):
        count = min(batch_size, samples - start)
        plain = min(shape.vocabulary, VISION_START) - 8  # ids below the special ones
        words = torch.randint(0, plain, (count, text_tokens), generator=generator)
        marks = ((1, ids.vision_start_token_id), (shape.image_tokens, ids.image_token_id), (1, ids.vision_end_token_id))
        frame = [torch.full((count, times), token) for times, token in marks]
        input_ids = torch.cat([words[:, :8], *frame, words[:, 8:]], 1)
        patches = count * shape.grid[0] * shape.grid[1]
        batch = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.randn(patches, 3 * 2 * 14 * 14, generator=generator),
            "image_grid_thw": torch.tensor([[1, *shape.grid]] * count),
        }
        if "mm_token_type_ids" in takes:  # transformers 5
            batch["mm_token_type_ids"] = (input_ids == ids.image_token_id).int()
        made.append(batch)
    return made
