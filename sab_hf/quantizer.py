"""`SABHfQuantizer`: the hooks that transformers calls while it loads a model. Thin: the work is in `make/` and `packed/`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from .dotted import block_of
from .packed.checksums import check_checksums, expect_marker, files_being_loaded, seal
from .packed.names import is_packed_name, without_packed
from .packed.recorded import record_by_default
from .packed.swap import dequantize_modules, modules_of, swap_in_empty
from .packed.verify import (
    check_contents,
    check_entries,
    check_loaded,
    naming_stale_files,
    packed_names,
    raise_if_missing,
    raise_if_unlisted,
    read_entries,
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
        self._partial = False  # whether the checkpoint holds more packed modules than the class that is loaded
        self.record = None
        """What quantization did (`binarize.QuantizationRecord`); None for a model that was loaded packed."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.pre_quantized:
            config = self.quantization_config
            files = kwargs.get("checkpoint_files") or files_being_loaded()
            with naming_stale_files(files):
                entries = read_entries(files)
                modules = modules_of(model, config.modules, entries) if files else config.modules
                self._partial = len(modules) < len(config.modules)
                swap_in_empty(model, modules, config.tied_head, config.tied_embeddings)
                if files:
                    check_entries(model, entries, self._partial)
                check_checksums(files, config.checksums, model)
                if not config.checksums:
                    check_contents(files)
            expect_marker(model, config.modules)
            self._name_as_here(model, modules)
            return model
        from .make.binarize import check_room, make_plan

        with torch.device("cpu"):  # transformers builds the skeleton under the meta device
            self._plan = make_plan(model, self.quantization_config)
            check_room(model, self._plan, self.quantization_config)
        if not hasattr(HfQuantizer, "update_missing_keys"):  # transformers 5 calls no hook with them
            _check_when_tied(model)
        return model

    def _name_as_here(self, model: nn.Module, modules: dict[str, list[int]]) -> None:
        """Have the config hold the names of this model's class, for when it is saved again."""
        config = self.quantization_config
        if modules.keys() != config.modules.keys():
            lists = {name.rpartition(".")[0] for name in map(block_of, modules) if name}
            own = [name for name in config.language_blocks or () if name in lists]
            config.modules, config.language_blocks = modules, own or None
            model.config.quantization_config = config

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.pre_quantized:
            check_loaded(model)
            record_by_default(model)
            return model
        from .make.binarize import run_plan

        self.record = run_plan(model, self._plan, self.quantization_config)
        del self._plan
        self.quantization_config = model.config.quantization_config
        model.hf_quantizer = self
        record_by_default(model)
        return model

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Called by transformers 4.57 with the tensors that the checkpoint lacks."""
        if self.pre_quantized:
            packed = packed_names(model)
            raise_if_missing([key for key in missing_keys if key in packed])
        else:
            from .machine.weights import check_complete

            check_complete(model, missing_keys)
            _check_sizes_when_initialized(model, missing_keys)
        return missing_keys

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Called by transformers 5 with what it converts while it loads: packed tensors have no dense shape to be converted."""
        return without_packed(super().update_weight_conversions(weight_conversions, *args))

    def update_unexpected_keys(self, model: nn.Module, unexpected_keys: list[str]) -> list[str]:
        """Called by transformers 4.57 with the tensors that the skeleton has no place for."""
        if not self._partial:
            raise_if_unlisted([key for key in unexpected_keys if is_packed_name(key)])
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


def _check_when_tied(model: nn.Module) -> None:
    """Check once what a dense checkpoint lacks, when transformers 5 ties weights and says which ones are missing."""
    from .machine.weights import check_complete, check_sizes

    left: set[str] = set()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    _before_initialization(model, lambda: left.update(_not_loaded(model)))

    def tie_weights(missing_keys: set[str] | None = None, **kwargs: Any) -> None:
        type(model).tie_weights(model, missing_keys=missing_keys, **kwargs)
        if missing_keys is not None:
            del model.tie_weights  # from here on the class's own again
            check_complete(model, missing_keys)
            # transformers 5.17 takes tensors of any size where there is a quantizer
            others = {name for name, p in model.named_parameters() if p.shape != shapes.get(name, p.shape)}
            check_sizes(model, (left - set(missing_keys)) | others)

    model.tie_weights = tie_weights


def _check_sizes_when_initialized(model: nn.Module, missing: list[str]) -> None:
    """Check once the sizes of a dense checkpoint, when transformers 4 gives values to the tensors that it will not load."""
    from .machine.weights import check_sizes

    _before_initialization(model, lambda: check_sizes(model, _not_loaded(model) - set(missing)))


def _before_initialization(model: nn.Module, act: Callable[[], None]) -> None:
    """Have `act` called once, before transformers gives values to tensors that were not loaded and flags them like others."""

    def initialize_weights() -> None:
        del model.initialize_weights  # from here on the class's own again
        act()
        model.initialize_weights()

    model.initialize_weights = initialize_weights


def _not_loaded(model: nn.Module) -> set[str]:
    """Return the parameters that transformers has not flagged as loaded, except those that stay on disk."""
    return {
        name
        for name, parameter in model.named_parameters()
        if not (parameter.is_meta or getattr(parameter, "_is_hf_initialized", False))
    }


register_quantizer("sab")(SABHfQuantizer)  # not as a decorator, see `config.py`
