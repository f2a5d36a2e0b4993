"""The packed matrices of one vLLM layer on one rank, collected from the tensors that a loader hands over in any order.

vLLM fuses matrices of the same input into one layer (q, k, v; gate, up). Their planes differ in number and in significant
columns, so such a layer keeps a matrix for each part, and multiplies by all of them at once. A part whose Linear stayed dense is
kept dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..kernels.ops import sab_linears
from ..packed.embedding import SABEmbedding
from ..packed.linear import SABLinear, SABModule
from ..packed.verify import check_mask, raise_if_missing
from ..packing import tensor_specs
from .shards import BY_MASK, ROW_AXIS, take_columns, take_rows, take_significant

ARRIVING = {name: dtype for name, (dtype, _) in tensor_specs(1, 1, 1, 1).items()}
"""The packed tensors that may arrive for a matrix, and their dtypes."""
DENSE = "weight"
"""Name of the tensor of a Linear that stayed dense; an empty one is the format's marker, and no weight."""
_ALWAYS = ("signs", "row_scale", "col_scale")


@dataclass(frozen=True)
class Share:
    """What one rank holds of a layer's matrix.

    Attributes:
        label: name of the layer, for errors.
        in_features: columns of the whole matrix.
        columns: first column of this rank, and the one behind its last.
        rows: rows of this rank, for each output of the layer (q, k, v; gate, up; or one).
        whole_rows: rows of each output in a file where one matrix holds all of them.
        rank, ranks: this rank, and how many share the layer.
        span: rows of this rank in the file where they follow from no equal division (a vocabulary's); rows beyond them are zero.
    """

    label: str
    in_features: int
    columns: tuple[int, int]
    rows: Sequence[int]
    whole_rows: Sequence[int]
    rank: int = 0
    ranks: int = 1
    span: tuple[int, int] | None = None

    def spans(self, outputs: Sequence[int], out_features: int) -> list[tuple[int, int]]:
        """Return this rank's rows of a matrix in the file, first and behind the last, one after the other.

        Fewer heads of keys than ranks are repeated by vLLM: a matrix that is divided less often than there are ranks goes to
        several of them.

        Args:
            outputs: which outputs of the layer the matrix gives.
            out_features: its rows.
        Raises:
            ValueError: so many rows cannot be divided in this way.
        """
        whole = [self.whole_rows[output] for output in outputs]
        own = [self.rows[output] for output in outputs]
        pieces = [rows // mine if rows % mine == 0 else 0 for rows, mine in zip(whole, own, strict=True)]
        divided = all(count and self.ranks % count == 0 for count in pieces) or self.span is not None
        if sum(whole) != out_features or not divided:
            raise ValueError(
                f"`{self.label}` must have {_sum(whole)} rows, {_sum(own)} on each of {self.ranks} ranks, the checkpoint has "
                f"{out_features}; it is of another model, or choose another --tensor-parallel-size"
            )
        if self.span is not None:
            return [self.span]
        offsets = [sum(whole[:i]) for i in range(len(whole))]
        starts = [
            at + self.rank * count // self.ranks * mine for at, count, mine in zip(offsets, pieces, own, strict=True)
        ]
        return [(start, start + mine) for start, mine in zip(starts, own, strict=True)]

    def padding(self) -> int:
        """Return the rows of zeros behind those of the file."""
        return 0 if self.span is None else self.rows[0] - (self.span[1] - self.span[0])


def _sum(rows: Sequence[int]) -> str:
    return " + ".join(map(str, rows))


@dataclass
class Part:
    """One matrix of a layer while it is loaded: the tensors that are there, cut to this rank.

    Attributes:
        share: what this rank holds.
        outputs: which outputs of the layer it gives.
    """

    share: Share
    outputs: tuple[int, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    _waiting: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor, device: torch.device) -> None:
        """Take a tensor of the file and keep a copy of what belongs to this rank on `device`.

        Raises:
            ValueError: its sizes are not those of the layer.
        """
        share = self.share
        self._check(name, tensor)
        axis = ROW_AXIS.get(name)
        if axis is not None:
            tensor = take_rows(tensor, axis, share.spans(self.outputs, tensor.shape[axis]), share.padding())
        start, stop = share.columns
        if (start, stop) == (0, share.in_features):
            found = {name: tensor}
        elif name not in BY_MASK:
            found = {name: take_columns(name, tensor, start, stop)}
        else:
            self._waiting[name] = tensor.clone()  # loaders may use its memory again
            if len(self._waiting) < len(BY_MASK):
                return
            found = self._named(take_significant, self._waiting, share.in_features, start, stop)
            self._waiting.clear()
        self.tensors |= {name: tensor.to(device, copy=True).contiguous() for name, tensor in found.items()}

    def module(self, dtype: torch.dtype, embedding: bool = False) -> nn.Module:
        """Return the matrix as a module: a packed one, or a Linear if it stayed dense.

        Args:
            dtype: floating point, that of the layer.
            embedding: return a module that looks rows up, or an Embedding.
        Raises:
            ValueError: a tensor has not arrived, or does not fit to the others.
        """
        share, tensors = self.share, self.tensors
        if DENSE in tensors:
            weight = tensors[DENSE].to(dtype)
            if embedding:
                return nn.Embedding.from_pretrained(weight)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            return linear
        raise_if_missing([f"{share.label}.{name}" for name in _ALWAYS if name not in tensors])
        raise_if_missing([f"{share.label}.{name}" for name in BY_MASK if self._waiting and name not in self._waiting])
        in_features = share.columns[1] - share.columns[0]
        if in_features < share.in_features and not any(name in tensors for name in BY_MASK):
            tensors.pop("residual_row_scale", None)  # all significant columns are other ranks'
        if embedding:
            return self._named(SABEmbedding, tensors, in_features, dtype)
        module = self._named(SABLinear, tensors, in_features, None, dtype)
        if module.num_significant:
            check_mask(
                share.label, *(tensors[name] for name in ("significant_columns", "col_scale", "residual_col_scale"))
            )
        return module

    def _check(self, name: str, tensor: Tensor) -> None:
        """Raise if a tensor has another number of columns than the layer; `packing.py` names the axes."""
        axes = {"signs": 3, "row_scale": 2, "col_scale": 2, "residual_signs": 2, DENSE: 2}
        columns, wanted = tensor.shape[-1] if tensor.ndim else 0, None
        if name in ("col_scale", DENSE):
            wanted = self.share.in_features
        elif name in ("signs", "significant_columns"):
            wanted = -(-self.share.in_features // 8)
        if tensor.ndim != axes.get(name, 1) or (wanted is not None and columns != wanted):
            raise ValueError(
                f"`{self.share.label}` takes {self.share.in_features} features, and `{name}` of the checkpoint is "
                f"{list(tensor.shape)}; it is of another model, or was altered: download or quantize it again"
            )

    def _named(self, make, *arguments):
        try:
            return make(*arguments)
        except ValueError as error:
            raise ValueError(f"`{self.share.label}`: {error}; download or quantize the checkpoint again") from error


class Parts:
    """The matrices of one layer on one rank, from the first tensor to modules.

    Args:
        share: what this rank holds.
        dtype: floating point, that of the layer.
        embedding: whether the layer looks rows up.
    """

    def __init__(self, share: Share, dtype: torch.dtype, embedding: bool = False):
        self.share, self.dtype, self.embedding = share, dtype, embedding
        self._parts: dict[tuple[int, ...], Part] = {}

    def add(self, name: str, tensor: Tensor, outputs: Sequence[int] | None, device: torch.device) -> None:
        """Take a tensor of the file.

        Args:
            name: its name in the format, or `weight` for that of a dense Linear; an empty weight is no weight.
            tensor: as the file holds it, for all ranks.
            outputs: the outputs of the layer that its matrix gives; None: all of them.
            device: where to keep it.
        Raises:
            ValueError: its sizes are not those of the layer.
        """
        if name == DENSE and not tensor.numel():
            return
        outputs = tuple(range(len(self.share.rows)) if outputs is None else outputs)
        part = self._parts.setdefault(outputs, Part(self.share, outputs))
        part.add(name, tensor, device)

    def modules(self) -> list[nn.Module]:
        """Return a module for each matrix, in the order of the layer's outputs, and forget the tensors.

        Raises:
            ValueError: an output has no matrix, or two; a matrix is incomplete.
        """
        given = sorted(output for outputs in self._parts for output in outputs)
        if given != list(range(len(self.share.rows))):
            raise ValueError(
                f"`{self.share.label}` must get a matrix for each of its {len(self.share.rows)} outputs, got those of {given}; "
                "the checkpoint is incomplete, or none was loaded (vLLM's load format `dummy` does not go with packed models)"
            )
        modules = [self._parts[outputs].module(self.dtype, self.embedding) for outputs in sorted(self._parts)]
        self._parts.clear()
        return modules


def multiply(modules: Sequence[nn.Module], x: Tensor, exact: bool) -> Tensor:
    """Return the products of `x` [..., in_features] by all matrices, one behind the other: [..., sum of their rows].

    Packed ones are multiplied in one call; `exact` as in `ops.linear_reference`.
    """
    packed = [module for module in modules if isinstance(module, SABModule)]
    if len(packed) == 1:
        results = iter([packed[0].multiply(x, exact)])
    else:
        several = [list(same) for same in zip(*[module.operands() for module in packed], strict=True)]
        results = iter(sab_linears(x, *several, exact) if packed else [])
    products = [next(results) if isinstance(module, SABModule) else module(x) for module in modules]
    return products[0] if len(products) == 1 else torch.cat(products, -1)
