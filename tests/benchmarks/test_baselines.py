"""The baselines' formulas against loops and brute force on small matrices, and their bits against a plain count."""

import itertools
from dataclasses import replace

import pytest
import torch
from baselines import (
    ARB_RC,
    ARB_RC_CGB,
    ARB_X,
    BASELINES,
    BILLM,
    BinaryScheme,
    Moments,
    arb_rc,
    arb_x,
    billm,
    fit_group,
    gptq,
    min_max_grid,
    nearest_signs,
    refit_on_inputs,
    round_to_grid,
    sab_as_published,
    sign_scale,
    split_by_magnitude,
    split_columns,
    sweep,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sab_hf.method.hessian import own_variance
from sab_hf.method.significance import significance_map


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, Moments]:
    """A Gaussian weight with uneven columns, and correlated inputs that differ between the modalities."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    W = 0.02 * normal(rows, columns) * (0.3 * normal(columns)).exp()
    mix = normal(columns, columns) / columns**0.5
    inputs = [(normal(4 * columns, columns) * normal(columns).exp()) @ mix + 0.1 for _ in range(2)]
    return W, Moments(*(X.T @ X / len(X) for X in inputs))


def unlike(moments: Moments) -> Moments:
    """Let each modality use mostly its own half of the features."""
    scale = torch.linspace(-1.5, 1.5, len(moments.text)).exp()
    return Moments(moments.text * scale.outer(scale), moments.visual / scale.outer(scale))


def relative_error(W: torch.Tensor, weight: torch.Tensor, H: torch.Tensor) -> float:
    E = W - weight
    return float(((E @ H) * E).sum() / ((W @ H) * W).sum())


def factor(H: torch.Tensor) -> torch.Tensor:
    """U with (H + λI)⁻¹ = UᵀU, by way of the explicit inverse."""
    H = H.double()
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    return torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()


def binarized(values: list[float], order: int) -> list[float]:
    """BiLLM's residual binarization of one row of one group, in plain Python."""
    if not values:
        return []
    approximation = [0.0] * len(values)
    for _ in range(order):
        rest = [w - a for w, a in zip(values, approximation, strict=True)]
        mean = sum(rest) / len(rest)
        scale = sum(abs(w - mean) for w in rest) / len(rest)
        approximation = [a + mean + (scale if w >= mean else -scale) for w, a in zip(rest, approximation, strict=True)]
    return approximation


def binarized_error(W: torch.Tensor, mask: torch.Tensor, order: int) -> float:
    error = 0.0
    for row, inside in zip(W.double(), mask, strict=True):
        values = row[inside].tolist()
        error += sum((w - a) ** 2 for w, a in zip(values, binarized(values, order), strict=True))
    return error


def weighted_error(W: torch.Tensor, mask: torch.Tensor, Lambda2: torch.Tensor, fit) -> float:
    return float((mask * Lambda2 * (W - fit.dense()).square()).double().sum())


# Bits


@pytest.mark.parametrize(
    ("scheme", "bits", "digits"), [(BILLM, 2.875, 3), (ARB_X, 2.875, 3), (ARB_RC, 2.51, 2), (ARB_RC_CGB, 2.83, 2)]
)
def test_block_bits_at_4096_with_9_salient_columns(scheme, bits, digits):
    assert round(32 * scheme.block_bits(4096, 128, salient=9) / 4096**2, digits) == bits


@pytest.mark.parametrize("scheme", [BILLM, ARB_RC, ARB_RC_CGB])
@pytest.mark.parametrize(("rows", "columns", "salient"), [(5, 7, 3), (1, 1, 1), (3, 40, 40), (8, 128, 9)])
def test_block_bits_counts_every_stored_item(scheme, rows, columns, salient):
    bits = 0
    for j in range(columns):
        is_salient = j < salient
        groups = 1 if is_salient and not scheme.column_group_bitmap else 2
        planes = 2 if is_salient else 1
        bits += 1 + 16 * groups * planes * scheme.column_scales  # its mask bit, its column scales
        bits += rows * (planes + (groups == 2))  # its signs, its group bitmap
    salient_groups = 2 if scheme.column_group_bitmap else 1
    bits += rows * 16 * salient_groups * (2 + scheme.row_mean)
    bits += rows * 16 * 2 * (1 + scheme.row_mean) * (salient < columns)
    assert scheme.block_bits(rows, columns, salient) == bits


