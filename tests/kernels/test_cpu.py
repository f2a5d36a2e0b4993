"""The compiled CPU kernels against the PyTorch implementation, for every instruction set of this machine."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers import DTYPES, assert_is_matmul, inputs, operands, random_planes, several
from hypothesis import given, settings
from hypothesis import strategies as st

from sab_hf import SABLinear
from sab_hf.kernels import layouts
from sab_hf.kernels.cpu import library
from sab_hf.kernels.cpu import linear as cpu
from sab_hf.kernels.ops import linear_reference, sab_linear, sab_linears
from sab_hf.planes import SignPlanes

KERNELS = library.load()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="there is no compiled library")
ISAS = [] if KERNELS is None else [name for name in library.NAMES if KERNELS.sab_cpu_select(name.encode()) == 0]
if KERNELS is not None:
    library.select(KERNELS, None)
LUT_ISAS = [name for name in ISAS if name != "portable"]


@pytest.fixture(params=ISAS)
def isa(request):
    library.select(KERNELS, request.param)
    yield request.param
    library.select(KERNELS, None)


@st.composite
def shapes(draw) -> tuple[int, int, int, int]:
    """out_features, in_features, planes and significant columns, around the sizes of tiles and blocks."""
    in_features = draw(st.one_of(st.integers(1, 40), st.integers(100, 300)))
    num_significant = draw(st.one_of(st.just(0), st.just(in_features), st.integers(0, in_features)))
    return draw(st.integers(1, 140)), in_features, draw(st.integers(1, 4)), num_significant


def lut_bound(x: torch.Tensor, planes: SignPlanes) -> torch.Tensor:
    """The largest error that int8 tables may make, [tokens, out_features]: half a step for each group of 4 columns."""
    bound = torch.zeros(x.shape[0], planes.shape[0], dtype=torch.float64)
    terms = [(planes.row_scale[k], planes.col_scale[k], x) for k in range(planes.num_planes)]
    if planes.num_significant:
        terms.append((planes.residual_row_scale, planes.residual_col_scale, x[:, planes.significant_columns]))
    for r, c, inputs_of_plane in terms:
        z = torch.nn.functional.pad(inputs_of_plane.double() * c.double(), (0, -c.numel() % 128)).abs()
        largest = z.unflatten(1, (-1, 32, 4)).sum(-1).amax(-1)  # [tokens, blocks]
        groups = torch.full((largest.shape[1],), 32, dtype=torch.float64)
        groups[-1] = 2 * ((c.numel() - 128 * (len(groups) - 1) + 7) // 8)
        bound += (largest / 126 * groups).sum(1, keepdim=True) * r.double().abs()
    return bound


@given(shape=shapes(), tokens=st.integers(0, 40), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=40)
def test_exact_kernels_equal_a_dense_matmul(shape, tokens, dtype, seed):
    planes, x = random_planes(*shape, seed=seed), inputs(tokens, shape[1], dtype=dtype, seed=seed + 1)
    for name in ISAS:
        library.select(KERNELS, name)
        assert_is_matmul(sab_linear(x, *operands(planes), exact=True), x, planes)
    library.select(KERNELS, None)


@given(
    shape=shapes(),
    tokens=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    outlier=st.sampled_from([1.0, 1e3]),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=40)
def test_lut_kernels_stay_within_their_bound(shape, tokens, dtype, outlier, seed):
    planes, x = random_planes(*shape, seed=seed), inputs(tokens, shape[1], dtype=dtype, seed=seed + 1)
    x[:, seed % shape[1]] *= outlier
    exact = x.double() @ planes.dense().double().T
    bound = 1.001 * lut_bound(x, planes) + torch.finfo(dtype).eps * exact.abs()
    bound += 2e-6 * (x.double().abs() @ planes.dense().double().abs().T) + 1e-6
    bound = bound.where(exact.abs() + bound < torch.finfo(dtype).max, torch.inf)
    for name in ISAS:
        library.select(KERNELS, name)
        y = sab_linear(x, *operands(planes))
        assert y.dtype == dtype
        assert ((y.double() - exact).abs() <= bound).all()
    library.select(KERNELS, None)


@pytest.mark.parametrize("outliers", [0, 8])
def test_lut_error_is_far_below_the_binarization_error(isa, outliers):
    """One plane loses about 36 % of a Gaussian matrix's energy; the tables lose less than a thousandth of that."""
    planes = SignPlanes(random_planes(256, 1024).signs, torch.ones(1, 256), torch.ones(1, 1024))
    x = inputs(8, 1024)
    x[:, torch.randperm(1024, generator=torch.Generator().manual_seed(1))[:outliers]] *= 100
    exact = x.double() @ planes.dense().double().T
    error = (sab_linear(x, *operands(planes)).double() - exact).square().sum() / exact.square().sum()
    assert error < 0.36 / 1000


