"""The kernels that a sweep measures compile for compute capability 9.0, without a GPU, and keep everything in registers.

There the tensor cores read weights from registers while a program goes on: nothing may write to these before it has waited.
"""

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

from sab_hf.kernels.cuda.dot import dot_kernel
from sab_hf.kernels.cuda.fragments import fragments_kernel
from sab_hf.kernels.cuda.fused import fused_kernel
from sab_hf.kernels.cuda.tiles import dot_tiles

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

WORDS, RESIDUAL_WORDS = 112, 12
MATRIX = {"NUM_WORDS": WORDS, "STRIDE": WORDS, "PDL": True}
SCHEMES = {"one plane": (1, False), "one plane + 10 %": (1, True), "two planes": (2, False)}
INTEGERS = (
    "stride_batch", "stride_column", "batch", "rows", "in_features", "num_significant", "num_inputs", "whole", "row_tiles",
    "tiles", "padded_words",
)  # fmt: skip
TYPES = {"u_ptr": "*bf16", "x_ptr": "*bf16", "y_ptr": "*bf16", "row_scale_ptr": "*fp16", "partial_ptr": "*fp32"}
TYPES |= {"extra_row_scale_ptr": "*fp16", "residual_row_scale_ptr": "*fp16"}

pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter"),
]  # fmt: skip


def build(kernel, constants: dict, warps: int, stages: int, several: dict[str, tuple] | None = None):
    """Compile as for contiguous inputs; several: the types of arguments that are tuples of tuples."""
    names, several = kernel.arg_names, several or {}
    types = {name: "i32" if name in INTEGERS else TYPES.get(name, "*i32") for name in names} | several
    contiguous = ("stride_batch", "rows", "in_features", "padded_words")
    given = [(i, name) for i, name in enumerate(names) if name not in constants]
    aligned = [(i,) for i, name in given if types[name][0] == "*" or name in contiguous]
    for name, tuples in several.items():
        aligned += [(names.index(name), i, j) for i, one in enumerate(tuples) for j in range(len(one))]
    source = ASTSource(
        kernel, {name: "constexpr" if name in constants else types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {path: [["tt.divisibility", 16]] for path in aligned},
    )  # fmt: skip
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})