def test_stored_bits_of_actual_shapes():
    W, moments = problem(6, 300)  # blocks of 128, 128 and 44 columns
    assert billm(W, moments).stored_bits == pytest.approx(2 + (3 * 7 * 16 * 6 + 300) / W.numel())
    assert sign_scale(W, moments).stored_bits == pytest.approx(1 + 3 * 16 * 6 / W.numel())
    assert gptq(W, moments, bits=3).stored_bits == pytest.approx(3 + 3 * (16 + 3) * 6 / W.numel())
    W, moments = problem(6, 256)
    for bits in (2, 3, 4):
        assert gptq(W, moments, bits=bits).stored_bits == pytest.approx(bits + (16 + bits) / 128)


# Groups and their fits


amplitude = st.floats(-2, 2, width=32)


@given(T=amplitude, first=amplitude, second=amplitude)
@settings(max_examples=200, deadline=None)
def test_nearest_signs_of_order_2_are_the_nearest_of_four_levels(T, first, second):
    T, first, second = (torch.tensor([[x]], dtype=torch.float64) for x in (T, first, second))
    chosen = sum(B * a for B, a in zip(nearest_signs(T, [first, second]), (first, second), strict=True))
    nearest = min(abs(T - s * first - t * second) for s, t in itertools.product((-1, 1), repeat=2))
    assert abs(T - chosen) == pytest.approx(float(nearest), abs=1e-12)


@given(T=amplitude, first=amplitude)
@settings(max_examples=50, deadline=None)
def test_nearest_signs_of_order_1_are_the_nearest_of_two_levels(T, first):
    (B,) = nearest_signs(torch.tensor([[T]]), [torch.tensor([[first]])])
    assert abs(T - float(B) * first) == min(abs(T - first), abs(T + first))


@pytest.mark.parametrize("order", [1, 2])
def test_fit_group_without_rounds_is_residual_binarization(order):
    W, _ = problem(4, 9)
    mask = torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    fit = fit_group(W, mask, order=order, scheme=BILLM).dense()
    for i in range(4):
        expected = torch.tensor(binarized(W[i, mask[i]].tolist(), order))
        torch.testing.assert_close(fit[i, mask[i]], expected)


def test_fit_group_with_column_scales_follows_the_written_out_formula():
    W, _ = problem(3, 4)
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1]]).bool()
    v = mask * torch.rand(3, 4, generator=torch.Generator().manual_seed(2))
    r = [sum(abs(W[i, j]) for j in range(4) if mask[i, j]) / mask[i].sum() for i in range(3)]
    c = [sum(abs(W[i, j]) / r[i] for i in range(3) if mask[i, j]) / mask[:, j].sum() for j in range(4)]
    for _ in range(2):
        r = [
            sum(v[i, j] * c[j] * abs(W[i, j]) for j in range(4)) / sum(v[i, j] * c[j] ** 2 for j in range(4))
            for i in range(3)
        ]
        c = [
            sum(v[i, j] * r[i] * abs(W[i, j]) for i in range(3)) / sum(v[i, j] * r[i] ** 2 for i in range(3))
            for j in range(4)
        ]
    fit = fit_group(W, mask, order=1, scheme=replace(ARB_RC, rounds=2), Lambda2=v)
    expected = torch.tensor([[r[i] * c[j] for j in range(4)] for i in range(3)]) * W.sign()
    torch.testing.assert_close(mask * fit.dense(), mask * expected)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("scheme", [ARB_RC, ARB_X])
def test_fit_group_never_raises_the_weighted_error(scheme, order):
    W, _ = problem(12, 20)
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(12, 20, generator=generator) < 0.5
    mask[4], mask[:, 7] = False, False
    Lambda2 = torch.rand(12, 20, generator=generator).square()
    fits = [fit_group(W, mask, order=order, scheme=replace(scheme, rounds=n), Lambda2=Lambda2) for n in range(16)]
    errors = [weighted_error(W, mask, Lambda2, fit) for fit in fits]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.97 * errors[0]


