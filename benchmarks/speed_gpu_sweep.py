"""All kernels and tiles for the products of a 7B model on a GPU, against cuBLAS in bf16: the table of `kernels/cuda/tiles.py`.

    python benchmarks/speed_gpu_sweep.py --output sweep.json

Kernels are compiled first, by as many processes as there are cores. Then every candidate is compared with the product of
the unpacked weights, in two runs that must agree bit for bit, and timed as in `speed_gpu.py`. What comes last on the
output is how many times as fast as dense the best one is, and the table to be pasted.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import sys
import time
from functools import cache

import torch
from speed_gpu import ROTATING_BYTES, SCHEMES, dense_us, random_operands
from timing import median_graph_us, provenance, write_json

from sab_hf.kernels.cuda import launch as kernels
from sab_hf.kernels.cuda import tiles as cuda_tiles
from sab_hf.kernels.cuda.planes import Planes
from sab_hf.kernels.cuda.planes import planes as collect
from sab_hf.kernels.cuda.tiles import DenseTiles, FragmentsTiles, FusedTiles
from sab_hf.packing import stored_bytes

SHAPES = {
    "q": (3584, 3584), "down": (3584, 18944), "gate": (18944, 3584), "gate, up": (37888, 3584), "k": (512, 3584),
}  # fmt: skip
INPUTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MOST_COPIES = 100
LARGEST_ERROR = {"single": 0.03, "int8": 0.03}
"""‖y - x Wᵀ‖ / ‖x Wᵀ‖ of kernels that round activations to int8; the others:"""
LARGEST_ERROR_16_BIT = 0.01

FUSED = [
    FusedTiles(64, 8, 16, 4, 4, 2, True),
    FusedTiles(64, 8, 32, 4, 4, 2, True),
    FusedTiles(128, 4, 32, 4, 4, 2, True),
    FusedTiles(64, 4, 64, 4, 4, 2, True),
    FusedTiles(128, 4, 64, 4, 4, 2, True),
    FusedTiles(128, 4, 64, 8, 4, 1, True),
    FusedTiles(128, 4, 128, 8, 3, 1, True),
    FusedTiles(128, 2, 128, 4, 4, 2, True),
    FusedTiles(256, 2, 128, 8, 4, 1, True),
    FusedTiles(128, 2, 256, 8, 4, 1, True),
]
"""The product of one pass, by inputs of a tile; the last three also without shared tiles for many inputs."""


def candidates(shape: tuple[int, int], planes: int, part: float, batch: int) -> list[tuple[str, tuple | None]]:
    """Return kernels and tiles that are worth measuring; None stands for the tiles of the rule."""
    rows, columns = shape
    words, residual_words = math.ceil(columns / 32), math.ceil(round(part * columns) / 32)
    found: list[tuple[str, tuple | None]] = []
    if cuda_tiles.kernel(batch, planes, rows, words, residual_words, 2, False, (9, 0)) == "single":
        found.append(("single", None))
    if batch <= 8:
        found.append(("bits", None))
    if batch <= 32:
        groups = cuda_tiles.power_of_two(math.ceil(batch / 8), 1, 4)
        found += [("fragments", tiles) for tiles in fragment_tiles(rows, words, groups)]
    least = {1: 0, 2: 0, 4: 0, 8: 16}.get(batch, min(batch, 256))
    fused = [tiles for tiles in FUSED if least and least <= tiles.batch <= 2 * least or batch > 128 <= tiles.batch]
    found += [("fused", tiles) for tiles in fused]
    if batch > 256:
        found += [("fused", tiles._replace(shared=False)) for tiles in FUSED[-3:]]
    if 2 <= batch <= (2048 if planes == 1 and not part else 128):
        found.append(("dot", None))
    if batch >= 256:
        found += [("dense", None), ("dense", DenseTiles(16)), ("dense", DenseTiles(32))]
    return found


def fragment_tiles(rows: int, words: int, groups: int) -> list[FragmentsTiles]:
    """Return tiles of the kernel on fragments: those of few rows need more warps for each."""
    if words > 256:
        shares = [(1, 16, 16), (2, 16, 16), (2, 8, 8), (1, 8, 8)]
    elif rows <= 4096:
        shares = [(1, 8, 8), (2, 8, 8), (1, 4, 4)]
    else:
        shares = [(2, 8, 8), (2, 4, 4), (2, 4, 1), (1, 8, 8)]
    found = [FragmentsTiles(tiles, groups, warps, split) for tiles, warps, split in shares]
    if groups == 4:  # fewer registers, and weights made twice
        found += [tiles._replace(groups=2) for tiles in found[:2]]
    return found


@cache
def small_planes(columns: int, scheme: str) -> Planes:
    """Return a matrix of few rows for which kernels compile as for one of many."""
    planes, part = SCHEMES[scheme]
    return collect(*random_operands(256, columns, planes, round(part * columns)))


def compile_one(task: tuple) -> tuple[tuple, str | None]:
    """Compile the kernels of a candidate into Triton's cache, and return what failed, or None."""
    columns, scheme, name, tiles, batch = task
    try:
        x = torch.randn(batch, columns, dtype=torch.bfloat16, device="cuda")
        kernels.PRODUCTS[name](x, small_planes(columns, scheme), tiles)
        torch.cuda.synchronize()
    except Exception as error:
        return task, repr(error)[:300]
    return task, None


