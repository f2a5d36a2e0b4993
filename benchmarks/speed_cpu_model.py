"""`generate` on a CPU with a vision-language model of half a billion parameters: dense, PyTorch's int8 and bf16, packed.

The shape is Qwen2-0.5B's as the language model of LLaVA with a small SigLIP tower; `--shape` has larger ones. Weights are random,
planes are made directly, because speed and memory do not depend on their values. Every variant runs in a process of its own, so
that its resident memory is its own. Rows of an output file that are not measured again stay in it.

    python benchmarks/speed_cpu_model.py --threads 2 --output speed_cpu_model.json
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from timing import kernels_in_use, merge_rows, provenance
from torch import nn

VARIANTS = ("float32", "bfloat16", "int8", "packed", "packed all", "packed all, by PyTorch", "packed all, exact")
"""Packed: the language blocks, one plane; all: also the embedding and a head of its own, four planes. By PyTorch: without
recorded tokens; exact: without rounded activations."""
PLANES_OF_THE_REST = 4
IMAGE_TOKEN, IMAGE_TOKENS, TEXT_TOKENS, NEW_TOKENS = 151_646, 196, 32, 64
LANGUAGE = {  # vocabulary, hidden and intermediate size, layers, heads of queries, and of keys and values
    "0.5b": (151_936, 896, 4864, 24, 14, 2),  # Qwen2-0.5B
    "3b": (151_936, 2048, 11008, 36, 16, 2),  # the language model of Qwen2.5-VL-3B
    "7b": (152_064, 3584, 18944, 28, 28, 4),  # and of Qwen2.5-VL-7B
}


def config(shape: str, layers: int | None = None):
    """LLaVA of a language model of `shape`, with all its layers or as many as asked, and a SigLIP tower of 12 layers of 384."""
    from transformers import LlavaConfig, Qwen2Config, SiglipVisionConfig

    vocabulary, hidden, intermediate, all_layers, heads, kv_heads = LANGUAGE[shape]
    text = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers or all_layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=4096, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6, image_size=224, patch_size=16,
        vision_use_head=False,
    )  # fmt: skip
    return LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN, vision_feature_layer=-1,
        vision_feature_select_strategy="full", tie_word_embeddings=False,
    )  # fmt: skip


def random_tensors(rows: int, columns: int, num_planes: int, num_significant: int) -> dict[str, torch.Tensor]:
    """Packed tensors of a matrix with random signs and equal scales."""
    from sab_hf import packing

    tensors = {}
    for name, (dtype, shape) in packing.tensor_specs(rows, columns, num_planes, num_significant).items():
        if dtype == torch.uint8:
            tensors[name] = torch.randint(0, 256, shape, dtype=torch.uint8)
        else:
            tensors[name] = torch.full(shape, 0.15 if "row" in name else 0.2, dtype=torch.float16).view(torch.int16)
    if num_significant:
        mask = torch.zeros(columns, dtype=torch.bool)
        mask[torch.randperm(columns)[:num_significant]] = True
        tensors["significant_columns"] = packing.pack_bits(mask)
    return tensors


def pack(model: nn.Module, rest: bool, residual: float) -> None:
    """Replace Linears of the language blocks on the meta device, and with `rest` embedding and head, by random packed modules."""
    from sab_hf import SABLinear
    from sab_hf.packed.embedding import SABEmbedding
    from sab_hf.packed.linear import replace_module

    for name, module in list(model.named_modules()):
        inside = "layers." in name and "vision" not in name
        if isinstance(module, nn.Linear) and (inside or (rest and name.endswith("lm_head"))):
            planes, significant = (1, int(residual * module.in_features)) if inside else (PLANES_OF_THE_REST, 0)
            tensors = random_tensors(module.out_features, module.in_features, planes, significant)
            bias = None if module.bias is None else torch.zeros(module.out_features)
            replace_module(model, name, SABLinear(tensors, module.in_features, bias))
        elif rest and name.endswith("embed_tokens"):
            tensors = random_tensors(module.num_embeddings, module.embedding_dim, PLANES_OF_THE_REST, 0)
            replace_module(model, name, SABEmbedding(tensors, module.embedding_dim, module.weight.dtype))


def make_model(
    variant: str, shape: str = "0.5b", layers: int | None = None, residual: float = 0.0, text: bool = False
) -> nn.Module:
    """The model of one variant, evaluated, weights on the CPU; with `text` its language model alone."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    os.environ["SAB_EXACT"] = "1" if variant.endswith("exact") else "0"
    torch.manual_seed(0)
    dtype = torch.bfloat16 if variant == "bfloat16" else torch.float32
    with torch.device("meta"):
        whole = config(shape, layers)
        if text:
            model = AutoModelForCausalLM.from_config(whole.text_config, dtype=dtype)
        else:
            model = AutoModelForImageTextToText.from_config(whole, dtype=dtype)
    if variant.startswith("packed"):
        pack(model, "all" in variant, residual)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                filled = torch.empty(parameter.shape, dtype=parameter.dtype).normal_(0, 0.02)
                setattr(module, name, nn.Parameter(filled, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module.register_buffer(name, rebuild_buffer(module, name, buffer), persistent=False)
    if variant == "int8":
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    if variant.startswith("packed") and not variant.endswith("PyTorch"):
        from sab_hf import record_decoding

        record_decoding(model)
    return model.eval()


def rebuild_buffer(module: nn.Module, name: str, buffer: torch.Tensor) -> torch.Tensor:
    """What `from_config` on the meta device leaves out: rotary frequencies and position ids."""
    if name.endswith("inv_freq"):
        width = 2 * buffer.numel()
        return 1.0 / (10_000.0 ** (torch.arange(0, width, 2).float() / width))
    if name == "position_ids":
        return torch.arange(buffer.shape[-1]).expand(buffer.shape).clone()
    raise ValueError(f"{type(module).__name__} has a buffer `{name}` that this benchmark does not know")


def resident_mib(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (peak) of this process, MiB."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


class Clock:
    """A streamer that notes when each token came."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


def measure(variant: str, options: argparse.Namespace) -> dict[str, float | str]:
    """Time `generate` of one variant: seconds of the whole, of the prefill with the first token, ms per further token.

    Medians over the repeats; of the tokens' times the median over all tokens of all repeats.
    """
    before = resident_mib("VmRSS")
    model = make_model(variant, options.shape, options.layers, options.residual, options.text)
    arguments = {}
    if options.compile:
        model.model.language_model.forward = torch.compile(model.model.language_model.forward, dynamic=False)
        arguments = {"cache_implementation": "static"}
    if options.text:
        tokens = torch.arange(IMAGE_TOKENS + TEXT_TOKENS)[None] + 100
    else:
        tokens = torch.cat([torch.full((1, IMAGE_TOKENS), IMAGE_TOKEN), torch.arange(TEXT_TOKENS)[None] + 100], 1)
        dtype = model.dtype if variant == "bfloat16" else torch.float32
        arguments["pixel_values"] = torch.randn(1, 3, 224, 224, dtype=dtype)

    def generate(new_tokens: int) -> list[float]:
        clock = Clock()
        start = time.perf_counter()
        out = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=new_tokens,
            min_new_tokens=new_tokens, pad_token_id=0, streamer=clock, **arguments,
        )  # fmt: skip
        assert out.shape[1] == tokens.shape[1] + new_tokens
        return [stamp - start for stamp in clock.times[1:]]  # the first one is the prompt

    with torch.inference_mode():
        # a static cache is as long as the text, and compiled for its length; otherwise until tokens are recorded
        generate(NEW_TOKENS if options.compile else 5)
        runs = [generate(NEW_TOKENS) for _ in range(options.repeats)]
    steps = [later - earlier for run in runs for earlier, later in pairwise(run)]
    return {
        "variant": variant,
        "shape": options.shape,
        "compiled": options.compile,
        "isa": kernels_in_use() if variant.startswith("packed") else "PyTorch's choice",
        "repeats": options.repeats,
        "seconds": statistics.median(run[-1] for run in runs),
        "first_token_seconds": statistics.median(run[0] for run in runs),
        "ms_per_token": statistics.median(steps) * 1e3,
        "min_ms_per_token": min(steps) * 1e3,
        "resident_before_mib": before,
        "resident_mib": settled_resident_mib() - before,
        "peak_mib": resident_mib("VmHWM") - before,
    }


def settled_resident_mib() -> float:
    """Resident memory once what is free has gone back to the system: of a model's conversion nothing shall count."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    return resident_mib("VmRSS")


def environment() -> dict[str, str]:
    """That of a process which measures: it imports the package of this checkout."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shape", choices=LANGUAGE, default="0.5b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--text", action="store_true", help="the language model alone; a prompt of as many tokens")
    parser.add_argument(
        "--residual", type=float, default=0.0, help="share of significant columns in the language blocks"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--compile", action="store_true", help="static cache and a compiled language model")
    parser.add_argument("--output", default=None)
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments)))
        return
    kernels_in_use()
    results = {"provenance": provenance("cpu"), "rows": []}
    for variant in arguments.variants:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", variant]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment())
        if done.returncode:
            print(f"{variant}: failed", flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        results["rows"].append(row)
        print(
            f"{variant:22} {row['seconds']:7.2f} s, first token {row['first_token_seconds']:6.2f} s, then "
            f"{row['ms_per_token']:7.2f} ms/token; resident {row['resident_mib']:6.0f} MiB, peak {row['peak_mib']:6.0f}",
            flush=True,
        )
        if arguments.output:
            merge_rows(arguments.output, results, ("variant", "shape", "compiled", "isa"))


if __name__ == "__main__":
    main()
