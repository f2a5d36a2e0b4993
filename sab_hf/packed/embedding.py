"""Embeddings and tied output heads on packed sign planes: rows are looked up packed, and nothing is stored twice."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import packing
from ..planes import SignPlanes
from .linear import PackedWeight, SABModule, empty_tensors, exact_by_default


class PackedRows(PackedWeight):
    """The weight of a packed embedding, of which a model may ask for single rows (`weight[token, :]`)."""

    embedding: SABEmbedding

    @property
    def data(self) -> PackedRows:
        return self

    def normal_(self, *args: Any, **kwargs: Any) -> PackedRows:
        """Do nothing: transformers 4 initializes some weights by name, before it loads them."""
        return self

    def __getitem__(self, index: int | Tensor | tuple[int | Tensor, slice]) -> Tensor:
        token, columns = index if isinstance(index, tuple) and len(index) == 2 else (index, slice(None))
        if columns != slice(None) or not (
            isinstance(token, int) or (isinstance(token, Tensor) and not token.is_floating_point())
        ):
            raise TypeError(
                f"of a packed embedding's weight only whole rows can be taken, `weight[tokens]`, got `weight[{index}]`; set "
                "`embedding_bits=16`, or call `model.dequantize()`"
            )
        return self.embedding.rows(torch.as_tensor(token, device=self.device))


class SABEmbedding(SABModule):
    """Row look-up in a matrix of packed sign planes.

    Args:
        tensors: packed tensors as in `SABModule`, without a residual plane; a row is a token.
        embedding_dim: columns of the matrix.
        dtype: dtype of the rows that come out, see `SABModule`.
        like: the embedding that this one stands for, of a class that multiplies the rows that it looks up by a number (Gemma,
            BART) or by none; None: `nn.Embedding`. Its weight is not kept.
    """

    padding_idx: int | None = None  # no row is left out of anything

    def __init__(
        self, tensors: dict[str, Tensor], embedding_dim: int, dtype: torch.dtype, like: nn.Embedding | None = None
    ):
        super().__init__(tensors, embedding_dim, dtype)
        if self.num_significant:
            raise ValueError(f"an embedding has full planes only, got {self.num_significant} significant columns")
        self._like = None if like is None else (_without_weight(like),)  # a tuple, so that it is no submodule
        self.scale = 1.0 if like is None else look_up_scale(like, dtype)
        if self.scale is None:
            raise ValueError(f"{type(like).__name__} does more than look rows up and multiply them by a number")

    @classmethod
    def from_planes(cls, planes: SignPlanes, dtype: torch.dtype, like: nn.Embedding | None = None) -> SABEmbedding:
        """Pack `planes` into a module; scales are rounded to float16."""
        return cls(packing.to_tensors(planes), planes.shape[1], dtype, like)

    @classmethod
    def empty_like(cls, embedding: nn.Embedding, num_planes: int) -> SABEmbedding:
        """Return a module of the shape of `embedding`, on its device, with uninitialised planes for a loader to fill."""
        weight = embedding.weight
        return cls(empty_tensors(weight, num_planes, 0), embedding.embedding_dim, weight.dtype, embedding)

    @property
    def weight(self) -> PackedRows:
        """What models may ask of an embedding's weight: shape, dtype, device, and single rows."""
        weight = PackedRows(*super().weight)
        weight.embedding = self
        return weight

    def dense(self, dtype: torch.dtype) -> nn.Embedding:
        """Return the embedding that this one stands for, with the weights that the planes make."""
        weight = nn.Parameter(self.planes().dense(dtype))
        return nn.Embedding.from_pretrained(weight, freeze=False) if self._like is None else _dense(self, weight)

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    def forward(self, input: Tensor, as_head: bool = False, exact: bool = False) -> Tensor:
        """Return the rows of the ids `input` [...], as [..., embedding_dim].

        Args:
            as_head: return the product `multiply(input, exact)` instead, for hidden states [..., embedding_dim]: as a forward
                pass, so that hooks bring the planes, wherever they are, and the hidden states together.
        """
        if as_head:
            return self.multiply(input, exact)
        rows = self.rows(input)
        return rows if self.scale == 1 else rows * self.scale

    def rows(self, input: Tensor) -> Tensor:
        """Return the rows of the matrix, [..., embedding_dim], for the ids `input` [...]: a look-up before any factor."""
        r = self.row_scale.view(torch.float16)[:, input].float()  # [K, ...]
        c = self.col_scale.view(torch.float16).float()  # [K, embedding_dim]
        shifts = torch.arange(8, dtype=torch.uint8, device=input.device)
        bits = (self.signs[:, input].unsqueeze(-1) >> shifts & 1).flatten(-2)[..., : self.in_features]
        signed = (2.0 * bits - 1.0) * c.view(len(c), *[1] * input.ndim, -1)
        return (signed * r.unsqueeze(-1)).sum(0).to(self.dtype)


