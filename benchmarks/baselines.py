"""Published methods as pure functions: a weight and second moments in, a dense approximation and its bits out.

Each is written from its paper's formulas, for comparison at equal bits. The result is dense (nothing is packed), and
`stored_bits` counts everything that a file would need: sign planes, group bitmaps, masks, row and column scales. Scales
are counted in 16 bits but kept in float32, which favours the baselines slightly.

Letters: `W` [out_features, in_features] weight, `H` [in_features, in_features] second moment of the inputs, `U` the
upper triangular factor with `H⁻¹ = UᵀU`, `B` signs, `r` and `c` row and column scales, `v` weights of a squared error,
`_b` the columns of one block.

Example:
    >>> moments = Moments(text=X_text.T @ X_text / len(X_text), visual=X_visual.T @ X_visual / len(X_visual))
    >>> result = BASELINES["billm"](W, moments)
    >>> result.weight.shape, result.stored_bits
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sab_hf.method.hessian import damp, feedback_factor, own_variance
from sab_hf.method.significance import significance_map

DAMPING = 0.01  # of the mean diagonal
SCALE_BITS = 16
MAX_SALIENT_COLUMNS = 49
SPLIT_PERCENTILES = range(10, 91)

Feedback = Literal["none", "diagonal", "exact"]


@dataclass(frozen=True)
class BaselineResult:
    """The outcome of one method on one Linear.

    weight: [out_features, in_features] float32, the dense approximation
    stored_bits: bits/weight, everything that a file would need
    """

    weight: Tensor
    stored_bits: float


class Moments(NamedTuple):
    """The second moments of a Linear's inputs, by modality; `None` for a modality that the layer does not see.

    text: [in_features, in_features], mean of x xᵀ over text positions
    visual: [in_features, in_features], the same over visual positions
    """

    text: Tensor | None
    visual: Tensor | None = None

    def present(self) -> list[Tensor]:
        """Return the moments that exist. Raises ValueError if there are none."""
        moments = [H for H in self if H is not None]
        if not moments:
            raise ValueError("`Moments` must hold at least one second moment, got None for text and for visual")
        return moments

    def balanced(self) -> Tensor:
        """Return the mean over the modalities present, so that neither drowns the other."""
        return torch.stack([H.float() for H in self.present()]).mean(dim=0)


@dataclass(frozen=True)
class BinaryScheme:
    """What a group of weights is fitted with: `mean_i + Σ_k r_ik c_jk B_ijk` over one or two planes k.

    row_mean: fit a row mean; without it the mean is 0
    column_scales: fit column scales; without them c = 1
    column_group_bitmap: split the salient columns by magnitude too, not only the others
    rounds: alternations after the start; 0 is plain residual binarization
    refit_on_inputs: refit row means and row scales of a block on its input moment afterwards; needs `row_mean`
    """

    row_mean: bool
    column_scales: bool
    column_group_bitmap: bool = False
    rounds: int = 0
    refit_on_inputs: bool = False

    def sides(self, salient: Sequence, others: Sequence) -> list[tuple[int, bool, Sequence]]:
        """Give the sets of columns that are not empty, each as (order, split by magnitude or not, columns)."""
        sides = (2, self.column_group_bitmap, salient), (1, True, others)
        return [side for side in sides if len(side[2])]

    def block_bits(self, rows: int, columns: int, salient: int) -> int:
        """Count the bits stored for one block of `columns` columns, `salient` of them salient."""
        bits = columns  # the mask of salient columns
        for order, split, side in self.sides(range(salient), range(salient, columns)):
            groups = 2 if split else 1
            bits += rows * len(side) * (order + split)  # sign planes, group bitmap
            bits += SCALE_BITS * groups * rows * (order + self.row_mean)
            bits += SCALE_BITS * groups * len(side) * order * self.column_scales
        return bits


SIGN_SCALE = BinaryScheme(row_mean=False, column_scales=False)
BILLM = BinaryScheme(row_mean=True, column_scales=False)
ARB_X = BinaryScheme(row_mean=True, column_scales=False, rounds=15, refit_on_inputs=True)
ARB_RC = BinaryScheme(row_mean=False, column_scales=True, rounds=15)
ARB_RC_CGB = replace(ARB_RC, column_group_bitmap=True)


class Plane(NamedTuple):
    """One sign plane of a group: r [rows, 1], c [1, columns], B [rows, columns] of ±1."""

    r: Tensor
    c: Tensor
    B: Tensor

    def dense(self) -> Tensor:
        """Return the product `r_i c_j B_ij`."""
        return self.r * self.c * self.B


class GroupFit(NamedTuple):
    """The fit of one group: mean [rows, 1] and its planes. Only the values inside the group's mask mean anything."""

    mean: Tensor
    planes: list[Plane]

    def dense(self) -> Tensor:
        """Return the approximation [rows, columns]."""
        return self.mean + sum(plane.dense() for plane in self.planes)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide; 0 where the denominator is 0 (an empty group, a dead column)."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def _sign(x: Tensor) -> Tensor:
    """Return ±1, +1 for 0: a stored sign has no third value."""
    return torch.where(x >= 0, 1.0, -1.0)


