"""The alternating significance-weighted fit of sign planes to a weight matrix.

With `A_k = diag(r_k) B_k` and `Ŵ = Σ_k A_k diag(c_k)`, the fit minimizes `tr((W − Ŵ) H (W − Ŵ)ᵀ)` by turns over the signs,
the row scales and the column scales. A residual plane is one more full-width plane whose column scales are 0 outside the
significant columns, so every step is written once, for any number of planes.

Source: SAB-LVLM, significance-weighted alternating binarization; ARB-LLM (arXiv 2410.03129) for row and column scales in
turn; GPTQ (arXiv 2210.17323) for the sweep. Deviation: scales are whole rows and columns instead of blocks of 128, and each
update is exact under H (method §4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.cuda.linear import can_fit
from ..planes import SignPlanes, signs_to
from .hessian import feedback_factor
from .levels import nearest_choice, sign_combinations, signs_of
from .products import signs_times

Columns = slice | Tensor
"""Columns of a matrix: all, or some by their numbers, so that no mask is counted again on a GPU that then waits."""

_RIDGE = 1e-6
"""Relative ridge of the scale systems. Updates solve for a change, so a ridge only shortens the step: the objective still
never rises."""
_LEAST_GAIN = 1e-3
"""Relative gain of a round below which the fit has converged."""
MAX_SYSTEM = 16384
"""Unknowns of one column-scale system; wider ones are solved by column blocks (float32 at 16384: 1 GiB a matrix)."""


@dataclass
class PlaneState:
    """Planes during the fit, all of full width.

    Attributes:
        B: [K, out_features, in_features] float32 ±1.
        r: [K, out_features] float32 row scales.
        c: [K, in_features] float32 column scales.
        free: [K, in_features] bool, the columns that a plane covers; elsewhere its c stays 0.
        has_residual: whether the last plane is the residual plane.
        unit_columns: whether c stays 1 everywhere.
    """

    B: Tensor
    r: Tensor
    c: Tensor
    free: Tensor
    has_residual: bool = False
    unit_columns: bool = False

    def dense(self) -> Tensor:
        """Return Ŵ [out_features, in_features]."""
        total = self.r[0][:, None] * self.c[0] * self.B[0]
        for r, B, c in zip(self.r[1:], self.B[1:], self.c[1:], strict=True):
            total.addcmul_(r[:, None] * c, B)
        return total

    @cached_property
    def covered(self) -> list[Columns]:
        """The columns that each plane covers; looked up once, `free` must not change afterwards."""
        whole = self.free.all(1).tolist()
        return [slice(None) if all_ else own.nonzero()[:, 0] for all_, own in zip(whole, self.free, strict=True)]

    @cached_property
    def combinations(self) -> Tensor:
        """All sign vectors [2^K, K] of the planes."""
        return sign_combinations(len(self.r), self.r.device)

    def copy(self) -> PlaneState:
        """Return the state with scales of its own; signs are never written in place."""
        return replace(self, r=self.r.clone(), c=self.c.clone())


class FitResult(NamedTuple):
    """Planes and the relative error `tr(EHEᵀ) / tr(WHWᵀ)` (elementwise mode: `‖Λ⊙E‖² / ‖Λ⊙W‖²`)."""

    planes: SignPlanes
    error: float


def fit_planes(
    W: Tensor,
    H: Tensor,
    num_planes: int,
    significant_columns: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    unit_columns: bool = False,
    alternations: int = 15,
    block_size: int = 128,
    U: Tensor | None = None,
) -> FitResult:
    """Fit sign planes under the output error `tr(diag(w) (W − Ŵ) H (W − Ŵ)ᵀ)`.

    Args:
        W: [out_features, in_features] float32.
        H: [in_features, in_features] float32, damped second moments of the inputs (Λ folded in).
        num_planes: full planes, K.
        significant_columns: [in_features] bool, columns with a residual plane; None for none.
        row_weight: [out_features] positive, w, how much the error of each output feature counts; None: all alike. Rows
            only compete for the column scales; signs and row scales are each row's own.
        unit_columns: keep all column scales at 1.
        alternations: most rounds of sweep and refit; ends earlier when a round gains less than 0.1 %. The best round by
            objective is returned.
        block_size: columns of the sweep between two matrix products.
        U: [in_features, in_features], `feedback_factor(H)` where it is known.
    """
    w = torch.ones_like(W[:, 0]) if row_weight is None else row_weight / row_weight.mean()
    state = initial_state(W, num_planes, significant_columns, unit_columns)
    WH = W @ H
    least = float(refit_scales(W, H, state, w, WH))
    best = state.copy()
    U = feedback_factor(H) if U is None else U
    for _ in range(alternations):
        sweep_signs(W, U, state, block_size)
        error = float(refit_scales(W, H, state, w, WH))
        gain = 1 - error / least if least > 0 else 0.0
        if gain > 0:
            best, least = state.copy(), error
        if gain < _LEAST_GAIN:
            break
    energy = float(w @ (WH * W).sum(1))
    return FitResult(to_sign_planes(best), max(least, 0.0) / max(energy, 1e-30))


def fit_tall_planes(
    W: Tensor, H: Tensor, num_planes: int, *, alternations: int = 15, block_size: int = 128, rows: int = 4096
) -> FitResult:
    """Fit full sign planes to a matrix of many rows (an embedding, an output head) in bounded memory.

    The column scales, which all rows share, are fitted on `rows` rows spread evenly; then signs and row scales of all rows,
    `rows` at a time. With no more rows than that it is `fit_planes`.

    Args:
        W: [out_features, in_features] floating point, on any device; the computation runs on the device of H.
        H, num_planes, alternations, block_size: as in `fit_planes`.
    Returns:
        Planes on the device of H, or of W where it has more rows than `rows`.
    """
    n = W.shape[0]
    if n <= rows:
        return fit_planes(W.to(H).float(), H, num_planes, alternations=alternations, block_size=block_size)
    some = W[torch.linspace(0, n - 1, rows, device=W.device).long()].to(H.device).float()
    U, w = feedback_factor(H), torch.ones(rows, device=H.device)
    shared = fit_planes(some, H, num_planes, alternations=alternations, block_size=block_size, U=U).planes
    signs, scales, error, energy = [], [], 0.0, 0.0
    for part in W.split(rows):
        part = part.to(H.device).float()
        state = PlaneState(
            signs_to(torch.float32, shared.signs[:, : len(part)]),
            shared.row_scale[:, : len(part)].mean(1, keepdim=True).expand(-1, len(part)).clone(),
            shared.col_scale.clone(),
            torch.ones_like(shared.col_scale, dtype=torch.bool),
        )
        state.r *= part.abs().mean(1) / some.abs().mean()
        for _ in range(3):  # scales of a row converge at once where the column scales are given
            sweep_signs(part, U, state, block_size)
            update_row_scales(part, H, state)
        error += output_error(part - state.dense(), H, w[: len(part)])
        energy += output_error(part, H, w[: len(part)])
        signs.append((state.B > 0).to(W.device)), scales.append(state.r.to(W.device))
    planes = SignPlanes(torch.cat(signs, 1), torch.cat(scales, 1), shared.col_scale.to(W.device))
    return FitResult(planes, error / max(energy, 1e-30))


def fit_planes_elementwise(
    W: Tensor,
    weight: Tensor,
    num_planes: int,
    significant_columns: Tensor | None = None,
    *,
    unit_columns: bool = False,
    alternations: int = 15,
) -> FitResult:
    """Fit sign planes under `Σ v ⊙ (W − Ŵ)²` with the closed forms of the paper (orders 1 and 2, any order here).

    Args:
        W: [out_features, in_features] float32.
        weight: v = Λ², [out_features, in_features] or [in_features], positive.
        num_planes, significant_columns, unit_columns: as in `fit_planes`.
        alternations: rounds; each step is exact, so the last is the best.
    """
    v = weight.expand_as(W)
    state = initial_state(W, num_planes, significant_columns, unit_columns)
    for _ in range(alternations):
        update_scales_elementwise(W, v, state)
        state.B = nearest_signs(W, state)
    update_scales_elementwise(W, v, state)
    error = (v * (W - state.dense()).square()).sum() / (v * W.square()).sum().clamp_min(1e-30)
    return FitResult(to_sign_planes(state), float(error))


def initial_state(
    W: Tensor, num_planes: int, significant_columns: Tensor | None, unit_columns: bool = False
) -> PlaneState:
    """Start each plane from what the planes before it leave: B = sign, r = row mean of |·|, c = column mean of |·|/r or 1."""
    free = torch.ones(num_planes, W.shape[1], dtype=torch.bool, device=W.device)
    has_residual = significant_columns is not None and bool(significant_columns.any())
    if has_residual:
        free = torch.cat([free, significant_columns[None]])
    rest, signs, rows, columns = W.clone(), [], [], []
    for covered in free:
        B = torch.where(rest >= 0, 1.0, -1.0)
        r = (rest.abs() * covered).sum(1) / covered.sum()
        c = (rest.abs() / torch.where(r > 0, r, 1)[:, None]).mean(0) if not unit_columns else torch.ones_like(rest[0])
        c = c * covered
        rest = rest - r[:, None] * B * c
        signs.append(B), rows.append(r), columns.append(c)
    scales = torch.stack(rows), torch.stack(columns)
    return PlaneState(torch.stack(signs), *scales, free, has_residual, unit_columns)


def output_error(E: Tensor, H: Tensor, row_weight: Tensor) -> float:
    """Return `tr(diag(w) E H Eᵀ)`, the squared error of the layer's output."""
    return float(row_weight @ ((E @ H) * E).sum(1))


