"""What a GGUF file says beside its weights: architecture, sizes of the model, rotary positions, tokenizer.

Written anew for the architectures of `ARCHITECTURES`; with other rotary positions or tokenizers, an existing GGUF file of the
model says it (`export_gguf(..., like=...)`). The keys are those of llama.cpp's own converter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..anatomy.llama_cpp import architecture_of

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    _QWEN2_SPLIT: "qwen2",
    _QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1): "llama-bpe",
}
"""Regular expression of a `Split` → name of llama.cpp's pre-tokenizer that splits alike."""

_ROTARY = ("default", "linear", "llama3", "mrope")
_SLIDING_PATTERN = 6
"""Of so many blocks of Gemma 3, the last sees everything; llama.cpp knows it by heart."""
_LARGEST_GEMMA = 62
"""Blocks of Gemma 3 27B, whose attention llama.cpp scales in a way of its own."""


def add_sizes(writer: Any, config: Any, rotary: nn.Module) -> None:
    """Add what llama.cpp must know of the text model to compute as transformers does.

    Args:
        writer: a `gguf.GGUFWriter`.
        config: the text config.
        rotary: its rotary embedding, with the frequencies as the model uses them.
    Raises:
        ValueError: the model does something that llama.cpp has no key for.
    """
    import gguf

    _check_activation(config)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    context = config.max_position_embeddings
    if config.model_type in ("mistral", "phi3") and config.sliding_window:
        context = min(
            context, config.sliding_window
        )  # llama.cpp sees all positions; within one window that is the same
    elif config.model_type != "gemma3_text" and getattr(config, "use_sliding_window", False):
        raise _unknown("sliding windows in some of its blocks")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gemma3_text":
        _add_gemma(writer, config, width)
    theta, kind, details = _rotary_of(config, "full_attention")
    writer.add_rope_freq_base(theta)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(details["factor"])
    elif kind == "llama3":
        base = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        factors = base / rotary.inv_freq.double().cpu().numpy()
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    if "mrope_section" in details:
        writer.add_rope_dimension_sections([*details["mrope_section"], 0, 0, 0][:4])


def _check_activation(config: Any) -> None:
    wanted = architecture_of(config).activation
    used = getattr(config, "hidden_activation", None) or config.hidden_act
    if used != wanted:
        raise _unknown(f"the activation {used!r} instead of {wanted!r}")


def _add_gemma(writer: Any, config: Any, width: int) -> None:
    pattern = [
        "full_attention" if (i + 1) % _SLIDING_PATTERN == 0 else "sliding_attention"
        for i in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != pattern:
        raise _unknown("blocks with and without a sliding window in another order than Gemma 3")
    largest = config.num_hidden_layers == _LARGEST_GEMMA
    scaled = config.hidden_size // config.num_attention_heads if largest else width
    if config.query_pre_attn_scalar != scaled:
        raise _unknown(f"`query_pre_attn_scalar` {config.query_pre_attn_scalar} instead of {scaled}")
    if config.final_logit_softcapping or config.attn_logit_softcapping:
        raise _unknown("logits with a soft cap")
    theta, kind, _ = _rotary_of(config, "sliding_attention")
    if kind != "default":
        raise _unknown(f"scaled rotary positions ({kind}) in its sliding windows")
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(theta)


def _rotary_of(config: Any, layer_type: str) -> tuple[float, str, dict[str, Any]]:
    """Return base, kind and details of the rotary positions of a type of layer; transformers 4 and 5 name them differently."""
    found = getattr(config, "rope_parameters", None)
    if found:
        details = found.get(layer_type, found)
        theta = details["rope_theta"]
    else:
        details, theta = getattr(config, "rope_scaling", None) or {}, config.rope_theta
        if layer_type == "sliding_attention":
            details, theta = {}, config.rope_local_base_freq
    kind = details.get("rope_type", details.get("type", "default"))
    share = details.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1)
    if share != 1:
        raise _unknown(f"rotary positions on {share:g} of each head")
    if kind not in _ROTARY:
        raise _unknown(f"rotary positions of the kind {kind!r}")
    return theta, kind, details


def _unknown(what: str) -> ValueError:
    return ValueError(
        f"this text model has {what}, which the export cannot write; pass `like` (--like) with an F16 GGUF file of the same model"
    )


def add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """Add the tokenizer that lies in a folder, with its special tokens and chat template.

    Args:
        writer: a `gguf.GGUFWriter`.
        folder: with tokenizer.json.
        vocab_size: rows of the embedding; further tokens fill it up.
    Raises:
        ValueError: llama.cpp has no tokenizer that does the same.
    """
    import gguf

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise _other_tokenizer("has no tokenizer.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    if model["type"] != "BPE":
        raise _other_tokenizer(f"is of the kind {model['type']!r}, no byte-pair encoding")
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    tokens = {i: text for text, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    if max(tokens) >= vocab_size:
        raise ValueError(
            f"the tokenizer has tokens up to {max(tokens)}, and the embedding {vocab_size} rows; the checkpoint holds the "
            "processor of another model"
        )
    texts, types = [], []
    for i in range(vocab_size):
        texts.append(tokens.get(i, f"[PAD{i}]"))
        types.append(_type_of(i, tokens, added, model))
    pieces = model.get("byte_fallback", False)  # SentencePiece, as Gemma and Llama 2 have it
    if pieces:
        ranks = {"".join(pair): -float(rank) for rank, pair in reversed(list(enumerate(_merges(model), 1)))}
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([ranks.get(text, -1e6) for text in texts])
        writer.add_add_space_prefix(_prepends(content))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(content, bool(model["merges"])))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=not pieces)
    if not pieces and not special.merges:  # llama.cpp wants one; the result of this one is no token
        special.merges = [" ".join(sorted(model["vocab"], key=model["vocab"].get)[:2])]
    special.add_to_gguf(writer, quiet=True)


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]


def _type_of(i: int, tokens: dict[int, str], added: dict[int, Any], model: dict[str, Any]) -> int:
    import gguf

    kinds = gguf.TokenType
    if i not in tokens:
        return kinds.UNUSED
    if tokens[i] == model.get("unk_token") and model.get("byte_fallback"):
        return kinds.UNKNOWN
    if i in added:
        return kinds.CONTROL if added[i]["special"] else kinds.USER_DEFINED
    text = tokens[i]
    if model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return kinds.BYTE
    return kinds.NORMAL


def _prepends(content: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""
    normalizer, pre = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    in_front = pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never"
    return in_front or any(part.get("type") == "Prepend" for part in parts)


def _pre_tokenizer(content: dict[str, Any], merges: bool) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer splits text before it merges."""
    normalizer, pre = content.get("normalizer"), content.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre])
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise _other_tokenizer(f"changes texts first ({normalizer.get('type')})")
    *before, last = parts
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _other_tokenizer("is not byte-level, or puts a space before a text")
    if not merges:  # how it splits makes no difference
        return "gpt-2"
    if last.get("use_regex", True):
        if not before:
            return "gpt-2"
        if len(before) == 1 and before[0] == {"type": "Digits", "individual_digits": True}:
            return "smollm"
    elif len(before) == 1 and before[0].get("type") == "Split" and before[0].get("behavior") == "Isolated":
        name = _PRE_TOKENIZERS.get(before[0]["pattern"].get("Regex"))
        if name:
            return name
    raise _other_tokenizer("splits texts in a way that is not known here")


def _other_tokenizer(what: str) -> ValueError:
    return ValueError(
        f"the tokenizer {what}, so the export cannot write it; pass `like` (--like) with an F16 GGUF file of the same model"
    )
