"""What vLLM's mixtures of experts do with packed experts: a loop over those that the router chose, as transformers runs them.

The experts of one layer differ in planes and significant columns, so each keeps two products of its own (gate and up; down).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from ..packed.experts import SPLIT
from ..packed.linear import exact_by_default
from .parts import ARRIVING, DENSE, Parts, Share, multiply

_GATE_UP, _GATE, _UP, _DOWN = (0, 1), (0,), (1,), None
_PLACES = {
    "gate_up_proj": _GATE_UP, "w13": _GATE_UP, "gate_proj": _GATE, "w1": _GATE, "up_proj": _UP, "w3": _UP, "down_proj": _DOWN,
    "w2": _DOWN,
}  # fmt: skip
"""Name of a matrix in files, also as vLLM renames it → outputs of the first product that it gives; None: it is the second."""
_ACTIVATIONS = {
    MoEActivation.SILU: functional.silu,
    MoEActivation.GELU: functional.gelu,
    MoEActivation.GELU_TANH: partial(functional.gelu, approximate="tanh"),
}


class SABExpertsMethod(FusedMoEMethodBase):
    """Experts of which some matrices are packed. The layer has `parts` while it is loaded, then `packed`.

    Args:
        moe: vLLM's config of the layer.
        label: its name.
        check: called when the model is loaded, see `SABConfig.check_placed`.
    Raises:
        ValueError: the experts do something that the loop does not.
    """

    def __init__(self, moe, label: str, check: Callable[[], None]):
        super().__init__(moe)
        self.label, self.check = label, check
        self.exact = exact_by_default()
        model = get_current_vllm_config().model_config
        problem = None
        if moe.activation not in _ACTIVATIONS or moe.swiglu_limit is not None:
            problem = f"their activation is {moe.activation.value!r}, one of {[one.value for one in _ACTIVATIONS]} is required"
        elif moe.has_bias:
            problem = "they have biases"
        elif model is not None and not model.enforce_eager:
            problem = "which of them run depends on the router, and no graph can hold that; add --enforce-eager"
        if problem:
            raise ValueError(
                f"the experts of `{label}` are packed, and vLLM cannot run them: {problem}. Or serve the checkpoint with "
                "`python -m sab_hf.run transformers serve`"
            )

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes,
    ) -> None:
        rank, ranks = self.moe.tp_rank, self.moe.tp_size
        whole, own = self.moe.intermediate_size, intermediate_size_per_partition

        def expert(number: int) -> tuple[Parts, Parts]:
            label = f"{self.label}.{number}"
            first = Share(label, hidden_size, (0, hidden_size), [own, own], [whole, whole], rank, ranks)
            down = Share(label, whole, (rank * own, (rank + 1) * own), [hidden_size], [hidden_size], rank, ranks)
            return Parts(first, params_dtype), Parts(down, params_dtype)

        layer.parts = [expert(number) for number in range(num_experts)]
        layer.register_parameter("w13_weight", nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False))
        layer.load_weights = lambda weights: self._load(layer, weights)

    def _load(self, layer: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Hand the tensors of a layer to its experts; names are relative to it."""
        device = layer.w13_weight.device
        for name, tensor in weights:
            for number, matrix, part, value in _of_experts(name, tensor, layer.is_fused_checkpoint_transposed):
                local = layer._map_global_expert_id_to_local_expert_id(number)
                if matrix not in _PLACES or part not in (*ARRIVING, DENSE) or not -1 <= local < len(layer.parts):
                    raise ValueError(f"`{self.label}` has no place for the tensor `{name}` of the checkpoint")
                if local >= 0:  # else it is another rank's
                    outputs = _PLACES[matrix]
                    layer.parts[local][outputs is None].add(part, value, outputs, device)
            yield "w13_weight"

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.check()
        pairs = [nn.ModuleList(nn.ModuleList(parts.modules()) for parts in expert) for expert in layer.parts]
        layer.packed = nn.ModuleList(pairs)
        del layer.parts

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        return None  # for kernels of vLLM, of which none runs here

    def maybe_roundup_sizes(self, hidden_size: int, intermediate_size_per_partition: int, *config) -> tuple[int, int]:
        return hidden_size, intermediate_size_per_partition

    def apply(
        self,
        layer: nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: object,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """Return the sum of what the chosen experts give, times their weights.

        Args:
            layer: of the experts.
            x: [tokens, hidden].
            topk_weights, topk_ids: [tokens, experts of a token], as the router chose them.
            shared_experts, shared_experts_input: run by the caller.
        Returns:
            [tokens, hidden].
        """
        ids = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        y = torch.zeros_like(x, dtype=torch.float32)
        for number in ids.unique().tolist():
            if number < 0:  # another rank's
                continue
            first, down = layer.packed[number]
            tokens, places = (ids == number).nonzero(as_tuple=True)
            weight = topk_weights[tokens, places, None]
            seen = x[tokens]
            if layer.apply_router_weight_on_input:
                seen, weight = seen * weight.to(x.dtype), 1.0
            gate, up = multiply(first, seen, self.exact).chunk(2, -1)
            inner = _ACTIVATIONS[self.moe.activation](gate) * up
            y.index_add_(0, tokens, multiply(down, inner, self.exact).float() * weight)
        return y.to(x.dtype)


def _of_experts(name: str, tensor: Tensor, transposed: bool) -> Iterator[tuple[int, str, str, Tensor]]:
    """Yield expert, matrix, tensor's name and value for a tensor of a file.

    `split.gate_up_proj.3.signs` and `3.gate_proj.signs` are of one expert, `down_proj` is the dense parameter of all.

    Args:
        name: in the file, relative to the layer.
        tensor: its value.
        transposed: whether parameters of all experts are stored as [experts, in_features, out_features].
    """
    words = name.split(".")
    if words[0] == SPLIT and len(words) == 4 and words[2].isdigit():
        yield int(words[2]), words[1], words[3], tensor
    elif words[0].isdigit() and len(words) == 3:
        yield int(words[0]), words[1], words[2], tensor
    elif len(words) == 1 and tensor.ndim == 3:
        for number, matrix in enumerate(tensor.unbind()):
            yield number, name, DENSE, matrix.T if transposed else matrix
    else:
        yield -1, name, "", tensor
