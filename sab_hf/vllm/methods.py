"""What vLLM's layers do with packed weights: take their tensors, multiply by them, look rows up in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from ..packed.linear import exact_by_default
from .parts import ARRIVING, DENSE, Parts, Share, multiply

_OUTPUTS = {"q": 0, "k": 1, "v": 2}  # what vLLM calls the parts of its attention layer


class _Packed:
    """What both methods have in common. The layer has `parts` while it is loaded, then `packed`, modules of its matrices.

    Args:
        label: name of the layer.
        check: called when the model is loaded, see `SABConfig.check_placed`.
    """

    def __init__(self, label: str, check: Callable[[], None]):
        self.label, self.check = label, check
        self.exact = exact_by_default()

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.check()
        layer.packed = nn.ModuleList(layer.parts.modules())

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = multiply(layer.packed, x, self.exact)
        return y if bias is None else y + bias


class SABLinearMethod(_Packed, LinearMethodBase):
    """Linear layers of one or more packed matrices, by rows or by columns shared among ranks."""

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes,
    ) -> None:
        cut = input_size_per_partition != input_size
        start = layer.tp_rank * input_size_per_partition if cut else 0
        share = Share(
            self.label,
            input_size,
            (start, start + input_size_per_partition),
            output_partition_sizes,
            _whole_rows(layer),
            layer.tp_rank,
            layer.tp_size,
        )
        _expect(layer, Parts(share, params_dtype), params_dtype)


class SABEmbeddingMethod(_Packed, QuantizeMethodBase):
    """A packed embedding, or an output head of its own, whose rows are shared among ranks and filled up by zeros.

    Args:
        label, check: see `_Packed`.
        head: whether it is an output head.
    """

    def __init__(self, label: str, check: Callable[[], None], head: bool):
        super().__init__(label, check)
        self.head = head

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes,
    ) -> None:
        own = layer.shard_indices
        share = Share(
            self.label,
            input_size,
            (0, input_size),
            output_partition_sizes,
            [layer.org_vocab_size],
            layer.tp_rank,
            layer.tp_size,
            (own.org_vocab_start_index, own.org_vocab_end_index),
        )
        _expect(layer, Parts(share, params_dtype, embedding=not self.head), params_dtype)

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        (matrix,) = layer.packed
        return matrix(input_)


class SABTiedHeadMethod(QuantizeMethodBase):
    """An output head that has no tensors: models tie it to their packed embedding, as its config tells them."""

    def __init__(self, label: str):
        self.label = label

    def create_weights(self, layer: nn.Module, *sizes: object, **attributes: object) -> None:
        pass

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        return embed_tokens

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        raise RuntimeError(
            f"`{self.label}` uses the packed embedding, and vLLM's model has not tied the two; quantize with `embedding_bits=16` "
            "or serve the checkpoint with `python -m sab_hf.run transformers serve`"
        )


def _whole_rows(layer: nn.Module) -> Sequence[int]:
    """Return the rows of each output of a layer in files that hold them as one matrix."""
    if hasattr(layer, "total_num_kv_heads"):
        heads, kv_heads = layer.total_num_heads, layer.total_num_kv_heads
        return [heads * layer.head_size, kv_heads * layer.head_size, kv_heads * layer.v_head_size]
    return getattr(layer, "output_sizes", [layer.output_size])


def _expect(layer: nn.Module, parts: Parts, dtype: torch.dtype) -> None:
    """Give a layer an empty parameter for each tensor that may arrive, whose loader hands it to `parts`.

    A dense weight may arrive for a part of a fused layer that stayed dense; its empty parameter also tells whoever asks the
    layer's dtype and device.
    """
    layer.parts = parts
    for name, stored in (ARRIVING | {DENSE: dtype}).items():
        empty = nn.Parameter(torch.empty(0, dtype=stored), requires_grad=False)
        set_weight_attrs(empty, {"weight_loader": _loader(parts, name)})
        layer.register_parameter(name, empty)


def _loader(parts: Parts, name: str) -> Callable[..., None]:
    def load(parameter: nn.Parameter, tensor: Tensor, shard: str | int | tuple[int, ...] | None = None) -> None:
        outputs = (
            shard
            if isinstance(shard, tuple) or shard is None
            else (_OUTPUTS[shard] if isinstance(shard, str) else shard,)
        )
        parts.add(name, tensor, outputs, parameter.device)

    return load
