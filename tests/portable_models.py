"""Small random models of portable widths, with tokenizers of the kinds that llama.cpp knows."""

from __future__ import annotations

import json

import torch
from helpers import V5
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

_AFTER_NUMBERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SPLITS = {"qwen2": _WORDS + r"\p{N}" + _AFTER_NUMBERS, "llama-bpe": _WORDS + r"\p{N}{1,3}" + _AFTER_NUMBERS}
TEXTS = (
    "The quick brown fox isn't here, it's 12345 miles away.",
    "  two spaces,\ttabs\n\n\nand   lines \n",
    "Größe, naïve café, 東京タワー and emoji 🙂!",
    "def f(x):\n    return x**2 # ok?",
)
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n{% endfor %}"
VOCAB_SIZE, IMAGE = 512, 500
_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},  # biases of query, key and value alone
    "qwen3": {},  # norms after query and key
    "gemma3_text": {"query_pre_attn_scalar": 32, "sliding_window": 64, "tie_word_embeddings": True},
    "olmo2": {},  # norms after attention and feed-forward network, none before them
    "phi3": {"sliding_window": 64},  # fused projections
}
"""Families that `sab-hf export gguf` writes."""
OTHER_FAMILIES = {
    "gemma2": {},
    "mixtral": {"num_local_experts": 2},
    "olmo": {},  # norms without gains
    "gpt_neox": {},  # one norm before both parts, a network without a gate
}
"""Families that it does not write."""


def build_portable(family: str, seed: int = 0, **changes) -> nn.Module:
    """Return a random model, float32, with gains and biases that are not all alike."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **_SIZES | (FAMILIES | OTHER_FAMILIES).get(family, {}) | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    return _with_uneven_gains(model)


@torch.no_grad()
def _with_uneven_gains(model: nn.Module, has_tower: bool = False) -> nn.Module:
    """Give a model gains and biases that are not all alike, a tower with larger weights, and no end token."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(torch.rand_like(parameter) - 0.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1)
        elif has_tower and "language_model" not in name and "lm_head" not in name:
            parameter.normal_(std=0.15)
    model.generation_config.eos_token_id = None
    return model


def build_vlm(family: str, seed: int = 0) -> nn.Module:
    """Return a random vision-language model, float32: "gemma3", whose 64×64 pictures take 4 tokens, or "qwen2_5_vl".

    A 168×196 picture takes 42 tokens of the second one, and six windows of its first block.
    """
    torch.manual_seed(seed)
    sizes = {"num_attention_heads": 2, "intermediate_size": 96, "hidden_size": 64, "patch_size": 8}
    if family == "gemma3":
        text = AutoConfig.for_model("gemma3_text", **_SIZES | FAMILIES["gemma3_text"])
        vision = sizes | {"image_size": 64, "num_hidden_layers": 2, "vision_use_head": False}
        own = {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 501, "eoi_token_index": 502}
        own["tie_word_embeddings"] = True
    else:
        rope = {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
        text = AutoConfig.for_model("qwen2_5_vl_text", **_SIZES, **{"rope_parameters" if V5 else "rope_scaling": rope})
        vision = sizes | {
            "depth": 2,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 14,
            "fullatt_block_indexes": [1],
        }
        own = {"image_token_id": IMAGE, "tie_word_embeddings": False}
    config = AutoConfig.for_model(family, text_config=text.to_dict(), vision_config=vision, **own)
    model = AutoModelForImageTextToText.from_config(config).eval()
    return _with_uneven_gains(model, has_tower=True)


def build_tokenizer(kind: str = "gpt-2") -> PreTrainedTokenizerFast:
    """Return a tokenizer that was trained on `TEXTS`: a byte-level one that splits as llama.cpp's `kind`, or "pieces"."""
    if kind == "pieces":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, max_token_length=8)
        tokenizer.train_from_iterator([text.replace("🙂", "").replace("東", "") for text in TEXTS], trainer)
        content = tokenizer.to_str()
        tokenizer = Tokenizer.from_str(_without_bytes_as_special(content))
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
        )
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt-2", "smollm"))
    before = []
    if kind == "smollm":
        before = [pre_tokenizers.Digits(individual_digits=True)]
    elif kind in SPLITS:
        before = [pre_tokenizers.Split(Regex(SPLITS[kind]), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level]) if before else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS * 2, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=TEMPLATE
    )


def _without_bytes_as_special(content: str) -> str:
    """Return a tokenizer whose byte tokens are no added tokens, as in SentencePiece's."""
    plain = json.loads(content)
    plain["added_tokens"] = [token for token in plain["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(plain)
