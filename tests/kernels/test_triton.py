"""The Triton kernels against a dense product in float64: in Triton's interpreter here, on a GPU with the marker `gpu`.

bfloat16 runs on GPUs only: the interpreter mis-evaluates products of it.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import inputs, level_problem, operands, random_planes

from sab_hf.method import fit, levels
from sab_hf.method.divergence import divergence
from sab_hf.method.hessian import damp, feedback_factor

pytest.importorskip("triton", reason="Triton is not installed")

from triton_cases import INTERPRETED, interpreted, kernels, problem

OTHERS = [str(Path(__file__).with_name(f"test_triton_{name}.py")) for name in ("joined", "attention")]
SIZES = [(6, 13, 1, 0), (9, 40, 2, 7), (37, 300, 1, 33), (5, 64, 2, 1), (3, 33, 3, 33), (1, 8, 4, 0)]
GPU_SIZES = [
    *SIZES,
    (70, 530, 3, 530),
    (129, 1000, 2, 100),
    (256, 3584, 1, 358),
    (515, 4304, 2, 1),
    (64, 18944, 1, 1895),
]


def test_kernels_pass_in_the_interpreter():
    """Run the tests of the kernels in a process of its own: the interpreter is chosen when Triton is imported."""
    if INTERPRETED:
        pytest.skip("this is that process")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", __file__, *OTHERS],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("this Triton's interpreter does not run with this NumPy")
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


def hold_exact(
    y: torch.Tensor, x: torch.Tensor, W: torch.Tensor, planes, scaled_dtype: torch.dtype, roundings: int = 1
) -> None:
    """Hold `y` to float32 sums, `roundings` of each scaled activation or weight to `scaled_dtype`, and one of the result."""
    x64 = x.cpu().double()
    exact = x64 @ W.T
    magnitude = x64.abs() @ magnitudes(planes).T
    bound = torch.finfo(x.dtype).eps * exact.abs() + 1e-6
    bound += (roundings * torch.finfo(scaled_dtype).eps / 2 + 4e-6) * magnitude
    assert y.shape == exact.shape
    assert y.dtype == x.dtype
    assert ((y.cpu().double() - exact).abs() <= bound).all()


def magnitudes(planes) -> torch.Tensor:
    """Return Σ_k |r_k| |c_k|ᵀ and the residual plane's, [n, m] float64: what rounding errors scale with."""
    total = torch.einsum("kn,km->nm", planes.row_scale.double().abs(), planes.col_scale.double().abs())
    if planes.columns is not None:
        extra = torch.outer(planes.residual_row_scale.double().abs(), planes.residual_col_scale.double().abs())
        total[:, planes.columns.long()] += extra
    return total.cpu()


def hold_rounded(y: torch.Tensor, x: torch.Tensor, W: torch.Tensor, planes, group: int, levels: int) -> None:
    """Hold `y` to half a step of its group's scale for each scaled activation: |r| Σ_groups group · max |c ⊙ x| / 2 levels."""
    x64, m = x.cpu().double(), W.shape[1]
    exact = x64 @ W.T

    def half_steps(scaled: torch.Tensor) -> torch.Tensor:  # [batch, columns] → [batch]
        padded = torch.nn.functional.pad(scaled.abs(), (0, -scaled.shape[1] % group)).unflatten(1, (-1, group))
        return (padded.amax(2) * group / (2 * levels)).sum(1)

    bound = torch.finfo(x.dtype).eps * exact.abs() + 1e-6 + 4e-6 * x64.abs() @ magnitudes(planes).T
    for r, c in zip(planes.row_scale.cpu().double(), planes.col_scale.cpu().double(), strict=True):
        bound = bound + half_steps(x64 * c)[:, None] * r.abs() * 1.001
    if planes.columns is not None:
        scaled = x64[:, planes.columns.cpu().long()] * planes.residual_col_scale.cpu().double()
        bound = bound + half_steps(scaled)[:, None] * planes.residual_row_scale.cpu().double().abs() * 1.001
    assert y.shape == (x.shape[0], W.shape[0])
    assert m == x.shape[1]
    assert ((y.cpu().double() - exact).abs() <= bound).all()


