"""`sab::linear` against a dense matmul in float64, and against PyTorch's own checks of a custom op."""

import pytest
import torch
from helpers import DTYPES, assert_is_matmul, inputs, operands, random_planes, several, sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sab_hf.kernels.ops import Operands, linear_reference, sab_linear, sab_linears
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
        with pytest.raises(ValueError, match=r"`signs` must be .* on cpu, where the input is, got .* on meta"):
            product()


# ---- wrong calls: the same error wherever the op is computed


def other_mask(mask: torch.Tensor) -> torch.Tensor:
    return mask ^ torch.tensor([1] + [0] * (mask.numel() - 1), dtype=torch.uint8, device=mask.device)


WRONG = {
    "x of integers": ({"x": lambda t: t.int()}, "the input must be floating point, got torch.int32"),
    "x complex": ({"x": lambda t: t.cfloat()}, "the input must be floating point, got torch.complex64"),
    "x without features": ({"x": lambda t: t[0, 0]}, "input has 0 features, not 30"),
    "x of another width": ({"x": lambda t: t[:, 1:]}, "input has 29 features, not 30"),
    "signs signed": ({"signs": lambda t: t.to(torch.int8)}, r"`signs` must be torch.uint8 \[2, 20, 4\] on"),
    "signs short": ({"signs": lambda t: t[..., 1:]}, "`signs` must be"),
    "signs flat": ({"signs": lambda t: t.flatten()}, "`signs` must be"),
    "signs of one plane": ({"signs": lambda t: t[:1]}, "`signs` must be"),
    "signs in another order": ({"signs": lambda t: t.view(20, 2, 4)}, "`signs` must be"),
    "row_scale float": ({"row_scale": lambda t: t.float()}, r"`row_scale` must be torch.float16 \[2, 20\] on"),
    "row_scale short": ({"row_scale": lambda t: t[:, 1:]}, "`signs` must be"),
    "row_scale flat": ({"row_scale": lambda t: t.flatten()}, r"`row_scale` must be torch.float16 \[planes, features\]"),
    "no plane": ({name: lambda t: t[:0] for name in ("signs", "row_scale", "col_scale")}, r"`row_scale` must be"),
    "col_scale of one plane": ({"col_scale": lambda t: t[:1]}, "`col_scale` must be"),
    "col_scale of integers": ({"col_scale": lambda t: t.view(torch.int16).int()}, "`col_scale` must be"),
    "mask short": ({"significant_columns": lambda t: t[1:]}, "`significant_columns` must be"),
    "no mask": ({"significant_columns": lambda t: None}, "a residual plane is .* got no `significant_columns`"),
    "a mask alone": (
        {name: lambda t: None for name in ("residual_signs", "residual_row_scale", "residual_col_scale")},
        "a residual plane is .* got no `residual_signs`",
    ),
    "residual_signs short": ({"residual_signs": lambda t: t[:, 1:]}, "`residual_signs` must be"),
    "residual_row_scale float": ({"residual_row_scale": lambda t: t.float()}, "`residual_row_scale` must be"),
    "residual_col_scale short": ({"residual_col_scale": lambda t: t[:2]}, "`residual_signs` must be"),
    "residual_col_scale empty": ({"residual_col_scale": lambda t: t[:0]}, "`residual_col_scale` must have a scale for"),
    "residual_col_scale of two axes": ({"residual_col_scale": lambda t: t[None]}, "`residual_col_scale` must be"),
    "more significant columns than columns": (
        {
            "residual_signs": lambda t: torch.zeros(20, 500, dtype=torch.uint8, device=t.device),
            "residual_col_scale": lambda t: torch.zeros(4000, dtype=t.dtype, device=t.device),
        },
        "a 20×30 matrix must have .* 0 to 30 significant columns, got 2 and 4000",
    ),
    **{
        f"{name} on meta": ({name: lambda t: t.to("meta")}, f"`{name}` must be .*, where the input is, got .* on meta")
        for name in Operands._fields
    },
}
MARKS = {"a mask of another count": ({"significant_columns": other_mask}, "must mark 17 columns, .* got 1[68]")}
"""What is seen when a matrix is first computed with."""


def wrong_call(changes, device="cpu"):
    """Return input and operands of a call that is right but for `changes`."""
    right = operands(random_planes(20, 30, 2, 17), device)
    given = {"x": inputs(2, 30).to(device), **Operands._make(right)._asdict()}
    given |= {name: change(given[name]) for name, change in changes.items()}
    return given.pop("x"), Operands(**given)


@pytest.mark.parametrize("case", [*WRONG, *MARKS])
@pytest.mark.parametrize("product", [sab_linear, linear_reference, "several"])
def test_wrong_calls_are_errors(device, product, case):
    changes, message = (WRONG | MARKS)[case]
    x, one = wrong_call(changes, device)
    if product is linear_reference and case in MARKS and device.type != "cpu":
        pytest.skip("counting would wait for the device")
    right = operands(random_planes(20, 30, 2, 17), device)
    sab_linear(inputs(2, 30).to(device), *right)  # what is prepared for a right call is not taken for a wrong one
    arguments = one
    if product == "several":
        product, arguments = sab_linears, [list(pair) for pair in zip(right, one, strict=True)]
    with pytest.raises((ValueError, RuntimeError), match=message):
        product(x, *arguments)


@pytest.mark.parametrize("case", WRONG)
def test_the_fake_kernel_refuses_what_kernels_refuse(case):
    changes, message = WRONG[case]
    with FakeTensorMode() as mode:
        x, one = wrong_call(changes)
        with pytest.raises((ValueError, RuntimeError), match=message):
            sab_linear(x, *one)
    assert mode is not None


@pytest.mark.parametrize("case", [case for case, (changes, _) in WRONG.items() if "x" not in changes] + [*MARKS])
def test_modules_refuse_tensors_that_were_put_into_them(case):
    """Past the checks of the constructor and of loading."""
    changes, message = (WRONG | MARKS)[case]
    module = SABLinear.from_planes(random_planes(20, 30, 2, 17))
    module(inputs(2, 30))
    for name, change in changes.items():
        changed = change(getattr(module, name).data.clone())
        setattr(module, name, None if changed is None else nn.Parameter(changed, requires_grad=False))
    if "float" in case or "of integers" in case:
        message = message.replace("torch.float16", "torch.(float16|int16)")
    with pytest.raises((ValueError, RuntimeError), match=message):
        module(inputs(2, 30))


@pytest.mark.parametrize("view", [lambda t: t.view(1, 40), lambda t: t.t()], ids=["wide", "tall"])
def test_views_of_the_memory_of_a_right_call_are_checked_too(view):
    x, packed = inputs(2, 30), list(operands(random_planes(20, 30, 2, 17)))
    sab_linear(x, *packed)
    packed[1] = view(packed[1])
    with pytest.raises(ValueError, match="must be"):
        sab_linear(x, *packed)


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
