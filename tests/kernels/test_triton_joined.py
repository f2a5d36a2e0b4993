"""Products of one input in shared launches: bit for bit what the products alone give, in the interpreter and on a GPU."""

import functools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from helpers import inputs, operands, random_planes
from triton_cases import interpreted, kernels, problem

from sab_hf.kernels import decoding
from sab_hf.kernels.cuda import tiles as cuda_tiles
from sab_hf.kernels.ops import sab_linear, sab_linears
from sab_hf.packed.linear import SABLinear

GROUPS = {
    "same sizes": [(21, 300, 1, 33), (21, 300, 1, 33)],
    "other rows": [(21, 300, 1, 33), (16, 300, 1, 33), (16, 300, 1, 33)],
    "other residual planes": [(21, 300, 1, 33), (21, 300, 1, 35), (21, 300, 1, 1), (21, 300, 1, 70)],
    "some without residual plane": [(21, 300, 1, 0), (16, 300, 1, 33), (21, 300, 1, 0)],
    "other numbers of planes": [(9, 300, 2, 33), (9, 300, 1, 33), (9, 300, 2, 0), (9, 300, 2, 33)],
    "one row, one word": [(1, 8, 2, 0), (1, 8, 1, 8), (2, 8, 1, 1)],
    "padded rows": [(5, 33, 2, 33), (3, 33, 2, 7)],
}
GPU_GROUPS = GROUPS | {
    "q, k, v": [(3584, 3584, 1, 358), (512, 3584, 1, 358), (512, 3584, 1, 358)],
    "q, k, v, unequal": [(3584, 3584, 1, 358), (512, 3584, 1, 200), (512, 3584, 1, 0)],
    "gate, up": [(18944, 3584, 1, 358), (18944, 3584, 1, 358)],
    "gate, up, no residual plane": [(18944, 3584, 1, 0), (18944, 3584, 1, 0)],
    "gate, up, unequal": [(18944, 3584, 1, 300), (18944, 3584, 2, 358)],
    "single and bits": [(4097, 3584, 1, 358), (512, 3584, 1, 358), (512, 3584, 1, 358), (4097, 3584, 1, 358)],
    "wide rows": [(515, 18944, 1, 1895), (515, 18944, 1, 1895)],
}


def assert_same_bits(found, expected) -> None:
    assert [y.shape for y in found] == [y.shape for y in expected]
    assert all(torch.equal(y, alone) for y, alone in zip(found, expected, strict=True))


def matrices(group, device="cpu"):
    return [problem(size, device)[0] for size in group]


@pytest.fixture
def launches(monkeypatch):
    """The kernels that were launched, by name."""
    names, launch = [], kernels()._launch
    monkeypatch.setattr(
        kernels(),
        "_launch",
        lambda kernel, *args, **options: (names.append(kernel.__name__), launch(kernel, *args, **options)),
    )
    return names


@interpreted
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_joined_single_products_are_the_products_alone(group, launches):
    planes, x = matrices(group), inputs(1, group[0][1], dtype=torch.float16)
    found = kernels().joined_single_products(x, planes)
    assert launches == ["joined_single_kernel"]
    assert_same_bits(found, [kernels().single_product(x, one) for one in planes])


@interpreted
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_joined_products_on_bits_are_the_products_alone(group, launches, monkeypatch):
    planes, x = matrices(group), inputs(group[0][1], 2).T  # strided
    tiles = cuda_tiles.BitsTiles(4, 4, 2)
    monkeypatch.setattr(cuda_tiles, "bits_tiles", lambda *sizes: tiles)
    found = kernels().joined_bits_products(x, planes)
    assert launches == ["joined_cut_kernel", "joined_bits_kernel"]
    assert_same_bits(found, [kernels().bits_product(x, one) for one in planes])


@interpreted
def test_programs_of_several_tiles_are_dealt_to_their_matrices(monkeypatch):
    """Two programs of three tiles each, for one of two matrices of a class."""
    monkeypatch.setattr(cuda_tiles, "single_tiles", lambda *sizes: cuda_tiles.SingleTiles(8, 16, 4, 4, 2))
    planes, x = matrices(GROUPS["same sizes"] + GROUPS["other rows"]), inputs(1, 300)
    found = kernels().joined_single_products(x, planes)
    assert_same_bits(found, [kernels().single_product(x, one) for one in planes])