def hold_int8(y: torch.Tensor, x: torch.Tensor, W: torch.Tensor, planes) -> None:
    hold_rounded(y, x, W, planes, 32, 127)


def hold_bits(y: torch.Tensor, x: torch.Tensor, W: torch.Tensor, planes) -> None:
    hold_rounded(y, x, W, planes, 512, 32767)


def hold_fused(y: torch.Tensor, x: torch.Tensor, W: torch.Tensor, planes) -> None:
    """Hold `y` to one rounding of the column scales, and if there are more planes, of their row scales and of the weights."""
    sums = planes.num_planes + (planes.num_significant > 0)
    hold_exact(y, x, W, planes, x.dtype, 1 if sums == 1 else 1 + sums)


def check_all(size, dtype, batch, device):
    planes, W = problem(size, device)
    x = inputs(batch, size[1], dtype=dtype, seed=batch).to(device)
    hold_exact(kernels().dot_product(x, planes), x, W, planes, dtype)
    if dtype != torch.float32:
        hold_exact(kernels().fragments_product(x, planes), x, W, planes, dtype)
        hold_fused(kernels().fused_product(x, planes), x, W, planes)
    hold_exact(kernels().dense_product(x, planes), x, W, planes, dtype)
    if batch <= 16:
        hold_bits(kernels().bits_product(x, planes), x, W, planes)
    if batch == 1 and planes.num_planes <= 2 and planes.num_words + 2 * planes.num_residual_words <= 128:
        hold_int8(kernels().single_product(x, planes), x, W, planes)
    if batch <= 4:
        hold_int8(kernels().int8_product(x, planes), x, W, planes)


@interpreted
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "batch"), [(torch.float16, 1), (torch.float32, 2)])
def test_kernels_equal_dense_matmul(size, dtype, batch):
    check_all(size, dtype, batch, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(size, torch.bfloat16) for size in GPU_SIZES]
    + [(size, dtype) for size in GPU_SIZES[1::3] for dtype in (torch.float32, torch.float16)],
)
@pytest.mark.parametrize("batch", [1, 3, 16, 70, 300])
def test_kernels_equal_dense_matmul_on_gpu(size, dtype, batch):
    check_all(size, dtype, batch, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 16, 70, 300])
@pytest.mark.parametrize("product", ["linear", "dot_product", "fused_product"])
def test_results_do_not_change_from_run_to_run_on_gpu(product, batch):
    """With many steps and tiles: tensor cores that still read weights when these are overwritten give other results."""
    planes, _ = problem((2048, 3584, 1, 358), "cuda")
    x = inputs(batch, 3584).bfloat16().cuda()
    multiply = getattr(kernels(), product)
    arguments = (x, planes, False) if product == "linear" else (x, planes)
    first = multiply(*arguments)
    assert all(torch.equal(multiply(*arguments), first) for _ in range(20))


@interpreted
@pytest.mark.parametrize("tiles", [(16, 2, 16, 3, 4, 2), (64, 4, 16, 1, 4, 3), (32, 1, 32, 2, 4, 2)])
def test_rows_shared_among_programs_add_up(tiles):
    from sab_hf.kernels.cuda.tiles import DotTiles

    planes, W = problem((37, 300, 1, 33), "cpu")
    x = inputs(3, 300)
    hold_exact(kernels().dot_product(x, planes, DotTiles(*tiles)), x, W, planes, torch.float32)


@interpreted
@pytest.mark.parametrize("tiles", [(1, 1, 2, 1), (2, 2, 4, 2)])
def test_warps_that_share_rows_of_fragments_make_every_row(tiles):
    """530 columns and 30 of the residual plane are three pieces, nine inputs two groups."""
    from sab_hf.kernels.cuda.tiles import FragmentsTiles

    planes, W = problem((18, 530, 1, 30), "cpu")
    x = inputs(9, 530, dtype=torch.float16)
    hold_exact(kernels().fragments_product(x, planes, FragmentsTiles(*tiles)), x, W, planes, torch.float16)


