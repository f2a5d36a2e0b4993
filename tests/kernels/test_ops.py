"""`sab::linear` against a dense matmul in float64, and against PyTorch's own checks of a custom op."""

import pytest
import torch
from helpers import DTYPES, assert_is_matmul, inputs, operands, random_planes, several, sizes
from hypothesis import given, settings
from hypothesis import strategies as st

from sab_hf.kernels.ops import sab_linear, sab_linears
from sab_hf.packed.linear import SABLinear
from sab_hf.planes import SignPlanes


@pytest.mark.parametrize("num_significant", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sab_linear_passes_opcheck(device, num_significant, dtype):
    planes = random_planes(6, 13, 2, num_significant)
    torch.library.opcheck(sab_linear, (inputs(2, 3, 13, dtype=dtype).to(device), *operands(planes, device)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sab_linears_passes_opcheck(device, dtype):
    matrices = random_planes(6, 13, 2, 5), random_planes(9, 13, 1, 0)
    torch.library.opcheck(sab_linears, (inputs(2, 3, 13, dtype=dtype).to(device), *several(*matrices, device=device)))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", [(19,), (1, 19), (0, 19), (2, 3, 19), (70, 19)])
def test_sab_linears_are_the_products_one_by_one(device, shape, exact):
    matrices = [random_planes(5, 19, 2, 7), random_planes(8, 19, 1, 0), random_planes(5, 19, 1, 19)]
    x = inputs(*shape).to(device)
    found = sab_linears(x, *several(*matrices, device=device), exact)
    expected = [sab_linear(x, *operands(planes, device), exact) for planes in matrices]
    assert len({y.untyped_storage()._cdata for y in found}) == 3
    assert all(torch.equal(y, one) for y, one in zip(found, expected, strict=True))


def test_weights_without_memory_are_an_error():
    """As those of a module are that waits for its offloaded weights; PyTorch calls the fake for any tensor on meta."""
    x, planes = inputs(2, 6), random_planes(4, 6, 1, 2)
    module = SABLinear.from_planes(planes).to("meta")
    assert module(x.to("meta")).shape == (2, 4)
    for product in (lambda: module(x), lambda: sab_linears(x, *several(planes, device="meta"))):
        with pytest.raises(RuntimeError, match="must be on cpu, as the input, got meta"):
            product()


def test_sab_linears_rejects_lists_of_different_lengths():
    signs, *others = several(random_planes(4, 6, 1, 2), random_planes(4, 6, 1, 2))
    with pytest.raises(ValueError, match="shorter"):
        sab_linears(inputs(2, 6), signs, *[other[:1] for other in others])


@given(size=sizes(), dtype=st.sampled_from(DTYPES), batch=st.integers(0, 5), seed=st.integers(0, 2**16))
@settings(deadline=None)
def test_sab_linear_equals_dense_matmul(size, dtype, batch, seed):
    planes = random_planes(*size, seed=seed)
    x = inputs(batch, size[1], dtype=dtype, seed=seed + 1)
    assert_is_matmul(sab_linear(x, *operands(planes), exact=True), x, planes)


@pytest.mark.parametrize("shape", [(0, 19), (19,), (2, 3, 19), (2, 0, 19), (2, 1, 3, 19)])
def test_sab_linear_takes_any_leading_shape(device, shape):
    planes = random_planes(5, 19, 2, 7)
    x = inputs(*shape).to(device)
    assert_is_matmul(sab_linear(x, *operands(planes, device), exact=True), x, planes)


@pytest.mark.parametrize(
    "view",
    [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[:1].expand(4, -1, -1)],
    ids=["transposed", "strided", "expanded"],
)
def test_sab_linear_takes_inputs_that_are_not_contiguous(device, view):
    planes = random_planes(5, 19, 1, 7)
    x = view(inputs(4, 6, 19).to(device))
    assert not x.is_contiguous()
    assert_is_matmul(sab_linear(x, *operands(planes, device), exact=True), x, planes)


def test_sab_linear_rounds_once():
    """Planes of 256, 1 and 1: a sum kept in bfloat16 would end at 256."""
    planes = SignPlanes(torch.ones(3, 1, 1, dtype=torch.bool), torch.tensor([[256.0], [1], [1]]), torch.ones(3, 1))
    assert sab_linear(torch.ones(1, 1, dtype=torch.bfloat16), *operands(planes)).item() == 258


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("in_features", [3, 12])
def test_sab_linear_rejects_inputs_of_another_width(where, in_features):
    planes = random_planes(4, 6, 1, 2)
    with pytest.raises(RuntimeError, match=f"{in_features} features, not 6"):
        sab_linear(inputs(2, in_features).to(where), *operands(planes, where))
