"""One product on a GPU by other packages' kernels, beside packed planes and cuBLAS in bf16, in one run.

    python benchmarks/speed.py --parts peers --output results/speed_gpu_peers.json

Packages that are not installed are named as not run: gemlite (2 bits, groups of 64, as HQQ's weights are run), bitsandbytes (NF4)
and PyTorch's own int4 product (groups of 128). Weights are random and rotate through more than the caches hold.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import speed_gpu
import timing
import torch
from speed_gpu import ROTATING_BYTES, SCHEMES, SHAPES, random_operands

from sab_hf.kernels.ops import sab_linear
from sab_hf.packing import stored_bytes

TOKENS = (1, 8, 32, 128)
MOST_COPIES = 64

Product = Callable[[torch.Tensor], torch.Tensor]


def dense(n: int, m: int) -> Product:
    """Return a product by cuBLAS."""
    W = torch.randn(n, m, dtype=torch.bfloat16, device=speed_gpu.DEVICE)
    return lambda x: torch.nn.functional.linear(x, W)


def planes(scheme: str) -> Callable[[int, int], Product]:
    """Return what makes products of packed planes."""

    def make(n: int, m: int) -> Product:
        count, part = SCHEMES[scheme]
        operands = random_operands(n, m, count, round(part * m))
        return lambda x: sab_linear(x, *operands, False)

    return make


def int4(n: int, m: int, group: int = 128) -> Product:
    """Return a product by PyTorch's int4 kernel."""
    codes = torch.randint(0, 256, (n, m // 2), dtype=torch.uint8, device=speed_gpu.DEVICE)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(m // group, n, 2, dtype=torch.bfloat16, device=speed_gpu.DEVICE) / 100
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)


def gemlite(n: int, m: int, group: int = 64) -> Product:
    """Return a product by gemlite's kernels of 2 bits."""
    import gemlite
    from gemlite.helper import A16W2_HQQ_INT

    gemlite.set_autotune("fast")
    codes = torch.randint(0, 4, (n, m), dtype=torch.uint8, device=speed_gpu.DEVICE)
    scales, zeros = (torch.rand(n, m // group, dtype=torch.bfloat16, device=speed_gpu.DEVICE) / 100 for _ in range(2))
    return A16W2_HQQ_INT(device=speed_gpu.DEVICE, dtype=torch.bfloat16).from_weights(codes, scales, zeros).forward


def nf4(n: int, m: int) -> Product:
    """Return a product by bitsandbytes' kernels of NF4."""
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(m, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    return layer.to(speed_gpu.DEVICE)


KINDS: dict[str, tuple[str | None, float, Callable[[int, int], Product]]] = {
    "dense": (None, 16, dense),
    "one plane": (None, 1, planes("one plane")),
    "one plane + 10 %": (None, 1.1, planes("one plane + 10 %")),
    "two planes": (None, 2, planes("two planes")),
    "gemlite, 2 bits": ("gemlite", 2.5, gemlite),
    "bitsandbytes, NF4": ("bitsandbytes", 4.5, nf4),
    "PyTorch, int4": (None, 4.25, int4),
}
"""Name → the package that it needs beside PyTorch, stored bits a weight, about, and what makes its products."""


def run(save: Callable[[dict[str, Any]], None], progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure all kinds on each shape; `save` is called with all results after each kind."""
    results: dict[str, Any] = {"rows": [], "not run": {}}
    for name, (package, _, _) in KINDS.items():
        if package and importlib.util.find_spec(package) is None:
            results["not run"][name] = f"{package} is not installed"
    for shape in SHAPES:
        dense_us: dict[int, float] = {}
        for name, (_, bits, make) in KINDS.items():
            if name in results["not run"]:
                continue
            size = stored_bytes(*shape, max(1, round(bits)), 0)
            try:
                products = [make(*shape) for _ in range(min(MOST_COPIES, max(2, math.ceil(ROTATING_BYTES / size))))]
                for tokens in TOKENS:
                    x = torch.randn(tokens, shape[1], dtype=torch.bfloat16, device=speed_gpu.DEVICE)
                    us = timing.median_graph_us([lambda product=product, x=x: product(x) for product in products])
                    if name == "dense":
                        dense_us[tokens] = us
                    row = {"shape": shape, "kind": name, "tokens": tokens, "us": us}
                    results["rows"].append(row | {"ratio": dense_us.get(tokens, math.nan) / us})
                    progress(str(results["rows"][-1]))
            except Exception as error:  # the others are still worth having
                results["rows"].append({"shape": shape, "kind": name, "error": repr(error)[:300]})
                progress(str(results["rows"][-1]))
            products = []
            if speed_gpu.DEVICE == "cuda":
                torch.cuda.empty_cache()
            save(results)
    return results
