"""The level nearest to each weight, and the gradients through it: brute force, autograd, finite values everywhere."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers import level_problem

from sab_hf.kernels.cuda import linear as cuda
from sab_hf.method.levels import NearestLevel, nearest_choice, sign_combinations, signs_of


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_weight_is_the_nearest_of_all_levels(planes):
    latent, unit, r, c = level_problem(5, 7, planes)
    W = NearestLevel.apply(latent, unit, r, c)
    for i, j in itertools.product(range(5), range(7)):
        levels = [
            sum(s * r[k, i] * c[k, j] for k, s in enumerate(signs)) for signs in sign_combinations(planes, W.device)
        ]
        value = latent[i, j] * unit[i, j]
        nearest = min(float(abs(level - value)) for level in levels)
        assert float(abs(W[i, j] - value)) == pytest.approx(nearest, abs=1e-6)


def test_choices_are_rows_of_the_combinations_and_the_first_of_equals():
    latent, unit, r, c = level_problem(6, 9, 3)
    choice = nearest_choice(latent * unit, r, c)
    signs = torch.stack([signs_of(choice, k, 3) for k in range(3)], -1)
    assert torch.equal(signs, sign_combinations(3, choice.device)[choice.long()])
    assert (signs[:, c[-1] == 0, -1] == 1).all()


@pytest.mark.parametrize("planes", [1, 2, 4])
def test_gradients_are_those_of_autograd_for_the_chosen_signs(planes):
    latent, unit, r, c = (t.requires_grad_(True) for t in level_problem(11, 13, planes, seed=1))
    downstream = torch.randn(11, 13)
    NearestLevel.apply(latent, unit, r, c).backward(downstream)
    found = latent.grad, r.grad, c.grad
    assert unit.grad is None
    latent.grad = r.grad = c.grad = None
    choice = nearest_choice((latent * unit).detach(), r.detach(), c.detach())
    sizes = r[:, :, None] * c[:, None]
    W = sum(signs_of(choice, k, planes) * sizes[k] for k in range(planes))
    inside = (latent * unit).abs() <= sizes.abs().sum(0)
    through = torch.where(inside, latent * unit.detach(), 0)
    (W + through - through.detach()).backward(downstream)
    assert 0 < int(inside.sum()) < inside.numel()
    for mine, expected in zip(found, (latent.grad, r.grad, c.grad), strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_gpu_without_kernels_for_fitting_is_named_once(monkeypatch, caplog):
    monkeypatch.setattr(cuda, "why_no_kernel", lambda device, dtype: "planted reason")
    matrix = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.float32)
    with caplog.at_level("WARNING", logger="sab_hf"):
        assert not cuda.can_fit(matrix)
        assert not cuda.can_fit(matrix)
    assert [record.getMessage() for record in caplog.records] == [
        "quantizing runs on PyTorch's operations, slowly: planted reason"
    ]
    assert not cuda.can_fit(torch.ones(1))