@pytest.mark.parametrize(
    ("dtype", "num_significant", "exact"),
    [(torch.float32, 0, True), (torch.float32, 5, False), (torch.bfloat16, 5, True), (torch.float16, 0, False)],
)
def test_op_on_cpu_passes_opcheck(dtype, num_significant, exact):
    planes = random_planes(6, 13, 2, num_significant)
    torch.library.opcheck(sab_linear, (inputs(2, 3, 13, dtype=dtype), *operands(planes), exact))


@pytest.mark.parametrize("shape", [(0, 19), (19,), (2, 3, 19), (2, 0, 19)])
def test_any_leading_shape(isa, shape):
    planes, x = random_planes(70, 19, 2, 7), inputs(*shape)
    assert_is_matmul(sab_linear(x, *operands(planes), exact=True), x, planes)
    assert sab_linear(x, *operands(planes)).shape == (*shape[:-1], 70)


def test_packed_tensors_that_are_not_contiguous(isa):
    planes, x = random_planes(20, 19, 2, 7), inputs(3, 19)
    strided = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in operands(planes)]
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert_is_matmul(sab_linear(x, *strided, exact=True), x, planes)


def test_float64_goes_through_pytorch():
    planes, x = random_planes(20, 19), inputs(3, 19, dtype=torch.float64)
    assert torch.equal(sab_linear(x, *operands(planes)), linear_reference(x, *operands(planes)))


def test_results_do_not_depend_on_the_number_of_threads(isa):
    planes, x = random_planes(700, 2000, 2, 100), inputs(33, 2000)
    results = []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results.append([sab_linear(x, *operands(planes), exact=exact) for exact in (True, False)])
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.allclose(other[0], results[0][0], rtol=1e-5, atol=1e-3)  # dense rows go through PyTorch's matmul
        assert torch.equal(other[1], results[0][1]) or isa == "portable"


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 7, 70])
def test_products_of_one_call_are_bitwise_the_single_ones(isa, tokens, exact):
    """More matrices than share a parallel region, of unlike sizes, planes and residual planes; one has no rows."""
    sizes = [(700, 2, 9), (1, 1, 0), (0, 1, 0), (130, 1, 300), (64, 3, 1), (200, 1, 0), (65, 2, 20), (900, 1, 5)]
    matrices = [random_planes(rows, 300, *rest, seed=i) for i, (rows, *rest) in enumerate([*sizes, *sizes])]
    for dtype in DTYPES:
        x = inputs(tokens, 300, dtype=dtype)
        for threads in (1, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            found = sab_linears(x, *several(*matrices), exact)
            single = [sab_linear(x, *operands(planes), exact) for planes in matrices]
            torch.set_num_threads(before)
            assert all(torch.equal(y, expected) for y, expected in zip(found, single, strict=True))


def test_products_of_one_call_follow_each_of_their_weights():
    matrices, others = ([random_planes(70, 40, 1, 3, seed=seed + i) for i in range(3)] for seed in (0, 10))
    packed, x = several(*matrices), inputs(2, 40)
    sab_linears(x, *packed, exact=True)
    for i, other in enumerate(others):
        for tensors, written in zip(packed, operands(other), strict=True):
            tensors[i].copy_(written)
        assert_is_matmul(sab_linears(x, *packed, exact=True)[i], x, other)


def test_stored_scales_give_the_same_products_and_gradients(isa):
    planes, x = random_planes(70, 300, 2, 9), inputs(2, 300)
    stored = [tensor.view(torch.int16) if tensor.dtype == torch.float16 else tensor for tensor in operands(planes)]
    assert torch.equal(sab_linear(x, *stored), sab_linear(x, *operands(planes)))
    double = x.double()  # goes through PyTorch
    assert torch.equal(sab_linear(double, *stored), sab_linear(double, *operands(planes)))
    x.requires_grad_()
    found, expected = (torch.autograd.grad(sab_linear(x, *o).sum(), x)[0] for o in (stored, operands(planes)))
    assert torch.equal(found, expected)


def test_a_layout_in_use_outlives_another_view_of_its_weights():
    """`.data` has a version counter of its own: the layouts of both are not the same, and none may vanish under the other."""
    planes, x = random_planes(70, 40), inputs(1, 40)
    module = SABLinear.from_planes(planes)
    module.signs.copy_(module.signs.clone())
    first = module(x)
    sab_linear(x, *[tensor if tensor is None else tensor.data for tensor in operands(planes)])
    sab_linear(x, module.signs.data, module.row_scale.data, module.col_scale.data, None, None, None, None)
    gc.collect()
    assert torch.equal(module(x), first)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_inputs_that_are_no_numbers_never_give_numbers(isa, value):
    planes, x = random_planes(70, 300, 2, 9), inputs(2, 300)
    x[1, 200] = value
    for exact in (True, False):
        y = sab_linear(x, *operands(planes), exact=exact)
        assert y[0].isfinite().all()
        assert not y[1].isfinite().any()


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e30])
def test_inputs_of_extreme_size(isa, size):
    planes, x = random_planes(70, 300), inputs(2, 300) * size
    exact = (x.double() @ planes.dense().double().T).float()
    for mode in (True, False):
        error = (sab_linear(x, *operands(planes), exact=mode) - exact).abs().max()
        assert error <= 0.05 * exact.abs().max() + 1e-28


