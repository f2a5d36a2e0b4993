"""`SABHfQuantizer`: the hooks that transformers calls while it loads a model. Thin: the work is in `make/` and `packed/`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from .packed.checksums import check_checksums, checkpoint_files, expect_marker, seal
from .packed.swap import dequantize_modules, swap_in_empty
from .packed.verify import (
    PACKED_NAMES,
    check_headers,
    check_loaded,
    naming_stale_files,
    packed_names,
    raise_if_missing,
    raise_if_unlisted,
)


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
            swap_in_empty(model, self.quantization_config.modules, self.quantization_config.tied_head)
            files = kwargs.get("checkpoint_files") or checkpoint_files(model)
            with naming_stale_files(files):
                if files:
                    check_headers(model, files)
                check_checksums(files, self.quantization_config.checksums, model)
            expect_marker(model, self.quantization_config.modules)
            return model
        from .make.binarize import make_plan

        with torch.device("cpu"):  # transformers builds the skeleton under the meta device
            self._plan = make_plan(model, self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.pre_quantized:
            check_loaded(model)
            return model
        from .make.binarize import run_plan

        self.record = run_plan(model, self._plan, self.quantization_config)
        del self._plan
        self.quantization_config = model.config.quantization_config
        model.hf_quantizer = self
        return model

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Called by transformers 4.57 with the tensors that the checkpoint lacks."""
        packed = packed_names(model)
        raise_if_missing([key for key in missing_keys if key in packed])
        return missing_keys

    def update_unexpected_keys(self, model: nn.Module, unexpected_keys: list[str]) -> list[str]:
        """Called by transformers 4.57 with the tensors that the skeleton has no place for."""
        raise_if_unlisted([key for key in unexpected_keys if key.rpartition(".")[2] in PACKED_NAMES])
        return unexpected_keys

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Replace the packed modules by dense ones of the same values, and forget that the model was quantized."""
        dequantize_modules(model, dtype or model.dtype)
        self.remove_quantization_config(model)
        for module in model.modules():
            if hasattr(
                module, "config"
            ):  # transformers 4.57 leaves a torch.dtype in sub-configs, which JSON cannot hold
                vars(module.config).pop("_pre_quantization_dtype", None)
        return model

    def get_state_dict_and_metadata(
        self, model: nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """Called by `save_pretrained` before it writes anything: write the checksums into the config."""
        if getattr(model, "_hf_peft_config_loaded", False):  # only the adapter is saved
            return None, {}
        return seal(model), {}

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Packed models are saved as safetensors only; pickled files are refused."""
        return safe_serialization is not False

    @property
    def is_trainable(self) -> bool:
        """Adapters (`sab_hf.peft`) can be trained on a packed model; its packed tensors cannot, see `is_qat_trainable`."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Signs and scales are stored numbers without gradient: a packed model without adapters is not trainable."""
        return False

    @property
    def is_compileable(self) -> bool:
        """`generate` with a static cache may compile the model: `SABLinear` is one custom op, without a graph break."""
        return True


register_quantizer("sab")(SABHfQuantizer)  # not as a decorator, see `config.py`
