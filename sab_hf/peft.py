"""LoRA adapters on packed models: importing this module tells PEFT how to put an adapter on a `SABLinear`.

    import sab_hf.peft
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(packed_model, LoraConfig(r=8, target_modules="all-linear"))

Everything else is PEFT's own: saving, `PeftModel.from_pretrained(packed_model, folder)`, several adapters, `Trainer`. The
adapter's files are those of any LoRA adapter.

PEFT finds the layer for a module in a fixed list, and the one opening it leaves, `LoraConfig._register_custom_module`, is
not saved with the adapter. So this module enters its `LoraModel` in PEFT's table of tuners instead: a subclass that treats
`SABLinear` and passes every other module on. The other tuners of the table get subclasses that refuse packed modules with a
reason; on dense modules of a packed model (norms, a dense tower) they work as ever. Prompt tuning, which looks for the
embedding among dense parameters, is refused where that is packed.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

try:
    from peft import PeftModel, PeftType
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.lora import LoraConfig, LoraLayer, LoraModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
except ImportError as error:
    if find_spec("peft") is None:
        raise ImportError("adapters on packed models need PEFT: pip install 'sab_hf[peft]'") from error
    raise ImportError(
        f"adapters on packed models need PEFT, which is installed but cannot be imported: {error}"
    ) from error

from .packed.embedding import SABEmbedding, SABTiedHead
from .packed.linear import SABLinear, SABModule

PACKED = (SABModule, SABTiedHead)
_ALL_LINEAR = "all-linear"
_WITHOUT_EMBEDDING = {"PREFIX_TUNING", "CARTRIDGE"}  # kinds of prompts that are keys and values
_INITIALIZATIONS = (True, False, "gaussian")  # the others start from a decomposition of the dense weight


class LoraSABLinear(nn.Module, LoraLayer):
    """`y = SABLinear(x) + scaling · B(A(dropout(x)))`, with trainable float A [r, in_features] and B [out_features, r].

    Args:
        base_layer: the packed Linear, which stays as it is.
        adapter_name: name of the first adapter.
        config: PEFT's LoRA config.
        r, lora_alpha: rank and scale of the adapter, as PEFT resolved them for this module.
    Raises:
        ValueError: the config asks for a variant that needs the dense weight.
    Source: LoRA, arXiv 2106.09685.
    """

    def __init__(
        self,
        base_layer: SABLinear,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ):
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter, as PEFT asks for it.

        Raises:
            ValueError: see the class.
        """
        if config.init_lora_weights not in _INITIALIZATIONS or config.use_dora:
            asked = "use_dora" if config.use_dora else f"init_lora_weights={config.init_lora_weights!r}"
            raise ValueError(
                f"LoRA on packed sign planes does not support {asked}, which needs the dense weight; leave it out, or put "
                "the adapter on `model.dequantize()`"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        self._move_adapter_to_device_of_base_layer(adapter_name, device=self.base_layer.row_scale.device)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        self._check_forward_args(x, *args, adapter_names=adapter_names, **kwargs)
        y = self.base_layer(x)
        if self.disable_adapters:
            return y
        if adapter_names is not None:  # one adapter for each row of the batch
            y = y.clone()
            for name in set(adapter_names) & self.lora_A.keys():
                rows = [i for i, wanted in enumerate(adapter_names) if wanted == name]
                y[rows] += self._delta(name, x[rows]).to(y.dtype)
            return y
        for name in self.active_adapters:
            if name in self.lora_A:
                y = y + self._delta(name, x).to(y.dtype)
        return y

    def _delta(self, name: str, x: Tensor) -> Tensor:
        x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
        return self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: the sum of sign planes and a low-rank matrix is no longer sign planes.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a LoRA adapter cannot be merged into packed sign planes: their sum is a dense matrix. Keep the adapter beside "
            "the packed model, or save it and merge it into the dense one: "
            "`PeftModel.from_pretrained(packed_model.dequantize(), adapter_folder).merge_and_unload()`"
        )

    def unmerge(self) -> None:
        """Do nothing: nothing is ever merged."""

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


