"""GGUF files in tests: what llama.cpp's converter makes of a dense model, and a reading of Q1_0, both written down once more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_qkv": "self_attn.qkv_proj",
}
"""Names in a file → in a block."""
OTHER_NORMS = {"ffn_norm": "post_attention_layernorm"}
NORMS_AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
OWN_NAMES = {
    "gemma3_text": NORMS_AFTER | {"ffn_norm": "pre_feedforward_layernorm"},
    "olmo2": NORMS_AFTER,
    "phi3": OTHER_NORMS | {"ffn_up": "mlp.gate_up_proj"},
}
"""Names that a kind of model has instead of `OTHER_NORMS`."""


def as_converted(model: nn.Module, prefix: str = "model.") -> dict[str, np.ndarray]:
    """Return the dense tensors of a text model as llama.cpp's converter writes them in F16; prefix: of its names."""
    state = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    config = model.config.get_text_config()
    gemma = config.model_type.startswith("gemma")
    tensors = {
        "token_embd.weight": state[f"{prefix}embed_tokens.weight"],
        "output_norm.weight": state[f"{prefix}norm.weight"],
    }
    if not config.tie_word_embeddings:
        tensors["output.weight"] = state["lm_head.weight"]
    for i in range(config.num_hidden_layers):
        for name, inner in (TENSORS | OWN_NAMES.get(config.model_type, OTHER_NORMS)).items():
            for kind in ("weight", "bias"):
                value = state.get(f"{prefix}layers.{i}.{inner}.{kind}")
                if value is None:
                    continue
                if config.model_type == "llama" and name in ("attn_q", "attn_k"):
                    heads = config.num_attention_heads if name == "attn_q" else config.num_key_value_heads
                    value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
                tensors[f"blk.{i}.{name}.{kind}"] = value
    if gemma:
        tensors = {name: value + name.endswith("norm.weight") for name, value in tensors.items()}
    return {name: np.ascontiguousarray(v, np.float32 if v.ndim == 1 else np.float16) for name, v in tensors.items()}


def read(path: Path) -> dict[str, np.ndarray]:
    """Return all tensors of a file as float32."""
    import gguf

    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q1_0:
            groups = np.asarray(tensor.data).reshape(len(tensor.data), -1, 18)
            scale = np.ascontiguousarray(groups[..., :2]).view(np.float16).astype(np.float32)
            bits = np.unpackbits(groups[..., 2:], axis=-1, bitorder="little").astype(np.float32)
            found[tensor.name] = ((2 * bits - 1) * scale).reshape(len(groups), -1)
        else:
            found[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return found


def write(
    path: Path, tensors: dict[str, np.ndarray], architecture: str = "llama", like: Path | None = None, **fields: str
) -> Path:
    """Write tensors and further strings as a file: with the metadata of another one, or of a Llama that says nothing else."""
    import gguf

    reader = None if like is None else gguf.GGUFReader(like)
    writer = gguf.GGUFWriter(path, "llama" if reader is None else reader.get_field("general.architecture").contents())
    for field in {} if reader is None else reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for name, value in fields.items():
        writer.add_string(name, value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
