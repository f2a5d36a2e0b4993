"""Configs of the zoo made small by rules on the names of their fields."""

from __future__ import annotations

import re
from typing import Any

from .common import AUDIO, BLOCKS, BOS, END, EOS, HIDDEN, IMAGE, INIT, INNER, PAD, SIDE, START, VIDEO, VOCAB, get

SIZES = [
    ((r"(.*_)?hidden_(size|dim)", r"(.*_)?embed_dim", "d_model", "output_dim", "projection_dim", "vision_output_dim",
      "embedding_size",
      "word_embed_proj_dim", r"adapter_(in|out)_dim", "adapter_input_size", "output_channels"), HIDDEN),
    ((r"(.*_)?intermediate_size(_mlp)?", r"(.*_)?ffn_dim", "d_ff", "mlp_dim", "share_expert_dim"), INNER),
    ((r"(num_)?(hidden_|decoder_|encoder_)?layers", "depth", "n_layers", "num_blocks", "resampler_depth"), BLOCKS),
    ((r"(.*_)?heads",), 2),
    (("qk_rope_head_dim",), 8),
    ((r"(.*_)?head_dim", "d_kv", "dim_head"), 16),
    ((r"(.*_)?lora_rank", "hc_lowrank", "loop_gate_rank"), 16),
    ((r"(unpadded_)?vocab_size(_per_layer_input)?",), VOCAB),
    ((r"(original_)?max_position_embeddings",), 256),
    ((r"num_(local_)?experts", "n_routed_experts"), 4),
    (("num_experts_per_tok",), 2),
    (("patch_size",), 4),
    (("image_size", "resolution", "max_image_size"), SIDE),
    (("num_position_embeddings", "num_patches", "num_mel_bins", "n_mel_bins"), 16),
    ((r"(sliding_)?window(_size)?", "sliding_window_size", "max_source_positions"), 8),
    ((r"image_token_(id|index)", "image_patch_id"), IMAGE),
    ((r"video_token_(id|index)",), VIDEO),
    ((r"audio_token_(id|index)",), AUDIO),
    (("video_start_token_id",), 125),
    (("video_end_token_id",), 126),
    ((r"(vision|image|low_res_image|frame|audio)_start_token_id", r"bo[ai]_token_(id|index)", "im_start_id",
      r"(image|audio)_bos_token_id"), START),
    ((r"(vision|image|frame|audio)_end_token_id", r"eo[ai]_token_(id|index)", "im_end_id", "audio_eos_token_id"), END),
    (("pad_token_id",), PAD),
    (("bos_token_id", "decoder_start_token_id"), BOS),
    ((r"eo[sd]_token_id", "sep_token_id"), EOS),
    (("initializer_range", "init_std"), INIT),
]  # fmt: skip
"""Patterns of fields' names → their value in a tiny model; the first that matches counts."""


def shrunk(config_class: str, **changes: Any) -> Any:
    """Return the default config of a class with small sizes and the zoo's token ids.

    Args:
        config_class: a class of transformers.
        changes: what else differs; a dict changes the fields of a part.
    """
    made = get(config_class)
    return made(**_changed(_small(made().to_dict()), changes))


def _small(values: dict[str, Any]) -> dict[str, Any]:
    layers = next((values[key] for key in ("num_hidden_layers", "depth") if isinstance(values.get(key), int)), None)
    small = {}
    for key, value in values.items():
        if key in ("per_layer_config", "transformers_version", "architectures", "head_dim_per_layer"):
            continue
        if isinstance(value, dict):
            value = _small(value)
        elif isinstance(value, list) and len(value) == layers:  # one entry for each block: of each kind one
            kinds = list(dict.fromkeys(map(str, value)))
            value = ([next(v for v in value if str(v) == kind) for kind in kinds] + value)[:BLOCKS]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            value = next((size for names, size in SIZES if any(re.fullmatch(name, key) for name in names)), value)
        small[key] = value
    return small


def _changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return values | {
        key: _changed(values[key], value) if isinstance(value, dict) and isinstance(values.get(key), dict) else value
        for key, value in changes.items()
    }
