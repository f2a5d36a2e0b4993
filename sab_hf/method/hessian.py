"""Second moments of a Linear's inputs, one matrix for each modality, and the factors that the fit needs."""

from __future__ import annotations

from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..calibration.modality import TEXT


class SecondMoments:
    """Stream `H_m = (1/N_m) Σ x xᵀ` over the tokens of each modality m, in float32.

    Args:
        in_features: width of the inputs.
        device: device of the accumulators.

    Source: SAB-LVLM, Hessians for text and visual inputs; here all from one forward pass (method §2).
    """

    def __init__(self, in_features: int, device: torch.device):
        self.in_features, self.device = in_features, device
        self._sums: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}

    def add(self, x: Tensor, modality: Tensor) -> None:
        """Add the inputs of one forward pass.

        Args:
            x: [tokens, in_features], any floating dtype.
            modality: [tokens] integer, negative for padding (counts nowhere).
        """
        for m in modality.unique().tolist():
            if m < 0:
                continue
            rows = x[modality == m]
            if multiplies_wide(x.device, x.dtype):
                self.total(m).add_(torch.mm(rows.T, rows, out_dtype=torch.float32))
            else:
                rows = rows.float()
                self.total(m).addmm_(rows.T, rows)
            self.counts[m] = self.counts.get(m, 0) + rows.shape[0]

    def total(self, modality: int) -> Tensor:
        """Return the accumulator `Σ x xᵀ` [in_features, in_features] of one modality, zero where it saw nothing."""
        if modality not in self._sums:
            self._sums[modality] = torch.zeros(self.in_features, self.in_features, device=self.device)
        return self._sums[modality]

    @classmethod
    def pooled(cls, parts: list[SecondMoments]) -> SecondMoments:
        """Return the second moments over the tokens of all `parts`; one that occurs twice counts once."""
        parts = list({id(part): part for part in parts}.values())
        total = cls(parts[0].in_features, parts[0].device)
        for part in parts:
            for m, matrix in part._sums.items():
                total._sums[m] = total._sums[m] + matrix if m in total._sums else matrix
                total.counts[m] = total.counts.get(m, 0) + part.counts[m]
        return total

    def is_finite(self) -> bool:
        """Whether every input so far was finite (the diagonal tells: it sums squares)."""
        return all(bool(total.diagonal().isfinite().all()) for total in self._sums.values())

    def matrices(self) -> dict[int, Tensor]:
        """Return `H_m` [in_features, in_features] for each modality that was seen."""
        return {m: total / self.counts[m] for m, total in sorted(self._sums.items())}


@lru_cache
def multiplies_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products of a half-precision dtype can be summed in float32, where they are exact.

    Tensor cores do that many times as fast as they multiply float32. PyTorch has it on some devices.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    x = torch.full((32, 16), 1.0, dtype=dtype, device=device)
    try:
        found = torch.mm(x.T, x, out_dtype=torch.float32)
    except (TypeError, NotImplementedError, RuntimeError):
        return False
    return found.dtype == torch.float32 and bool((found == 32).all())


def mix(moments: SecondMoments | None, in_features: int, device: torch.device, balance: str = "equal") -> Tensor:
    """Mix the modalities' second moments, by default with equal weight, `H = mean_m H_m` (text and visual: one half each).

    A token-count mix lets the many image tokens drown the text. A layer that saw no token at all gets the identity, which
    makes its fit plain least squares on the weights.

    Args:
        balance: "equal", "tokens" (by their numbers of tokens) or "text" (alone, where there is any).

    Source: method §2. Deviation: the published code mixes by token count and calibrates the feedback on text only.
    """
    matrices = moments.matrices() if moments else {}
    if not matrices:
        return torch.eye(in_features, device=device)
    if balance == "text" and TEXT in matrices:
        return matrices[TEXT]
    weights = {m: moments.counts[m] if balance == "tokens" else 1 for m in matrices}
    return sum(matrices[m] * (weight / sum(weights.values())) for m, weight in weights.items())


def damp(H: Tensor, damping: float) -> Tensor:
    """Add `damping` × the mean diagonal to the diagonal; an all-zero matrix becomes the identity.

    Args:
        H: [in_features, in_features] float32, symmetric positive semidefinite.
    """
    mean = H.diagonal().mean()
    if mean <= 0:
        return torch.eye(H.shape[0], device=H.device, dtype=H.dtype)
    return H + damping * mean * torch.eye(H.shape[0], device=H.device, dtype=H.dtype)


def feedback_factor(H: Tensor) -> Tensor:
    """Return the upper triangular U with `H⁻¹ = UᵀU`, contiguous, whose rows say how an error spreads to later columns.

    With rows and columns in reverse, `H = L Lᵀ`: then U is the inverse of L, in reverse; in float64 where L does not exist in
    float32.

    Args:
        H: [in_features, in_features] float32, damped.

    Source: GPTQ (arXiv 2210.17323), step 3.
    """
    L, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
    if failed:
        L = torch.linalg.cholesky(H.flip(0, 1).double())
    U = torch.eye(len(L), dtype=L.dtype, device=L.device)
    U = torch.linalg.solve_triangular(L, U, upper=False)
    return U.flip(0, 1).triu_().to(H.dtype).contiguous()  # the solver leaves columns as rows


def inverse_diagonal(U: Tensor) -> Tensor:
    """Return `[H⁻¹]_jj` [in_features] from the feedback factor of H."""
    return torch.linalg.vector_norm(U, dim=0).square()


def own_variance(H: Tensor, damping: float) -> Tensor:
    """Return `1 / [(H + λI)⁻¹]_jj` [in_features], the variance of each feature that the others do not explain.

    Args:
        damping: λ as a share of the mean diagonal of H.
    """
    return 1 / inverse_diagonal(feedback_factor(damp(H, damping)))


class InputFactors:
    """What the fits of all Linears with one input need of its second moments; each is computed once, when it is first read.

    Args:
        moments: of the input; None if no token came.
        in_features: width of the input.
        device: where to compute.
        balance: how modalities are mixed, as in `mix`.
        damping: λ as a share of the mean diagonal.
    """

    def __init__(
        self, moments: SecondMoments | None, in_features: int, device: torch.device, balance: str, damping: float
    ):
        self.moments, self._balance, self._damping = moments, balance, damping
        self._in_features, self._device = in_features, device

    @cached_property
    def mixed(self) -> Tensor:
        """The modalities' second moments [in_features, in_features], mixed and damped."""
        return damp(mix(self.moments, self._in_features, self._device, self._balance), self._damping)

    @cached_property
    def feedback(self) -> Tensor:
        """The feedback factor U [in_features, in_features] of the mixed matrix."""
        return feedback_factor(self.mixed)

    @cached_property
    def variances(self) -> dict[int, Tensor]:
        """Modality → `own_variance` [in_features] of its second moments."""
        if self.moments is None:
            return {}
        if len(self.moments.counts) == 1:  # the mixed matrix is that of the modality
            return {m: 1 / inverse_diagonal(self.feedback) for m in self.moments.counts}
        return {m: own_variance(H, self._damping) for m, H in self.moments.matrices().items()}
