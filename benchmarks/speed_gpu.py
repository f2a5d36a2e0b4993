"""One product on a GPU: packed planes against cuBLAS in bf16, weights rotating through more than the caches hold.

The layers of a block as vLLM runs them, at the numbers of tokens that it batches: `run_served`, in one command

    python benchmarks/speed.py --parts served --output results/speed_gpu_served.json
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from timing import copy_bandwidth, median_graph_us

from sab_hf.kernels.ops import sab_linear, sab_linears
from sab_hf.packed.linear import SABLinear  # noqa: F401  registers the op's implementations
from sab_hf.packing import stored_bytes

DEVICE = "cuda"
ROTATING_BYTES = 120e6
SHAPES = [(37888, 3584), (18944, 3584), (3584, 18944), (3584, 3584)]
SCHEMES = {"one plane": (1, 0.0), "one plane + 10 %": (1, 0.1), "two planes": (2, 0.0)}
HEAD = (152064, 3584)
GROUPS = {"q, k, v": [(3584, 3584), (512, 3584), (512, 3584)], "gate, up": [(18944, 3584)] * 2}

SERVED = GROUPS | {"o": [(3584, 3584)], "down": [(3584, 18944)]}
"""Layers of a block in vLLM → the matrices that they hold, which share an input."""
SERVED_TOKENS = (1, 2, 8, 16, 32, 64, 128, 256)


def cases() -> list[dict[str, Any]]:
    """Return what is measured, the most important first."""
    decode = [{"shape": shape, "scheme": scheme, "batch": 1, "exact": False} for shape in SHAPES for scheme in SCHEMES]
    head = [{"shape": HEAD, "scheme": "four planes", "batch": 1, "exact": False}]
    batches = [
        {"shape": SHAPES[0], "scheme": "one plane", "batch": batch, "exact": exact}
        for batch, exact in ((16, False), (1, True), (256, False), (2048, False), (4, False), (8, False), (64, False))
    ]
    return decode + head + batches


def random_operands(out_features: int, in_features: int, num_planes: int, num_significant: int) -> tuple:
    """Return random packed tensors on `DEVICE` in the order of the op's arguments, scales float16 around 1e-2."""

    def scales(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, device=DEVICE) * 0.02 + 0.01).half()

    def signs(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)

    row_bytes = math.ceil(in_features / 8)
    packed = signs(num_planes, out_features, row_bytes)
    full = (packed, scales(num_planes, out_features), scales(num_planes, in_features))
    if not num_significant:
        return (*full, None, None, None, None)
    mask = torch.zeros(row_bytes * 8, dtype=torch.uint8, device=DEVICE)
    mask[torch.randperm(in_features, device=DEVICE)[:num_significant]] = 1
    columns = (mask.view(-1, 8) << torch.arange(8, device=DEVICE)).sum(1, dtype=torch.uint8)
    residual = (signs(out_features, math.ceil(num_significant / 8)), scales(out_features), scales(num_significant))
    return (*full, columns, *residual)


def dense_us(shape: tuple[int, int], batch: int) -> float:
    """Return microseconds of one bf16 product by cuBLAS."""
    n, m = shape
    copies = max(2, math.ceil(ROTATING_BYTES / (2 * n * m)))
    weights = [torch.randn(n, m, dtype=torch.bfloat16, device=DEVICE) for _ in range(copies)]
    x = torch.randn(batch, m, dtype=torch.bfloat16, device=DEVICE)
    return median_graph_us([lambda W=W: torch.nn.functional.linear(x, W) for W in weights])


def packed_us(shape: tuple[int, int], num_planes: int, part: float, batch: int, exact: bool) -> float:
    """Return microseconds of one `sab::linear`, activations bf16, the preparation of the activations included."""
    n, m = shape
    k = round(part * m)
    copies = math.ceil(ROTATING_BYTES / stored_bytes(n, m, num_planes, k))
    operands = [random_operands(n, m, num_planes, k) for _ in range(max(2, copies))]
    x = torch.randn(batch, m, dtype=torch.bfloat16, device=DEVICE)
    return median_graph_us([lambda o=o: sab_linear(x, *o, exact) for o in operands])


def joined_us(shapes: list[tuple[int, int]], num_planes: int, part: float, batch: int = 1) -> float:
    """Return microseconds of the packed products of one input by several matrices in one call, activations bf16."""
    columns = shapes[0][1]
    x = torch.randn(batch, columns, dtype=torch.bfloat16, device=DEVICE)
    groups = _groups(shapes, num_planes, round(part * columns))
    if len(shapes) == 1:
        return median_graph_us([lambda group=group: sab_linear(x, *group[0]) for group in groups])
    lists = [[list(same) for same in zip(*group, strict=True)] for group in groups]
    return median_graph_us([lambda one=one: sab_linears(x, *one) for one in lists])