@interpreted
@pytest.mark.parametrize(
    ("tiles", "size", "batch"),
    [
        ((16, 4, 16, 4, 2, 1, True), (37, 300, 1, 33), 3),  # four programs share three tiles of three steps
        ((16, 4, 16, 4, 2, 1, False), (37, 300, 1, 33), 3),
        ((16, 4, 16, 4, 2, 2, True), (20, 300, 2, 33), 19),  # eight programs, four tiles
        ((16, 2, 8, 4, 2, 1, True), (140, 128, 1, 0), 1),  # a whole tile each, and the other five shared
        ((16, 8, 8, 4, 2, 3, True), (9, 40, 1, 40), 2),  # one tile of one step
    ],
)
def test_programs_that_share_tiles_add_up(tiles, size, batch):
    from sab_hf.kernels.cuda.tiles import FusedTiles

    planes, W = problem(size, "cpu")
    x = inputs(batch, size[1], dtype=torch.float16)
    hold_fused(kernels().fused_product(x, planes, FusedTiles(*tiles)), x, W, planes)


@interpreted
@pytest.mark.parametrize(
    ("sizes", "tiles", "batch"),
    [
        ([(37, 300, 1, 33), (16, 300, 1, 300), (1, 300, 1, 1)], (16, 2, 16, 4, 2, 1, True), 3),
        ([(5, 70, 2, 0), (40, 70, 2, 0)], (16, 2, 16, 4, 2, 1, True), 19),
        ([(9, 40, 1, 7), (16, 40, 1, 40)], (16, 2, 16, 4, 2, 1, False), 2),
    ],
)
def test_matrices_of_one_input_share_a_fused_launch(sizes, tiles, batch):
    """Four programs share tiles of a matrix and of two, with rows that fill none."""
    from sab_hf.kernels.cuda.tiles import FusedTiles

    hold_fused_products(sizes, batch, "cpu", FusedTiles(*tiles))


@pytest.mark.parametrize(
    ("batch", "planes", "rows", "residual_words", "joined"),
    [
        (8, 1, 4608, 12, False),
        (16, 1, 4608, 12, True),
        (256, 1, 4608, 12, True),
        (257, 1, 4608, 12, False),
        (64, 1, 37888, 12, False),
        (128, 1, 37888, 12, True),
        (128, 1, 4608, 0, False),
        (128, 2, 4608, 12, False),
    ],
)
def test_matrices_share_a_fused_launch_where_that_was_faster(batch, planes, rows, residual_words, joined):
    from sab_hf.kernels.cuda.tiles import joins

    assert joins(batch, planes, rows, 112, residual_words) == joined


@interpreted
@pytest.mark.parametrize(("columns", "dtype", "launches"), [(33, "float16", 1), (0, "float16", 0), (33, "float32", 0)])
def test_linears_share_a_fused_launch(monkeypatch, columns, dtype, launches):
    made = [problem((n, 300, 1, columns), "cpu") for n in (37, 16, 5)]
    x, shared = inputs(16, 300, dtype=getattr(torch, dtype)), []
    together = kernels().fused_products
    monkeypatch.setattr(
        kernels(), "fused_products", lambda x, many, *a: shared.append(len(many)) or together(x, many, *a)
    )
    results = kernels().linears(x, [planes for planes, _ in made], exact=False)
    assert shared.count(3) == launches
    for y, (planes, W) in zip(results, made, strict=True):
        hold_fused(y, x, W, planes)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [2, 8, 32, 128, 256])
@pytest.mark.parametrize("scheme", [(1, 358), (1, 0), (2, 0)])
@pytest.mark.parametrize("rows", [(3584, 512, 512), (18944, 18944), (100, 7)])
def test_matrices_of_one_input_share_a_fused_launch_on_gpu(rows, scheme, batch):
    hold_fused_products([(n, 3584, *scheme) for n in rows], batch, "cuda")


def hold_fused_products(sizes, batch, device, tiles=None) -> None:
    made = [problem(size, device) for size in sizes]
    x = inputs(batch, sizes[0][1], dtype=torch.float16).to(device)
    results = kernels().fused_products(x, [planes for planes, _ in made], tiles)
    for y, (planes, W) in zip(results, made, strict=True):
        hold_fused(y, x, W, planes)


