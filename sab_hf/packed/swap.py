"""Swapping packed modules in and out of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..dotted import block_of
from .embedding import FixedVocabulary, SABEmbedding, SABTiedEmbedding, SABTiedHead
from .experts import expert_name, fuse_experts, fused_parameters, split_experts
from .linear import SABLinear, SABModule, replace_module
from .names import loaded_names


def swap_in_empty(
    model: nn.Module, modules: dict[str, list[int]], tied_head: bool = False, tied_embeddings: Sequence[str] = ()
) -> None:
    """Replace the modules of `model` that a checkpoint holds packed by empty packed ones of the recorded size.

    Args:
        model: the skeleton, usually on the meta device.
        modules: name → [K, k], as recorded in `config.json`.
        tied_head: whether the output head uses the planes of the input embedding.
        tied_embeddings: names of further embeddings that use them.
    Raises:
        ValueError: no modules are recorded, one is not a Linear or the embedding of this model, or has more significant
            columns than there are.
    """
    if not modules:
        raise ValueError(
            "the checkpoint's quantization_config says `sab` but lists no quantized modules; it is damaged or was written by "
            "hand: download or quantize the checkpoint again. To quantize a dense one, pass `quantization_config=`"
        )
    split_experts(model, modules)
    dense = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    unknown = [name for name in modules if name not in dense]
    if unknown:
        raise ValueError(_unknown_module(model, unknown[0], len(unknown)))
    for name, (_, num_significant) in modules.items():
        columns = dense[name].weight.shape[1]
        if num_significant > (0 if isinstance(dense[name], nn.Embedding) else columns):
            raise ValueError(
                f"the checkpoint's quantization_config gives `{name}`, a {type(dense[name]).__name__} of {columns} columns, "
                f"{num_significant} significant columns, which cannot be; it was altered: download or quantize it again"
            )
    for name, (num_planes, num_significant) in modules.items():
        if isinstance(dense[name], nn.Embedding):
            replace_module(model, name, SABEmbedding.empty_like(dense[name], num_planes))
        else:
            replace_module(model, name, SABLinear.empty_like(dense[name], num_planes, num_significant))
    tied_head = tied_head and model.get_output_embeddings() is not None  # `AutoModel` gives models without a head
    if tied_head or tied_embeddings:
        tie_to_embedding(model, tied_head, tied_embeddings)
    fix_vocabulary(model)


def fix_vocabulary(model: nn.Module) -> None:
    """Have `resize_token_embeddings` of a model with packed embedding or head accept the present size only."""
    if not hasattr(model, "get_input_embeddings"):
        return  # a part of a model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, SABEmbedding) or isinstance(head, (SABLinear, SABTiedHead)):
        model.resize_token_embeddings = FixedVocabulary(embedding, embedding.num_embeddings)


def modules_of(
    model: nn.Module, modules: dict[str, list[int]], entries: Iterable[tuple[str, str, tuple[int, ...]]]
) -> dict[str, list[int]]:
    """Return the modules of `model` that a checkpoint holds packed, also where another class than the model's saved it.

    The config's names are those of the class that saved. Another class for the same files (`AutoModel`, or
    `AutoModelForCausalLM` for a vision-language model) names the same modules otherwise and may lack some; which is which
    follows from where transformers' loader puts the files' tensors.

    Args:
        model: the skeleton, with dense modules.
        modules: name → [K, k], as recorded in `config.json`.
        entries: name, dtype and shape of each tensor in the files.
    Returns:
        name in the model → [K, k], without the modules that belong to parts that the model lacks.
    Raises:
        ValueError: a module belongs to a part that the model has, and is not in it; or the config lists other modules or sizes
            than the files hold.
    """
    places = _places(model)
    if modules.keys() <= places:
        return modules
    shapes = {name: shape for name, _, shape in entries}
    in_files = [name.removesuffix(".signs") for name in shapes if name.endswith(".signs")]
    sizes = {name: [shapes[f"{name}.signs"][0], *shapes.get(f"{name}.residual_col_scale", (0,))] for name in in_files}
    unknown = [name for name in modules if name not in places]
    if sorted(sizes.values()) != sorted(
        modules.values()
    ):  # the files tell nothing of the modules that the config means
        raise ValueError(_unknown_module(model, unknown[0], len(unknown)))
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    parts = {name for name, _ in model.named_modules()}
    found = {}
    for name, (loaded, *_) in loaded_names(model, shapes, {f"{place}.signs" for place in places}).items():
        if not name.endswith(".signs"):
            continue
        own = loaded.removesuffix(".signs")
        if own in places:
            found[own] = sizes[name.removesuffix(".signs")]
        elif {block_of(other) for other in (own, own.removeprefix(prefix), prefix + own)} & parts:
            raise ValueError(_unknown_module(model, own, 1))
    if not found:
        raise ValueError(_unknown_module(model, unknown[0], len(unknown)))
    return found


def _places(model: nn.Module) -> set[str]:
    """Return the names of the modules that may be packed, experts of fused parameters among them."""
    names = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    for fused in fused_parameters(model):
        names |= {expert_name(fused, expert) for expert in range(model.get_parameter(fused).shape[0])}
    return names


def _unknown_module(model: nn.Module, name: str, count: int) -> str:
    return (
        f"the checkpoint's quantization_config lists {count} modules that are no Linear of {type(model).__name__}, first "
        f"`{name}`; load it with the class that saved it (and, for mixtures of experts, with a transformers version that names "
        "them so: versions 4 and 5 differ)"
    )


def tied_embeddings(model: nn.Module) -> list[str]:
    """Return the names of the embeddings that have the input embedding's weight, itself excluded, in a model with values."""
    embedding = model.get_input_embeddings()
    names = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding) and module.weight is embedding.weight
    ]
    own = next(name for name, module in model.named_modules() if module is embedding)
    return [name for name in names if name != own]


