"""Text models of several families in vLLM, packed and of random weights; the greedy answers must be those of transformers.

    python tests/vllm_families.py FOLDER [FAMILY ...]

What differs between them is how files and vLLM name and fuse matrices, and which of embedding and head are packed or one.
Prints a line for each, and fails if a token differs. All run in this process, see `.ci/vllm`.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from pathlib import Path

os.environ |= {"SAB_EXACT": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}

import torch
import transformers
from transformers import AutoModelForCausalLM

import sab_hf
from sab_hf import SABQuantizationConfig

MAX_TOKENS, VOCABULARY = 12, 300
SIZES = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCABULARY, "max_position_embeddings": 512, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
HEADS = {"head_dim": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
SHARED = {"shared_expert_intermediate_size": 96}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64, "query_pre_attn_scalar": 32}
FAMILIES = {
    "Llama, embedding and head packed": ("LlamaConfig", HEADS, False, {"rest_bits": 4}),
    "Llama, packed embedding is the head": ("LlamaConfig", HEADS, True, {"rest_bits": 4}),
    "Llama, head packed": ("LlamaConfig", HEADS, False, {"head_bits": 3}),
    "Qwen3, dense embedding is the head": ("Qwen3Config", HEADS, True, {}),
    "Gemma 3, packed embedding is the head": ("Gemma3TextConfig", HEADS | WINDOWS, True, {"rest_bits": 4}),
    "Phi-3, whose files have q, k, v and gate, up as one": ("Phi3Config", {}, False, {"rest_bits": 4}),
    "Qwen3-MoE, experts dense": ("Qwen3MoeConfig", HEADS | EXPERTS, False, {"modules_to_not_convert": ["experts"]}),
    "Qwen3-MoE, experts packed": ("Qwen3MoeConfig", HEADS | EXPERTS, False, {}),
    "Qwen2-MoE, experts packed, one of them shared": ("Qwen2MoeConfig", EXPERTS | SHARED, False, {}),
    "Mixtral, experts packed": ("MixtralConfig", LOCAL_EXPERTS, False, {}),
    "Mixtral, experts dense": ("MixtralConfig", LOCAL_EXPERTS, False, {"modules_to_not_convert": ["experts"]}),
}
"""Name → config class of transformers, its fields beside `SIZES`, whether embedding and head are one, settings of the method."""


def make(folder: Path, kind: str, fields: dict, tied: bool, settings: dict) -> torch.nn.Module:
    """Save a packed model of random weights, and return it."""
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SIZES | fields, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).eval()
    batches = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in torch.randint(3, VOCABULARY, (4, 2, 24))
    ]
    quick = {"num_samples": 8, "alternations": 2, "refine_steps": 0, "distil_steps": 0, "sensitivity_samples": 4}
    method = SABQuantizationConfig(
        calibration=batches, allow_text_only=True, allow_low_coverage=True, **quick | settings
    )
    sab_hf.quantize(model, None, batches, method)
    model.generation_config.eos_token_id = None  # so that answers have a known length
    model.save_pretrained(folder)
    return model


def answers_of_transformers(model: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]]:
    """Return the tokens of greedy answers."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def answers_of_vllm(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Return the tokens of greedy answers to all prompts at once."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(folder), dtype="float32", enforce_eager=True, max_model_len=128, skip_tokenizer_init=True, max_num_seqs=8
    )
    how = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, detokenize=False, ignore_eos=True)
    results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], how, use_tqdm=False)
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return [list(result.outputs[0].token_ids) for result in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    options = parser.parse_args()
    for number, name in enumerate(options.families):
        start, folder = time.perf_counter(), options.folder / f"family_{number}"
        model = make(folder, *FAMILIES[name])
        prompts = [torch.randint(3, VOCABULARY, (length,)).tolist() for length in (5, 17, 30)]
        expected, got = answers_of_transformers(model, prompts), answers_of_vllm(folder, prompts)
        if got != expected:
            sys.exit(f"{name}: tokens {got}, of transformers {expected}")
        count = sum(map(len, got))
        print(f"{name}: {count} tokens, all those of transformers, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