class FixedVocabulary:
    """What a model with a packed embedding or head has in place of `resize_token_embeddings`; holds no model.

    Args:
        embedding: the input embedding, packed or dense.
        size: its tokens.
    """

    def __init__(self, embedding: nn.Module, size: int):
        self._embedding, self._size = embedding, size

    def __call__(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Return the input embedding if its size is asked for.

        Raises:
            ValueError: another size is asked for.
        """
        size = self._size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size = math.ceil(size / pad_to_multiple_of) * pad_to_multiple_of
        if size != self._size:
            raise ValueError(
                f"the vocabulary of {self._size} tokens cannot be resized to {size}: embedding or output head are packed, "
                "and sign planes have no room for new rows. Call `model.dequantize()` first, or resize the dense model and "
                "quantize it with `embedding_bits=16, head_bits=16`"
            )
        return self._embedding


class _Tied(nn.Module):
    """A module that uses the planes of the input embedding, and holds no tensor of its own.

    Args:
        embedding: the input embedding.
    """

    def __init__(self, embedding: SABEmbedding):
        super().__init__()
        self._embedding = (embedding,)  # a tuple, so that it is no submodule and its tensors are stored once

    @property
    def weight(self) -> PackedRows:
        """The weight of the input embedding."""
        return self._embedding[0].weight

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"{rows}, {columns}, planes of the input embedding"


class SABTiedEmbedding(_Tied):
    """A further embedding that looks up the input embedding's rows: an encoder's or decoder's own.

    Args:
        embedding: the input embedding.
        like: the embedding that this one stands for, as in `SABEmbedding`.
    """

    def __init__(self, embedding: SABEmbedding, like: nn.Embedding):
        super().__init__(embedding)
        self._like = (_without_weight(like),)
        self.scale = look_up_scale(like, embedding.dtype)
        if self.scale is None:
            raise ValueError(f"{type(like).__name__} does more than look rows up and multiply them by a number")

    def forward(self, input: Tensor) -> Tensor:
        rows = self._embedding[0].rows(input)
        return rows if self.scale == 1 else rows * self.scale

    def dense(self, weight: nn.Parameter) -> nn.Embedding:
        """Return the embedding that this one stands for, on the input embedding's dense `weight`."""
        return _dense(self, weight)


class SABTiedHead(_Tied):
    """An output head that multiplies by the planes of the input embedding.

    Args:
        embedding: the input embedding.
    """

    def __init__(self, embedding: SABEmbedding):
        super().__init__(embedding)
        self.exact = exact_by_default()

    @property
    def in_features(self) -> int:
        return self._embedding[0].in_features

    @property
    def out_features(self) -> int:
        return self._embedding[0].out_features

    def forward(self, input: Tensor) -> Tensor:
        # `forward` is what accelerate replaces; hooks of the module, noise or gradients of rows, are not meant for logits
        return self._embedding[0].forward(input, as_head=True, exact=self.exact)


def look_up_scale(embedding: nn.Embedding, dtype: torch.dtype = torch.float32) -> float | None:
    """Return the number by which an embedding multiplies the rows that it looks up, as `dtype` holds it if it is a buffer.

    Found by a look-up in a small table: 1 for `nn.Embedding`, a number of the module (`embed_scale`) for its scaled
    subclasses, None for an embedding that does anything else. On the meta device buffers have no values; a plain number of
    the module is taken for theirs.
    """
    if type(embedding).forward is nn.Embedding.forward:
        return 1.0
    usual = vars(nn.Embedding(1, 1, device="meta"))
    numbers = [value for name, value in vars(embedding).items() if type(value) is float and name not in usual]
    buffers = {name: buffer for name, buffer in embedding._buffers.items() if buffer is not None and buffer.ndim == 0}
    scales = [*(float(buffer) for buffer in buffers.values() if not buffer.is_meta), *numbers, 1.0]
    rows = torch.linspace(-1, 2, 2 * embedding.embedding_dim, device="cpu").view(2, -1)
    probe = _without_weight(embedding)
    probe.padding_idx = None
    probe._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
    probe._buffers.update({name: torch.tensor(scales[0], device="cpu") for name in buffers})
    with torch.no_grad():
        try:
            looked_up = probe(torch.arange(2, device="cpu"))
        except (RuntimeError, TypeError, AttributeError, NotImplementedError):  # takes more than ids, or parts on meta
            return None
    if not isinstance(looked_up, Tensor) or looked_up.is_meta or looked_up.shape != rows.shape:
        return None
    scale = next((scale for scale in scales if torch.allclose(looked_up, rows * scale)), None)
    return float(torch.tensor(scale, device="cpu").to(dtype)) if scale is not None and buffers else scale


def _dense(packed: SABEmbedding | SABTiedEmbedding, weight: nn.Parameter) -> nn.Embedding:
    """Return the embedding that a packed one stands for, with `weight`."""
    embedding = _without_weight(packed._like[0])
    for name, buffer in embedding._buffers.items():
        if buffer.is_meta:
            embedding._buffers[name] = torch.full_like(buffer, packed.scale, device=weight.device)
    embedding.weight = weight
    return embedding.to(weight.dtype)


def _without_weight(embedding: nn.Embedding) -> nn.Embedding:
    """Return a copy of an embedding that shares all but its weight, of which it holds the shape only."""
    shell = copy.copy(embedding)
    shell._parameters = {"weight": nn.Parameter(embedding.weight.to("meta"), requires_grad=False)}
    shell._buffers = dict(embedding._buffers)
    return shell
