"""The file format, version 1: sign planes as named tensors.

This page is the specification; a reader in any language can be written from it alone.

A quantized matrix has `out_features` = n rows and `in_features` = m columns and stands for

    W ≈ Σ_k diag(r_k) · B_k · diag(c_k)   +   diag(r') · B' · diag(c') · S

with K full planes B_k ∈ {−1, +1}^{n×m} and, optionally, one residual plane B' ∈ {−1, +1}^{n×k} on k of the m columns (S
selects them). In a checkpoint the module called `name` is the tensors `name.signs`, `name.row_scale`, and so on:

| tensor                 | dtype, shape         | meaning                                                                     |
|------------------------|----------------------|-----------------------------------------------------------------------------|
| `signs`                | uint8 [K, n, ⌈m/8⌉]  | B_k: bit j%8 (least significant first) of byte j//8 is column j; 1 is +1     |
| `row_scale`            | int16 [K, n]         | r_k, the 16 bits of an IEEE 754 binary16 number                              |
| `col_scale`            | int16 [K, m]         | c_k, likewise                                                               |
| `significant_columns`  | uint8 [⌈m/8⌉]        | the significance mask: bit j%8 of byte j//8 set: column j has a residual     |
| `residual_signs`       | uint8 [n, ⌈k/8⌉]     | B', its columns in ascending order of the columns that the mask marks        |
| `residual_row_scale`   | int16 [n]            | r'                                                                          |
| `residual_col_scale`   | int16 [k]            | c'                                                                          |
| `bias`                 | as in the base model | present if the base module had one                                          |

The four tensors of the residual plane are absent where k = 0. Spare bits at the end of a row are 0. Scales are stored
as integers because loaders cast floating-point tensors to the dtype that the user asks for (which would round them) and
leave integers alone: `tensor.view(torch.float16)` reads them. One module also has an empty tensor `weight`, uint8 [0]: a
loader that does not know this format finds a weight of the wrong shape and fails, in place of initializing the module
randomly. Readers skip it.

`config.json` holds, under `quantization_config`, `quant_method: "sab"`, `format_version: 1`, `modules`: for each quantized
module its name and `[K, k]`, `tied_head`: true or false, and `checksums` (see `packed/checksums.py`; null if there are none).
What else is there tells how the planes were made; readers skip it. Names in `modules` are those of the model's class; tensors
begin as in the base model's dense checkpoints, which may differ (LLaVA's module `model.language_model.layers.0…` is
`language_model.model.layers.0…` in the file). All other tensors, and the rest of `config.json`, are as in a dense checkpoint
of the base model. A module is one of these:

- A Linear: y = W x + bias, n outputs and m inputs.
- The input embedding: row i of W is that of token i, n tokens and m features; k = 0 and no bias. A look-up gives the row in
  the dtype of the model. Where the base model ties its output head to it, `tied_head` is true: there is no tensor of the
  head, whose logits are W x with the embedding's W, and `tie_word_embeddings` is false, for no dense matrix is tied.
  `tied_embeddings` names further embeddings of the base model that look up rows of the same W, and have no tensor either.
  Embeddings that multiply rows by a number (Gemma, BART) still do: W is before the factor.
- An expert of a mixture whose base model keeps all experts in one 3-D tensor, say `….experts.gate_up_proj`: that tensor is
  absent, and expert e is the Linear `….experts.split.gate_up_proj.e` with a W [out_features, in_features], also where the
  3-D tensor is [experts, in_features, out_features]. Biases of such experts stay the base model's tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .planes import SignPlanes

FORMAT_VERSION = 1
_BIT_WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128)


ROW_AXIS = {"signs": 1, "row_scale": 1, "residual_signs": 0, "residual_row_scale": 0}
"""The axis of a matrix's rows in each tensor that has them."""


def pack_bits(bits: Tensor) -> Tensor:
    """Pack the last axis of a boolean tensor, eight entries a byte, least significant bit first.

    Args:
        bits: [..., m] bool.
    Returns:
        [..., ⌈m/8⌉] uint8; spare bits are 0.
    """
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8))
    weights = torch.tensor(_BIT_WEIGHTS, dtype=torch.uint8, device=bits.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, length: int) -> Tensor:
    """Invert `pack_bits`.

    Args:
        packed: [..., ⌈length/8⌉] uint8.
        length: entries of the last axis, m.
    Returns:
        [..., length] bool.
    """
    weights = torch.tensor(_BIT_WEIGHTS, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) & weights).ne(0).flatten(-2)[..., :length]