class _Refusing:
    """What a tuner does before PEFT's own: refuse what would train, copy or replace packed tensors."""

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Check before a tuner sizes what its layers share: VeRA would only say that no target is of a known type."""
        self._check_targets(model, adapter_name)
        super()._pre_injection_hook(model, config, adapter_name)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into the model.

        Raises:
            ValueError: the config asks for something of a packed module that needs dense weights.
        """
        _check_trained_whole(model, self.peft_config[adapter_name])
        self._check_targets(model, adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _check_targets(self, model: nn.Module, adapter_name: str) -> None:
        """Raise a ValueError if an adapter would be put on a module that this tuner refuses."""
        config = self._prepare_adapter_config(self.peft_config[adapter_name], self.get_model_config(model))
        for name, module in model.named_modules():
            if isinstance(_base(module), self.refused) and self._check_target_module_exists(config, name):
                raise ValueError(
                    f"{config.peft_type.value} adapters need the dense weight of `{name}`, which is packed "
                    f"({type(_base(module)).__name__}); use LoRA on packed Linears, leave `{name}` out of `target_modules`, "
                    "or put the adapter on `model.dequantize()`"
                )


class SABLoraModel(_Refusing, LoraModel):
    """PEFT's `LoraModel`, which also knows `SABLinear`."""

    refused = (SABEmbedding, SABTiedHead)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into the model; "all-linear" means the packed Linears too, which PEFT would pass over."""
        config = self.peft_config[adapter_name]
        if isinstance(config.target_modules, str) and config.target_modules.lower() == _ALL_LINEAR:
            packed = {name for name, module in model.named_modules() if _packed(module)}
            head = getattr(model, "get_output_embeddings", lambda: None)()
            packed -= {name for name, module in model.named_modules() if module is head}
            config.target_modules = _maybe_include_all_linear_layers(config, model).target_modules | packed
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    @staticmethod
    def _create_new_module(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if _packed(target):
            base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            return LoraSABLinear(base, adapter_name, config=lora_config, **kwargs)
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _packed(module: nn.Module) -> bool:
    """Return whether a module is a `SABLinear`, or a layer of a tuner on one."""
    return isinstance(_base(module), SABLinear)


def _check_trained_whole(model: nn.Module, config: Any) -> None:
    """Raise a ValueError if a config wants to train a packed module itself, or rows of a packed embedding."""
    rows = getattr(config, "trainable_token_indices", None)
    asked = {"modules_to_save": list(getattr(config, "modules_to_save", None) or ())}
    if isinstance(rows, dict):
        asked["trainable_token_indices"] = list(rows)
    elif rows is not None:
        asked["trainable_token_indices"] = [n for n, m in model.named_modules() if m is model.get_input_embeddings()]
    for field, wanted in asked.items():
        for name, module in model.named_modules():
            if any(f".{name}".endswith(f".{end}") for end in wanted) and any(
                isinstance(m, PACKED) for m in module.modules()
            ):
                raise ValueError(
                    f"`{field}` asks to train `{name}`, which is packed: sign planes cannot be trained. Leave it out, load "
                    "a checkpoint whose embedding and head are dense (`embedding_bits=16, head_bits=16`), or train "
                    "`model.dequantize()`"
                )


def _refusing(tuner: type) -> type:
    """Return a subclass of a tuner, of the same name, that refuses packed modules."""
    return type(tuner.__name__, (_Refusing, tuner), {"refused": PACKED, "__doc__": tuner.__doc__})


def _check_prompt(model: PeftModel, config: Any) -> None:
    """Raise a ValueError if a config adds tokens to prompts, and the embedding that PEFT looks for is packed."""
    embedding = getattr(model.get_base_model(), "get_input_embeddings", lambda: None)()
    if isinstance(embedding, SABEmbedding) and config.peft_type not in _WITHOUT_EMBEDDING:
        raise ValueError(
            f"{config.peft_type.value} needs a dense embedding, and that of the model is packed; load a checkpoint whose "
            "embedding is dense (`embedding_bits=16`), use LoRA or prefix tuning, or put the adapter on `model.dequantize()`"
        )


def register() -> None:
    """Enter in PEFT what knows packed modules; done when this module is imported, and harmless when repeated."""
    for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        if issubclass(tuner, BaseTuner) and not issubclass(tuner, _Refusing):
            PEFT_TYPE_TO_TUNER_MAPPING[kind] = SABLoraModel if kind is PeftType.LORA else _refusing(tuner)
    setup = PeftModel._setup_prompt_encoder
    if not hasattr(setup, "__wrapped__"):

        @functools.wraps(setup)
        def checked(self: PeftModel, adapter_name: str) -> Any:
            _check_prompt(self, self.peft_config[adapter_name])
            return setup(self, adapter_name)

        PeftModel._setup_prompt_encoder = checked


register()
