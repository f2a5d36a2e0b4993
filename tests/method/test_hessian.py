"""Second moments against explicit sums, and the factors of their inverse against float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sab_hf.method.hessian import (
    InputFactors,
    SecondMoments,
    damp,
    feedback_factor,
    inverse_diagonal,
    mix,
    multiplies_wide,
    own_variance,
)

CPU = torch.device("cpu")
PADDING, TEXT, VISUAL = -1, 0, 1


def tokens(count: int, m: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [count, m] and their modalities, padding among them; the padding holds huge values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, m, generator=generator)
    modality = torch.randint(PADDING, VISUAL + 1, (count,), generator=generator)
    x[modality == PADDING] = 1e6
    return x, modality


@given(
    count=st.integers(0, 60),
    m=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None)
def test_moments_equal_the_sum_written_out_in_any_chunks(count, m, cuts, dtype, seed):
    x, modality = tokens(count, m, seed)
    x = x.clamp(max=6e4).to(dtype)
    moments = SecondMoments(m, CPU)
    edges = [0, *sorted(min(cut, count) for cut in cuts), count]
    for start, end in itertools.pairwise(edges):
        moments.add(x[start:end], modality[start:end])
    seen = set(modality.tolist()) - {PADDING}
    assert set(moments.matrices()) == set(moments.counts) == seen
    for kind, H in moments.matrices().items():
        rows = [row.double() for row, label in zip(x, modality, strict=True) if label == kind]
        expected = sum(torch.outer(row, row) for row in rows) / len(rows)
        assert moments.counts[kind] == len(rows)
        assert H.dtype == torch.float32
        torch.testing.assert_close(H.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "m"), [(1, 1), (33, 9), (700, 128), (4096, 577)])
def test_moments_on_a_gpu_are_those_of_exact_products(dtype, count, m):
    x, modality = (t.cuda() for t in tokens(count, m))
    x = x.clamp(max=6e4).to(dtype)
    moments = SecondMoments(m, x.device)
    moments.add(x, modality)
    for kind, H in moments.matrices().items():
        rows = x[modality == kind].double()
        torch.testing.assert_close(H.double(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-5)


def test_products_summed_in_float32_are_used_where_there_are_any(monkeypatch):
    x, modality = tokens(40, 6)
    x = x.clamp(max=6e4).bfloat16()
    plain, wide = SecondMoments(6, CPU), SecondMoments(6, CPU)
    plain.add(x, modality)
    product, made = torch.mm, []

    def with_dtype(a, b, out_dtype):
        made.append(a.dtype)
        return product(a.to(out_dtype), b.to(out_dtype))

    multiplies_wide.cache_clear()
    monkeypatch.setattr(torch, "mm", with_dtype)
    assert multiplies_wide(CPU, torch.bfloat16)
    assert not multiplies_wide(CPU, torch.float32)
    wide.add(x, modality)
    assert made == [torch.bfloat16] * 3
    for kind, H in wide.matrices().items():
        torch.testing.assert_close(H, plain.matrices()[kind])
    multiplies_wide.cache_clear()


@pytest.mark.parametrize("error", [TypeError, NotImplementedError, RuntimeError])
def test_a_device_or_a_pytorch_without_such_products_makes_others(monkeypatch, error):
    def fail(*_, **__):
        raise error

    multiplies_wide.cache_clear()
    monkeypatch.setattr(torch, "mm", fail)
    assert not multiplies_wide(CPU, torch.float16)
    multiplies_wide.cache_clear()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_moments_tell_of_inputs_that_are_not_finite(bad):
    x, modality = tokens(30, 5)
    moments = SecondMoments(5, CPU)
    moments.add(x, modality)
    x[modality == PADDING] = bad
    moments.add(x, modality)
    assert moments.is_finite()
    x[(modality == TEXT).nonzero()[0], 3] = bad
    moments.add(x, modality)
    assert not moments.is_finite()


@pytest.mark.parametrize("balance", ["equal", "tokens", "text"])
def test_mix_weighs_modalities_as_asked(balance):
    generator = torch.Generator().manual_seed(0)
    moments = SecondMoments(5, CPU)
    x = torch.randn(1000, 5, generator=generator) * torch.where(torch.arange(1000) < 10, 3.0, 1.0)[:, None]
    modality = torch.where(torch.arange(1000) < 10, TEXT, VISUAL)
    moments.add(x, modality)
    text, visual = x[:10].T @ x[:10] / 10, x[10:].T @ x[10:] / 990
    expected = {"equal": 0.5 * text + 0.5 * visual, "tokens": x.T @ x / 1000, "text": text}
    torch.testing.assert_close(mix(moments, 5, CPU, balance), expected[balance])


def test_mix_of_one_modality_is_that_one_and_of_none_the_identity():
    x = torch.eye(4) * torch.arange(1.0, 5)[:, None]
    moments = SecondMoments(4, CPU)
    moments.add(x, torch.full((4,), VISUAL))
    for balance in ("equal", "tokens", "text"):
        torch.testing.assert_close(mix(moments, 4, CPU, balance), x.T @ x / 4)
    assert torch.equal(mix(None, 4, CPU), torch.eye(4))


def test_damp_adds_a_share_of_the_mean_diagonal():
    H = torch.tensor([[2.0, 1.0, 0.0], [1.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    expected = H.clone()
    for j in range(3):
        expected[j, j] += 0.1 * 2
    given_H = H.clone()
    torch.testing.assert_close(damp(H, 0.1), expected)
    assert torch.equal(H, given_H)
    assert torch.equal(damp(torch.zeros(3, 3), 0.1), torch.eye(3))


def singular(m: int, rank: int, dead: int, seed: int = 0) -> torch.Tensor:
    """Second moments of inputs that span `rank` directions, the first `dead` features always 0, outliers included."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(3 * rank, rank, generator=generator) @ torch.randn(rank, m, generator=generator)
    X[:, :dead] = 0
    X[:, -1] *= 30
    return X.T @ X / len(X)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(("m", "rank", "dead"), [(1, 1, 0), (8, 20, 0), (30, 1, 0), (30, 5, 7), (9, 3, 9), (64, 40, 1)])