def one_launch_us(shapes: list[tuple[int, int]], num_planes: int, part: float, batch: int) -> float:
    """Return microseconds of the same products by the fused kernel in one launch, whether a rule chooses it or not."""
    from sab_hf.kernels.cuda.launch import fused_products
    from sab_hf.kernels.cuda.planes import planes

    columns = shapes[0][1]
    x = torch.randn(batch, columns, dtype=torch.bfloat16, device=DEVICE)
    groups = [[planes(*one) for one in group] for group in _groups(shapes, num_planes, round(part * columns))]
    return median_graph_us([lambda group=group: fused_products(x, group) for group in groups])


def _groups(shapes: list[tuple[int, int]], num_planes: int, k: int) -> list[list[tuple]]:
    """Return operands of several matrices with k significant columns, so often that no cache holds all."""
    copies = math.ceil(ROTATING_BYTES / sum(stored_bytes(*shape, num_planes, k) for shape in shapes))
    return [[random_operands(*shape, num_planes, k) for shape in shapes] for _ in range(max(2, copies))]


def group_us(shapes: list[tuple[int, int]], num_planes: int, part: float) -> dict[str, float]:
    """Return microseconds of the products of one input by several matrices, in bf16: joined, one by one, and by cuBLAS."""
    columns = shapes[0][1]
    x = torch.randn(1, columns, dtype=torch.bfloat16, device=DEVICE)
    groups = _groups(shapes, num_planes, round(part * columns))
    copies = max(2, math.ceil(ROTATING_BYTES / sum(2 * n * m for n, m in shapes)))
    weights = [[torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for shape in shapes] for _ in range(copies)]
    return {
        "us": joined_us(shapes, num_planes, part),
        "separate_us": median_graph_us(
            [lambda group=group: [sab_linear(x, *one) for one in group] for group in groups]
        ),
        "dense_us": median_graph_us([lambda Ws=Ws: [torch.nn.functional.linear(x, W) for W in Ws] for Ws in weights]),
    }


def run_served(save: Callable[[dict[str, Any]], None], progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure the layers of a block as vLLM runs them, packed ones against one bf16 matrix each; `save` as in `run`.

    Returns:
        `rows`, one for each layer and number of tokens; `blocks`, their sums for each number of tokens.
    """
    results: dict[str, Any] = {"rows": [], "blocks": []}
    scheme = "one plane + 10 %"
    for tokens in SERVED_TOKENS:
        packed = dense = 0.0
        for layer, shapes in SERVED.items():
            row = {"layer": layer, "shapes": shapes, "scheme": scheme, "tokens": tokens}
            try:
                row["us"] = joined_us(shapes, *SCHEMES[scheme], tokens)
                row["dense_us"] = dense_us((sum(rows for rows, _ in shapes), shapes[0][1]), tokens)
                row["ratio"] = row["dense_us"] / row["us"]
                if DEVICE == "cuda" and tokens > 1 and len(shapes) > 1:
                    row["one_launch_us"] = one_launch_us(shapes, *SCHEMES[scheme], tokens)
            except Exception as error:  # the other layers are still worth having
                row["error"] = repr(error)
            packed, dense = packed + row.get("us", math.nan), dense + row.get("dense_us", math.nan)
            results["rows"].append(row)
            progress(str(row))
            save(results)
            torch.cuda.empty_cache()
        if not math.isnan(packed + dense):
            results["blocks"].append({"tokens": tokens, "us": packed, "dense_us": dense, "ratio": dense / packed})
            progress(str(results["blocks"][-1]))
            save(results)
    return results


def run(save: Callable[[dict[str, Any]], None], progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure every case; `save` is called with all results after each."""
    results: dict[str, Any] = {"copy_GB/s": copy_bandwidth("cuda", 2**30), "rows": []}
    dense: dict[tuple, float] = {}
    for case in cases():
        shape, batch = tuple(case["shape"]), case["batch"]
        planes, part = SCHEMES.get(case["scheme"], (4, 0.0))
        try:
            if (shape, batch) not in dense:
                dense[shape, batch] = dense_us(shape, batch)
            us = packed_us(shape, planes, part, batch, case["exact"])
        except Exception as error:  # the other cases are still worth having
            results["rows"].append(case | {"error": repr(error)})
        else:
            nbytes = stored_bytes(*shape, planes, round(part * shape[1]))
            bandwidth = nbytes / us / 1e3
            results["rows"].append(
                case | {
                    "us": us, "dense_us": dense[shape, batch], "ratio": dense[shape, batch] / us, "GB/s": bandwidth,
                    "share_of_copy": bandwidth / results["copy_GB/s"],
                }
            )  # fmt: skip
        progress(str(results["rows"][-1]))
        save(results)
        torch.cuda.empty_cache()
    results["groups"] = []
    for name, shapes in GROUPS.items():
        scheme = "one plane + 10 %"
        row = {"group": name, "shapes": shapes, "scheme": scheme, "batch": 1} | group_us(shapes, *SCHEMES[scheme])
        results["groups"].append(row)
        progress(str(row))
        save(results)
    return results
