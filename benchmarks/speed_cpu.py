"""The CPU kernels of `sab::linear` against `torch.nn.functional.linear` in float32, weights cold in the caches.

Every row times float32, the int8 look-up and the exact kernel in turn, repeat by repeat, so that a busy moment hits all
of them; medians and minima are written. Weights rotate through more memory than the last-level cache holds (`--cache`).

    SAB_CPU_ISA=avx2 python benchmarks/speed_cpu.py --threads 2 --output speed_cpu.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from timing import copy_bandwidth, kernels_in_use, merge_rows, provenance
from torch import Tensor

from sab_hf import packing
from sab_hf.kernels.ops import sab_linear

SHAPES = ((18944, 3584), (3584, 18944), (4864, 896))
SCHEMES = {"one plane": (1, 0.0), "one plane + 10 %": (1, 0.1), "two planes": (2, 0.0), "four planes": (4, 0.0)}


def random_operands(rows: int, columns: int, num_planes: int, residual: float) -> list[Tensor | None]:
    """Random packed tensors in the order of the op's arguments."""
    significant = int(residual * columns)
    operands: list[Tensor | None] = [None] * 7
    for index, (name, (dtype, shape)) in enumerate(
        packing.tensor_specs(rows, columns, num_planes, significant).items()
    ):
        if dtype == torch.uint8:
            operands[index] = torch.randint(0, 256, shape, dtype=torch.uint8)
        else:
            operands[index] = torch.rand(shape).half()
        if name == "significant_columns":
            mask = torch.zeros(columns, dtype=torch.bool)
            mask[torch.randperm(columns)[:significant]] = True
            operands[index] = packing.pack_bits(mask)
    return operands


def time_in_turn(calls: dict[str, Callable[[int], Tensor]], repeats: int) -> dict[str, list[float]]:
    """Time every call once a repeat, in turn; milliseconds by name. A call gets the number of the repeat."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call(repeat)
            if repeat >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def measure(rows: int, columns: int, scheme: str, tokens: int, arguments: argparse.Namespace) -> dict:
    """One row of the table: float32, look-up and exact on the same inputs."""
    num_planes, residual = SCHEMES[scheme]
    x = torch.randn(tokens, columns)
    first = random_operands(rows, columns, num_planes, residual)
    nbytes = sum(tensor.nbytes for tensor in first if tensor is not None)
    copies = 1 + arguments.cache * 2**20 // nbytes if tokens == 1 else 2
    packed = [first] + [[t if t is None else t.clone() for t in first] for _ in range(copies - 1)]
    dense_copies = max(2, 1 + arguments.cache * 2**20 // (4 * rows * columns)) if tokens == 1 else 2
    dense = [torch.randn(rows, columns) for _ in range(dense_copies)]
    for operands in packed:  # makes the kernel layouts
        sab_linear(x[:1], *operands)
    calls = {
        "float32": lambda i: torch.nn.functional.linear(x, dense[i % dense_copies]),
        "look-up": lambda i: sab_linear(x, *packed[i % copies], False),
        # other planes than those that the look-up call of the same repeat left in the cache
        "exact": lambda i: sab_linear(x, *packed[(i + copies // 2) % copies], True),
    }
    times = time_in_turn(calls, arguments.repeats if tokens <= 16 else max(3, arguments.repeats // 3))
    row: dict = {"rows": rows, "columns": columns, "scheme": scheme, "tokens": tokens, "packed_bytes": nbytes}
    row |= {f"{name} ms": statistics.median(values) for name, values in times.items()}
    row |= {f"{name} min ms": min(values) for name, values in times.items()}
    exact, lut = sab_linear(x, *first, True).double(), sab_linear(x, *first, False).double()
    row["look-up nmse"] = ((lut - exact).square().sum() / exact.square().sum()).item()
    return row


def show(row: dict, bandwidth: float) -> None:
    """Print times, ratios to float32 (medians; minima in brackets) and the share of the copy bandwidth at one token."""
    text = f"{row['rows']:6}×{row['columns']:<6} {row['scheme']:17} {row['tokens']:4} tokens"
    text += f"   float32 {row['float32 ms']:8.2f} ms"
    for name in ("look-up", "exact"):
        ratio, best = (row["float32" + kind] / row[name + kind] for kind in (" ms", " min ms"))
        text += f" | {name} {row[name + ' ms']:8.3f} ms {ratio:5.1f}× ({best:5.1f}×)"
        if row["tokens"] == 1:
            text += f" {row['packed_bytes'] / row[name + ' ms'] / 1e6 / bandwidth:4.0%}"
    print(text, f"| nmse {row['look-up nmse']:.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--shapes", nargs="+", default=[f"{n}x{m}" for n, m in SHAPES])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--cache", type=int, default=320, help="MiB that weights of one token's rows rotate through")
    parser.add_argument("--output", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    isa = kernels_in_use()
    bandwidth = copy_bandwidth("cpu", 256 << 20)
    results = {"provenance": provenance("cpu") | {"isa": isa}, "rows": []}
    print(results["provenance"], f"copy {bandwidth:.1f} GB/s", flush=True)
    for shape in arguments.shapes:
        rows, columns = (int(number) for number in shape.split("x"))
        for tokens in arguments.tokens:
            for scheme in arguments.schemes if tokens == 1 else arguments.schemes[:1]:
                with torch.inference_mode():
                    row = measure(rows, columns, scheme, tokens, arguments) | {"copy_gb_per_s": bandwidth}
                results["rows"].append(row)
                show(row, bandwidth)
                if arguments.output:
                    merge_rows(arguments.output, results, ("rows", "columns", "scheme", "tokens"))


if __name__ == "__main__":
    main()
