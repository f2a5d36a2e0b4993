"""The significance map against the method page written out in loops."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sab_hf.method.hessian import own_variance
from sab_hf.method.significance import LEAST_WEIGHT, hoyer_sparsity, saliency, significance_map, significant_columns

TEXT, VISUAL = 0, 1
PAPER = {"salient_top_p": 0.05, "diff_quantile": 0.5, "sparsity_threshold": 0.005}


def problem(n: int, m: int, z: int = 2, seed: int = 0) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """A weight without zeros, and second moments of z modalities that use the features very differently."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(n, m, generator=generator)
    H = {}
    for kind in range(z):
        X = torch.randn(4 * m, m, generator=generator) * torch.randn(m, generator=generator).mul(1.5).exp()
        H[kind] = X.T @ X / len(X)
    return W, H


def variances(H: dict[int, torch.Tensor], damping: float = 0.01) -> dict[int, torch.Tensor]:
    """What the map reads of second moments."""
    return {kind: own_variance(matrix, damping) for kind, matrix in H.items()}


@pytest.mark.parametrize(
    ("s", "expected"),
    [([1, 0], 1), ([0, 5], 1), ([1, 1], 0), ([7, 7, 7], 0), ([0, 0, 2], 1), ([0, 0], 0), ([0, 0, 0], 0), ([4], 0)],
)
def test_hoyer_sparsity_at_its_extremes(s, expected):
    assert hoyer_sparsity(torch.tensor(s).float()[:, None]).tolist() == pytest.approx([expected], abs=1e-6)


@given(
    s=st.lists(st.floats(0, 1, width=32, allow_subnormal=False), min_size=2, max_size=4),
    exponent=st.integers(-120, 120),
)
@settings(deadline=None)
def test_hoyer_sparsity_equals_the_formula_at_every_scale(s, exponent):
    norm, z = math.sqrt(sum(x * x for x in s)), len(s)
    expected = 0.0 if max(s) == 0 else (math.sqrt(z) - sum(s) / norm) / (math.sqrt(z) - 1) if norm else None
    rho = hoyer_sparsity(torch.tensor(s)[:, None])
    assert 0 <= float(rho) <= 1
    if expected is not None:  # None: squares underflow in the reference
        assert float(rho) == pytest.approx(min(max(expected, 0), 1), abs=1e-5)
    scaled = torch.tensor(s) * 2.0**exponent
    if (scaled / 2.0**exponent).tolist() == torch.tensor(s).tolist():  # nothing was lost to underflow
        assert torch.equal(hoyer_sparsity(scaled[:, None]), rho)


def test_saliency_equals_the_formula():
    W, H = problem(4, 6)
    H = H[TEXT]
    damped = H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(6)
    inverse = torch.linalg.inv(damped)
    S = [[float(W[i, j]) ** 2 / float(inverse[j, j]) for j in range(6)] for i in range(4)]
    mean = sum(map(sum, S)) / 24
    variance = own_variance(H, 0.01)
    torch.testing.assert_close(saliency(W, variance), torch.tensor(S) / mean, rtol=1e-4, atol=1e-6)
    assert not saliency(torch.zeros(4, 6), variance).any()


