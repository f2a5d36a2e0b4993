"""Embeddings and tied output heads on packed sign planes: rows are looked up packed, and nothing is stored twice."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import packing
from ..planes import SignPlanes
from .linear import SABModule, empty_tensors, exact_by_default


class SABEmbedding(SABModule):
    """Row look-up in a matrix of packed sign planes.

    Args:
        tensors: packed tensors as in `SABModule`, without a residual plane; a row is a token.
        embedding_dim: columns of the matrix.
        dtype: dtype of the rows that come out, see `SABModule`.
    """

    def __init__(self, tensors: dict[str, Tensor], embedding_dim: int, dtype: torch.dtype):
        super().__init__(tensors, embedding_dim, dtype)
        if self.num_significant:
            raise ValueError(f"an embedding has full planes only, got {self.num_significant} significant columns")

    @classmethod
    def from_planes(cls, planes: SignPlanes, dtype: torch.dtype) -> SABEmbedding:
        """Pack `planes` into a module; scales are rounded to float16."""
        return cls(packing.to_tensors(planes), planes.shape[1], dtype)

    @classmethod
    def empty_like(cls, embedding: nn.Embedding, num_planes: int) -> SABEmbedding:
        """Return a module of the shape of `embedding`, on its device, with uninitialised planes for a loader to fill."""
        weight = embedding.weight
        return cls(empty_tensors(weight, num_planes, 0), embedding.embedding_dim, weight.dtype)

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


class SABTiedHead(nn.Module):
    """An output head that multiplies by the planes of the input embedding, and holds no tensor of its own.

    Args:
        embedding: the input embedding.
    """

    def __init__(self, embedding: SABEmbedding):
        super().__init__()
        self._embedding = (embedding,)  # a tuple, so that it is no submodule and its tensors are stored once
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

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, planes of the input embedding"
