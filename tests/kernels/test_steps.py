"""Recorded steps against the PyTorch operations that they stand for."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from helpers import DTYPES, inputs, operands, random_planes
from torch import Tensor
from torch.nn import functional

from sab_hf.kernels.cpu import library
from sab_hf.kernels.cpu.operands import DTYPES as STEP_DTYPES
from sab_hf.kernels.cpu.recording import Call, NotReplayableError, compare, record
from sab_hf.kernels.cpu.steps import FUNCTIONS, KINDS, Steps, _Step
from sab_hf.kernels.ops import sab_linear

pytestmark = pytest.mark.skipif(library.load() is None, reason="there is no compiled library")
CLOSE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 1e-2), torch.float16: (2e-3, 1e-3)}


def make(function, *tensors: Tensor, fixed: tuple[Tensor, ...] = ()) -> tuple[Steps, list[int], list]:
    """Record `function` twice and return its steps, the storages of its inputs and the views of its results."""
    recordings, views = [], []
    for _ in range(2):
        given = [tensor.clone() for tensor in tensors]
        recording, results = record(lambda given=given: function(*given))
        results = results if isinstance(results, (list, tuple)) else [results]
        recordings.append(recording)
        views.append([recording.view(tensor) for tensor in (*given, *results)])
    recording, merged = compare(*recordings, 7, list(zip(*views, strict=True)))
    held = {recording.view(tensor).storage: tensor for tensor in fixed}
    named = [view.storage for view in merged[: len(tensors)]]
    results = merged[len(tensors) :]
    return Steps(recording, held, named, [], sorted({view.storage for view in results})), named, results


def run(steps: Steps, named: list[int], results: list, *tensors: Tensor, threads: int = 1) -> list[Tensor] | None:
    given = dict(zip(named, tensors, strict=True))
    made = steps.run(7, 0, given, threads)
    return None if made is None else [steps.tensor(view, 7, 0, made) for view in results]


def assert_same(
    function, *tensors: Tensor, fixed: tuple[Tensor, ...] = (), threads: int = 1, taken: bool = True
) -> None:
    """Check that steps give what `function` gives, also for other inputs than those of the recording."""
    steps, named, results = make(function, *tensors, fixed=fixed)
    if taken:
        assert not [part for part in steps._parts if isinstance(part, Call)], "PyTorch computes a part of it"
    others = [tensor.flip(0) if tensor.ndim and tensor.dtype.is_floating_point else tensor for tensor in tensors]
    for given in (tensors, [tensor.contiguous() for tensor in others]):
        found = run(steps, named, results, *given, threads=threads)
        wanted = function(*given)
        wanted = wanted if isinstance(wanted, (list, tuple)) else [wanted]
        for one, other in zip(found, wanted, strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            rtol, atol = CLOSE.get(one.dtype, (0, 0))
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol, equal_nan=True)


def test_structs_are_those_of_the_library():
    assert library.load().sab_cpu_step_bytes() == ctypes.sizeof(_Step)
    header = (library.LIBRARY.parent / "csrc" / "steps.h").read_text()
    for prefix, names in (("SAB_STEP_", KINDS), ("SAB_", FUNCTIONS)):
        kind = header.split("enum sab_step_kind" if prefix == "SAB_STEP_" else "enum sab_step_function")[1].split("}")[
            0
        ]
        listed = [word.strip(" {\n") for word in kind.split(",") if word.strip(" {\n")]
        assert listed == [prefix + name.upper() for name in names]
    assert len(STEP_DTYPES) == 6


UNARY = [
    *(
        torch.neg,
        torch.abs,
        torch.exp,
        torch.sin,
        torch.cos,
        torch.tanh,
        torch.sigmoid,
        functional.silu,
        functional.relu,
        functional.gelu,
    ),
    *(torch.square, torch.reciprocal, lambda x: functional.gelu(x, approximate="tanh"), lambda x: x.abs().sqrt()),
    *(lambda x: (x.abs() + 0.5).rsqrt(), lambda x: (x.abs() + 0.5).log(), lambda x: x**2, lambda x: x.abs() ** 1.5),
    *(
        lambda x: x.clamp(-0.5, 0.7),
        lambda x: x.clamp(min=0.1),
        lambda x: (x * 1).to(torch.float32),
        lambda x: x.bfloat16() * 2,
    ),
    *(lambda x: x.masked_fill(x > 0, -1.0), lambda x: torch.where(x < 0.2, x, -x), lambda x: torch.full_like(x, 3.0)),
    *(lambda x: 2 - x, lambda x: x / 3, lambda x: x.clone().add_(1).mul_(x)),
]


@pytest.mark.parametrize("function", UNARY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise(function, dtype):
    assert_same(function, 3 * inputs(3, 700, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_of_extreme_numbers(dtype):
    x = torch.tensor([0.0, -0.0, 1e-30, 88.0, -88.0, 200.0, -200.0, math.inf, -math.inf, math.nan, 0.3, -0.3]).to(dtype)
    for function in (torch.exp, torch.tanh, torch.sigmoid, functional.relu, torch.abs, torch.neg):
        assert_same(function, x)


BINARY = [torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum, torch.eq, torch.lt, torch.ge]


@pytest.mark.parametrize("function", BINARY)
@pytest.mark.parametrize("shapes", [((2, 3, 5), (2, 3, 5)), ((2, 3, 5), (3, 1)), ((4, 1, 6), (1, 2, 6)), ((5,), ())])
def test_broadcasts(function, shapes):
    a, b = inputs(*shapes[0]), inputs(*shapes[1], seed=1)
    assert_same(function, a, b)
    assert_same(lambda a, b: function(a.transpose(0, -1).contiguous().transpose(0, -1), b), a, b)


def test_integers_and_flags():
    ids, mask = torch.tensor([[3, 1, 2, 9]]), torch.tensor([[True, False, True, True]])
    assert_same(lambda ids, mask: (ids + 2, ids * ids - 5, ids == 2, ids > 1, ids.float()), ids, mask)
    assert_same(
        lambda ids, mask: (mask & (ids > 1), mask | (ids > 1), ~mask, mask.all(), mask.any(), mask.sum()), ids, mask
    )
    assert_same(lambda ids, mask: (ids.max(), ids.sum(-1), torch.arange(3, 9) + ids.sum()), ids, mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions(dtype):
    x = inputs(3, 4, 530, dtype=dtype)
    assert_same(lambda x: (x.mean(-1, keepdim=True), x.sum(-1), x.amax((1, 2)), x.sum((1, 2)), x.amin(-1)), x)
    assert_same(lambda x: x.transpose(0, 1).mean(-1), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_softmax(dtype):
    x, weight, bias = inputs(2, 3, 70, dtype=dtype), inputs(70, dtype=dtype, seed=1), inputs(70, dtype=dtype, seed=2)
    assert_same(lambda x, w, b: functional.layer_norm(x, (70,), w, b, 1e-5), x, weight, bias)
    assert_same(
        lambda x, w, b: functional.layer_norm(x, (70,)) + functional.rms_norm(x, (70,), w, 1e-6), x, weight, bias
    )
    assert_same(lambda x, w, b: functional.softmax(x, -1), x, weight, bias)


def test_softmax_of_masked_rows():
    x = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf, -math.inf, -math.inf]])
    assert_same(lambda x: functional.softmax(x, -1), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_and_joins(dtype):
    x = inputs(2, 3, 4, 6, dtype=dtype)
    assert_same(lambda x: x.transpose(1, 2).reshape(2, 4, 18), x)
    assert_same(lambda x: (torch.cat([x, -x], dim=1), torch.cat([x[..., 3:], x[..., :3]], dim=-1)), x)
    assert_same(lambda x: x[:, :, None].expand(2, 3, 5, 4, 6).reshape(2, 15, 4, 6), x)
    assert_same(lambda x: x.permute(3, 1, 0, 2).contiguous(), x)
    assert_same(lambda x: (torch.stack([x, -x], dim=-1), torch.stack([x[..., ::2], x[..., 1::2]], dim=2)), x)
    assert_same(lambda x: x.new_ones(3) - x.new_zeros(2, 3), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_dense_products(dtype, threads):
    x, W, b = (
        inputs(1, 2, 300, dtype=dtype) / 17,
        inputs(150, 300, dtype=dtype, seed=1),
        inputs(150, dtype=dtype, seed=2),
    )
    for function in (
        lambda x, W, b: functional.linear(x, W, b),
        lambda x, W, b: functional.linear(x, W),
        lambda x, W, b: x[0] @ W.T,
    ):
        assert_same(function, x, W, b, threads=threads)
    assert_same(lambda x, W, b: x @ W.T.contiguous()[None], x, W, b, threads=threads)


def test_rotary_frequencies():
    frequencies, position = inputs(8), torch.tensor([[5]])
    assert_same(lambda f, p: f[None, :, None].expand(1, -1, 1).float() @ p[:, None, :].float(), frequencies, position)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("heads", "key_heads", "queries"), [(4, 4, 1), (6, 2, 1), (4, 1, 3)])
def test_attention(dtype, threads, heads, key_heads, queries):
    q, k, v = (
        inputs(2, heads, queries, 16, dtype=dtype),
        *(inputs(2, key_heads, 37, 16, dtype=dtype, seed=s) for s in (1, 2)),
    )
    grouped = {"enable_gqa": heads != key_heads}
    bias = inputs(2, 1, queries, 37, dtype=dtype, seed=3)
    mask = (torch.arange(37) > 4).expand(2, 1, queries, 37).contiguous()
    attend = functional.scaled_dot_product_attention
    assert_same(lambda q, k, v: attend(q, k, v, **grouped), q, k, v, threads=threads)
    assert_same(lambda q, k, v, m: attend(q, k, v, attn_mask=m, scale=0.3, **grouped), q, k, v, bias, threads=threads)
    assert_same(lambda q, k, v, m: attend(q, k, v, attn_mask=m, **grouped), q, k, v, mask, threads=threads)


def test_attention_to_nothing_is_what_pytorch_gives():
    q, k, v = inputs(1, 1, 1, 16), inputs(1, 1, 5, 16, seed=1), inputs(1, 1, 5, 16, seed=2)
    mask = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    assert_same(lambda q, k, v, m: functional.scaled_dot_product_attention(q, k, v, attn_mask=m), q, k, v, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exact", [False, True])
def test_packed_products_of_one_input_share_a_step(dtype, exact):
    x = inputs(1, 1, 200, dtype=dtype)
    first, second = operands(random_planes(90, 200, 2, 20)), operands(random_planes(130, 200, 1, 0, seed=1))
    fixed = tuple(tensor for tensor in (*first, *second) if tensor is not None)

    def function(x):
        return sab_linear(x, *first, exact), sab_linear(x, *second, exact)

    steps, named, results = make(function, x, fixed=fixed)
    assert len(steps._steps) == 1
    for threads in (1, 2):
        for found, wanted in zip(run(steps, named, results, x, threads=threads), function(x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_rows_of_a_table():
    table, ids = inputs(20, 6), torch.tensor([[3, 19]])
    assert_same(lambda table, ids: functional.embedding(ids, table), table, ids)
    steps, named, results = make(lambda table, ids: functional.embedding(ids, table), table, ids)
    assert run(steps, named, results, table, torch.tensor([[3, 20]])) is None  # the model then says what is wrong


def test_operations_without_a_step_are_pytorchs():
    x = inputs(4, 9)
    assert_same(lambda x: (x.topk(3).values * 2, x.sort(-1).indices + 1), x, taken=False)


def test_a_value_that_decides_the_way_is_watched():
    def function(x):
        return x * 2 if bool((x.sum() > 0).all()) else x * 3

    x = torch.ones(5)
    steps, named, results = make(function, x)
    assert torch.equal(run(steps, named, results, x)[0], 2 * x)
    assert run(steps, named, results, -x) is None


def test_results_of_another_shape_are_refused_when_they_come():
    steps, named, results = make(lambda x: x.nonzero() + 1, torch.tensor([1.0, 0.0, 2.0]))
    assert run(steps, named, results, torch.tensor([1.0, 1.0, 2.0])) is None


def test_writing_into_what_is_not_its_own_is_refused():
    with pytest.raises(NotReplayableError, match="writes into a tensor"):
        make(lambda x: x.add_(1) * 2, torch.ones(3))


def test_numbers_that_change_unevenly_are_refused():
    counts = iter([1.0, 2.5])
    with pytest.raises(NotReplayableError, match="became"):
        make(lambda x: x * next(counts), torch.ones(3))


def test_every_instruction_set_has_the_steps():
    kernels = library.load()
    sets = [name for name in library.NAMES if kernels.sab_cpu_select(name.encode()) == 0]
    assert "portable" in sets
    q, k, v = inputs(1, 4, 1, 20), inputs(1, 2, 13, 20, seed=1), inputs(1, 2, 13, 20, seed=2)

    def function(q, k, v):
        found = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return functional.silu(found).softmax(-1), functional.layer_norm(found, (20,)), (found * found).mean(-1)

    try:
        for name in sets:
            library.select(kernels, name)
            assert_same(function, q, k, v, threads=2)
    finally:
        library.select(kernels, None)