def map_in_loops(S: list[torch.Tensor], top_p: float, quantile: float, threshold: float):
    """Method §3, steps 2 to 4, for two modalities, from their saliencies; the floor of Λ last."""
    n, m = S[0].shape
    cells = list(itertools.product(range(n), range(m)))
    text, visual = ({cell: float(S_m[cell]) for cell in cells} for S_m in S)
    rho = {}
    for cell in cells:
        norm = math.hypot(text[cell], visual[cell])
        rho[cell] = (math.sqrt(2) - (text[cell] + visual[cell]) / norm) / (math.sqrt(2) - 1) if norm else 0.0
    significant = set()
    for values in (text, visual):
        significant |= set(sorted(cells, key=lambda cell: -values[cell])[: round(top_p * n * m)])
    spread = {cell: abs(text[cell] - visual[cell]) for cell in cells}
    least = sorted(spread.values())[math.ceil(quantile * n * m) - 1]
    unimodal = {cell for cell in significant if spread[cell] >= least and rho[cell] >= threshold}
    total = sum(text.values()) + sum(visual.values())
    r = sum(text[cell] + visual[cell] for cell in unimodal) / total
    Lambda = {cell: r * rho[cell] + (1 - r) * (1 - rho[cell]) for cell in cells}
    mean = sum(Lambda.values()) / len(cells)
    Lambda = {cell: max(value / mean, LEAST_WEIGHT) for cell, value in Lambda.items()}
    mean = sum(Lambda.values()) / len(cells)
    return rho, unimodal, significant - unimodal, r, {cell: value / mean for cell, value in Lambda.items()}


@pytest.mark.parametrize("numbers", [(0.05, 0.5, 0.005), (0.2, 0.9, 0.3), (0.3, 0.1, 0.0)])
@pytest.mark.parametrize("seed", range(3))
def test_map_equals_the_method_page(seed, numbers):
    W, H = problem(9, 13, seed=seed)
    names = ("salient_top_p", "diff_quantile", "sparsity_threshold")
    result = significance_map(W, variances(H), **dict(zip(names, numbers, strict=True)))
    S = [saliency(W, variances(H)[kind]) for kind in (TEXT, VISUAL)]
    rho, unimodal, crossmodal, share, Lambda = map_in_loops(S, *numbers)
    assert unimodal
    assert crossmodal or numbers[1] < 0.9
    assert {tuple(cell) for cell in result.unimodal.nonzero().tolist()} == unimodal
    assert {tuple(cell) for cell in result.crossmodal.nonzero().tolist()} == crossmodal
    assert result.unimodal_share == pytest.approx(share, rel=1e-4)
    for cell, value in rho.items():
        assert float(result.rho[cell]) == pytest.approx(value, abs=1e-4)
        assert float(result.Lambda[cell]) == pytest.approx(Lambda[cell], abs=1e-3)


@pytest.mark.parametrize("z", [2, 3])
def test_map_of_the_paper_s_form_is_constant_down_each_column(z):
    W, H = problem(7, 11, z)
    result = significance_map(W, variances(H), **PAPER)
    for matrix in (result.rho, result.Lambda):
        torch.testing.assert_close(matrix, matrix[:1].expand(7, -1), rtol=1e-3, atol=1e-4)
        assert matrix[0].std() > 0.05
    torch.testing.assert_close(result.column_weight, result.Lambda[0], rtol=1e-3, atol=1e-4)
    assert not (result.unimodal & result.crossmodal).any()


@pytest.mark.parametrize("seed", range(3))
def test_lambda_has_mean_one_and_no_zero(seed):
    """One modality alone uses half of the features: ρ = 1 there, and without a floor Λ would be next to r."""
    W, _ = problem(8, 12, seed=seed)
    half = (torch.arange(12) < 6).float()
    H = {TEXT: torch.diag(1e-6 + half), VISUAL: torch.diag(torch.ones(12))}
    Lambda = significance_map(W, variances(H, 1e-6), **PAPER | {"sparsity_threshold": 1.0}).Lambda
    assert float(Lambda.mean()) == pytest.approx(1, abs=1e-5)
    # the floor is set before the mean is made 1 again, which takes up to LEAST_WEIGHT of it
    assert float(Lambda.min()) == pytest.approx(LEAST_WEIGHT / (1 + LEAST_WEIGHT / 2), rel=0.01)


@pytest.mark.parametrize("kinds", [(), (TEXT,), (VISUAL,)])
@pytest.mark.parametrize(
    "numbers",
    [{}, {"sparsity_threshold": 0.0}, {"sparsity_threshold": 0.0, "salient_top_p": 1.0, "diff_quantile": 0.0}],
    ids=["paper", "some unimodal", "all unimodal"],
)
def test_map_of_a_single_modality_is_one(kinds, numbers):
    W, H = problem(6, 10)
    result = significance_map(W, variances({kind: H[kind] for kind in kinds}), **PAPER | numbers)
    assert not result.rho.any()
    assert result.unimodal_share == 0
    torch.testing.assert_close(result.Lambda, torch.ones(6, 10))
    torch.testing.assert_close(result.column_weight, torch.ones(10))


