"""All kernels and tiles for the products of a 7B model on a GPU, against cuBLAS in bf16; `kernels/cuda/tiles.py` has the rules.

    python benchmarks/speed_gpu_sweep.py --output sweep.json

Kernels are compiled first, by as many processes as there are cores. Then every candidate is compared with the product of
the unpacked weights, in two runs that must agree bit for bit, and timed as in `speed_gpu.py`. What comes last on the
output is how many times as fast as dense the best one is, and how much slower the choice of the rules. `--show` prints that
of a file, nothing measured.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import torch
from speed_gpu import ROTATING_BYTES, SCHEMES, dense_us, random_operands
from timing import median_graph_us, provenance, write_json

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
Candidate = tuple[str, tuple | None]
"""A kernel and its tiles; None stands for those of a rule."""

FUSED = [
    FusedTiles(64, 8, 16, 4, 4, 2, True),
    FusedTiles(64, 8, 32, 4, 4, 2, True),
    FusedTiles(128, 4, 32, 4, 4, 2, True),
    FusedTiles(64, 4, 64, 4, 4, 2, True),
    FusedTiles(128, 4, 64, 4, 4, 2, True),
    FusedTiles(128, 4, 64, 8, 4, 1, True),
    FusedTiles(128, 4, 128, 8, 3, 1, True),
    FusedTiles(64, 4, 128, 4, 3, 2, True),
    FusedTiles(128, 2, 128, 4, 4, 2, True),
    FusedTiles(256, 2, 128, 8, 4, 1, True),
    FusedTiles(64, 2, 256, 4, 3, 2, True),
    FusedTiles(128, 2, 256, 8, 4, 1, True),
]
"""Tiles of the product of one pass, the fewest inputs first. Two programs of a processor: one makes weights while the tensor
cores work for the other."""


def candidates(shape: tuple[int, int], planes: int, part: float, batch: int, processors: int) -> list[Candidate]:
    """Return kernels and tiles that are worth measuring on a device of compute capability 9.0."""
    rows, columns = shape
    words, residual_words = math.ceil(columns / 32), math.ceil(round(part * columns) / 32)
    sizes = planes, rows, words, residual_words, processors
    found: list[Candidate] = []
    if cuda_tiles.kernel(batch, planes, rows, words, residual_words, 2, False, (9, 0)) == "single":
        found.append(("single", cuda_tiles.single_tiles(*sizes[1:])))
    if batch <= 8:
        found.append(("bits", cuda_tiles.bits_tiles(*sizes)))
    if batch <= 32:
        groups = cuda_tiles.power_of_two(math.ceil(batch / 8), 1, 2)
        found += [("fragments", tiles) for tiles in fragment_tiles(rows, words, groups)]
    least = {1: 0, 2: 0, 4: 0, 8: 16}.get(batch, min(batch, 256))
    for tiles in FUSED:
        if least and (least <= tiles.batch <= 2 * least or batch > 128 <= tiles.batch):
            count, slots = math.ceil(rows / tiles.rows) * math.ceil(batch / tiles.batch), processors * tiles.programs
            found.append(("fused", tiles))
            if count >= slots // 2:
                found.append(("fused", tiles._replace(shared=False)))
            elif tiles.programs > 1:
                found.append(("fused", tiles._replace(programs=1)))
    if 2 <= batch <= (2048 if planes == 1 and not part else 128):
        sums = planes + (residual_words > 0)
        found.append(("dot", cuda_tiles.dot_tiles(rows, words, sums, batch, processors, 2)))
    if batch >= 64:
        found.append(("dense", None))
    if batch >= 1024:
        found += [("dense", DenseTiles(16)), ("dense", DenseTiles(32))]
    return found


def fragment_tiles(rows: int, words: int, groups: int) -> list[FragmentsTiles]:
    """Return tiles of the kernel on fragments: those of few rows need more warps for each; four groups were never the best."""
    if words > 256:
        shares = [(1, 16, 16), (2, 16, 16), (2, 8, 8), (1, 8, 8)]
    elif rows <= 4096:
        shares = [(1, 8, 8), (2, 8, 8), (1, 4, 4)]
    else:
        shares = [(2, 8, 8), (2, 4, 4), (2, 4, 1), (1, 8, 8)]
    return [FragmentsTiles(tiles, groups, warps, split) for tiles, warps, split in shares]


@cache
def small_planes(columns: int, scheme: str) -> Planes:
    """Return a matrix of few rows for which kernels compile as for one of many."""
    planes, part = SCHEMES[scheme]
    return collect(*random_operands(256, columns, planes, round(part * columns)))


def product(name: str) -> Callable[..., torch.Tensor]:
    """Return what launches a kernel; only this needs Triton."""
    from sab_hf.kernels.cuda.launch import PRODUCTS

    return PRODUCTS[name]


def compile_one(task: tuple) -> tuple[tuple, str | None]:
    """Compile the kernels of a candidate into Triton's cache, and return what failed, or None."""
    columns, scheme, name, tiles, batch = task
    try:
        x = torch.randn(batch, columns, dtype=torch.bfloat16, device="cuda")
        product(name)(x, small_planes(columns, scheme), tiles)
        torch.cuda.synchronize()
    except Exception as error:
        return task, repr(error)[:300]
    return task, None