def test_half_numbers_convert_as_in_pytorch(isa):
    """All 65,536 binary16 numbers as scales, and results that round, overflow and become subnormal."""
    halves = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()]
    planes = SignPlanes(torch.ones(1, halves.numel(), 1, dtype=torch.bool), halves[None], torch.ones(1, 1))
    for dtype in DTYPES:
        for factor in (1.0, 1.337, 1e-3):
            x = torch.tensor([[factor]], dtype=dtype)
            expected = (halves.float() * x.float()).to(dtype)
            assert torch.equal(sab_linear(x, *operands(planes), exact=True), expected)


def test_layout_follows_the_weights():
    """A write, a move to other memory, and memory that is used again: never an old layout."""
    x = inputs(1, 40)
    module = SABLinear.from_planes(random_planes(70, 40, 1, 3, seed=0))
    module(x)
    changed = random_planes(70, 40, 1, 3, seed=1)
    module.load_state_dict(SABLinear.from_planes(changed).state_dict())
    assert_is_matmul(module(x), x, SignPlanes(**vars(changed)))
    for seed in range(20):
        planes = random_planes(70, 40, 1, 3, seed=seed)
        assert_is_matmul(SABLinear.from_planes(planes)(x), x, planes)


def test_layouts_are_made_once_not_saved_and_dropped_with_the_weights(monkeypatch):
    made = []
    lay_out = cpu._lay_out
    monkeypatch.setattr(cpu, "_lay_out", lambda *arguments: made.append(1) or lay_out(*arguments))
    module, x = SABLinear.from_planes(random_planes(70, 40, 1, 3)), inputs(2, 40)
    names = set(module.state_dict())
    for _ in range(3):
        module(x)
    assert len(made) == 2  # full planes and residual plane
    assert set(module.state_dict()) == names
    del module
    gc.collect()
    other = SABLinear.from_planes(random_planes(5, 5))
    other(inputs(1, 5))
    assert not any(entry.storage.expired() for entry in layouts._CACHE.values())


def test_layouts_are_dropped_with_weights_that_move_though_the_module_stays(monkeypatch):
    """As when a model that ran on a CPU moves to a GPU, or its weights go back to disk."""
    made, lay_out = [], cpu._lay_out

    def noted(*arguments):
        codes = lay_out(*arguments)
        made.append(weakref.ref(codes))
        return codes

    monkeypatch.setattr(cpu, "_lay_out", noted)
    stays, moves = (SABLinear.from_planes(random_planes(70, 40, 1, 3, seed=seed)) for seed in range(2))
    stays(inputs(1, 40))
    moves(inputs(1, 40))
    moves.to("meta")
    SABLinear.from_planes(random_planes(5, 5))(inputs(1, 5))
    gc.collect()
    assert [codes() is not None for codes in made] == [True, True, False, False, True]


def test_compiles_without_graph_breaks(isa):
    module = SABLinear.from_planes(random_planes(70, 40, 2, 3), torch.randn(70))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = inputs(3, 40)
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t.to(torch.int8), "`signs` must be torch.uint8"),
        (0, lambda t: t[..., :-1].contiguous(), "`signs` must be torch.uint8"),
        (1, lambda t: t.float(), "`row_scale` must be torch.float16"),
        (1, lambda t: t[:, :-1].contiguous(), "`signs` must be torch.uint8"),
        (2, lambda t: t[:1].contiguous(), "`col_scale` must be torch.float16"),
        (3, lambda t: t[:-1].contiguous(), "`significant_columns` must be torch.uint8"),
        (5, lambda t: t.float(), "`residual_row_scale` must be torch.float16"),
        (6, lambda t: t[:2].contiguous(), "`residual_signs` must be torch.uint8"),
    ],
)
def test_packed_tensors_that_do_not_fit_are_errors(index, change, message):
    packed = list(operands(random_planes(20, 30, 2, 17)))
    packed[index] = change(packed[index])
    with pytest.raises(ValueError, match=message):
        sab_linear(inputs(1, 30), *packed)
