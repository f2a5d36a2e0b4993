"""The level nearest to each latent weight, and one step of training: brute force, autograd and Adam of PyTorch, rounding."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import level_problem

from sab_hf.kernels.cpu import levels as cpu_levels
from sab_hf.kernels.cpu import library
from sab_hf.kernels.cuda import linear as cuda
from sab_hf.method.levels import (
    BETAS,
    EPSILON,
    descend,
    nearest_choice,
    nearest_level,
    sign_combinations,
    signs_of,
    unit_of,
)


@pytest.fixture(params=["compiled", "PyTorch"], autouse=True)
def kernels(request, monkeypatch):
    """Every test runs with the compiled kernels and without."""
    if request.param == "PyTorch":
        monkeypatch.setattr(cpu_levels, "can_fit", lambda *tensors: False)
    return request.param


def numbers(rate, step):
    return torch.tensor([rate, *(1 / (1 - beta**step) for beta in BETAS), step])


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_weight_is_the_nearest_of_all_levels(planes):
    latent, scales = level_problem(5, 7, planes)
    W, unit = nearest_level(latent, scales, torch.empty_like(latent)), unit_of(scales.r_start, scales.c_start)
    for i, j in itertools.product(range(5), range(7)):
        started = [abs(float(scales.r_start[k, i] * scales.c_start[k, j])) for k in range(planes)]
        assert float(unit[i, j]) == pytest.approx(min((size for size in started if size), default=0))
        levels = [
            sum(s * scales.r[k, i] * scales.c[k, j] for k, s in enumerate(signs))
            for signs in sign_combinations(planes, W.device)
        ]
        value = latent[i, j] * unit[i, j]
        nearest = min(float(abs(level - value)) for level in levels)
        assert float(abs(W[i, j] - value)) == pytest.approx(nearest, abs=1e-6)
    assert torch.equal(nearest_level(latent, scales, torch.empty_like(W, dtype=torch.bfloat16)), W.bfloat16())


def test_choices_are_rows_of_the_combinations_and_the_first_of_equals():
    latent, scales = level_problem(6, 9, 3)
    choice = nearest_choice(latent * unit_of(*scales[:2]), scales.r, scales.c)
    signs = torch.stack([signs_of(choice, k, 3) for k in range(3)], -1)
    assert torch.equal(signs, sign_combinations(3, choice.device)[choice.long()])
    assert (signs[:, scales.c[-1] == 0, -1] == 1).all()


@pytest.mark.parametrize("planes", [1, 2, 4])
def test_steps_are_those_of_autograd_for_the_chosen_signs_and_adam(planes):
    """Straight through the choice inside of all levels, nothing outside; the scales for the signs as chosen."""
    latent, scales = level_problem(11, 13, planes, seed=1)
    latent *= planes  # some lie outside of all levels
    given, unit = latent.clone(), unit_of(scales.r_start, scales.c_start)
    expected, r, c = (t.clone().requires_grad_(True) for t in (latent, scales.r, scales.c))
    adam = torch.optim.Adam([expected], 0.03, BETAS, EPSILON)
    moments, at_scales = (torch.zeros(11, 13), torch.zeros(11, 13)), (torch.zeros_like(r), torch.zeros_like(c))
    for step in (1, 2, 3):
        downstream = torch.randn(11, 13)
        choice = nearest_choice((expected * unit).detach(), r.detach(), c.detach())
        sizes = r[:, :, None] * c[:, None]
        W = sum(signs_of(choice, k, planes) * sizes[k] for k in range(planes))
        inside = (expected * unit).abs() <= sizes.abs().sum(0)
        through = torch.where(inside, expected * unit, 0)
        r.grad = c.grad = expected.grad = None
        (W + through - through.detach()).backward(downstream)
        assert 0 < int(inside.sum()) < inside.numel()
        adam.step()
        descend(downstream, latent, moments, scales, at_scales, numbers(0.03, step))
        assert not downstream.any()  # it starts the next sum
        torch.testing.assert_close(at_scales, (r.grad, c.grad.where(scales.c != 0, 0)))
        torch.testing.assert_close(latent, expected.detach())
    assert float((latent - given).abs().max()) > 0.05


@pytest.mark.parametrize("name", library.NAMES)
@pytest.mark.parametrize(
    ("rows", "columns", "planes"), [(1, 1, 1), (3, 64, 2), (33, 65, 1), (70, 200, 3), (64, 130, 5)]
)
def test_compiled_kernels_do_what_pytorch_does_on_any_number_of_threads(
    name, rows, columns, planes, kernels, monkeypatch
):
    if kernels != "compiled":
        pytest.skip("compared within one test")
    compiled = library.load()
    try:
        library.select(compiled, name)
    except ValueError:
        pytest.skip(f"this machine has no {name}")
    latent, scales = level_problem(rows, columns, planes, seed=3)
    latent.view(-1)[0] = math.nan
    gradient, moments = torch.randn(rows, columns), (torch.randn(rows, columns), torch.rand(rows, columns))

    def run(threads):
        torch.set_num_threads(threads)
        given = [t.clone() for t in (gradient, latent, *moments)]
        at_scales = torch.full_like(scales.r, 9), torch.full_like(scales.c, 9)
        W = nearest_level(given[1], scales, torch.empty_like(latent))
        descend(given[0], given[1], (given[2], given[3]), scales, at_scales, numbers(0.03, 4))
        return [W, *given, *at_scales]

    try:
        one, three = run(1), run(3)
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(one, three, strict=True))
        monkeypatch.setattr(cpu_levels, "can_fit", lambda *tensors: False)
        torch.testing.assert_close(one, run(1), rtol=1e-4, atol=1e-5, equal_nan=True)
    finally:
        torch.set_num_threads(1)
        library.select(compiled, None)


def test_steps_below_the_resolution_of_bfloat16_count_on_average():
    """A hundred steps of 2^-11 from 1, where the next number is 2^-8 away: rounding to nearest would leave nothing of them."""
    latent, scales = torch.ones(64, 64, dtype=torch.bfloat16), level_problem(64, 64, 1)[1]
    scales = type(scales)(*(torch.ones_like(part) * 2 for part in scales))
    moments = torch.zeros_like(latent), torch.zeros_like(latent)
    at_scales = torch.zeros(1, 64), torch.zeros(1, 64)
    for step in range(1, 101):
        descend(torch.ones(64, 64), latent, moments, scales, at_scales, numbers(2**-11, step))
    assert float(latent.float().mean()) == pytest.approx(1 - 100 * 2**-11, abs=2e-3)


def test_a_gpu_without_kernels_for_fitting_is_named_once(monkeypatch, caplog, kernels):
    monkeypatch.setattr(cuda, "why_no_kernel", lambda device, dtype: f"planted reason, {kernels}")
    matrix = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.float32)
    with caplog.at_level("WARNING", logger="sab_hf"):
        assert not cuda.can_fit(matrix)
        assert not cuda.can_fit(matrix)
    assert [record.getMessage() for record in caplog.records] == [
        "quantizing runs on PyTorch's operations, slowly: planted reason, " + kernels
    ]
    assert not cuda.can_fit(torch.ones(1))