def task_of(shape: tuple[int, int], scheme: str, name: str, tiles: tuple | None, batch: int) -> tuple:
    """Return what a candidate is compiled by: its tiles, and what Triton makes different code for."""
    if name == "fused":
        tiles = tiles._replace(programs=1, shared=True)
    elif name == "dense":
        tiles = None
    if name != "bits":
        batch = batch if batch < 2 else 2 if batch % 16 else 16
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
    from sab_hf.kernels.cuda.launch import unpack

    return x.float() @ unpack(planes, torch.float32, 0, planes.rows).T


def check(
    name: str, tiles: tuple | None, x: torch.Tensor, planes: Planes, expected: torch.Tensor
) -> tuple[float, bool]:
    """Return a candidate's error, and whether it is right: small, finite, and the same again."""
    y = product(name)(x, planes, tiles)
    error = ((y.float() - expected).norm() / expected.norm()).item()
    same = torch.equal(y, product(name)(x, planes, tiles))
    return error, same and error < LARGEST_ERROR.get(name, LARGEST_ERROR_16_BIT)


def time_us(name: str, tiles: tuple | None, x: torch.Tensor, matrices: list[Planes], repeats: int) -> float:
    """Return microseconds of one product, everything included that prepares it."""
    multiply = product(name)
    return median_graph_us([lambda planes=planes: multiply(x, planes, tiles) for planes in matrices], repeats=repeats)


def measure(options: argparse.Namespace) -> dict:
    """Compile, then measure one shape after the other, each in a process of its own, until the time is over."""
    end = time.monotonic() + options.seconds
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    tasks = {
        task_of(SHAPES[shape], scheme, name, tiles, batch): None
        for shape, scheme, batch in itertools.product(options.shapes, SCHEMES, options.inputs)
        for name, tiles in candidates(SHAPES[shape], *SCHEMES[scheme], batch, processors)
    }
    start = time.monotonic()
    compiled = compile_all(list(tasks), options.compile_seconds)
    results = provenance("cuda") | {
        "command": " ".join(sys.argv), "processors": processors, "compile_s": time.monotonic() - start, "problems": [],
        "not compiled in time": len(tasks) - len(compiled), "rows": [], "dense": {},
    }  # fmt: skip
    results["problems"] += [[repr(task), error] for task, error in compiled.items() if error]
    print(f"{len(compiled)} of {len(tasks)} compiled in {results['compile_s']:.0f} s", flush=True)
    ready = {task for task, error in compiled.items() if error is None}
    for shape in options.shapes:
        try:  # after an error of the device no other kernel runs in its process
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                part = process.submit(measure_shape, shape, options.inputs, ready, end, processors).result()
        except Exception as error:
            results["problems"].append([shape, repr(error)[:300]])
            continue
        results["rows"] += part["rows"]
        results["dense"] |= part["dense"]
        write_json(options.output, results)
        print(f"{shape}: {len(part['rows'])} rows, {end - time.monotonic():.0f} s left", flush=True)
    return results