def nearest_signs(T: Tensor, amplitudes: Sequence[Tensor]) -> list[Tensor]:
    """Choose the signs that bring `Σ_k B_k a_k` nearest to T, element by element, for one or two amplitudes.

    T: [rows, columns], target
    amplitudes: one or two [rows, columns], of either sign

    The larger amplitude takes the sign of T, the smaller one the sign of what remains.
    """
    outer = _sign(T)
    if len(amplitudes) == 1:
        return [outer * _sign(amplitudes[0])]
    first, second = amplitudes
    inner = outer * _sign(T.abs() - torch.maximum(first.abs(), second.abs()))
    first_leads = first.abs() >= second.abs()
    return [
        torch.where(first_leads, outer, inner) * _sign(first),
        torch.where(first_leads, inner, outer) * _sign(second),
    ]


def fit_group(W: Tensor, mask: Tensor, *, order: int, scheme: BinaryScheme, Lambda2: Tensor | None = None) -> GroupFit:
    """Fit a mean and `order` scaled sign planes to the weights inside a mask.

    W: [rows, columns] float32; mask: [rows, columns] bool, the group
    Lambda2: [rows, columns], weights of the squared error; None for 1

    Starts by residual binarization: mean, mean magnitude, sign, then again on what remains. Each alternation then takes
    the exact minimum over the mean, over each scale in turn, and over the signs, so the squared error under v never
    rises: `r_i = Σ_j v c_j B_ij T_ij / Σ_j v c_j²`, `c_j` its mirror image, T the weight less everything else fitted.

    Source: BiLLM, residual approximation (start); ARB-LLM, first and second order, and ARB-RC (alternation).
    """
    inside = mask.to(W.dtype)
    v = inside if Lambda2 is None else inside * Lambda2
    row_count, column_count = inside.sum(1, keepdim=True), inside.sum(0, keepdim=True)
    mean, planes, T = W.new_zeros(W.shape[0], 1), [], W
    for _ in range(order):
        if scheme.row_mean:
            shift = _ratio((inside * T).sum(1, keepdim=True), row_count)
            mean, T = mean + shift, T - shift
        magnitude = inside * T.abs()
        r, c = _ratio(magnitude.sum(1, keepdim=True), row_count), torch.ones_like(column_count)
        if scheme.column_scales:
            c = _ratio(_ratio(magnitude, r).sum(0, keepdim=True), column_count)
        planes.append(Plane(r, c, _sign(T)))
        T = T - planes[-1].dense()

    for _ in range(scheme.rounds):
        if scheme.row_mean:
            T = W - GroupFit(mean, planes).dense()
            mean = mean + _ratio((v * T).sum(1, keepdim=True), v.sum(1, keepdim=True))
        for k, (r, c, B) in enumerate(planes):
            vBT = v * B * (W - GroupFit(mean, planes[:k] + planes[k + 1 :]).dense())
            r = _ratio((vBT * c).sum(1, keepdim=True), (v * c * c).sum(1, keepdim=True))
            if scheme.column_scales:
                c = _ratio((vBT * r).sum(0, keepdim=True), (v * r * r).sum(0, keepdim=True))
            planes[k] = Plane(r, c, B)
        signs = nearest_signs(W - mean, [plane.r * plane.c for plane in planes])
        planes = [plane._replace(B=B) for plane, B in zip(planes, signs, strict=True)]
    return GroupFit(mean, planes)


def _start_error(W: Tensor, masks: Sequence[Tensor], order: int) -> Tensor:
    """Return the squared error of W when each mask is binarized as BiLLM does."""
    return sum((mask * (W - fit_group(W, mask, order=order, scheme=BILLM).dense())).square().sum() for mask in masks)


def _everything(W: Tensor) -> Tensor:
    return torch.ones_like(W, dtype=torch.bool)