def task_of(shape: tuple[int, int], scheme: str, name: str, tiles: tuple | None, batch: int) -> tuple:
    """Return what a candidate compiles for: kernels of the first two kinds do not depend on the number of inputs."""
    if name in ("fragments", "fused"):
        batch = 16
    elif name == "dense":
        batch, tiles = 16, None
    return shape[1], scheme, name, tiles, batch


def compile_all(tasks: list[tuple], seconds: float) -> dict[tuple, str | None]:
    """Return for each task that ended in time what failed."""
    done: dict[tuple, str | None] = {}
    start = time.monotonic()
    pool = multiprocessing.get_context("spawn").Pool(min(len(tasks), os.cpu_count() or 1))
    results = pool.imap_unordered(compile_one, tasks)
    try:
        while len(done) < len(tasks):
            task, error = results.next(timeout=max(0.0, seconds - (time.monotonic() - start)))
            done[task] = error
    except multiprocessing.TimeoutError:
        pass
    pool.terminate()
    return done


def reference(planes: Planes, x: torch.Tensor) -> torch.Tensor:
    """Return x Wᵀ with unrounded weights, float32."""
    return x.float() @ kernels.unpack(planes, torch.float32, 0, planes.rows).T


def check(name: str, tiles: tuple | None, x: torch.Tensor, planes: Planes, expected: torch.Tensor) -> tuple[float, bool]:
    """Return a candidate's error, and whether it is right: small, finite, and the same again."""
    y = kernels.PRODUCTS[name](x, planes, tiles)
    error = ((y.float() - expected).norm() / expected.norm()).item()
    same = torch.equal(y, kernels.PRODUCTS[name](x, planes, tiles))
    return error, same and error < LARGEST_ERROR.get(name, LARGEST_ERROR_16_BIT)


