"""Vision tower and projector as the GGUF file that llama.cpp calls `mmproj`, in float16.

Written for the models of `TOWERS`. Names, keys and dtypes are those of llama.cpp's own converter; what its code takes for granted
(window of attention, activation, patches merged into a token) is compared with the config first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers.image_processing_base import ImageProcessingMixin

_WINDOW = 112
"""Pixels of a side of the windows that Qwen2.5-VL's tower attends in; llama.cpp knows it by heart."""
_QWEN_IMAGE_SIZE = 560
"""What the converter writes for towers that take pictures of any size; llama.cpp wants a number there."""
_EXACT = ("v.patch_embd.", "v.position_embd.")
"""Tensors that stay in float32."""
_FRAMES = 2
"""Frames in a patch of Qwen2.5-VL; llama.cpp has a convolution for each."""


@dataclass(frozen=True)
class _Tower:
    """How llama.cpp stores a kind of vision tower.

    Attributes:
        projector: its name of the projector.
        add_sizes: adds the keys that only this kind has, and raises if llama.cpp computes something else.
        tensors: yields names and values for the file, given the model without its head.
    """

    projector: str
    add_sizes: Callable[[Any, Any], None]
    tensors: Callable[[nn.Module], Iterator[tuple[str, Tensor]]]


def require_tower(config: Any) -> None:
    """Raise a ValueError unless the model of a config has a vision tower that can be written."""
    if getattr(config, "vision_config", None) is None:
        raise ValueError(
            f"an `mmproj` file holds a vision tower, and {config.model_type!r} has none; leave `mmproj` out"
        )
    if config.model_type not in TOWERS:
        raise ValueError(
            f"an `mmproj` file can be written for models of the types {sorted(TOWERS)}, and this one is {config.model_type!r}; "
            "leave `mmproj` out and use the file of the original model, from the Hub or of llama.cpp's converter, since "
            "binarizing leaves the tower as it is"
        )


def image_statistics(checkpoint: str | os.PathLike) -> dict[str, list[float]]:
    """Return mean and standard deviation of each color by which pictures are normalized.

    Args:
        checkpoint: folder or Hub id.
    Raises:
        OSError: it has no image processor.
    """
    try:
        content, _ = ImageProcessingMixin.get_image_processor_dict(checkpoint)
        return {key: [float(value) for value in content[key]] for key in ("image_mean", "image_std")}
    except (OSError, KeyError, TypeError) as error:
        raise OSError(
            f"`{checkpoint}` has no image processor beside its weights that says how pictures are normalized ({error}); save the "
            f"base model's there: `AutoProcessor.from_pretrained(<base model>).save_pretrained({str(checkpoint)!r})`"
        ) from error