def stack_bytes(compiled, tmp_path: Path) -> int:
    """Return the bytes of a thread's local memory: spilled registers."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def early_writes(ptx: str) -> list[str]:
    """Return the instructions that write to a register of a left operand which a `wgmma` may still have to read.

    All paths are followed, with the groups of products that are under way.
    """
    body = re.sub(r"//[^\n]*", "", ptx[ptx.index("\n{", ptx.index(".entry")) + 2 :])
    lines = [line.strip() for line in re.split(r"[;\n]|(?<=:)\s", body)]
    lines = [line for line in lines if line and not line.startswith(".")]
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    found, seen, paths = {}, set(), [(0, (), frozenset())]
    while paths:
        i, groups, begun = paths.pop()
        while i < len(lines):
            guard, text = re.match(r"(@!?%p\d+\s+)?(.*)", lines[i], re.DOTALL).groups()
            name, _, operands = text.partition(" ") if " " in text else text.partition("\t")
            operands = operands.strip()
            if text.endswith(":"):
                if (i, groups, begun) in seen:
                    break
                seen.add((i, groups, begun))
            elif name.startswith("wgmma.mma_async"):
                left = re.findall(r"\{[^}]*\}|%\w+", operands)[1]
                begun |= frozenset(re.findall(r"%\w+", left)) if left.startswith("{") else frozenset()
            elif name.startswith("wgmma.commit_group"):
                groups, begun = (*groups, begun), frozenset()
            elif name.startswith("wgmma.wait_group"):
                groups = groups[-int(operands) :] if int(operands) else ()
            elif name.startswith("ret"):
                break
            elif name.startswith("bra"):
                paths.append((labels[operands], groups, begun))
                if not guard:
                    break
            elif not name.startswith(("st.", "cp.", "bar.", "red.", "fence", "griddepcontrol", "wgmma")):
                written = re.match(r"\{[^}]*\}|[%\w|]+", operands)
                registers = set(re.findall(r"%\w+", written[0])) if written else set()
                if registers & frozenset().union(*groups, begun):
                    found[i] = text
            i += 1
    return list(found.values())


@pytest.mark.parametrize(("scheme", "count"), [*((scheme, 1) for scheme in SCHEMES), ("one plane + 10 %", 3)])
def test_fused_kernels_fit_the_registers(scheme, count, tmp_path):
    from speed_gpu_sweep import FUSED

    planes, extra = SCHEMES[scheme]
    matrix = ("i32", "*bf16", *("*i32", "*i32", "*fp16") * 2)
    for tiles in dict.fromkeys(tiles._replace(programs=1) for tiles in FUSED):
        constants = MATRIX | {
            "stride_column": 1, "PLANES": planes, "EXTRA": extra, "EXTRA_STRIDE": WORDS, "EVEN": True, "ROWS": tiles.rows,
            "WORDS": tiles.words, "BATCH": tiles.batch, "WAIT": True,
        }  # fmt: skip
        compiled = build(fused_kernel, constants, tiles.warps, tiles.stages, {"matrices": (matrix,) * count})
        assert stack_bytes(compiled, tmp_path) == 0, tiles
        assert "wgmma.mma_async" in compiled.asm["ptx"]
        assert not early_writes(compiled.asm["ptx"]), tiles


def dot_ptx(batch: int, residual_words: int) -> str:
    tiles = dot_tiles(18944, WORDS, 1 + (residual_words > 0), batch, 132, 2)
    constants = MATRIX | {
        "PLANES": 1, "RESIDUAL_WORDS": residual_words, "RESIDUAL_STRIDE": residual_words, "ROWS": tiles.rows,
        "WORDS": tiles.words, "BATCH": tiles.batch, "SPLITS": tiles.splits, "WAIT": True,
    }  # fmt: skip
    return build(dot_kernel, constants, tiles.warps, tiles.stages).asm["ptx"]


@pytest.mark.parametrize("batch", [16, 32, 64, 128, 1024])
@pytest.mark.parametrize("residual_words", [0, RESIDUAL_WORDS])
def test_products_are_waited_for_before_their_weights_are_overwritten(batch, residual_words):
    ptx = dot_ptx(batch, residual_words)
    assert "wgmma.mma_async" in ptx
    assert not early_writes(ptx)


@pytest.mark.parametrize(("pending", "found"), [(0, []), (1, ["mov.b32 \t%r2, %r9"])])
def test_weights_that_are_overwritten_early_are_found(pending, found):
    """Two products are under way at the end of a step; with one left, the second one's weights may still be read."""
    products = "".join(
        f"\twgmma.mma_async.sync.aligned.m64n8k16 {{%r5}}, {{%r{i}}}, %rd1, 1;\n\twgmma.commit_group.sync.aligned;\n"
        for i in (1, 2)
    )
    step = f"$L__BB0_1:\n\twgmma.wait_group.sync.aligned {pending};\n\tmov.b32 \t%r1, %r8;\n\tmov.b32 \t%r2, %r9;\n{products}"
    assert early_writes(f".entry kernel(\n)\n{{\n{step}\t@%p1 bra \t$L__BB0_1;\n\tret;\n}}") == found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_on_fragments_fit_the_registers(scheme, tmp_path):
    from speed_gpu_sweep import fragment_tiles

    planes, residual = SCHEMES[scheme]
    words = RESIDUAL_WORDS if residual else 0
    for tiles in fragment_tiles(3584, WORDS, 2) + fragment_tiles(18944, WORDS, 2):
        constants = MATRIX | {
            "PLANES": planes, "RESIDUAL_WORDS": words, "RESIDUAL_STRIDE": words, "TILES": tiles.tiles,
            "GROUPS": tiles.groups, "WARPS": tiles.warps, "SPLIT": tiles.split,
        }  # fmt: skip
        assert stack_bytes(build(fragments_kernel, constants, tiles.warps, 3), tmp_path) == 0, tiles
