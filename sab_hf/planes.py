"""Sign planes with row and column scales: the one value that everything else makes, stores or runs.

A weight [out_features, in_features] takes these forms on its way from a dense checkpoint to a product:

| form | where | scales | made by |
|---|---|---|---|
| dense weight | the model's `nn.Linear` | – | transformers |
| `PlaneState` | `method/fit.py` | float32; all planes of full width | the alternating fit, for itself |
| `SignPlanes` | here | float16 or float32 | the fit, `packing.from_tensors`; what a weight *is* |
| `TrainablePlanes` | `method/trainable.py` | float32, relative to their start | refinement and distillation |
| tensors by name | `packing.py`, files | bits of float16, as int16 | `packing.to_tensors` |
| `SABModule` | `packed/` | the same tensors, as parameters | `from_planes`, loading |
| `Operands` | `kernels/ops.py` | float16, or int16 as stored | `SABModule.multiply`, for `sab::linear` |
| `Planes` | `kernels/cuda/planes.py` | as in `Operands` | from these, for Triton kernels |
| `Matrix` | `kernels/cpu/library.py`, `sab_cpu.h` | addresses of the stored ones | from these, for C kernels |
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SignPlanes:
    """A matrix [out_features, in_features] as K full sign planes and one residual plane on the significant columns.

    `W ≈ Σ_k diag(row_scale[k]) · (±1 from signs[k]) · diag(col_scale[k])`, and on the significant columns one more such
    term. Source: method of SAB-LVLM with every bit counted; the group bitmap of the published method is a second plane.

    Attributes:
        signs: [K, out_features, in_features] bool, True is +1.
        row_scale: [K, out_features] floating point.
        col_scale: [K, in_features] floating point.
        significant_columns: [in_features] bool, the columns with a residual plane; None if there are none.
        residual_signs: [out_features, k] bool, the significant columns in ascending order.
        residual_row_scale: [out_features] floating point.
        residual_col_scale: [k] floating point.
    """

    signs: Tensor
    row_scale: Tensor
    col_scale: Tensor
    significant_columns: Tensor | None = None
    residual_signs: Tensor | None = None
    residual_row_scale: Tensor | None = None
    residual_col_scale: Tensor | None = None

    @property
    def num_planes(self) -> int:
        return self.signs.shape[0]

    @property
    def num_significant(self) -> int:
        return 0 if self.residual_col_scale is None else self.residual_col_scale.numel()

    @property
    def has_unit_columns(self) -> bool:
        """Whether all column scales are 1, as in portable models: training then leaves them alone."""
        return not self.num_significant and bool((self.col_scale == 1).all())

    @property
    def shape(self) -> tuple[int, int]:
        return self.signs.shape[1], self.signs.shape[2]

    def take_rows(self, rows: slice) -> SignPlanes:
        """Return the planes of some rows."""
        residual = {}
        if self.num_significant:
            signs, scale = self.residual_signs[rows], self.residual_row_scale[rows]
            residual = {"residual_signs": signs, "residual_row_scale": scale}
        return replace(self, signs=self.signs[:, rows], row_scale=self.row_scale[:, rows], **residual)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix that the planes stand for, [out_features, in_features], summed in float32."""
        W = torch.zeros(self.shape, dtype=torch.float32, device=self.signs.device)
        for B, r, c in zip(self.signs, self.row_scale.float(), self.col_scale.float(), strict=True):
            W += signs_to(torch.float32, B) * r[:, None] * c
        if self.num_significant:
            B, r, c = self.residual_signs, self.residual_row_scale.float(), self.residual_col_scale.float()
            W[:, self.significant_columns] += signs_to(torch.float32, B) * r[:, None] * c
        return W.to(dtype)


def signs_to(dtype: torch.dtype, signs: Tensor) -> Tensor:
    """Return a bool tensor as ±1 of `dtype` (True is +1)."""
    return signs.to(dtype).mul_(2).sub_(1)
