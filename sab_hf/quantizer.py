"""`SABHfQuantizer`: the hooks that transformers calls while it loads a model. Thin: the work is in `binarize` and `linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from .linear import SABLinear, dequantize_modules, swap_in_empty


@register_quantizer("sab")
class SABHfQuantizer(HfQuantizer):
    """Binarize a dense checkpoint while it loads, or fill packed modules from a packed one.

    Before the weights: a packed checkpoint gets empty `SABLinear`s in its skeleton, a dense one is planned and its
    calibration set prepared, so that mistakes show before hours are spent. After the weights: completeness is checked, or
    the plan is run.
    """

    requires_calibration = False  # the quantizer calibrates by itself

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.record = None
        """What quantization did (`binarize.QuantizationRecord`); None for a model that was loaded packed."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.pre_quantized:
            if not self.quantization_config.modules:
                raise ValueError(
                    "the checkpoint's quantization_config says `sab` but lists no quantized modules: it is damaged, or it "
                    "was written by hand. To quantize a dense checkpoint, remove quantization_config from its config.json"
                )
            swap_in_empty(model, self.quantization_config.modules)
            return model
        from .binarize import make_plan

        with torch.device("cpu"):  # transformers builds the skeleton under the meta device
            self._plan = make_plan(model, self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.pre_quantized:
            _check_complete(model)
            return model
        from .binarize import run_plan

        self.record = run_plan(model, self._plan, self.quantization_config)
        del self._plan
        self.quantization_config = model.config.quantization_config
        model.hf_quantizer = self
        return model

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Called by transformers 4.57 with the tensors that the checkpoint lacks."""
        packed = _packed_names(model)
        _raise_if_missing([key for key in missing_keys if key in packed])
        return missing_keys

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Replace the packed modules by dense ones of the same values, and forget that the model was quantized."""
        dequantize_modules(model, dtype or model.dtype)
        self.remove_quantization_config(model)
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Packed models are saved as safetensors only; pickled files are refused."""
        return safe_serialization is not False

    @property
    def is_trainable(self) -> bool:
        return False


def _packed_names(model: nn.Module) -> dict[str, Tensor]:
    """Return the packed tensors of `model` by their names in its state dict."""
    return {
        f"{name}.{tensor_name}": tensor
        for name, module in model.named_modules()
        if isinstance(module, SABLinear)
        for tensor_name, tensor in module.packed_tensors().items()
    }


def _check_complete(model: nn.Module) -> None:
    """Raise if the checkpoint lacked a packed tensor: the loader leaves those as uninitialised memory.

    transformers 4.57 tells us (`update_missing_keys`). Version 5 flags each parameter that it has loaded; parameters on
    the meta device are offloaded to disk, which only happens to those that were found.
    """
    if hasattr(HfQuantizer, "update_missing_keys"):
        return
    _raise_if_missing(
        [
            name
            for name, tensor in _packed_names(model).items()
            if not (tensor.is_meta or getattr(tensor, "_is_hf_initialized", False))
        ]
    )


def _raise_if_missing(missing: list[str]) -> None:
    if missing:
        raise ValueError(
            f"the checkpoint says `sab` but lacks {len(missing)} packed tensors, first `{missing[0]}`; it is incomplete or "
            "holds dense weights. Download it again, or remove quantization_config from its config.json if it is dense"
        )