@interpreted
@pytest.mark.parametrize(
    ("batch", "exact", "expected"),
    [
        (1, False, ["joined_cut_kernel", "joined_bits_kernel", "joined_single_kernel"]),
        (2, False, ["joined_cut_kernel", "joined_bits_kernel"]),
        (1, True, ["scale_kernel", "dot_kernel"] * 4),
        (40, False, ["scale_kernel", "dot_kernel"] * 4),
    ],
)
def test_products_by_the_same_kernel_share_launches(batch, exact, expected, launches, monkeypatch):
    monkeypatch.setattr(cuda_tiles, "SINGLE_ROWS", 20)
    monkeypatch.setattr(cuda_tiles, "bits_tiles", lambda *sizes: cuda_tiles.BitsTiles(4, 4, 1))
    planes, x = matrices([(21, 300, 1, 33), (16, 300, 1, 33), (21, 300, 2, 0), (5, 300, 1, 7)]), inputs(batch, 300)
    found = kernels().linears(x, planes, exact)
    assert launches == expected
    assert_same_bits(found, [kernels().linear(x, one, exact) for one in planes])


@interpreted
def test_products_with_other_numbers_of_warps_have_launches_of_their_own(launches, monkeypatch):
    monkeypatch.setattr(
        cuda_tiles,
        "bits_tiles",
        lambda planes, rows, *sizes: cuda_tiles.BitsTiles(*(4, 4, 1) if rows > 16 else (2, 1, 1)),
    )
    planes, x = matrices([(21, 300, 1, 33), (16, 300, 1, 33), (21, 300, 1, 33), (16, 300, 1, 0)]), inputs(2, 300)
    found = kernels().linears(x, planes, False)
    assert launches == ["joined_cut_kernel", "joined_bits_kernel"] * 2
    assert_same_bits(found, [kernels().linear(x, one, False) for one in planes])


def around(form, batch, in_features, rows, dtype, device="cpu"):
    """What stands around products: a norm or gate, a bias for the first, addends for all but the first."""
    other = inputs(*([] if form in decoding.NORMS else [batch]), in_features, seed=3, dtype=dtype) if form else None
    biases = [inputs(rows[0], seed=4, dtype=dtype), *[None] * (len(rows) - 1)]
    addends = [None, *[inputs(batch, n, seed=5, dtype=dtype) for n in rows[1:]]]
    moved = [[None if one is None else one.to(device) for one in several] for several in ([other], biases, addends)]
    return decoding.Around(form, 1e-6 if form in decoding.NORMS else 0.0, *moved[0], *moved[1:])


FORMS = ["", *decoding.NORMS, *decoding.GATES]


@interpreted
@pytest.mark.parametrize(
    ("kernel", "batch", "dtype", "form"),
    [("single", 1, torch.float16, form) for form in FORMS]
    + [("bits", 2, torch.float32, form) for form in ("rms_norm", "gelu_tanh")],
)
def test_kernels_do_what_stands_around_products(kernel, batch, dtype, form, launches, monkeypatch):
    """As PyTorch does it around the same kernels: to a rounding of the input, which moves a few of its integers by one."""
    monkeypatch.setattr(cuda_tiles, "SINGLE_ROWS", 30 if kernel == "single" else 0)
    monkeypatch.setattr(cuda_tiles, "bits_tiles", lambda *sizes: cuda_tiles.BitsTiles(2, 2, 1))
    sizes = [(21, 300, 1, 33), (16, 300, 1, 0)]
    planes, x = matrices(sizes), 3 * inputs(batch, 300, dtype=dtype)
    given = around(form, batch, 300, (21, 16), dtype)
    found = kernels().linears(x, planes, False, given)
    assert launches == (["joined_single_kernel"] if kernel == "single" else ["joined_cut_kernel", "joined_bits_kernel"])
    for y, expected in zip(found, given.after(kernels().linears(given.before(x), planes, False)), strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y, expected, rtol=2 * eps, atol=2e-5 * expected.abs().max().item())