def measure(options: argparse.Namespace) -> dict:
    """Measure every cell, the fewest inputs first, until the time is over; write after each matrix."""
    start = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = False
    cells = [
        (shape, scheme, batch, name, tiles)
        for shape, scheme, batch in itertools.product(options.shapes, SCHEMES, options.inputs)
        for name, tiles in candidates(SHAPES[shape], *SCHEMES[scheme], batch)
    ]
    tasks = list(dict.fromkeys(task_of(SHAPES[cell[0]], cell[1], cell[3], cell[4], cell[2]) for cell in cells))
    compiled = compile_all(tasks, options.compile_seconds)
    results = provenance("cuda") | {
        "command": " ".join(sys.argv), "tasks": len(tasks), "compiled": len(compiled),
        "compile_s": time.monotonic() - start, "rows": [], "dense": {},
        "errors": [[repr(task), error] for task, error in compiled.items() if error],
    }  # fmt: skip
    print(f"{len(compiled)} of {len(tasks)} compiled in {results['compile_s']:.0f} s, {len(results['errors'])} failed")
    for shape, scheme in itertools.product(options.shapes, SCHEMES):
        rows, columns = SHAPES[shape]
        planes, part = SCHEMES[scheme]
        count = math.ceil(ROTATING_BYTES / stored_bytes(rows, columns, planes, round(part * columns)))
        matrices = [
            collect(*random_operands(rows, columns, planes, round(part * columns)))
            for _ in range(min(MOST_COPIES, max(2, count)))
        ]
        x = torch.randn(max(options.inputs), columns, dtype=torch.bfloat16, device="cuda")
        expected = reference(matrices[0], x)
        for batch in options.inputs:
            if time.monotonic() - start > options.seconds:
                results["stopped"] = [shape, scheme, batch]
                return results
            key = f"{shape} {batch}"
            if key not in results["dense"]:
                results["dense"][key] = dense_us((rows, columns), batch)
            used, repeats = (matrices, 11) if batch < 512 else (matrices[:2], 7)
            for name, tiles in candidates((rows, columns), planes, part, batch):
                if compiled.get(task_of((rows, columns), scheme, name, tiles, batch), "not in time") is not None:
                    continue
                row = {"shape": shape, "scheme": scheme, "batch": batch, "kernel": name, "tiles": tiles}
                try:
                    row["error"], row["right"] = check(name, tiles, x[:batch], matrices[0], expected[:batch])
                    product = kernels.PRODUCTS[name]
                    row["us"] = median_graph_us(
                        [lambda p=p: product(x[:batch], p, tiles) for p in used], repeats=repeats  # noqa: B023
                    )
                except Exception as error:
                    row |= {"right": False, "problem": repr(error)[:300]}
                results["rows"].append(row)
            write_json(options.output, results)
        del matrices, expected
        torch.cuda.empty_cache()
    return results


def best_rows(results: dict) -> dict[tuple[str, str], list[dict]]:
    """Return for each matrix the fastest right row of each number of inputs."""
    found: dict[tuple[str, str, int], dict] = {}
    for row in results["rows"]:
        key = row["shape"], row["scheme"], row["batch"]
        if row["right"] and row["us"] < found.get(key, row)["us"] + (key not in found):
            found[key] = row
    matrices: dict[tuple[str, str], list[dict]] = {}
    for (shape, scheme, _), row in sorted(found.items(), key=lambda item: item[0][2]):
        matrices.setdefault((shape, scheme), []).append(row)
    return matrices


def show(results: dict) -> None:
    """Print problems, the best of each cell, and the table for `tiles.py`."""
    for row in results["rows"]:
        if not row["right"]:
            print("WRONG", row)
    for task, error in results["errors"]:
        print("not compiled", task, error)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    lines = []
    for (shape, scheme), rows in best_rows(results).items():
        ratios = [results["dense"][f"{shape} {row['batch']}"] / row["us"] for row in rows]
        cells = [f"{row['batch']}: {row['us']:.1f} {r:.2f}× {row['kernel']}" for row, r in zip(rows, ratios, strict=True)]
        print(f"{shape}, {scheme} | " + " | ".join(cells))
        n, m = SHAPES[shape]
        planes, part = SCHEMES[scheme]
        merged: list[dict] = []
        for row in rows:
            if merged and (merged[-1]["kernel"], merged[-1]["tiles"]) == (row["kernel"], row["tiles"]):
                merged.pop()
            merged.append(row)
        merged[-1] = merged[-1] | {"batch": 2**31}
        choices = ", ".join(f'({row["batch"]}, "{row["kernel"]}", {short(row["tiles"])})' for row in merged)
        lines.append(f"    ({processors}, {planes}, {n}, {math.ceil(m / 32)}, {part > 0}): ({choices},),")
    print("MEASURED = {", *lines, "}", sep="\n")


def short(tiles: tuple | None) -> str:
    """Return the call that makes `tiles`."""
    return "None" if tiles is None else f"{type(tiles).__name__}({', '.join(map(str, tiles))})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="speed_gpu_sweep.json")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--inputs", nargs="+", type=int, default=list(INPUTS))
    parser.add_argument("--seconds", type=float, default=450, help="after which no further cell is begun")
    parser.add_argument("--compile-seconds", type=float, default=200, help="after which the rest is left out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    results = measure(options)
    write_json(options.output, results)
    show(results)


if __name__ == "__main__":
    main()