@interpreted
def test_rows_without_a_first_plane_keep_the_others():
    """The fused product divides by the first plane's row scales."""
    from sab_hf.kernels.cuda.planes import planes as collect

    random = random_planes(7, 64, 2, 9)
    random.row_scale[0, :3] = 0
    random.row_scale[:, 1] = 0
    random.residual_row_scale[1] = 0
    x = inputs(2, 64, dtype=torch.float16)
    planes = collect(*operands(random))
    y = kernels().fused_product(x, planes)
    hold_fused(y, x, random.dense().double(), planes)
    assert not y[:, 1].any()
    assert y[:, 0].all()


@interpreted
@pytest.mark.parametrize("size", [(3, 33, 1, 33), (5, 100, 1, 1), (4, 1030, 1, 500)])
def test_residual_bits_are_spread_to_their_columns(size):
    """A first plane of nothing leaves the residual one, all of whose scales are 1."""
    from sab_hf.kernels.cuda.planes import planes as collect

    random = random_planes(*size, seed=3)
    random.row_scale.zero_()
    random.col_scale.zero_()
    random.residual_row_scale.fill_(1)
    random.residual_col_scale.fill_(1)
    x = torch.randint(-4, 5, (3, size[1])).half()
    y = kernels().fused_product(x, collect(*operands(random)))
    assert torch.equal(y.double(), x.double() @ random.dense().double().T)


@interpreted
@pytest.mark.parametrize("tiles", [(1, 1, 1), (1, 1, 2), (4, 2, 1), (4, 4, 3), (8, 4, 1)])
def test_warps_that_share_rows_make_every_row(tiles):
    """1,200 columns are three pieces: warps get unequal numbers of them, or none."""
    from sab_hf.kernels.cuda.tiles import BitsTiles

    planes, W = problem((37, 1200, 2, 520), "cpu")
    x = inputs(2, 1200)
    hold_bits(kernels().bits_product(x, planes, BitsTiles(*tiles)), x, W, planes)


@interpreted
@pytest.mark.parametrize("tiles", [(4, 16, 16, 3), (2, 16, 16, 2), (8, 16, 16, 2), (32, 16, 16, 1)])
def test_programs_of_several_tiles_make_every_row(tiles):
    from sab_hf.kernels.cuda.tiles import Int8Tiles

    planes, W = problem((37, 300, 1, 33), "cpu")
    x = inputs(2, 300)
    hold_int8(kernels().int8_product(x, planes, Int8Tiles(*tiles)), x, W, planes)


@interpreted
@pytest.mark.parametrize("tiles", [(16, 16, 4, 4, 2), (8, 32, 8, 8, 1), (64, 16, 2, 4, 5)])
def test_programs_that_take_tiles_in_turn_make_every_row(tiles):
    from sab_hf.kernels.cuda.tiles import SingleTiles

    for size in [(37, 300, 1, 33), (37, 300, 2, 33), (37, 300, 1, 0)]:
        planes, W = problem(size, "cpu")
        x = inputs(1, 300)
        if planes.num_residual_words <= tiles[2]:
            hold_int8(kernels().single_product(x, planes, SingleTiles(*tiles)), x, W, planes)


@interpreted
def test_strided_inputs():
    planes, W = problem((9, 40, 2, 7), "cpu")
    x = inputs(40, 6).T[::2]
    hold_exact(kernels().dot_product(x, planes), x, W, planes, torch.float32)
    hold_int8(kernels().int8_product(x, planes), x, W, planes)
    hold_bits(kernels().bits_product(x, planes), x, W, planes)
    hold_int8(kernels().single_product(x[1:2], planes), x[1:2], W, planes)
    x = x.half()
    hold_exact(kernels().fragments_product(x, planes), x, W, planes, torch.float16)
    hold_fused(kernels().fused_product(x, planes), x, W, planes)


@interpreted
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_never_give_finite_numbers(value):
    planes, _ = problem((9, 40, 2, 0), "cpu")
    x = inputs(1, 40)
    x[0, 3] = value
    assert not kernels().int8_product(x, planes).isfinite().any()
    assert not kernels().bits_product(x, planes).isfinite().any()
    assert not kernels().single_product(x, planes).isfinite().any()
    assert not kernels().fragments_product(x.half(), planes).isfinite().any()
    assert not kernels().fused_product(x.half(), planes).isfinite().any()


