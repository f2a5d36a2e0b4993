"""End to end on a GPU: a model of Qwen2.5-VL-7B's shape with random weights, dense bf16 against packed, decoding."""

import gc
import statistics
import time
from typing import Any

import torch
from speed_gpu import random_operands
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, StaticCache

import sab_hf
from sab_hf.packed.linear import SABLinear, replace_module

VARIANTS = ("bf16", "packed", "packed, 4-plane head")
PACKED_NAMES = (
    "signs",
    "row_scale",
    "col_scale",
    "significant_columns",
    "residual_signs",
    "residual_row_scale",
    "residual_col_scale",
)
# the values of Qwen/Qwen2.5-VL-7B-Instruct's config.json
TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "out_hidden_size": 3584,
    "hidden_act": "silu",
}


def build(variant: str) -> Qwen2_5_VLForConditionalGeneration:
    """Return the model on the GPU: random bf16 weights; packed, one plane and a tenth for the language Linears."""
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=False)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = Qwen2_5_VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)
    if variant != "bf16":
        _pack(model, head_planes=4 if "head" in variant else 0)
    gc.collect()
    torch.cuda.empty_cache()
    return model


def _pack(model: nn.Module, head_planes: int) -> None:
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, linear in linears:
        if "language_model.layers" in name:
            _replace(model, name, linear, 1, round(0.1 * linear.in_features))
        elif name == "lm_head" and head_planes:
            _replace(model, name, linear, head_planes, 0)


def _replace(model: nn.Module, name: str, linear: nn.Linear, num_planes: int, num_significant: int) -> None:
    operands = random_operands(linear.out_features, linear.in_features, num_planes, num_significant)
    tensors = {
        key: tensor.view(torch.int16) if tensor.dtype == torch.float16 else tensor
        for key, tensor in zip(PACKED_NAMES, operands, strict=True)
        if tensor is not None
    }
    replace_module(model, name, SABLinear(tensors, linear.in_features, linear.bias))


@torch.inference_mode()
def measure_generate(model: Any, batch: int, tokens: int, repeats: int, ready: Any = None) -> dict[str, float]:
    """Return decoding speed of `generate` with a static cache, which compiles the model, and memory.

    Two lengths are timed, and the difference divided: prefill and start-up cancel. In turn, `generate` waits for each token
    and decodes ahead (`sab_hf.decode_ahead`).

    Args:
        ready: called after compilation, before anything is timed.
    """
    prompt = torch.randint(0, 150000, (batch, 32), device="cuda")

    def generate(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count,
            min_new_tokens=count, cache_implementation="static", pad_token_id=0, max_length=None,
        )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - start

    short = tokens // 4
    start = time.perf_counter()
    for _ in range(2):
        generate(tokens), generate(short)
    compiling = time.perf_counter() - start
    if ready is not None:
        ready()
    torch.cuda.reset_peak_memory_stats()
    milliseconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats):
        for ahead, several in milliseconds.items():
            sab_hf.decode_ahead(ahead)
            several.append((generate(tokens) - generate(short)) / (tokens - short) * 1e3)
    sab_hf.decode_ahead(False)
    speeds = {}
    for ahead, several in milliseconds.items():
        prefix, step = "ahead_" if ahead else "", statistics.median(several)
        speeds[f"{prefix}ms_per_step"] = step
        speeds[f"{prefix}ms_per_step_range"] = [min(several), max(several)]
        speeds[f"{prefix}tokens_per_second"] = batch / step * 1e3
    return speeds | {
        "weights_GiB": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30,
        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30,
        "first_generations_s": compiling,
    }


@torch.inference_mode()
def measure_steps(
    model: Any, batch: int, tokens: int, repeats: int, ready: Any = None, observe: Any = None
) -> dict[str, float]:
    """Return the speed of greedy decoding steps alone, which stay on the device: what `generate` adds on the host is left out.

    The model's forward pass and the choice of the next token are compiled into one graph (`fullgraph`, CUDA graphs), with a
    static cache; the host does not wait between steps.

    Args:
        ready: called after compilation, before anything is timed.
        observe: called after that with a function that computes `tokens` more steps, which it may call once; what it
            returns is added to the result.
    """
    prompt = torch.randint(0, 150000, (batch, 32), device="cuda")
    runs = repeats + 1 + (observe is not None)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=32 + runs * tokens)

    def forward(ids: Tensor, positions: Tensor) -> Tensor:
        places = positions.expand(3, batch, -1)
        logits = model(input_ids=ids, position_ids=places, past_key_values=cache, use_cache=True).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    ids = forward(prompt, torch.arange(32, device="cuda"))
    position = torch.full((1,), 32, device="cuda")
    step = torch.compile(forward, mode="reduce-overhead", fullgraph=True)

    def run() -> float:
        nonlocal ids
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(tokens):
            torch.compiler.cudagraph_mark_step_begin()
            ids = step(ids, position).clone()
            position.add_(1)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / tokens

    run()
    if ready is not None:
        ready()
    seconds = statistics.median([run() for _ in range(repeats)])
    observed = {} if observe is None else observe(run)
    return {"step_ms": seconds * 1e3, "steps_tokens_per_second": batch / seconds} | observed
