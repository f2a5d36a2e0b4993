"""The kernels that a sweep measures compile for compute capability 9.0, without a GPU, and keep everything in registers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_cases import INTERPRETED

from sab_hf.kernels.cuda.fragments import fragments_kernel
from sab_hf.kernels.cuda.fused import fused_kernel

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

WORDS, RESIDUAL_WORDS = 112, 12
MATRIX = {"NUM_WORDS": WORDS, "STRIDE": WORDS, "PDL": True}
SCHEMES = {"one plane": (1, False), "one plane + 10 %": (1, True), "two planes": (2, False)}
INTEGERS = (
    "stride_batch", "stride_column", "batch", "rows", "in_features", "num_significant", "num_inputs", "whole", "row_tiles",
    "tiles",
)  # fmt: skip
TYPES = {"x_ptr": "*bf16", "y_ptr": "*bf16", "row_scale_ptr": "*fp16", "partial_ptr": "*fp32"}
TYPES |= {"extra_row_scale_ptr": "*fp16", "residual_row_scale_ptr": "*fp16"}

pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter"),
]  # fmt: skip


def stack_bytes(kernel, constants: dict, warps: int, stages: int, tmp_path: Path) -> int:
    """Compile as for contiguous inputs, and return the bytes of a thread's local memory: spilled registers."""
    names = kernel.arg_names
    types = {name: "i32" if name in INTEGERS else TYPES.get(name, "*i32") for name in names}
    aligned = [name for name in names if types[name].startswith("*") or name in ("stride_batch", "rows", "in_features")]
    source = ASTSource(
        kernel, {name: "constexpr" if name in constants else types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )  # fmt: skip
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages}
    )
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fused_kernels_fit_the_registers(scheme, tmp_path):
    from speed_gpu_sweep import FUSED

    planes, extra = SCHEMES[scheme]
    for tiles in dict.fromkeys(tiles._replace(programs=1) for tiles in FUSED):
        constants = MATRIX | {
            "stride_column": 1, "PLANES": planes, "EXTRA": extra, "EXTRA_STRIDE": WORDS, "EVEN": True, "ROWS": tiles.rows,
            "WORDS": tiles.words, "BATCH": tiles.batch,
        }  # fmt: skip
        assert stack_bytes(fused_kernel, constants, tiles.warps, tiles.stages, tmp_path) == 0, tiles


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_on_fragments_fit_the_registers(scheme, tmp_path):
    from speed_gpu_sweep import fragment_tiles

    planes, residual = SCHEMES[scheme]
    words = RESIDUAL_WORDS if residual else 0
    for tiles in fragment_tiles(3584, WORDS, 4) + fragment_tiles(18944, WORDS, 2):
        constants = MATRIX | {
            "PLANES": planes, "RESIDUAL_WORDS": words, "RESIDUAL_STRIDE": words, "TILES": tiles.tiles,
            "GROUPS": tiles.groups, "WARPS": tiles.warps, "SPLIT": tiles.split,
        }  # fmt: skip
        assert stack_bytes(fragments_kernel, constants, tiles.warps, 3, tmp_path) == 0, tiles