@pytest.mark.parametrize("order", [1, 2])
def test_split_by_magnitude_takes_the_best_percentile(order):
    W, _ = problem(5, 30)
    concentrated, sparse = split_by_magnitude(W, order)
    assert torch.equal(concentrated, ~sparse)
    assert W[concentrated].abs().max() < W[sparse].abs().min()
    magnitudes = sorted(W.abs().flatten().tolist())
    best = min(
        binarized_error(W, W.abs() < threshold, order) + binarized_error(W, W.abs() >= threshold, order)
        for threshold in (magnitudes[percent * (len(magnitudes) - 1) // 100] for percent in range(10, 91))
    )
    error = binarized_error(W, concentrated, order) + binarized_error(W, sparse, order)
    assert error == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("seed", [None, 4, 5])
def test_split_columns_takes_the_best_count_of_the_most_salient(seed):
    W, _ = problem(5, 60)
    saliency = W.square() if seed is None else torch.rand(5, 60, generator=torch.Generator().manual_seed(seed))
    ranked = sorted(range(60), key=lambda j: -float(saliency[:, j].sum()))

    def error(count: int) -> float:
        mask = torch.zeros(5, 60, dtype=torch.bool)
        mask[:, ranked[:count]] = True
        return binarized_error(W, mask, 2) + binarized_error(W, ~mask, 2)

    salient, others = split_columns(W, saliency)
    assert salient.tolist() == ranked[: len(salient)]
    assert sorted([*salient.tolist(), *others.tolist()]) == list(range(60))
    assert error(len(salient)) == pytest.approx(min(error(count) for count in range(1, 50)), rel=1e-5)


def test_split_columns_takes_up_to_49_columns():
    W = torch.cat([torch.full((4, 55), 2.0), torch.full((4, 5), 1.0)], dim=1)
    W[:, ::2] *= -1
    W[:, :49] *= 3
    salient, others = split_columns(W, W.abs())
    assert sorted(salient.tolist()) == list(range(49))
    assert sorted(others.tolist()) == list(range(49, 60))


def test_refit_on_inputs_is_the_least_squares_fit_and_survives_empty_features():
    W, moments = problem(4, 16)
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(5, 4, 16, generator=generator)
    features[3, 1], features[4] = 0.0, 0.0
    H = moments.balanced() + 0.01 * torch.eye(16)
    refitted = refit_on_inputs(W, torch.zeros_like(W), features, H)
    L = torch.linalg.cholesky(H.double())
    for i in range(4):
        A = features[:, i].double()
        coefficients = torch.linalg.pinv((A @ L).T) @ (W[i].double() @ L)
        torch.testing.assert_close(refitted[i].double(), coefficients @ A, atol=1e-6, rtol=1e-4)


# Feedback


def later_columns_after(feedback: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a sweep makes of columns 4…9 when columns 0…3 are quantized to zero."""
    W, moments = problem(3, 10)
    H = moments.balanced()
    H = H + 0.01 * H.diagonal().mean() * torch.eye(10)
    U = torch.linalg.cholesky(torch.linalg.inv(H.double()), upper=True).float()
    out = sweep(W, U, lambda W_b, block: (W_b * (block.start > 0), 0), block_size=4, feedback=feedback).weight
    return W, out, H


def test_sweep_with_exact_feedback_leaves_the_later_columns_optimal():
    W, out, H = later_columns_after("exact")
    gradient = ((W - out) @ H)[:, 4:]
    assert gradient.abs().max() < 1e-4 * (W @ H).abs().max()


def test_sweep_with_diagonal_feedback_follows_the_written_out_formula():
    W, out, H = later_columns_after("diagonal")
    U = torch.linalg.cholesky(torch.linalg.inv(H.double()), upper=True)
    for i, k in itertools.product(range(3), range(4, 10)):
        pushed = sum(float(W[i, j]) / U[j, j] * U[j, k] for j in range(4))
        assert float(out[i, k]) == pytest.approx(float(W[i, k]) - float(pushed), abs=1e-5)


def test_sweep_without_feedback_keeps_the_later_columns():
    W, out, _ = later_columns_after("none")
    assert torch.equal(out[:, 4:], W[:, 4:])


# GPTQ


@pytest.mark.parametrize("bits", [2, 3])
def test_gptq_equals_column_by_column_optimal_brain_quantization(bits):
    W, moments = problem(4, 22)
    H = moments.balanced().double()
    H = H + 0.01 * H.diagonal().mean() * torch.eye(22)
    rest, expected = W.double(), torch.empty(4, 22, dtype=torch.float64)
    for j in range(22):
        if j % 8 == 0:
            scale, zero = min_max_grid(rest[:, j : j + 8], bits)
        expected[:, j : j + 1] = round_to_grid(rest[:, j : j + 1], scale, zero, bits)
        H_inv = torch.linalg.inv(H[j:, j:])
        rest[:, j:] -= torch.outer(rest[:, j] - expected[:, j], H_inv[0] / H_inv[0, 0])
    torch.testing.assert_close(gptq(W, moments, bits=bits, group_size=8).weight, expected.float())


def test_gptq_with_identity_moment_rounds_to_nearest():
    W, _ = problem(5, 40)
    result = gptq(W, Moments(torch.eye(40)), bits=3, group_size=40)
    torch.testing.assert_close(result.weight, round_to_grid(W, *min_max_grid(W, 3), 3))


def test_gptq_with_16_bits_is_nearly_exact():
    W, moments = problem(5, 40)
    for given_moments in (Moments(torch.eye(40)), moments):
        assert (gptq(W, given_moments, bits=16).weight - W).norm() < 1e-4 * W.norm()


def test_min_max_grid_takes_the_best_shrunk_range():
    W, _ = problem(3, 50)
    scale, zero = min_max_grid(W, 2)
    for i in range(3):
        low, high = min(float(W[i].min()), 0.0), max(float(W[i].max()), 0.0)
        errors = []
        for step in range(80):
            size = (1 - step / 100) * (high - low) / 3
            levels = [size * (q - round(-low * (1 - step / 100) / size)) for q in range(4)]
            errors.append(sum(min((w - level) ** 2 for level in levels) for w in W[i].tolist()))
        error = (W[i] - round_to_grid(W, scale, zero, 2)[i]).square().sum()
        assert float(error) == pytest.approx(min(errors), rel=1e-4)
        assert zero[i] in (0, 1, 2, 3)


# Whole methods


def test_methods_are_ordered_as_their_bits_and_fits_suggest():
    W, moments = problem(96, 300)
    H = moments.balanced()
    error = {name: relative_error(W, method(W, moments).weight, H) for name, method in BASELINES.items()}
    assert error["gptq_4bit"] < error["gptq_3bit"] < error["gptq_2bit"] < 0.2
    assert error["arb_rc_cgb"] < error["arb_rc"] < error["billm"] < error["sign_scale"] < 1
    assert error["arb_x"] < error["billm"]


def one_block(W: torch.Tensor, H: torch.Tensor, scheme, Lambda2: torch.Tensor) -> torch.Tensor:
    """A whole method on a layer of one block: saliency, groups, fits."""
    salient, others = split_columns(W, (W / factor(H).diagonal()).square())
    everything = [torch.ones(len(W), len(salient), dtype=torch.bool)]
    masks = {
        2: split_by_magnitude(W[:, salient], 2) if scheme.column_group_bitmap else everything,
        1: split_by_magnitude(W[:, others], 1),
    }
    out = torch.zeros_like(W)
    for order, side in ((2, salient), (1, others)):
        for mask in masks[order]:
            fit = fit_group(W[:, side], mask, order=order, scheme=scheme, Lambda2=Lambda2[:, side])
            out[:, side] = torch.where(mask, fit.dense(), out[:, side])
    return out


ROW_AND_COLUMN = BinaryScheme(row_mean=False, column_scales=True, rounds=15)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("billm", BinaryScheme(row_mean=True, column_scales=False)),
        ("arb_rc", ROW_AND_COLUMN),
        ("arb_rc_cgb", replace(ROW_AND_COLUMN, column_group_bitmap=True)),
    ],
)
def test_binary_methods_equal_their_steps_on_one_block(name, scheme):
    W, moments = problem(6, 60)
    expected = one_block(W, moments.balanced(), scheme, torch.ones_like(W))
    torch.testing.assert_close(BASELINES[name](W, moments).weight, expected)


def test_arb_x_has_less_output_error_than_its_alternation_alone():
    W, moments = problem(6, 60)
    H = moments.balanced()
    alternation = one_block(W, H, BinaryScheme(row_mean=True, column_scales=False, rounds=15), torch.ones_like(W))
    assert relative_error(W, arb_x(W, moments).weight, H) < 0.9 * relative_error(W, alternation, H)


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "sab_as_published"])
def test_methods_treat_uncorrelated_blocks_separately(name):
    halves = [problem(4, 128, seed) for seed in (1, 2)]
    W = torch.cat([W_half for W_half, _ in halves], dim=1)
    # The damping follows the mean diagonal, which must be the same for the halves and the whole.
    blocks = [moments.balanced() / moments.balanced().diagonal().mean() for _, moments in halves]
    whole = BASELINES[name](W, Moments(torch.block_diag(*blocks))).weight
    parts = [BASELINES[name](W_half, Moments(H)).weight for (W_half, _), H in zip(halves, blocks, strict=True)]
    torch.testing.assert_close(whole, torch.cat(parts, dim=1), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "sab_as_published"])
def test_methods_use_the_mean_of_both_moments(name):
    W, moments = problem(4, 140)
    mixed = BASELINES[name](W, Moments(text=None, visual=(moments.text + moments.visual) / 2))
    assert torch.equal(BASELINES[name](W, moments).weight, mixed.weight)


def test_sab_weights_the_fit_by_its_squared_map():
    W, moments = problem(6, 60)
    moments = unlike(moments)
    settings = {"salient_top_p": 0.05, "diff_quantile": 0.5, "sparsity_threshold": 0.005}
    Lambda = significance_map(
        W, {m: own_variance(H, 0.01) for m, H in enumerate((moments.text, moments.visual))}, **settings
    ).Lambda
    assert Lambda.std() > 0.1
    expected = one_block(W, moments.text, ARB_RC_CGB, Lambda**2)
    torch.testing.assert_close(sab_as_published(W, moments).weight, expected)


def test_sab_with_alike_modalities_is_arb_rc_with_bitmap_on_text():
    W, moments = problem(8, 140)
    expected = arb_rc(W, Moments(moments.text), column_group_bitmap=True)
    for alike in (Moments(moments.text), Moments(moments.text, 4 * moments.text)):
        result = sab_as_published(W, alike)
        torch.testing.assert_close(result.weight, expected.weight)
        assert result.stored_bits == expected.stored_bits
    assert not torch.allclose(sab_as_published(W, moments).weight, expected.weight)


def test_sab_takes_its_feedback_from_text_alone():
    W, moments = problem(64, 256)
    first, second = unlike(moments)
    ours, swapped = (sab_as_published(W, Moments(*pair)).weight for pair in ((first, second), (second, first)))
    # Λ is the same for both; only the moment behind groups and feedback differs.
    assert relative_error(W, ours, first) < 0.8 * relative_error(W, swapped, first)
    assert relative_error(W, swapped, second) < 0.8 * relative_error(W, ours, second)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 1), (5, 129), (2, 51)])
def test_odd_shapes_give_finite_results(name, shape):
    W, moments = problem(*shape)
    result = BASELINES[name](W, moments)
    assert result.weight.shape == shape
    assert result.weight.dtype == torch.float32
    assert result.weight.isfinite().all()
    assert result.stored_bits > 1


@pytest.mark.parametrize("name", BASELINES)
def test_dead_columns_and_zero_rows_give_finite_results(name):
    W, moments = problem(4, 140)
    W[2] = 0
    W[:, 11] = 0
    for H in moments:
        H[5:9], H[:, 5:9] = 0, 0
    result = BASELINES[name](W, moments)
    assert result.weight.isfinite().all()
    assert relative_error(W, result.weight, moments.balanced()) < 1


@pytest.mark.parametrize("name", BASELINES)
def test_zero_weight_and_zero_moments_give_zero_and_finite_results(name):
    W, moments = problem(3, 20)
    assert BASELINES[name](torch.zeros_like(W), moments).weight.abs().max() == 0
    assert BASELINES[name](W, Moments(*map(torch.zeros_like, moments))).weight.isfinite().all()


@pytest.mark.parametrize("name", BASELINES)
def test_methods_are_deterministic_and_leave_their_inputs_alone(name):
    W, moments = problem(4, 140)
    kept = [x.clone() for x in (W, *moments)]
    first, second = (BASELINES[name](torch.nn.Parameter(W), moments) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert first.stored_bits == second.stored_bits
    assert not first.weight.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(kept, (W, *moments), strict=True))


@pytest.mark.parametrize("name", BASELINES)
def test_half_precision_weights_are_accepted(name):
    W, moments = problem(4, 30)
    result = BASELINES[name](W.bfloat16(), moments)
    assert torch.equal(result.weight, BASELINES[name](W.bfloat16().float(), moments).weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", BASELINES)
def test_methods_agree_between_cpu_and_gpu(name):
    W, moments = problem(64, 300)
    on_gpu = BASELINES[name](W.cuda(), Moments(*(H.cuda() for H in moments)))
    H = moments.balanced()
    on_cpu = BASELINES[name](W, moments)
    assert on_gpu.weight.is_cuda
    # The searches may break near-ties differently, so the errors agree, not the weights.
    errors = [relative_error(W, result.weight.cpu(), H) for result in (on_cpu, on_gpu)]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_wrong_arguments_are_refused():
    W, moments = problem(3, 20)
    with pytest.raises(ValueError, match="at least one second moment"):
        billm(W, Moments(None))
    with pytest.raises(ValueError, match=r"must be \[in_features, in_features\] = \(20, 20\), got \(19, 19\)"):
        billm(W, Moments(moments.text[1:, 1:]))
    with pytest.raises(ValueError, match="non-empty"):
        billm(W[0], moments)
    with pytest.raises(ValueError, match="`bits` must be 1…16, got 17"):
        gptq(W, moments, bits=17)