@interpreted
def test_other_kernels_have_their_surroundings_computed_one_by_one(launches, monkeypatch):
    monkeypatch.setattr(cuda_tiles, "SINGLE_ROWS", 20)
    planes, x = matrices([(9, 33, 1, 0), (9, 33, 1, 7)]), inputs(17, 33)
    given = around("rms_norm", 17, 33, (9, 9), torch.float32)
    found = kernels().linears(x, planes, False, given)
    assert launches == ["scale_kernel", "dot_kernel"] * 2
    assert_same_bits(found, given.after([kernels().linear(given.before(x), one, False) for one in planes]))


@functools.cache
def on_gpu(size: tuple[int, int, int, int]):
    return operands(random_planes(*size, seed=sum(size)), "cuda")


OTHER_DTYPES = [
    (name, dtype) for name in ("other residual planes", "single and bits") for dtype in (torch.float32, torch.float16)
]


def compare_on_gpu(name: str, dtype: torch.dtype, batch: int, exact: bool) -> None:
    packed = [on_gpu(size) for size in GPU_GROUPS[name]]
    x = inputs(batch, GPU_GROUPS[name][0][1], dtype=dtype).cuda()
    found = sab_linears(x, *map(list, zip(*packed, strict=True)), exact)
    assert_same_bits(found, [sab_linear(x, *one, exact) for one in packed])


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize(("group", "dtype"), [(name, torch.bfloat16) for name in GPU_GROUPS] + OTHER_DTYPES)
def test_joined_products_are_the_products_alone_on_a_gpu(group, dtype, batch):
    """Only the loads and stores of the kernels depend on the dtype."""
    compare_on_gpu(group, dtype, batch, exact=False)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "exact"), [(1, True), (16, False), (300, False)])
@pytest.mark.parametrize("group", ["other numbers of planes", "q, k, v, unequal"])
def test_products_that_share_no_launch_are_the_products_alone_on_a_gpu(group, batch, exact):
    compare_on_gpu(group, torch.bfloat16, batch, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("group", ["q, k, v", "gate, up"])
def test_joined_products_follow_each_other_in_a_cuda_graph(group):
    """Each launch overlaps with the one before it: inputs that the one before makes must be there."""
    planes = [list(same) for same in zip(*map(on_gpu, GPU_GROUPS[group]), strict=True)]
    x = inputs(1, 3584, dtype=torch.bfloat16).cuda()

    def several_times():
        results, y = [], x
        for _ in range(8):
            products = sab_linears(y, *planes)
            results += products
            y = torch.nn.functional.rms_norm(products[0][:, :3584], (3584,))
        return results

    expected = several_times()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = several_times()
    for _ in range(20):
        for y in found:
            y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("group", "batch", "forms"),
    [("q, k, v", 1, ["rms_norm"]), ("gate, up", 2, ["rms_norm"]), ("wide rows", 2, ["silu"]), ("same sizes", 2, FORMS)],
)
def test_kernels_do_what_stands_around_products_on_a_gpu(group, batch, forms, dtype):
    packed = [on_gpu(size) for size in GPU_GROUPS[group]]
    rows, in_features = [size[0] for size in GPU_GROUPS[group]], GPU_GROUPS[group][0][1]
    lists = list(map(list, zip(*packed, strict=True)))
    for form in forms:
        given = around(form, batch, in_features, rows, dtype, "cuda")
        x = 3 * inputs(batch, in_features, dtype=dtype).cuda()
        found = decoding.sab_folded_linears(x, given.other, *given[:2], *lists, *given[3:])
        for y, expected in zip(found, given.after(sab_linears(given.before(x), *lists)), strict=True):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(y, expected, rtol=4 * eps, atol=eps * expected.abs().max().item())


@pytest.mark.gpu
def test_a_compiled_model_uses_the_joined_kernels(launches):
    """With integer activations and under CUDA graphs, as a model that generates runs."""
    layers = [
        SABLinear.from_planes(random_planes(rows, 512, 1, 51, seed=i)).cuda() for i, rows in enumerate((512, 64, 64))
    ]
    for layer in layers:
        layer.exact = False
    x = inputs(1, 512, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        expected = [layer(x) for layer in layers]
        launches.clear()
        compiled = torch.compile(lambda x: [layer(x) for layer in layers], fullgraph=True, mode="reduce-overhead")
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            found = compiled(x)
    assert set(launches) == {"joined_single_kernel"}
    assert_same_bits(found, expected)