@interpreted
def test_int8_products_of_nothing_are_nothing():
    planes, _ = problem((9, 40, 2, 7), "cpu")
    assert torch.equal(kernels().int8_product(torch.zeros(1, 40), planes), torch.zeros(1, 9))
    assert torch.equal(kernels().bits_product(torch.zeros(1, 40), planes), torch.zeros(1, 9))


@interpreted
@pytest.mark.parametrize(("product", "bound"), [("bits_product", 0.02), ("int8_product", 0.2)])
def test_outlier_channels_leave_the_others_right(product, bound):
    """Some channels 1,000 times the others: what the others add to the output is still right.

    One plane loses over half of a random weight's output, and rounding of activations has to stay far below that.
    """
    planes, W = problem((200, 1024, 1, 0), "cpu")
    x = inputs(1, 1024)
    outliers = torch.arange(5, 1024, 300)
    ordinary = x.clone()
    ordinary[0, outliers] = 0
    x[0, outliers] *= 1000
    error = getattr(kernels(), product)(x, planes).double() - x.double() @ W.T
    assert error.norm() < bound * (ordinary.double() @ W.T).norm()


@interpreted
def test_unpacking_in_parts_gives_the_same_product(monkeypatch):
    planes, W = problem((37, 300, 1, 33), "cpu")
    monkeypatch.setattr(kernels(), "DENSE_BYTES", 20 * 300 * 4)
    monkeypatch.setattr(kernels(), "DENSE_ROWS", 8)
    x = inputs(5, 300)
    hold_exact(kernels().dense_product(x, planes), x, W, planes, torch.float32)


def sweep_problem(rows, columns, planes, device):
    generator = torch.Generator().manual_seed(rows + columns)
    W = torch.randn(rows, columns, generator=generator)
    x = torch.randn(3 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    H = x.T @ x / len(x) + 0.1 * torch.eye(columns)
    significant = None if planes == 1 else torch.rand(columns, generator=generator) < 0.3
    state = fit.initial_state(W, planes, significant)
    return [t.to(device) for t in (W.T.contiguous(), feedback_factor(H), state.r, state.c)]


def compare_sweeps(rows, columns, planes, start, end, device):
    rest, U, r, c = sweep_problem(rows, columns, planes, device)
    kernel = importlib.import_module("sab_hf.method.kernels.sweep")
    columns_as_rows = U.T.contiguous().T  # as solvers leave it
    choices, errors = kernel.sweep_block(rest.clone(), columns_as_rows, r, c, start, end)
    expected_choices, expected_errors = fit._sweep_block(rest.clone(), U, r, c, start, end)
    torch.testing.assert_close(errors, expected_errors, rtol=1e-3, atol=1e-3)
    same_level = choices == expected_choices
    assert same_level.float().mean() > 0.999  # a tie may go either way by rounding


@interpreted
@pytest.mark.parametrize("planes", [1, 2])
def test_fit_with_the_kernel_is_the_fit_without(monkeypatch, planes):
    generator = torch.Generator().manual_seed(planes)
    W = torch.randn(20, 40, generator=generator)
    x = torch.randn(120, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    H = damp(x.T @ x / len(x), 0.01)
    expected = fit.fit_planes(W, H, planes, block_size=16)
    monkeypatch.setattr(fit, "can_fit", lambda W: True)
    found = fit.fit_planes(W, H, planes, block_size=16)
    assert found.error == pytest.approx(expected.error, rel=1e-2)  # a tie may go either way by rounding


@interpreted
@pytest.mark.parametrize(("rows", "columns", "planes", "start", "end"), [(5, 40, 1, 0, 40), (33, 21, 2, 8, 21)])
def test_sweep_chooses_as_the_specification(rows, columns, planes, start, end):
    compare_sweeps(rows, columns, planes, start, end, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("planes", [1, 2, 4])
@pytest.mark.parametrize(
    ("rows", "columns", "start", "end"), [(5, 40, 0, 40), (700, 301, 128, 256), (3584, 384, 256, 384)]
)
def test_sweep_chooses_as_the_specification_on_a_gpu(rows, columns, planes, start, end):
    compare_sweeps(rows, columns, planes, start, end, "cuda")


def compare_levels(rows, columns, planes, device, state_dtype, gradient_dtype):
    """The specification runs on the CPU: on a GPU it would be the kernels."""
    latent, scales = level_problem(rows, columns, planes)
    latent = latent.to(state_dtype)
    kernel = importlib.import_module("sab_hf.method.kernels.levels")
    there = latent.to(device), levels.Scales(*(part.to(device) for part in scales))
    mine = kernel.nearest_level(*there, torch.empty(rows, columns, device=device)).cpu()
    expected = levels.nearest_level(latent, scales, torch.empty(rows, columns))
    largest = expected.abs().amax(1, keepdim=True)  # of several planes a level may be a small rest of large scales
    close = (mine - expected).abs() <= 1e-6 * largest
    assert close.float().mean() > 0.999  # a tie may go either way by rounding
    downstream = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)).to(gradient_dtype)
    downstream[~close] = 0
    numbers = torch.tensor([0.03, 1 / (1 - levels.BETAS[0]), 1 / (1 - levels.BETAS[1]), 1.0])
    results = []
    for descend, place in ((kernel.descend, device), (levels.descend, "cpu"), (kernel.descend, device)):
        own, gradient, own_numbers = (t.to(place, copy=True) for t in (latent, downstream, numbers))
        own_scales = levels.Scales(*(part.to(place) for part in scales))
        moments = torch.zeros_like(own), torch.zeros_like(own)
        at_scales = torch.zeros_like(own_scales.r), torch.zeros_like(own_scales.c)
        descend(gradient, own, moments, own_scales, at_scales, own_numbers)
        assert not gradient.any()
        results.append([t.cpu() for t in (own, *moments, *at_scales)])
        results[-1][-1][scales.c == 0] = 0
    step = 0.1 if state_dtype == torch.bfloat16 else 1e-4  # rounded at random, each in its own way
    assert ((results[0][0] - results[1][0]).abs() <= step).float().mean() > 0.999
    for name, mine, expected in zip(("first", "second", "r", "c"), results[0][1:], results[1][1:], strict=True):
        far = ~torch.isclose(mine.float(), expected.float(), rtol=1e-2, atol=1e-3)
        assert far.float().mean() < 1e-3, (name, int(far.sum()), mine[far][:4], expected[far][:4])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))