def measure_shape(shape: str, inputs: list[int], ready: set[tuple], end: float, processors: int) -> dict:
    """Measure the cells of a shape, all schemes, the fewest inputs first; begin none after `end`."""
    torch.backends.cuda.matmul.allow_tf32 = False
    rows, columns = SHAPES[shape]
    x = torch.randn(max(inputs), columns, dtype=torch.bfloat16, device="cuda")
    results: dict = {"rows": [], "dense": {}}
    for scheme, (planes, part) in SCHEMES.items():
        count = math.ceil(ROTATING_BYTES / stored_bytes(rows, columns, planes, round(part * columns)))
        matrices = [
            collect(*random_operands(rows, columns, planes, round(part * columns)))
            for _ in range(min(MOST_COPIES, max(2, count)))
        ]
        expected = reference(matrices[0], x)
        for batch in inputs:
            if time.monotonic() > end:
                return results
            key = f"{shape} {batch}"
            if key not in results["dense"]:
                results["dense"][key] = dense_us((rows, columns), batch)
            used, repeats = (matrices, 11) if batch < 512 else (matrices[:2], 7)
            for name, tiles in candidates((rows, columns), planes, part, batch, processors):
                if task_of((rows, columns), scheme, name, tiles, batch) not in ready:
                    continue
                row = {"shape": shape, "scheme": scheme, "batch": batch, "kernel": name, "tiles": tiles}
                results["rows"].append(row)
                try:
                    row["error"], row["right"] = check(name, tiles, x[:batch], matrices[0], expected[:batch])
                    row["us"] = time_us(name, tiles, x[:batch], used, repeats)
                except Exception as error:
                    row |= {"right": False, "problem": repr(error)[:300]}
                    if "CUDA error" in repr(error):
                        return results
        del matrices, expected
        torch.cuda.empty_cache()
    return results


def chosen(shape: tuple[int, int], planes: int, part: float, batch: int, processors: int) -> Candidate:
    """Return kernel and tiles that the rules choose on a device of compute capability 9.0."""
    rows, columns = shape
    words, residual_words = math.ceil(columns / 32), math.ceil(round(part * columns) / 32)
    sizes = planes, rows, words, residual_words, processors
    name = cuda_tiles.kernel(batch, planes, rows, words, residual_words, 2, False, (9, 0))
    tiles = {
        "single": lambda: cuda_tiles.single_tiles(*sizes[1:]),
        "bits": lambda: cuda_tiles.bits_tiles(*sizes),
        "fragments": lambda: cuda_tiles.fragments_tiles(*sizes, batch),
        "fused": lambda: cuda_tiles.fused_tiles(*sizes, batch),
        "dot": lambda: cuda_tiles.dot_tiles(rows, words, planes + (residual_words > 0), batch, processors, 2),
        "dense": lambda: None,
    }
    return name, tiles[name]()


def cells(results: dict) -> dict[tuple[str, str, int], tuple[list[dict], dict | None]]:
    """Return for each matrix, scheme and number of inputs the right rows, the fastest first, and the rules' choice or None."""
    found: dict[tuple[str, str, int], list[dict]] = {}
    for row in results["rows"]:
        if row["right"]:
            found.setdefault((row["shape"], row["scheme"], row["batch"]), []).append(row)
    pairs = {}
    for (shape, scheme, batch), rows in found.items():
        name, tiles = chosen(SHAPES[shape], *SCHEMES[scheme], batch, results["processors"])
        same = [row for row in rows if row["kernel"] == name and tuple(row["tiles"] or ()) == (tiles or ())]
        pairs[shape, scheme, batch] = sorted(rows, key=lambda row: row["us"]), same[0] if same else None
    return pairs


def show(results: dict) -> None:
    """Print problems, and of each cell the fastest candidate, its ratio to dense, the rules' choice and how much slower it is."""
    for row in results["rows"]:
        if not row["right"]:
            print("WRONG", row)
    for problem in results["problems"]:
        print("PROBLEM", *problem)
    slower = []
    for (shape, scheme, batch), (rows, choice) in cells(results).items():
        best, dense = rows[0], results["dense"][f"{shape} {batch}"]
        line = f"{shape}, {scheme}, {batch}: {best['us']:.1f} us, {dense / best['us']:.2f}×, {short(best)}"
        if choice is None:
            print(f"{line}; the rules' choice was not measured")
            continue
        slower.append(choice["us"] / best["us"])
        print(line if choice is best else f"{line}; {short(choice)} {slower[-1]:.2f}")
    near = sum(one <= 1.05 for one in slower)
    print(
        f"{near} of {len(slower)} choices within 5 % of the best, at most {max(slower, default=math.nan):.2f} times as long"
    )


def short(row: dict) -> str:
    """Return kernel and tiles."""
    return f"{row['kernel']}{tuple(row['tiles'] or ())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="speed_gpu_sweep.json")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--inputs", nargs="+", type=int, default=list(INPUTS))
    parser.add_argument("--seconds", type=float, default=450, help="after which no further cell is begun")
    parser.add_argument("--compile-seconds", type=float, default=200, help="after which the rest is left out")
    parser.add_argument("--show", metavar="FILE", help="compare the rules with what this file has, and measure nothing")
    options = parser.parse_args()
    if options.show:
        show(json.loads(Path(options.show).read_text()))
        return
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    results = measure(options)
    write_json(options.output, results)
    show(results)


if __name__ == "__main__":
    main()