def tie_to_embedding(model: nn.Module, head: bool, others: Sequence[str]) -> None:
    """Let the output head of a transformers model, or further embeddings, use the planes of its packed input embedding.

    transformers ties `weight` parameters, which packed modules do not have: the config says "not tied" from here on, and
    `SABQuantizationConfig.tied_head` and `tied_embeddings` remember.

    Args:
        model: the model.
        head: whether the output head does.
        others: names of embeddings that do, as `tied_embeddings` gives them.
    Raises:
        ValueError: the input embedding is not packed, or one of the others is no embedding of its shape.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, SABEmbedding):
        raise ValueError(
            "the checkpoint's quantization_config says that modules are tied to a packed input embedding, but "
            f"lists no packed embedding for {type(model).__name__}; it was altered: download or quantize it again"
        )
    for saved in others:
        name = _own_name(model, saved)
        other = None if name is None else model.get_submodule(name)
        if not isinstance(other, nn.Embedding) or other.weight.shape != embedding.weight.shape:
            raise ValueError(
                f"the checkpoint's quantization_config says that `{saved}` uses the planes of the input embedding, which is "
                f"{list(embedding.weight.shape)}, but {type(model).__name__} has no embedding of that name and shape; it was "
                "altered, or load it with the class that saved it"
            )
        replace_module(model, name, SABTiedEmbedding(embedding, other))
    if head:
        model.set_output_embeddings(SABTiedHead(embedding))
    set_tied(model, False)


def _own_name(model: nn.Module, name: str) -> str | None:
    """Return the name in `model` of a module that a class with or without the base model's prefix calls `name`."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    parts = {part for part, _ in model.named_modules(remove_duplicate=False)}
    return next((own for own in (name, name.removeprefix(prefix), prefix + name) if own in parts), None)


def set_tied(model: nn.Module, tied: bool) -> None:
    """Have all configs of a model, and transformers' own list of tied weights, say whether embedding and head are one."""
    configs: list[Any] = [model.config, *(module.config for module in model.modules() if hasattr(module, "config"))]
    for config in configs:
        if hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = tied
    if hasattr(model, "all_tied_weights_keys"):  # transformers 5 works this out when the model is made
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True) if tied else {}


def dequantize_modules(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every packed module of `model` by a dense one of the weights that it stands for."""
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, SABModule)]
    if any(module.signs.is_meta for _, module in packed):
        raise ValueError("some packed weights are offloaded; to dequantize, load the model with device_map='cpu'")
    tied = [name for name, module in model.named_modules() if isinstance(module, SABTiedHead)]
    others = [(name, module) for name, module in model.named_modules() if isinstance(module, SABTiedEmbedding)]
    for name, module in packed:
        replace_module(model, name, module.dense(dtype))
    vars(model).pop("resize_token_embeddings", None)  # the class's own again
    fuse_experts(model)
    embedding = model.get_input_embeddings() if tied or others else None
    for name, module in others:
        replace_module(model, name, module.dense(embedding.weight))
    for name in tied:
        with torch.device("meta"):
            head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, dtype=dtype)
        head.weight = embedding.weight
        replace_module(model, name, head)
        set_tied(model, True)