@interpreted
@pytest.mark.parametrize(
    ("rows", "columns", "planes", "state_dtype"), [(5, 70, 1, torch.bfloat16), (33, 21, 3, torch.float32)]
)
def test_nearest_levels_and_steps_are_as_specified(rows, columns, planes, state_dtype):
    compare_levels(rows, columns, planes, "cpu", state_dtype, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("planes", "state_dtype", "gradient_dtype"),
    [(planes, dtype, dtype) for planes in (1, 2, 4) for dtype in (torch.float32, torch.bfloat16)]
    + [(2, torch.float32, torch.bfloat16), (2, torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize(("rows", "columns"), [(5, 70), (701, 301), (3584, 1024)])
def test_nearest_levels_and_steps_are_as_specified_on_a_gpu(rows, columns, planes, state_dtype, gradient_dtype):
    compare_levels(rows, columns, planes, "cuda", state_dtype, gradient_dtype)


def compare_divergences(vocabulary, device, dtype):
    generator = torch.Generator().manual_seed(0)
    given, wanted = (4 * torch.randn(2, 3, vocabulary, generator=generator).to(device, dtype) for _ in range(2))
    counted = torch.tensor([[1.0, 0.0, 0.5], [1.0, 1.0, 1.0]], device=device)
    kernel = importlib.import_module("sab_hf.method.kernels.divergence")
    value, gradient = kernel.divergence(given, wanted.clone(), counted)
    expected, expected_gradient = divergence(given.cpu(), wanted.cpu(), counted.cpu())
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=1e-2, atol=1e-5)


@interpreted
@pytest.mark.parametrize(("vocabulary", "dtype"), [(50, torch.float32), (5000, torch.bfloat16)])
def test_divergence_is_as_specified(vocabulary, dtype):
    compare_divergences(vocabulary, "cpu", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("vocabulary", "dtype"), [(50, torch.float32), (152064, torch.bfloat16)])
def test_divergence_is_as_specified_on_a_gpu(vocabulary, dtype):
    compare_divergences(vocabulary, "cuda", dtype)