def test_feedback_factor_factors_the_inverse(m, rank, dead, size):
    H = damp(singular(m, rank, dead) * size, 0.01)
    U = feedback_factor(H)
    assert U.is_contiguous()  # kernels read its rows
    assert torch.equal(U, U.triu())
    assert (U.diagonal() > 0).all()
    expected = torch.linalg.inv(H.double())
    scale = expected.diagonal().sqrt()
    H_inv = U.double().T @ U.double()
    torch.testing.assert_close(H_inv / scale / scale[:, None], expected / scale / scale[:, None], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(inverse_diagonal(U).double(), expected.diagonal(), rtol=1e-3, atol=0)


def test_feedback_factor_falls_back_to_float64_where_float32_breaks_down():
    """uuᵀ + I with integers u up to 4000 is exact in float32, and its inverse is I − uuᵀ / (1 + uᵀu)."""
    checked = 0
    for seed in range(20):
        u = torch.randint(1000, 4000, (40,), generator=torch.Generator().manual_seed(seed)).double()
        exact_H = torch.outer(u, u) + torch.eye(40)
        H = exact_H.float()
        assert torch.equal(H.double(), exact_H)
        if torch.linalg.cholesky_ex(H.flip(0, 1)).info == 0:
            continue
        expected = torch.eye(40) - torch.outer(u, u) / (1 + u @ u)
        U = feedback_factor(H)
        assert U.dtype == torch.float32
        torch.testing.assert_close(inverse_diagonal(U).double(), expected.diagonal(), rtol=0, atol=1e-6)
        torch.testing.assert_close(U.double(), torch.linalg.cholesky(expected, upper=True), rtol=0, atol=2e-3)
        checked += 1
    assert checked


@pytest.mark.parametrize("kinds", [(TEXT,), (VISUAL,), (TEXT, VISUAL)])
@pytest.mark.parametrize("balance", ["equal", "tokens", "text"])
def test_factors_of_an_input_are_those_of_its_moments(kinds, balance):
    """Each is computed once: of one modality one factorization is enough for the variance and the feedback."""
    moments = SecondMoments(6, CPU)
    for kind in kinds:
        x = torch.randn(50, 6, generator=torch.Generator().manual_seed(kind)) * torch.arange(1.0, 7)
        moments.add(x, torch.full((50,), kind))
    factors = InputFactors(moments, 6, CPU, balance, 0.01)
    torch.testing.assert_close(factors.mixed, damp(mix(moments, 6, CPU, balance), 0.01))
    torch.testing.assert_close(factors.feedback, feedback_factor(factors.mixed))
    assert set(factors.variances) == set(kinds)
    for kind, H in moments.matrices().items():
        torch.testing.assert_close(factors.variances[kind], own_variance(H, 0.01))


def test_factors_of_an_input_without_tokens_are_the_identity_s():
    factors = InputFactors(None, 3, CPU, "equal", 0.01)
    torch.testing.assert_close(factors.mixed, 1.01 * torch.eye(3))
    torch.testing.assert_close(factors.feedback, torch.eye(3) / 1.01**0.5)
    assert factors.variances == {}
