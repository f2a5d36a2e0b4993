"""The quantization method `sab` as vLLM knows it: which layers of a model are packed, and what runs them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
import vllm
from huggingface_hub import snapshot_download
from torch import nn
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from ..config import SABQuantizationConfig
from ..packed.verify import PackedSize
from .checkpoint import PATTERNS, check_checkpoint
from .versions import check_version


class SABConfig(QuantizationConfig):
    """The packed modules of a checkpoint, by the names that vLLM's model gives them.

    vLLM calls, in this order: `from_config` and `maybe_update_config` once, in the process that was started, so that mistakes
    show before any weight is loaded; then in each worker `apply_vllm_mapper`, `get_quant_method` for each layer as the model is
    built, and `get_checkpoint_weight_mapper` when its weights are about to be loaded.

    Args:
        config: `quantization_config` of the checkpoint.
    """

    def __init__(self, config: SABQuantizationConfig):
        super().__init__()
        self.config = config
        self.sizes: dict[str, PackedSize] = {}
        """Packed modules: name → sizes; in vLLM's names as soon as its model has told them."""
        self.markers: list[str] = []
        """Names in the files of empty tensors, which are no weights."""
        self._placed: set[str] = set()  # packed modules for which the model has a layer
        self._unnamed: set[tuple[int, int]] = set()  # sizes of embeddings whose names vLLM does not tell

    def get_name(self) -> str:
        return "sab"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75  # of the Triton kernels, see `kernels/cuda/linear.py`

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # it is in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SABConfig:
        """Read `quantization_config` of a checkpoint.

        Raises:
            ValueError: this vLLM was not tested; the format is of the future; a value is not accepted.
        """
        check_version(vllm.__version__)
        return cls(SABQuantizationConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check the checkpoint, and have the model tie its head where the packed embedding is the head.

        Args:
            model_name: a folder or a Hub repository, whose files vLLM would load next, from the same cache.
            hf_config: the model's config; a tied head is put into it.
            revision: of the repository.
        Raises:
            ValueError, FileNotFoundError: see `check_checkpoint`.
        """
        folder = model_name
        if not os.path.isdir(folder):
            folder = snapshot_download(model_name, revision=revision, allow_patterns=list(PATTERNS))
        self.sizes, self.markers = check_checkpoint(Path(folder), self.config)
        if self.config.tied_head and hf_config is not None:
            for part in (hf_config, hf_config.get_text_config()):
                part.tie_word_embeddings = True

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the packed modules as vLLM renames tensors; patterns may end in a dot, so a tensor of each module is mapped."""
        sizes = {}
        for name, size in self.sizes.items():
            renamed = hf_to_vllm_mapper.map_name(f"{name}.signs")
            sizes[name if renamed is None else renamed.removesuffix(".signs")] = size
        self.sizes = sizes

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return what runs a layer: packed weights, or what vLLM has for dense ones.

        Args:
            layer: a layer of the model being built.
            prefix: its name.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        from .experts import SABExpertsMethod
        from .methods import SABEmbeddingMethod, SABLinearMethod, SABTiedHeadMethod

        if isinstance(layer, LinearBase):
            packed = [name for name in self._names(prefix) if name in self.sizes]
            self._placed.update(packed)
            return SABLinearMethod(prefix, self.check_placed) if packed else UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            packed = [name for name in self.sizes if name.startswith(f"{prefix}.")]
            self._placed.update(packed)
            return SABExpertsMethod(layer.moe_config, prefix, self.check_placed) if packed else None
        if not isinstance(layer, VocabParallelEmbedding):
            return None
        head = isinstance(layer, ParallelLMHead)
        if prefix in self.sizes:
            self._placed.add(prefix)
            return SABEmbeddingMethod(prefix, self.check_placed, head)
        if head:
            return SABTiedHeadMethod(prefix) if self.config.tied_head else None
        shape = (layer.org_vocab_size, layer.embedding_dim)
        if not prefix and any(size[:2] == shape for size in self.sizes.values()):
            self._unnamed.add(shape)
            return SABEmbeddingMethod("the embedding", self.check_placed, head)
        return None

    def _names(self, prefix: str) -> list[str]:
        """Return the names of the matrices that a layer may hold: its own, and those that the model fuses into it."""
        parent, _, own = prefix.rpartition(".")
        return [prefix, *(f"{parent}.{part}".lstrip(".") for part in self.packed_modules_mapping.get(own, ()))]

    def get_checkpoint_weight_mapper(self) -> Any:
        """Leave out the tensors that are no weights; by now the model is built, so what it lacks is named before loading.

        Raises:
            ValueError: see `check_placed`.
        """
        from vllm.model_executor.models.utils import WeightsMapper

        self.check_placed()
        return WeightsMapper(orig_to_new_regex={re.compile(f"^{re.escape(name)}$"): None for name in self.markers})

    def check_placed(self) -> None:
        """Check that the model, which is built, has a layer for every packed module; some of vLLM's loaders skip what has none.

        Raises:
            ValueError: names the modules that have none.
        """
        from vllm.distributed import get_pp_group

        if get_pp_group().world_size > 1:
            return  # the others' layers are not here
        lost = [name for name in self.sizes if name not in self._placed and self.sizes[name][:2] not in self._unnamed]
        if lost:
            raise ValueError(
                f"vLLM's model has no layer that can be packed for {len(lost)} packed modules, first `{lost[0]}`; quantize with "
                "these modules dense (`modules_to_not_convert`, or 16 bits for their role), or serve the checkpoint with "
                "`python -m sab_hf.run transformers serve`"
            )


register_quantization_config("sab")(SABConfig)
