"""The alternating fit: every exact step against `lstsq`, the sweep and the closed forms against plain loops."""

import itertools
from collections import Counter
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sab_hf.method import fit
from sab_hf.method.fit import (
    PlaneState,
    fit_planes,
    fit_planes_elementwise,
    initial_state,
    nearest_signs,
    sweep_signs,
    to_sign_planes,
    update_column_scales,
    update_row_scales,
    update_scales_elementwise,
)
from sab_hf.method.hessian import damp, feedback_factor
from sab_hf.packing import from_tensors, to_tensors
from sab_hf.planes import SignPlanes

Problem = tuple[torch.Tensor, torch.Tensor]


def problem(n: int, m: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Problem:
    """A Gaussian weight with uneven columns, and second moments of correlated inputs with uneven features."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    W = normal(n, m) * (0.5 * normal(m)).exp()
    X = (normal(3 * m, m) * normal(m).exp()) @ (torch.eye(m) + normal(m, m) / m**0.5)
    return W.to(dtype), damp(X.T @ X / len(X), 0.01).to(dtype)


def random_state(n: int, m: int, K: int, residual: bool, seed: int, dtype: torch.dtype = torch.float64) -> PlaneState:
    """Random signs, scales of both signs, and a last plane on about half of the columns if `residual`."""
    generator = torch.Generator().manual_seed(seed)
    planes = K + residual
    free = torch.ones(planes, m, dtype=torch.bool)
    if residual:
        free[-1] = torch.rand(m, generator=generator) < 0.5
        free[-1, 0], free[-1, -1] = True, m == 1
    B = torch.randint(0, 2, (planes, n, m), generator=generator).to(dtype) * 2 - 1
    r, c = (torch.randn(planes, size, generator=generator).to(dtype) for size in (n, m))
    return PlaneState(B, r, c * free, free)


def output_error(W: torch.Tensor, W_hat: torch.Tensor, H: torch.Tensor) -> float:
    """tr(E H Eᵀ) in float64, row by row."""
    return sum(float(e @ H.double() @ e) for e in (W.double() - W_hat.double()))


def weighted_error(W: torch.Tensor, W_hat: torch.Tensor, v: torch.Tensor) -> float:
    return float((v.double() * (W.double() - W_hat.double()).square()).sum())


shapes = {"n": st.integers(1, 8), "m": st.integers(1, 12), "K": st.integers(1, 4), "residual": st.booleans()}


# The scales under H


@given(**shapes, seed=st.integers(0, 2**16), largest_system=st.sampled_from([1, 3, 8, 2**14]))
@settings(deadline=None, max_examples=60)
def test_scale_updates_never_raise_the_objective(n, m, K, residual, seed, largest_system):
    """In float32 and also from states that are nothing like a fit; with the column system whole and in blocks."""
    W, H = problem(n, m, seed)
    state = random_state(n, m, K, residual, seed, torch.float32)
    uncovered = ~state.free
    size = output_error(W, torch.zeros_like(W), H)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "MAX_SYSTEM", largest_system)
        before = output_error(W, state.dense(), H)
        for update in (update_row_scales, update_column_scales) * 2:
            update(W, H, state)
            after = output_error(W, state.dense(), H)
            assert after <= before + 1e-6 * max(size, before), update.__name__
            before = after
    assert (state.c[uncovered] == 0).all()


def least_row_error(W: torch.Tensor, H: torch.Tensor, state: PlaneState) -> float:
    """Least objective over the row scales: one least-squares problem a row, with H = L Lᵀ."""
    L, least = torch.linalg.cholesky(H), 0.0
    for i in range(W.shape[0]):
        design = (state.B[:, i] * state.c) @ L  # [K, m]
        r = torch.linalg.lstsq(design.T, W[i] @ L, driver="gelsd").solution
        least += float((W[i] @ L - r @ design).square().sum())
    return least


def least_column_error(W: torch.Tensor, H: torch.Tensor, state: PlaneState) -> float:
    """Least objective over the column scales: the vectorised problem, one unknown for each covered column."""
    L, design = torch.linalg.cholesky(H), []
    for k, j in state.free.nonzero().tolist():
        basis = torch.zeros_like(W)
        basis[:, j] = state.r[k] * state.B[k, :, j]
        design.append((basis @ L).flatten())
    design, target = torch.stack(design, 1), (W @ L).flatten()
    c = torch.linalg.lstsq(design, target, driver="gelsd").solution
    return float((target - design @ c).square().sum())


@pytest.mark.parametrize(
    ("n", "m", "K", "residual"), [(5, 7, 1, False), (6, 5, 2, True), (4, 9, 3, False), (1, 4, 1, 1)]
)
@pytest.mark.parametrize("seed", range(4))
def test_scale_updates_reach_the_minimum(n, m, K, residual, seed):
    W, H = problem(n, m, seed, torch.float64)
    size = output_error(W, torch.zeros_like(W), H)
    for update, least in [(update_row_scales, least_row_error), (update_column_scales, least_column_error)]:
        state = random_state(n, m, K, residual, seed)
        expected = least(W, H, state)
        assert output_error(W, state.dense(), H) > expected + 1e-2 * size
        update(W, H, state)
        assert output_error(W, state.dense(), H) == pytest.approx(expected, rel=1e-5, abs=1e-6 * size)


@pytest.mark.parametrize("largest_system", [2, 6, 10])
def test_column_scales_by_blocks_converge_to_the_whole_system(monkeypatch, largest_system):
    W, H = problem(6, 11, 3, torch.float64)
    start = random_state(6, 11, 1, True, 3)
    least = least_column_error(W, H, start)
    monkeypatch.setattr(fit, "MAX_SYSTEM", largest_system)
    state = start.copy()
    update_column_scales(W, H, state)
    assert output_error(W, state.dense(), H) > 1.0001 * least  # one pass over blocks is not the whole
    reached = pytest.approx(least, rel=1e-5)
    assert any(update_column_scales(W, H, state) or output_error(W, state.dense(), H) == reached for _ in range(500))


def test_row_scales_of_a_row_depend_on_that_row_only():
    W, H = problem(6, 11, 3, torch.float64)
    state = random_state(6, 11, 2, True, 3)
    alone = PlaneState(state.B[:, 2:3], state.r[:, 2:3].clone(), state.c, state.free)
    update_row_scales(W, H, state)
    update_row_scales(W[2:3], H, alone)
    torch.testing.assert_close(state.r[:, 2:3], alone.r)


# The signs


@given(**shapes, seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=40)
def test_signs_without_correlation_are_the_nearest_levels(n, m, K, residual, seed):
    """The sweep under H = I, and `nearest_signs`, against brute force over all 2^K levels of every weight."""
    W = problem(n, m, seed)[0]
    swept = random_state(n, m, K, residual, seed, torch.float32)
    nearest = swept.copy()
    sweep_signs(W, torch.eye(m), swept, block_size=5)
    nearest.B = nearest_signs(W, nearest)
    for i, j in itertools.product(range(n), range(m)):
        scales = (swept.r[:, i] * swept.c[:, j]).tolist()
        levels = [
            sum(s * b for s, b in zip(scales, signs, strict=True))
            for signs in itertools.product([-1, 1], repeat=len(scales))
        ]
        least = min(abs(float(W[i, j]) - level) for level in levels)
        for state in (swept, nearest):
            assert set(state.B[:, i, j].tolist()) <= {-1.0, 1.0}
            assert abs(float(W[i, j] - state.dense()[i, j])) == pytest.approx(least, abs=1e-5)


def sweep_naively(W: torch.Tensor, H: torch.Tensor, state: PlaneState) -> torch.Tensor:
    """Optimal Brain Quantization, column after column: each treated column is eliminated from the inverse of H."""
    W, H_inv = W.double().clone(), torch.linalg.inv(H.double())
    W_hat = torch.empty_like(W)
    for j in range(W.shape[1]):
        for i in range(W.shape[0]):
            scales = (state.r[:, i] * state.c[:, j]).double()
            levels = [float(scales @ torch.tensor(s).double()) for s in itertools.product([-1, 1], repeat=len(scales))]
            W_hat[i, j] = min(levels, key=lambda level: abs(level - W[i, j]))
            error = (W[i, j] - W_hat[i, j]) / H_inv[j, j]
            W[i, j + 1 :] -= error * H_inv[j, j + 1 :]
        H_inv = H_inv - H_inv[:, j : j + 1] @ H_inv[j : j + 1] / H_inv[j, j]
    return W_hat


@pytest.mark.parametrize("block_size", [1, 3, 128])
@pytest.mark.parametrize(("n", "m", "K", "residual"), [(6, 10, 1, False), (5, 13, 2, False), (4, 7, 1, True)])
def test_sweep_equals_a_plain_column_loop(n, m, K, residual, block_size):
    W, H = problem(n, m, seed=n)
    start = initial_state(W, K, random_state(n, m, K, True, n).free[-1] if residual else None)
    state = start.copy()
    sweep_signs(W, feedback_factor(H), state, block_size)
    torch.testing.assert_close(state.dense().double(), sweep_naively(W, H, start), rtol=1e-5, atol=1e-5)
    without_feedback = start.copy()
    without_feedback.B = nearest_signs(W, start)
    assert not torch.equal(without_feedback.dense(), state.dense())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 9), (6, 9), (6, 1)])
def test_sweep_leaves_the_weight_alone(n, m, transposed):
    W, H = problem(n, m, 2)
    W = W.T.contiguous().T if transposed else W
    before = W.clone()
    sweep_signs(W, feedback_factor(H), random_state(n, m, 1, False, 2, torch.float32), block_size=4)
    assert torch.equal(W, before)


# The closed forms (method §4.3)


def weighted_problem(n: int, m: int, seed: int, order: int) -> tuple[torch.Tensor, torch.Tensor, PlaneState]:
    generator = torch.Generator().manual_seed(seed)
    v = torch.rand(n, m, generator=generator).double() + 0.1
    return problem(n, m, seed, torch.float64)[0], v, random_state(n, m, order, False, seed)


def test_elementwise_scales_equal_the_formula_of_order_one():
    n, m = 5, 8
    W, v, state = weighted_problem(n, m, 0, 1)
    state.B = torch.where(W >= 0, 1.0, -1.0)[None].double()
    r, c = [0.0] * n, state.c[0].tolist()
    for i in range(n):
        above = sum(float(v[i, j]) * c[j] * abs(float(W[i, j])) for j in range(m))
        r[i] = above / sum(float(v[i, j]) * c[j] ** 2 for j in range(m))
    for j in range(m):
        above = sum(float(v[i, j]) * r[i] * abs(float(W[i, j])) for i in range(n))
        c[j] = above / sum(float(v[i, j]) * r[i] ** 2 for i in range(n))
    update_scales_elementwise(W, v, state)
    assert state.r[0].tolist() == pytest.approx(r, rel=1e-4, abs=1e-5)
    assert state.c[0].tolist() == pytest.approx(c, rel=1e-4, abs=1e-5)


def solve_two(p: list[float], q: list[float], w: list[float], v: list[float]) -> tuple[float, float]:
    """Solve [Σvp² Σvpq; Σvpq Σvq²][x; y] = [Σvpw; Σvqw] by Cramer's rule."""

    def total(a: list[float], b: list[float]) -> float:
        return sum(weight * x * y for weight, x, y in zip(v, a, b, strict=True))

    pp, pq, qq, pw, qw = total(p, p), total(p, q), total(q, q), total(p, w), total(q, w)
    determinant = pp * qq - pq**2
    return (pw * qq - qw * pq) / determinant, (pp * qw - pq * pw) / determinant


def test_elementwise_scales_equal_the_formula_of_order_two():
    n, m = 6, 9
    W, v, state = weighted_problem(n, m, 1, 2)
    (B1, B2), (c1, c2) = state.B.clone(), state.c.clone()
    rows = [solve_two((c1 * B1[i]).tolist(), (c2 * B2[i]).tolist(), W[i].tolist(), v[i].tolist()) for i in range(n)]
    r1, r2 = torch.tensor(rows).double().T
    columns = [
        solve_two((r1 * B1[:, j]).tolist(), (r2 * B2[:, j]).tolist(), W[:, j].tolist(), v[:, j].tolist())
        for j in range(m)
    ]
    update_scales_elementwise(W, v, state)
    torch.testing.assert_close(state.r, torch.stack([r1, r2]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.c.T, torch.tensor(columns).double(), rtol=1e-4, atol=1e-4)


def test_nearest_signs_equal_the_formula_of_order_two():
    """The plane with the larger |rc| takes sign(W), the other sign(W)·sign(|W|−a), each times the sign of its scale."""
    W, _, state = weighted_problem(7, 10, 2, 2)
    expected = torch.empty_like(state.B)
    for i, j in itertools.product(range(7), range(10)):
        w, scales = float(W[i, j]), (state.r[:, i] * state.c[:, j]).tolist()
        large = max((0, 1), key=lambda k: abs(scales[k]))
        sign = 1.0 if w > 0 else -1.0
        within = sign * (1.0 if abs(w) > abs(scales[large]) else -1.0)
        expected[large, i, j] = sign if scales[large] > 0 else -sign
        expected[1 - large, i, j] = within if scales[1 - large] > 0 else -within
    assert torch.equal(nearest_signs(W, state), expected)


@given(**shapes, seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=40)
def test_elementwise_steps_never_raise_the_objective(n, m, K, residual, seed):
    W, v, _ = weighted_problem(n, m, seed, K)
    W, v, state = W.float(), v.float(), random_state(n, m, K, residual, seed, torch.float32)
    before = weighted_error(W, state.dense(), v)
    size = weighted_error(W, torch.zeros_like(W), v)
    for _ in range(3):
        update_scales_elementwise(W, v, state)
        middle = weighted_error(W, state.dense(), v)
        state.B = nearest_signs(W, state)
        after = weighted_error(W, state.dense(), v)
        assert after <= middle + 1e-6 * size
        assert middle <= before + 1e-6 * max(size, before)
        before = after
    assert (state.c[~state.free] == 0).all()


# The whole fit


def mask_of(m: int, *columns: int) -> torch.Tensor:
    mask = torch.zeros(m, dtype=torch.bool)
    mask[list(columns)] = True
    return mask


def stored(planes: SignPlanes) -> SignPlanes:
    """The planes as a file gives them back: scales in float16."""
    return from_tensors(to_tensors(planes), planes.shape[1])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_fit_reports_the_error_of_its_planes(K, residual):
    n, m = 12, 19
    W, H = problem(n, m, 5)
    columns = mask_of(m, 0, 7, 8, 18) if residual else None
    planes, error = fit_planes(W, H, K, columns)
    assert (planes.num_planes, planes.num_significant, planes.shape) == (K, 4 if residual else 0, (n, m))
    zero = torch.zeros_like(W)
    assert error == pytest.approx(output_error(W, planes.dense(), H) / output_error(W, zero, H), rel=1e-4)
    v = torch.rand(n, m, generator=torch.Generator().manual_seed(0)) + 0.1
    planes, error = fit_planes_elementwise(W, v, K, columns)
    assert (planes.num_planes, planes.num_significant, planes.shape) == (K, 4 if residual else 0, (n, m))
    assert error == pytest.approx(weighted_error(W, planes.dense(), v) / weighted_error(W, zero, v), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_fit_gains_by_planes_by_significant_columns_and_by_the_hessian(seed):
    n, m = 24, 40
    W, H = problem(n, m, seed)
    errors = [fit_planes(W, H, K).error for K in (1, 2, 3)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    score = W.square().sum(0) / torch.linalg.inv(H).diagonal()
    columns = score >= score.topk(8).values[-1]
    assert errors[1] < fit_planes(W, H, 1, columns).error < 0.95 * errors[0]
    size = output_error(W, torch.zeros_like(W), H)
    elementwise = fit_planes_elementwise(W, torch.ones(m), 1)
    assert errors[0] < 0.9 * output_error(W, elementwise.planes.dense(), H) / size
    plain = fit_planes(W, torch.eye(m), 1)
    assert elementwise.error == pytest.approx(plain.error, rel=0.05)  # one objective, two ways


def test_fit_starts_with_the_steps_of_the_method():
    """No round at all: signs of W, and the row, column and again row scales, each at its minimum."""
    W, H = problem(12, 19, 5, torch.float64)
    B = torch.where(W >= 0, 1.0, -1.0).double()
    r = W.abs().mean(1)
    c = (W.abs() / r[:, None]).mean(0)
    state = PlaneState(B[None], r[None], c[None], torch.ones(1, 19, dtype=torch.bool))
    update_row_scales(W, H, state)
    update_column_scales(W, H, state)
    least = least_row_error(W, H, state)
    error = fit_planes(W.float(), H.float(), 1, alternations=0).error
    assert error == pytest.approx(least / output_error(W, 0 * W, H), rel=1e-4)


def test_elementwise_fit_ends_with_the_scales_of_its_signs():
    """The columns of the result solve the paper's 2×2 systems, however few the rounds."""
    W, v, _ = weighted_problem(12, 19, 6, 2)
    planes = fit_planes_elementwise(W.float(), v.float(), 2, alternations=1).planes
    p, q = (2.0 * planes.signs - 1) * planes.row_scale[:, :, None]  # A_k = diag(r_k) B_k
    columns = [solve_two(p[:, j].tolist(), q[:, j].tolist(), W[:, j].tolist(), v[:, j].tolist()) for j in range(19)]
    torch.testing.assert_close(planes.col_scale.T, torch.tensor(columns), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("K", [1, 2])
def test_elementwise_fit_ends_where_no_closed_form_gains(K):
    W, _ = problem(12, 19, 6)
    v = torch.rand(12, 19, generator=torch.Generator().manual_seed(1)) + 0.1
    planes, error = fit_planes_elementwise(W, v, K, alternations=200)
    free = torch.ones(K, 19, dtype=torch.bool)
    state = PlaneState(2.0 * planes.signs - 1, planes.row_scale.clone(), planes.col_scale.clone(), free)
    assert torch.equal(nearest_signs(W, state), state.B)
    update_scales_elementwise(W, v, state)
    size = weighted_error(W, 0 * W, v)
    assert weighted_error(W, state.dense(), v) == pytest.approx(error * size, rel=1e-4)
    rounds = [fit_planes_elementwise(W, v, K, alternations=rounds).error for rounds in (1, 2, 4, 8)]
    assert rounds == sorted(rounds, reverse=True)
    assert error < rounds[0]
    if K == 2:  # one plane has the signs of W from the start
        assert not torch.equal(state.B, initial_state(W, K, None).B)


def test_fit_keeps_the_best_round():
    for seed in range(5):
        W, H = problem(10, 17, seed)
        errors = [fit_planes(W, H, 1, alternations=rounds).error for rounds in range(8)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < errors[0]


def test_fit_finds_a_matrix_that_is_one_plane():
    planes = random_state(9, 14, 1, False, 4, torch.float32)
    W = planes.dense()
    _, H = problem(9, 14, 4)
    assert fit_planes(W, H, 1).error < 1e-9
    assert fit_planes_elementwise(W, torch.ones(14), 1).error < 1e-9


@pytest.mark.parametrize("block_size", [4, 128])
@pytest.mark.parametrize(("n", "m"), [(1, 9), (7, 1), (1, 1), (5, 13), (3, 130)])
def test_fit_takes_any_shape(n, m, block_size):
    W, H = problem(n, m, 1)
    for columns in (None, mask_of(m), mask_of(m, *range(0, m - 1, 3))):
        for result in (
            fit_planes(W, H, 1, columns, block_size=block_size),
            fit_planes_elementwise(W, torch.ones(m), 1, columns),
        ):
            assert 0 <= result.error < 1
            assert result.planes.num_planes == 1
            assert result.planes.num_significant == (0 if columns is None else int(columns.sum()))
            assert result.planes.dense().shape == (n, m)
            assert result.planes.dense().isfinite().all()


@pytest.mark.parametrize("block_size", [1, 5, 13])
def test_fit_block_size_does_not_change_the_result(block_size):
    W, H = problem(6, 13, 2)
    torch.testing.assert_close(
        fit_planes(W, H, 2, block_size=block_size).planes.dense(), fit_planes(W, H, 2).planes.dense()
    )


def test_fit_keeps_a_residual_plane_on_all_columns_a_residual_plane():
    """The recorded sizes [K, k] of a module must be those of its tensors, also at k = in_features."""
    W, H = problem(6, 13, 2)
    planes = fit_planes(W, H, 1, torch.ones(13, dtype=torch.bool)).planes
    assert (planes.num_planes, planes.num_significant) == (1, 13)


DEAD = {
    "all zero": lambda W, H: (W.zero_(), H),
    "no weights and no inputs": lambda W, H: (W.zero_(), H.zero_()),
    "no inputs": lambda W, H: (W, H.zero_()),
    "zero rows": lambda W, H: (W.index_fill_(0, torch.tensor([0, 4]), 0), H),
    "zero columns": lambda W, H: (W.index_fill_(1, torch.tensor([0, 5, 12]), 0), H),
    "dead inputs": lambda W, H: (W, H.index_fill_(0, torch.tensor([0, 5]), 0).index_fill_(1, torch.tensor([0, 5]), 0)),
    "one live weight": lambda W, H: (W * W.eq(W.max()), H),
    "constant": lambda W, H: (W.fill_(0.25), H),
    "one input direction": lambda W, H: (W, torch.outer(H[0], H[0])),
}


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("dead", DEAD)
def test_fit_survives_dead_rows_and_columns(dead, K):
    W, H = DEAD[dead](*problem(6, 13, 3))
    H = damp(H, 0.01)
    for result in (
        fit_planes(W, H, K, mask_of(13, 0, 3, 5), block_size=4),
        fit_planes_elementwise(W, torch.ones(13), K, mask_of(13, 0, 3, 5)),
    ):
        for name in (field.name for field in fields(SignPlanes)):
            assert getattr(stored(result.planes), name).isfinite().all(), name
        assert 0 <= result.error < 1
        if dead == "zero rows":
            assert result.planes.dense()[[0, 4]].abs().max() < 1e-3
        if not W.any():
            assert not result.planes.dense().any()


@given(
    n=st.integers(1, 12),
    m=st.integers(1, 20),
    K=st.integers(1, 4),
    size=st.sampled_from([1e-7, 1.0, 1e4]),
    hessian=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=60)
def test_fit_scales_survive_float16(n, m, K, size, hessian, seed):
    """Whatever the size of the weights, storing the scales costs next to nothing."""
    W, H = problem(n, m, seed)
    columns = mask_of(m, *range(0, m - 1, 4))
    if hessian:
        planes, error = fit_planes(W * size, H, K, columns)
        stored_error = output_error(W, stored(planes).dense() / size, H) / output_error(W, 0 * W, H)
    else:
        planes, error = fit_planes_elementwise(W * size, torch.ones(m), K, columns)
        stored_error = weighted_error(W, stored(planes).dense() / size, 1 + 0 * W) / float(W.double().square().sum())
    assert stored_error <= error + 1e-3  # a fit that is next to exact may have planes that nearly cancel


@pytest.mark.parametrize("size", [1e-7, 1e4])
def test_fit_does_not_depend_on_the_size_of_the_weights(size):
    W, H = problem(10, 17, 6)
    assert fit_planes(W * size, H, 2).error == pytest.approx(fit_planes(W, H, 2).error, rel=1e-3)
    assert fit_planes(W, H * size, 2).error == pytest.approx(fit_planes(W, H, 2).error, rel=1e-3)


@pytest.mark.parametrize("transposed", [False, True])
def test_fit_is_deterministic_and_leaves_its_inputs_alone(transposed):
    W, H = problem(10, 17, 7)
    W = W.T.contiguous().T if transposed else W
    columns, v = mask_of(17, 2, 3, 16), torch.rand(10, 17, generator=torch.Generator().manual_seed(0)) + 0.1
    given = [tensor.clone() for tensor in (W, H, columns, v)]
    runs = [(fit_planes(W, H, 2, columns), fit_planes_elementwise(W, v, 2, columns)) for _ in range(2)]
    for one, two in zip(*runs, strict=True):
        assert one.error == two.error
        for name in (field.name for field in fields(SignPlanes)):
            assert torch.equal(getattr(one.planes, name), getattr(two.planes, name)), name
    assert all(torch.equal(a, b) for a, b in zip(given, (W, H, columns, v), strict=True))


@pytest.mark.parametrize("residual", [False, True])
def test_to_sign_planes_keeps_the_matrix_and_balances_the_scales(residual):
    state = random_state(6, 13, 2, residual, 8, torch.float32)
    state.r *= 1e-5
    planes = to_sign_planes(state)
    torch.testing.assert_close(planes.dense(), state.dense())
    for r, c in zip(planes.row_scale, planes.col_scale, strict=True):
        assert float(r.square().mean()) == pytest.approx(float(c.square().mean()), rel=1e-4)


@pytest.mark.parametrize("num_planes", [1, 2])
@pytest.mark.parametrize("elementwise", [False, True])
def test_column_scales_of_one_stay_one_and_cost_what_they_are_worth(num_planes, elementwise):
    W, H = problem(24, 40)

    def fitted(W, H, **options):
        if elementwise:
            return fit_planes_elementwise(W, H.diagonal(), num_planes, **options)
        return fit_planes(W, H, num_planes, **options)

    unit, free = fitted(W, H, unit_columns=True), fitted(W, H)
    assert (unit.planes.col_scale == 1).all()
    assert unit.planes.has_unit_columns
    assert not free.planes.has_unit_columns
    assert free.error < unit.error < 1
    again = fit.from_sign_planes(from_tensors(to_tensors(unit.planes), 40))
    assert again.unit_columns
    assert (to_sign_planes(again).col_scale == 1).all()


def test_row_scales_alone_are_the_least_squares_ones():
    W, H = problem(12, 20)
    planes = fit_planes(W, H, 1, unit_columns=True).planes
    B = planes.signs[0].float() * 2 - 1
    wanted = ((B @ H) * W).sum(1) / ((B @ H) * B).sum(1)
    torch.testing.assert_close(planes.row_scale[0], wanted, rtol=1e-3, atol=1e-5)


# What a round takes


class Watch(TorchDispatchMode):
    """Counts operations by name: those that wait for the device, and those that factor."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("residual", [0, 8])
@pytest.mark.parametrize("K", [1, 2])
def test_refit_multiplies_and_waits_as_little_as_it_can(K, residual):
    """Two products with H for each plane, of a residual plane its own columns; one system; one look at its factorization."""
    n, m, planes, width = 30, 64, K + bool(residual), 64 * K + residual
    W, H = problem(n, m, 1)
    state = initial_state(W, K, mask_of(m, *range(residual)))
    assert [B.shape[1] for B in (state.B[0][:, at] for at in state.covered)] == [m] * K + [residual] * bool(residual)
    w, WH = torch.rand(n) + 0.5, W @ H
    with FlopCounterMode(display=False) as flops, Watch() as watch:
        error = fit.refit_scales(W, H, state, w, WH)
    with_H, system, rows = 2 * n * m * width, n * width**2, 2 * n * planes**2 * m
    assert flops.get_total_flops() == pytest.approx(2 * (with_H + system + rows), rel=0.02)
    assert watch.count["_local_scalar_dense"] == 1
    assert watch.count["linalg_cholesky_ex"] == 1
    assert not watch.count.keys() & {"nonzero", "linalg_lu_factor_ex", "_linalg_solve_ex"}
    E = (W - state.dense()).double()
    assert float(error) == pytest.approx(float(w.double() @ ((E @ H.double()) * E).sum(1)), rel=1e-4)


def test_known_feedback_factor_is_not_made_again(monkeypatch):
    W, H = problem(10, 17, 8)
    expected, U = fit_planes(W, H, 1), feedback_factor(H)
    monkeypatch.setattr(fit, "feedback_factor", None)
    result = fit_planes(W, H, 1, U=U)
    assert result.error == expected.error
    assert torch.equal(result.planes.signs, expected.planes.signs)


@pytest.mark.parametrize("K", [1, 2, 5, 9])
def test_small_systems_are_solved_with_a_ridge(K):
    A = torch.randn(20, K, 2 * K, generator=torch.Generator().manual_seed(K), dtype=torch.float64)
    systems, rhs = A @ A.mT, torch.randn(20, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    systems[0], rhs[0] = 0, 0
    systems[1, -1], systems[1, :, -1], rhs[1, -1] = 0, 0, 0  # a plane without effect on a row
    solution = fit._solve(systems.clone(), rhs.clone())
    assert not solution[0].any()
    assert solution[1, -1] == 0
    ridge = 1e-6 * systems.diagonal(dim1=1, dim2=2).mean(1)
    damped = systems + ridge[:, None, None] * torch.eye(K)
    torch.testing.assert_close(solution[2:], torch.linalg.solve(damped[2:], rhs[2:]), rtol=1e-6, atol=1e-9)


def test_large_system_that_rounding_made_indefinite_is_solved():
    system, rhs = torch.tensor([[1.0, 1.01], [1.01, 1.0]]), torch.tensor([1.0, -2.0])
    expected = torch.linalg.solve(system + 1e-6 * torch.eye(2), rhs)
    torch.testing.assert_close(fit._solve_whole(system, rhs), expected)