def split_by_magnitude(W: Tensor, order: int) -> list[Tensor]:
    """Split W into (concentrated, sparse) masks at the threshold on |W| with the least error at this order.

    Source: BiLLM, optimal splitting search, over the 10–90 % percentiles of |W|.
    """
    ordered = W.abs().flatten().sort().values  # torch.quantile refuses more than 2²⁴ values
    thresholds = ordered[[percent * (len(ordered) - 1) // 100 for percent in SPLIT_PERCENTILES]]
    sparse = [W.abs() >= threshold for threshold in thresholds]
    errors = torch.stack([_start_error(W, (~mask, mask), order) for mask in sparse])
    best = sparse[int(errors.argmin())]
    return [~best, best]


def split_columns(W: Tensor, saliency: Tensor) -> tuple[Tensor, Tensor]:
    """Split a block's columns into (salient, other) indices.

    W, saliency: [rows, columns] of the block

    Columns are ranked by summed |saliency|; of the counts 1…49 the one is taken where salient and other columns, each
    binarized at order 2, have the least error together.

    Source: BiLLM, structural search of salient columns.
    """
    ranked = saliency.abs().sum(0).argsort(descending=True, stable=True)
    errors = []
    for count in range(1, min(MAX_SALIENT_COLUMNS, W.shape[1]) + 1):
        sides = W[:, ranked[:count]], W[:, ranked[count:]]
        errors.append(sum(_start_error(side, [_everything(side)], order=2) for side in sides))
    best = 1 + int(torch.stack(errors).argmin())
    return ranked[:best], ranked[best:]


def refit_on_inputs(W: Tensor, approximation: Tensor, features: Tensor, H: Tensor) -> Tensor:
    """Move the coefficients of `features` to the least `tr((W−Ŵ) H (W−Ŵ)ᵀ)`, row by row, and return the new Ŵ.

    W, approximation: [rows, columns]; features: [F, rows, columns], what each row's coefficients multiply
    H: [columns, columns], the block's input moment

    Source: ARB-LLM, ARB-X, signs fixed.
    Deviation: the paper alternates mean and scale inside one group; this is the joint minimum over all groups of a row,
    which that alternation can only approach.
    """
    A = features.transpose(0, 1).double()  # [rows, F, columns]
    AH = A @ H.double()
    G = AH @ A.mT  # [rows, F, F]
    ridge = 1e-6 * G.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]  # for the features of empty groups
    rhs = AH @ (W - approximation).double().unsqueeze(-1)  # [rows, F, 1]
    change = torch.linalg.solve(G + ridge * torch.eye(G.shape[1], dtype=G.dtype, device=G.device), rhs)
    return approximation + (change.mT @ A).squeeze(1).to(W.dtype)


def binarize_block(
    W: Tensor, saliency: Tensor, scheme: BinaryScheme, *, H: Tensor, Lambda2: Tensor | None = None
) -> tuple[Tensor, int]:
    """Group one block's weights, fit each group, and return the approximation and the bits stored for it.

    W, saliency, Lambda2: [rows, columns]; H: [columns, columns], used by `scheme.refit_on_inputs` alone
    """
    approximation, features = torch.zeros_like(W), []
    salient, others = split_columns(W, saliency)
    for order, split, side in scheme.sides(salient, others):
        W_side, Lambda2_side = W[:, side], None if Lambda2 is None else Lambda2[:, side]
        for mask in split_by_magnitude(W_side, order) if split else [_everything(W_side)]:
            fit = fit_group(W_side, mask, order=order, scheme=scheme, Lambda2=Lambda2_side)
            approximation[:, side] += mask * fit.dense()
            if scheme.refit_on_inputs:
                factors = [mask, *(mask * plane.B for plane in fit.planes)]
                features += [torch.zeros_like(W).index_copy(1, side, factor.to(W.dtype)) for factor in factors]
    if scheme.refit_on_inputs:
        approximation = refit_on_inputs(W, approximation, torch.stack(features), H)
    return approximation, scheme.block_bits(*W.shape, salient=len(salient))


def _damped_factor(H: Tensor) -> tuple[Tensor, Tensor]:
    """Return (H + λI, U), both float32; the factor is computed in float64."""
    damped = damp(H.double(), DAMPING)
    return damped.float(), feedback_factor(damped).float()


def _checked(W: Tensor, moments: Moments) -> Tensor:
    """Return W in float32 without gradient. Raises ValueError unless all shapes fit."""
    if W.ndim != 2 or W.numel() == 0:
        raise ValueError(f"`W` must be a non-empty [out_features, in_features] matrix, got shape {tuple(W.shape)}")
    for H in moments.present():
        if H.shape != (W.shape[1], W.shape[1]):
            raise ValueError(
                f"every moment must be [in_features, in_features] = {(W.shape[1],) * 2}, got {tuple(H.shape)}; "
                "pass the moments of this layer's own inputs"
            )
    return W.detach().float()


def sweep(
    W: Tensor,
    U: Tensor,
    quantize: Callable[[Tensor, slice], tuple[Tensor, float]],
    *,
    block_size: int,
    feedback: Feedback,
) -> BaselineResult:
    """Quantize block after block of columns, each block's error pushed to the later columns through U.

    W: [out_features, in_features]; U: [in_features, in_features] upper triangular, `H⁻¹ = UᵀU`
    quantize: (the block's updated weights, its columns) → (approximation, bits stored)
    feedback: "exact" pushes `E U_bb⁻¹ U_b,later`; "diagonal" has U_bb's diagonal in place of U_bb, as BiLLM and its
        successors do; "none" leaves the later columns alone
    """
    W, out, bits = W.clone(), torch.empty_like(W), 0.0
    for start in range(0, W.shape[1], block_size):
        block = slice(start, min(start + block_size, W.shape[1]))
        out[:, block], block_bits = quantize(W[:, block].clone(), block)
        bits += block_bits
        E, U_bb = W[:, block] - out[:, block], U[block, block]
        if feedback == "diagonal":
            W[:, block.stop :] -= (E / U_bb.diagonal()) @ U[block, block.stop :]
        elif feedback == "exact":
            E = torch.linalg.solve_triangular(U_bb, E, upper=True, left=False)
            W[:, block.stop :] -= E @ U[block, block.stop :]
    return BaselineResult(out, bits / W.numel())


def sign_scale(
    W: Tensor, moments: Moments, *, block_size: int = 128, feedback: Feedback = "diagonal"
) -> BaselineResult:
    """Approximate each row of a block by its mean magnitude times its signs.

    W: [out_features, in_features]; moments are used where `feedback` is not "none"

    Source: the plain binarization that BiLLM starts from.
    """
    W = _checked(W, moments)
    _, U = _damped_factor(moments.balanced())

    def quantize(W_b: Tensor, block: slice) -> tuple[Tensor, float]:
        fit = fit_group(W_b, _everything(W_b), order=1, scheme=SIGN_SCALE)
        return fit.dense(), W_b.numel() + SCALE_BITS * len(W_b)

    return sweep(W, U, quantize, block_size=block_size, feedback=feedback)


def min_max_grid(W: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and integer zero point, both [rows, 1], of each row's asymmetric grid with 2^bits levels.

    The range from min to max (0 included) is shrunk in 80 steps down to 0.21 of itself; each row keeps the step with
    the least squared error.
    """
    low, high = W.amin(1, keepdim=True).clamp(max=0), W.amax(1, keepdim=True).clamp(min=0)
    span = (high - low) / (2**bits - 1)
    span = torch.where(span > 0, span, 1.0)  # a row of zeros: any scale represents it
    zero = torch.round(-low / span)  # low and span shrink together
    best_scale, best_error = span, torch.full_like(span, math.inf)
    for step in range(80):
        scale = (1 - step / 100) * span
        error = (W - round_to_grid(W, scale, zero, bits)).square().sum(1, keepdim=True)
        best_scale = torch.where(error < best_error, scale, best_scale)
        best_error = torch.minimum(error, best_error)
    return best_scale, zero


def round_to_grid(W: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the grid value `scale × (q − zero)`, q in 0…2^bits−1, nearest to each weight."""
    return scale * ((torch.round(W / scale) + zero).clamp(0, 2**bits - 1) - zero)


def gptq(W: Tensor, moments: Moments, *, bits: int, group_size: int = 128) -> BaselineResult:
    """Quantize column after column on a min-max grid per row and group, the error compensated by all later columns.

    W: [out_features, in_features]; bits: bits/weight of the codes, 1…16
    Raises ValueError for other bits. Columns keep their order, so no permutation is stored.

    Source: GPTQ (arXiv 2210.17323), with groups; the range search is the published code's, here on the squared error.
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"`bits` must be 1…16, got {bits}")
    W = _checked(W, moments)
    _, U = _damped_factor(moments.balanced())

    def quantize(W_b: Tensor, block: slice) -> tuple[Tensor, float]:
        stored = W_b.numel() * bits + len(W_b) * (SCALE_BITS + bits)
        scale, zero = min_max_grid(W_b, bits)
        U_bb, Q = U[block, block], torch.empty_like(W_b)
        for j in range(W_b.shape[1]):
            Q[:, j : j + 1] = round_to_grid(W_b[:, j : j + 1], scale, zero, bits)
            error = (W_b[:, j] - Q[:, j]) / U_bb[j, j]
            W_b[:, j + 1 :] -= torch.outer(error, U_bb[j, j + 1 :])
        return Q, stored

    return sweep(W, U, quantize, block_size=group_size, feedback="exact")


def _binarize(
    W: Tensor, H: Tensor, scheme: BinaryScheme, *, block_size: int, Lambda2: Tensor | None = None
) -> BaselineResult:
    """Binarize by blocks under a scheme; groups and feedback, diagonal, come from H."""
    H, U = _damped_factor(H)

    def quantize(W_b: Tensor, block: slice) -> tuple[Tensor, float]:
        saliency = (W_b / U.diagonal()[block]).square()
        Lambda2_b = None if Lambda2 is None else Lambda2[:, block]
        return binarize_block(W_b, saliency, scheme, H=H[block, block], Lambda2=Lambda2_b)

    return sweep(W, U, quantize, block_size=block_size, feedback="diagonal")


def billm(W: Tensor, moments: Moments, *, block_size: int = 128) -> BaselineResult:
    """Binarize with salient columns at order 2 and the others in two groups by magnitude, each with row mean and scale.

    W: [out_features, in_features]

    As in the paper: both searches (salient columns, magnitude threshold) measure the error on W. As in the published
    code: the saliency is w² / U_jj²; the column count, 1 to 49, is judged with both sides at order 2; the threshold
    runs over percentiles of |W|, not fractions of its maximum; the block's error is divided by U's diagonal, without
    feedback inside the block.

    Source: BiLLM (arXiv 2402.04291), algorithm 1.
    Deviation: the published code runs both searches on the saliency matrix instead of W.
    """
    return _binarize(_checked(W, moments), moments.balanced(), BILLM, block_size=block_size)


def arb_x(W: Tensor, moments: Moments, *, block_size: int = 128) -> BaselineResult:
    """Binarize BiLLM's groups by alternation, then refit means and scales on each block's input moment.

    W: [out_features, in_features]

    Source: ARB-LLM (arXiv 2410.03129), ARB-X, without the column-group bitmap.
    Deviation: groups from BiLLM's searches, and a joint refit over the groups: see `refit_on_inputs`.
    """
    return _binarize(_checked(W, moments), moments.balanced(), ARB_X, block_size=block_size)


def arb_rc(W: Tensor, moments: Moments, *, column_group_bitmap: bool, block_size: int = 128) -> BaselineResult:
    """Binarize BiLLM's groups with a row scale times a column scale per group and plane, by alternation.

    W: [out_features, in_features]; column_group_bitmap: split the salient columns by magnitude too, so four groups

    Source: ARB-LLM (arXiv 2410.03129), ARB-RC and column-group bitmap.
    Deviation: groups from BiLLM's searches; the published code searches with the row-and-column fit itself.
    """
    scheme = ARB_RC_CGB if column_group_bitmap else ARB_RC
    return _binarize(_checked(W, moments), moments.balanced(), scheme, block_size=block_size)


def sab_as_published(W: Tensor, moments: Moments, *, block_size: int = 128) -> BaselineResult:
    """Binarize as ARB-RC with column-group bitmap, the fit weighted by Λ², groups and error feedback from text alone.

    W: [out_features, in_features]; a layer without text inputs uses its visual moment

    Source: SAB-LVLM (arXiv 2607.01876), with the settings of its README.
    Deviation: our reading, and to be called that: the published code lacks several modules and does not run.
    """
    W = _checked(W, moments)
    H_text, *_ = by_modality = moments.present()
    Lambda = significance_map(
        W,
        {m: own_variance(H, DAMPING) for m, H in enumerate(by_modality)},
        salient_top_p=0.05,
        diff_quantile=0.5,
        sparsity_threshold=0.005,
    ).Lambda
    return _binarize(W, H_text, ARB_RC_CGB, block_size=block_size, Lambda2=Lambda.square())


BASELINES: dict[str, Callable[[Tensor, Moments], BaselineResult]] = {
    "sign_scale": sign_scale,
    "gptq_2bit": functools.partial(gptq, bits=2),
    "gptq_3bit": functools.partial(gptq, bits=3),
    "gptq_4bit": functools.partial(gptq, bits=4),
    "billm": billm,
    "arb_x": arb_x,
    "arb_rc": functools.partial(arb_rc, column_group_bitmap=False),
    "arb_rc_cgb": functools.partial(arb_rc, column_group_bitmap=True),
    "sab_as_published": sab_as_published,
}