def refit_scales(W: Tensor, H: Tensor, state: PlaneState, row_weight: Tensor, WH: Tensor) -> Tensor:
    """Minimize the output error over row, column and again row scales, each exactly; it never rises.

    Args:
        WH: [out_features, in_features], `W H`.
    Returns:
        The output error afterwards, a number on the device. It takes no product more: `(W − Ŵ) H` is WH less what the row scales
        were found from.
    """
    DH = update_row_scales(W, H, state)
    if not state.unit_columns:
        gradient = _less(WH, state.r, DH)
        del DH
        update_column_scales(W, H, state, row_weight, gradient)
        del gradient
        DH = update_row_scales(W, H, state)
    return row_weight @ (_less(WH, state.r, DH) * (W - state.dense())).sum(1)


def _less(M: Tensor, r: Tensor, planes: Tensor) -> Tensor:
    """Return `M − Σ_k diag(r_k) planes_k`, for M [n, m], r [K, n] and planes [K, n, m]."""
    for r_k, plane in zip(r, planes, strict=True):
        M = torch.addcmul(M, r_k[:, None], plane, value=-1)
    return M


def update_row_scales(W: Tensor, H: Tensor, state: PlaneState) -> Tensor:
    """Minimize the output error over r: one K×K system a row, `(D H Dᵀ) Δr = D H e`, D = B ⊙ c, e the row's error.

    Returns:
        D H [K, out_features, in_features].
    """
    planes = zip(state.B, state.c, state.covered, strict=True)
    DH = torch.stack([signs_times(B[:, at], c[at], H[at]) for B, c, at in planes])
    D = state.B * state.c[:, None]
    rhs = (DH * _less(W, state.r, D)).sum(2).T  # [n, K]
    systems = DH.transpose(0, 1) @ D.permute(1, 2, 0)  # [n, K, K]
    state.r += _solve(systems, rhs).T
    return DH