def unpack_mask(packed: Tensor, in_features: int, num_significant: int) -> Tensor:
    """Unpack a significance mask and count it.

    Args:
        packed: [⌈in_features/8⌉] uint8.
        in_features: columns of the matrix.
        num_significant: columns of its residual plane.
    Returns:
        [in_features] bool.
    Raises:
        ValueError: the mask marks another number of columns.
    """
    mask = unpack_bits(packed, in_features)
    marked = int(mask.sum())
    if marked != num_significant:
        raise ValueError(
            f"`significant_columns` must mark {num_significant} columns, those of the residual plane, got {marked}; the "
            "tensors are damaged or of different matrices"
        )
    return mask


def tensor_specs(
    out_features: int, in_features: int, num_planes: int, num_significant: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of every stored tensor of one quantized matrix, bias excluded.

    Args:
        out_features, in_features: n and m of the matrix.
        num_planes: full planes, K ≥ 1.
        num_significant: columns with a residual plane, 0 ≤ k ≤ m.
    Raises:
        ValueError: a matrix of this shape cannot have as many planes or significant columns.
    """
    if num_planes < 1 or not 0 <= num_significant <= in_features:
        raise ValueError(
            f"a {out_features}×{in_features} matrix must have at least 1 full plane and 0 to {in_features} significant columns, "
            f"got {num_planes} and {num_significant}"
        )
    specs = {
        "signs": (torch.uint8, (num_planes, out_features, math.ceil(in_features / 8))),
        "row_scale": (torch.int16, (num_planes, out_features)),
        "col_scale": (torch.int16, (num_planes, in_features)),
    }
    if num_significant:
        specs |= {
            "significant_columns": (torch.uint8, (math.ceil(in_features / 8),)),
            "residual_signs": (torch.uint8, (out_features, math.ceil(num_significant / 8))),
            "residual_row_scale": (torch.int16, (out_features,)),
            "residual_col_scale": (torch.int16, (num_significant,)),
        }
    return specs


def stored_bytes(out_features: int, in_features: int, num_planes: int, num_significant: int) -> int:
    """Return the bytes that a matrix of this shape occupies in a file, bias and file header excluded."""
    specs = tensor_specs(out_features, in_features, num_planes, num_significant)
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values())


def to_tensors(planes: SignPlanes) -> dict[str, Tensor]:
    """Pack sign planes into the tensors that a file holds (see the table above)."""
    tensors = {
        "signs": pack_bits(planes.signs),
        "row_scale": planes.row_scale.to(torch.float16).view(torch.int16),
        "col_scale": planes.col_scale.to(torch.float16).view(torch.int16),
    }
    if planes.num_significant:
        tensors |= {
            "significant_columns": pack_bits(planes.significant_columns),
            "residual_signs": pack_bits(planes.residual_signs),
            "residual_row_scale": planes.residual_row_scale.to(torch.float16).view(torch.int16),
            "residual_col_scale": planes.residual_col_scale.to(torch.float16).view(torch.int16),
        }
    return tensors


def from_tensors(tensors: dict[str, Tensor], in_features: int) -> SignPlanes:
    """Unpack the tensors of a file; the inverse of `to_tensors`.

    Args:
        tensors: the tensors by the names of the table above; others are ignored.
        in_features: columns of the matrix (the packed rows only say how many bytes they fill).
    Raises:
        ValueError: the significance mask marks another number of columns than the residual plane has.
    """
    residual = {}
    if "significant_columns" in tensors:
        residual_col_scale = tensors["residual_col_scale"].view(torch.float16)
        num_significant = residual_col_scale.numel()
        residual = {
            "significant_columns": unpack_mask(tensors["significant_columns"], in_features, num_significant),
            "residual_signs": unpack_bits(tensors["residual_signs"], num_significant),
            "residual_row_scale": tensors["residual_row_scale"].view(torch.float16),
            "residual_col_scale": residual_col_scale,
        }
    return SignPlanes(
        signs=unpack_bits(tensors["signs"], in_features),
        row_scale=tensors["row_scale"].view(torch.float16),
        col_scale=tensors["col_scale"].view(torch.float16),
        **residual,
    )