def add_tower_header(writer: Any, config: Any, statistics: dict[str, list[float]]) -> None:
    """Add what llama.cpp must know of a vision tower.

    Args:
        writer: a `gguf.GGUFWriter` of the architecture "clip".
        config: of the whole model, whose type is in `TOWERS`.
        statistics: from `image_statistics`.
    Raises:
        ValueError: llama.cpp would compute something else than this model.
    """
    import gguf

    kind, vision = TOWERS[config.model_type], config.vision_config
    writer.add_type("mmproj")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(kind.projector)
    writer.add_vision_projection_dim(config.get_text_config().hidden_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_image_mean(statistics["image_mean"])
    writer.add_vision_image_std(statistics["image_std"])
    kind.add_sizes(writer, config)


def tower_tensors(model: nn.Module) -> Iterator[tuple[str, np.ndarray, Any]]:
    """Yield name, value [...] float32 and type of each tensor of a model's vision tower and projector."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    for name, value in TOWERS[model.config.model_type].tensors(model.model):
        exact = value.ndim == 1 or name.startswith(_EXACT)
        yield name, value.detach().float().cpu().numpy(), kinds.F32 if exact else kinds.F16


# ---- Gemma 3: SigLIP, patches averaged to a fixed number of tokens


def _add_gemma3(writer: Any, config: Any) -> None:
    vision = config.vision_config
    patches, tokens = vision.image_size // vision.patch_size, round(config.mm_tokens_per_image**0.5)
    _require(vision.hidden_act == "gelu_pytorch_tanh", f"the activation {vision.hidden_act!r}")
    _require(
        tokens**2 == config.mm_tokens_per_image and patches % tokens == 0,
        f"{config.mm_tokens_per_image} tokens for {patches}×{patches} patches",
    )
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_block_count(vision.num_hidden_layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_use_gelu(True)
    writer.add_vision_projector_scale_factor(patches // tokens)


def _gemma3_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    names = _Names(model.config.vision_config.num_hidden_layers)
    for name, value in model.vision_tower.named_parameters():
        stem, _, key = name.removeprefix("vision_model.").rpartition(".")
        if not stem.startswith("head."):  # gives one vector for a picture, which Gemma does not use
            yield f"{names.of(f'vision_tower.vision_model.{stem}')}.{key}", value
    projector = model.multi_modal_projector
    yield "mm.input_projection.weight", projector.mm_input_projection_weight
    yield "mm.soft_emb_norm.weight", projector.mm_soft_emb_norm.weight + 1.0  # Gemma's gain is 1 + weight


# ---- Qwen2.5-VL: pictures of any size, attention in windows but for every nth block


def _add_qwen2_5_vl(writer: Any, config: Any) -> None:
    vision = config.vision_config
    whole = list(vision.fullatt_block_indexes)
    every = whole[0] + 1 if whole else 0
    _require(vision.hidden_act == "silu", f"the activation {vision.hidden_act!r}")
    _require(
        whole and whole == list(range(every - 1, vision.depth, every)),
        f"attention to the whole picture in the blocks {whole} of {vision.depth}",
    )
    _require(vision.window_size == _WINDOW, f"windows of {vision.window_size} pixels")
    _require(
        vision.spatial_merge_size == 2, f"{vision.spatial_merge_size}×{vision.spatial_merge_size} patches in a token"
    )
    _require(vision.temporal_patch_size == _FRAMES, f"patches of {vision.temporal_patch_size} frames")
    writer.add_vision_image_size(_QWEN_IMAGE_SIZE)
    writer.add_vision_block_count(vision.depth)
    writer.add_vision_head_count(vision.num_heads)
    writer.add_vision_attention_layernorm_eps(1e-6)  # a constant in transformers
    writer.add_vision_use_silu(True)
    writer.add_vision_n_wa_pattern(every)
    writer.add_vision_spatial_merge_size(vision.spatial_merge_size)


def _qwen2_5_vl_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    names = _Names(model.config.vision_config.depth)
    for name, value in model.visual.named_parameters():
        stem, _, key = name.rpartition(".")
        if stem == "patch_embed.proj":
            for frame, suffix in zip(value.unbind(2), ("", ".1"), strict=True):
                yield f"v.patch_embd.weight{suffix}", frame
        elif stem.endswith("attn.qkv"):
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                yield f"{names.of('visual.' + stem.removesuffix('qkv') + part)}.{key}", rows
        else:
            yield f"{names.of(f'visual.{stem}')}.{key}", value


TOWERS = {
    "gemma3": _Tower("gemma3", _add_gemma3, _gemma3_tensors),
    "qwen2_5_vl": _Tower("qwen2.5vl_merger", _add_qwen2_5_vl, _qwen2_5_vl_tensors),
}
"""`model_type` of a config → its vision tower."""


class _Names:
    """Names of tensors as llama.cpp's converter gives them.

    Args:
        blocks: of the tower.
    """

    def __init__(self, blocks: int):
        import gguf

        last = 2  # number of the projector's last matrix, for which the table counts as for blocks
        self._names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, max(blocks, last + 1))

    def of(self, stem: str) -> str:
        """Return the name of the tensors of a module, given its name in the converter's terms."""
        found = self._names.get_name(stem)
        if found is None:
            raise ValueError(f"llama.cpp has no place for the tensors of `{stem}`; leave `mmproj` out")
        return found


def _require(known: Any, what: str) -> None:
    if not known:
        raise ValueError(
            f"this vision tower has {what}, which llama.cpp has no key for, so an `mmproj` file would compute something else; "
            "leave `mmproj` out"
        )