def update_column_scales(
    W: Tensor, H: Tensor, state: PlaneState, row_weight: Tensor | None = None, gradient: Tensor | None = None
) -> None:
    """Minimize the output error over c: `[(A_kᵀ diag(w) A_l) ⊙ H] Δc = Σ_i w_i A_k ⊙ (E H)`, by column blocks if too wide.

    Args:
        gradient: [out_features, in_features], `E H` where it is known; it is overwritten.
    """
    K, m = state.c.shape
    width = max(1, MAX_SYSTEM // K)
    w = torch.ones_like(W[:, 0]) if row_weight is None else row_weight
    gradient = (W - state.dense()) @ H if gradient is None else gradient
    for start in range(0, m, width):
        end = min(start + width, m)
        columns = [_within(at, start, end, m) for at in state.covered]
        B = [B_k[:, at] for B_k, at in zip(state.B, columns, strict=True)]
        A = _joined([r[:, None] * B_k for r, B_k in zip(state.r, B, strict=True)], 1)  # [n, unknowns]
        parts = []  # of the system, the rows of each plane
        for r, B_k, at in zip(state.r, B, columns, strict=True):
            parts.append(signs_times(B_k.T, w * r, A).mul_(_joined([H[at][:, other] for other in columns], 1)))
        system = _joined(parts, 0)
        del parts
        rhs = w @ (A * _joined([gradient[:, at] for at in columns], 1))
        changes = _solve_whole(system, rhs).split([B_k.shape[1] for B_k in B])
        del system, A
        for k, (at, change) in enumerate(zip(columns, changes, strict=True)):
            state.c[k, at] += change
            if end < m:
                gradient[:, end:] -= state.r[k][:, None] * signs_times(B[k], change, H[at][:, end:])


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """Return parts beside each other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _within(at: Columns, start: int, end: int, width: int) -> Columns:
    """Return the columns of `at`, of a matrix of `width` columns, that are `start` to `end - 1`."""
    if isinstance(at, slice):
        return slice(start, end)
    return at if end - start == width else at[(at >= start) & (at < end)]


def sweep_signs(W: Tensor, U: Tensor, state: PlaneState, block_size: int) -> None:
    """Choose the signs column by column; the error of each is pushed to the columns after it through U.

    Column j takes, row by row, the nearest of the levels `Σ_k ±r_k c_k[j]`. This step may raise the objective for the
    scales at hand; the refits after it more than pay for it.
    """
    rest = W.T.clone(memory_format=torch.contiguous_format)  # columns of W as rows, for contiguous access
    m = W.shape[1]
    choose, chosen = _sweep_block, []
    if can_fit(W):
        from .kernels import sweep as triton_sweep

        choose, block_size = triton_sweep.sweep_block, min(block_size, triton_sweep.MAX_COLUMNS)
    for start in range(0, m, block_size):
        end = min(start + block_size, m)
        choices, errors = choose(rest, U, state.r, state.c, start, end)
        chosen.append(choices)
        if end < m:
            rest[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    del rest
    state.B = state.combinations[torch.cat(chosen)].permute(2, 1, 0).contiguous()


def _sweep_block(rest: Tensor, U: Tensor, r: Tensor, c: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Choose the levels of columns `start` to `end - 1`, whose `rest` [in_features, out_features] is used up.

    Returns:
        [end - start, out_features] each: the choices, as rows of `sign_combinations`, and the errors to push on.
    """
    errors = torch.empty(end - start, rest.shape[1], device=rest.device)
    choices = torch.empty(end - start, rest.shape[1], dtype=torch.long, device=rest.device)
    combinations = sign_combinations(c.shape[0], rest.device)
    for j in range(start, end):
        # a plane that does not cover the column doubles its levels: the first of equals is taken
        levels = (combinations * c[:, j]) @ r  # [2^K, n]
        choice = choices[j - start]
        torch.argmin((levels - rest[j]).abs_(), 0, out=choice)
        error = torch.sub(rest[j], levels.gather(0, choice[None])[0], out=errors[j - start]).div_(U[j, j])
        rest[j + 1 : end].addr_(U[j, j + 1 : end], error, alpha=-1)
    return choices, errors


def update_scales_elementwise(W: Tensor, v: Tensor, state: PlaneState) -> None:
    """Minimize `Σ v ⊙ (W − Ŵ)²` over r, then over c: one K×K system a row, then one a column.

    For one plane these are `r_i = Σ_j v c_j b w / Σ_j v c_j²` and its mirror image; for two, the paper's 2×2 systems.
    """
    D = (state.B * state.c[:, None]).transpose(0, 1)  # [n, K, m]
    state.r += _solve((D * v[:, None]) @ D.mT, torch.einsum("nkm,nm->nk", D, v * (W - state.dense()))).T
    if state.unit_columns:
        return
    A = (state.B * state.r[:, :, None] * state.free[:, None]).permute(2, 0, 1)  # [m, K, n]
    change = _solve((A * v.T[:, None]) @ A.mT, torch.einsum("mkn,nm->mk", A, v * (W - state.dense())))
    state.c += change.T


def nearest_signs(W: Tensor, state: PlaneState) -> Tensor:
    """Return the signs [K, out_features, in_features] whose level `Σ_k ±r_k c_k` is nearest to each weight."""
    choice, K = nearest_choice(W, state.r, state.c), len(state.r)
    return torch.stack([signs_of(choice, k, K) for k in range(K)])


def to_sign_planes(state: PlaneState, all_r: Tensor | None = None) -> SignPlanes:
    """Convert the state of a fit: make scales of each plane balanced (so that float16 holds them) and columns compact.

    Args:
        all_r: [K, rows of the whole matrix], where the state has some rows of it only: these decide the balance.
    """
    r, c = (state.r, state.c) if state.unit_columns else _balance(state.r, state.c, state.r if all_r is None else all_r)
    if not state.has_residual:
        return SignPlanes(state.B > 0, r, c)
    columns = state.free[-1]
    return SignPlanes(
        signs=state.B[:-1] > 0,
        row_scale=r[:-1],
        col_scale=c[:-1],
        significant_columns=columns,
        residual_signs=state.B[-1][:, columns] > 0,
        residual_row_scale=r[-1],
        residual_col_scale=c[-1][columns],
    )


def from_sign_planes(planes: SignPlanes) -> PlaneState:
    """Invert `to_sign_planes`; scales in float32."""
    free = torch.ones_like(planes.col_scale, dtype=torch.bool)
    state = PlaneState(signs_to(torch.float32, planes.signs), planes.row_scale.float(), planes.col_scale.float(), free)
    state.unit_columns = planes.has_unit_columns
    if not planes.num_significant:
        return state
    columns = planes.significant_columns
    B, c = torch.ones_like(state.B[:1]), torch.zeros_like(state.c[:1])
    B[0, :, columns] = signs_to(torch.float32, planes.residual_signs)
    c[0, columns] = planes.residual_col_scale.float()
    return PlaneState(
        torch.cat([state.B, B]),
        torch.cat([state.r, planes.residual_row_scale.float()[None]]),
        torch.cat([state.c, c]),
        torch.cat([free, columns[None]]),
        has_residual=True,
    )


def _balance(r: Tensor, c: Tensor, all_r: Tensor) -> tuple[Tensor, Tensor]:
    """Share the magnitude of each plane between its scales: `r·t, c/t` with equal root mean squares of `all_r` and c."""
    size_r, size_c = (s.square().mean(1, keepdim=True).sqrt() for s in (all_r, c))
    t = torch.where((size_r > 0) & (size_c > 0), (size_c / size_r).sqrt(), 1)
    return r * t, c / t


def _add_ridge(diagonal: Tensor) -> None:
    """Add the ridge to the diagonal [..., K] of a system; a row of zeros is a plane without effect, and gets a 1."""
    ridge = diagonal.mean(-1, keepdim=True).mul_(_RIDGE).expand_as(diagonal)
    diagonal += ridge.masked_fill(diagonal == 0, 1)


def _solve(systems: Tensor, rhs: Tensor) -> Tensor:
    """Solve many small symmetric positive semidefinite systems [..., K, K] x = [..., K]; all-zero systems give 0.

    By Gauss-Jordan elimination, each step for all systems at once; the ridge makes pivots positive, so none is exchanged.
    """
    rows = torch.cat([systems, rhs[..., None]], -1)
    _add_ridge(rows.diagonal(dim1=-2, dim2=-1))
    for k in range(rhs.shape[-1]):
        pivot = rows[..., k, :] / rows[..., k, k : k + 1]
        rows = torch.addcmul(rows, rows[..., k : k + 1], pivot[..., None, :], value=-1)
        rows[..., k, :] = pivot
    return rows[..., -1]


def _solve_whole(system: Tensor, rhs: Tensor) -> Tensor:
    """Solve one large symmetric positive semidefinite system [K, K] x = [K], which gets a ridge; an all-zero one gives 0."""
    _add_ridge(system.diagonal())
    L, failed = torch.linalg.cholesky_ex(system)
    if failed:  # by rounding
        return torch.linalg.solve(system, rhs)
    return torch.cholesky_solve(rhs[:, None], L)[:, 0]