def test_map_of_modalities_that_are_alike_is_one():
    W, H = problem(6, 10)
    result = significance_map(W, variances({TEXT: H[TEXT], VISUAL: 5 * H[TEXT]}), **PAPER)
    assert not result.unimodal.any()
    torch.testing.assert_close(result.rho, torch.zeros(6, 10), atol=1e-5, rtol=0)
    torch.testing.assert_close(result.Lambda, torch.ones(6, 10), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dead", ["weights", "a column", "inputs", "one modality's inputs"])
def test_map_survives_what_is_dead(dead):
    W, H = problem(6, 10)
    if dead == "weights":
        W.zero_()
    elif dead == "a column":
        W[:, 3] = 0
    else:
        for kind in (TEXT, VISUAL) if dead == "inputs" else (TEXT,):
            H[kind].zero_()
    result = significance_map(W, variances(H), **PAPER)
    assert result.rho.isfinite().all()
    assert not result.rho[W == 0].any()
    assert (result.Lambda > 0).all()
    assert float(result.Lambda.mean()) == pytest.approx(1, abs=1e-5)


def test_map_does_not_depend_on_the_size_of_weights_and_inputs():
    W, H = problem(6, 10)
    expected = significance_map(W, variances(H), **PAPER)
    for result in (
        significance_map(W * 1e-6, variances(H), **PAPER),
        significance_map(W, variances({TEXT: H[TEXT] * 1e-6, VISUAL: H[VISUAL] * 1e6}), **PAPER),
    ):
        torch.testing.assert_close(result.Lambda, expected.Lambda, rtol=1e-3, atol=1e-3)
        assert torch.equal(result.unimodal, expected.unimodal)


@pytest.mark.parametrize("k", [0, 1, 4, 9])
def test_significant_columns_of_a_diagonal_hessian(k):
    """‖W_j‖² h_j is all there is to a column then, and neither factor alone gives the same order."""
    W = torch.diag(torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6, 5])) @ torch.ones(9, 9).triu().tril()
    h = torch.tensor([9.0, 1, 1, 20, 2, 0.5, 50, 0.1, 3])
    score = [float(W[j, j]) ** 2 * float(h[j]) for j in range(9)]  # 81 1 16 20 50 40.5 200 3.6 75
    expected = set(sorted(range(9), key=lambda j: -score[j])[:k])
    mask = significant_columns(W, h, k)
    assert mask.dtype == torch.bool
    assert set(mask.nonzero().flatten().tolist()) == expected
    assert k != 4 or expected == {6, 0, 8, 4}


def test_significant_columns_of_a_correlated_hessian():
    """Features 0 and 1 are next to equal: each can make up for the other, so large inputs alone do not make them matter."""
    W, _ = problem(5, 12)
    X = torch.randn(60, 12, generator=torch.Generator().manual_seed(1))
    X[:, :2] = 3 * X[:, :1] + 0.1 * X[:, 1:2] * torch.tensor([0, 1])
    H = X.T @ X / 60 + 0.01 * torch.eye(12)
    H_inv = torch.linalg.inv(H.double())
    energy = [sum(float(w) ** 2 for w in W[:, j]) for j in range(12)]
    best, by_size = (
        set(sorted(range(12), key=lambda j: -score[j])[:5])
        for score in (
            [energy[j] / float(H_inv[j, j]) for j in range(12)],
            [energy[j] * float(H[j, j]) for j in range(12)],
        )
    )
    assert best != by_size
    assert set(significant_columns(W, own_variance(H, 0.0), 5).nonzero().flatten().tolist()) == best
