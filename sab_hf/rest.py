"""Binarizing what is not a language block: towers, projector, input embedding, output head, a few full planes each."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .calibration import IMAGE, CalibrationBatch
from .capture import count_first, model_inputs, observing
from .config import DENSE, REST_ROLES, SABQuantizationConfig
from .embedding import SABEmbedding
from .fit import fit_tall_planes
from .hessian import SecondMoments, damp, mix
from .linear import SABLinear, replace_module
from .roles import EMBEDDING, Roles
from .swap import tie_head

logger = logging.getLogger(__name__)

_MOMENT_BYTES = 2 << 30
"""Most memory that second moments may take at a time; more matrices are done in several passes."""


def plan_rest(model: nn.Module, roles: Roles, config: SABQuantizationConfig) -> dict[str, int]:
    """Return name → full planes of each matrix outside the language blocks that the config asks for.

    Raises:
        ValueError: a role was named that the model does not have, or tied embeddings were given two numbers.
    """
    planned: dict[str, int] = {}
    for role in REST_ROLES:
        bits = config.bits_of(role)
        if bits == DENSE:
            continue
        names = list(_matrices(model, roles, role))
        if not names and getattr(config, f"{role}_bits") is not None:
            raise ValueError(
                f"`{role}_bits` is {bits}, but {type(model).__name__} has no matrix of the role `{role}`; leave it out"
            )
        planned |= dict.fromkeys(names, bits)
    if is_tied(model):
        _check_tied(config)
        named = [bits for bits in (config.embedding_bits, config.head_bits) if bits is not None]
        bits = named[0] if named else config.bits_of(EMBEDDING)
        planned.pop(roles.head, None)
        if bits != DENSE:
            planned[roles.embedding] = bits
    return planned


def _check_tied(config: SABQuantizationConfig) -> None:
    embedding, head = config.embedding_bits, config.head_bits
    if embedding is not None and head is not None and embedding != head:
        raise ValueError(
            f"`embedding_bits` is {embedding} and `head_bits` is {head}, but this model's input embedding and output head are "
            "one tied matrix; give both the same number, or only one of them"
        )


def is_tied(model: nn.Module) -> bool:
    """Return whether output head and input embedding are one matrix."""
    head = model.get_output_embeddings()
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return head is not None and (tied or head.weight is model.get_input_embeddings().weight)


def _matrices(model: nn.Module, roles: Roles, role: str) -> dict[str, nn.Module]:
    """Return the matrices of a role by name. Subclasses of Linear and Embedding have a forward of their own: left alone."""
    kind = nn.Embedding if role == EMBEDDING else nn.Linear
    return {name: module for name, module in model.named_modules() if type(module) is kind and roles.of(name) == role}


@torch.no_grad()
def binarize_rest(
    model: nn.Module,
    roles: Roles,
    planned: dict[str, int],
    batches: list[CalibrationBatch],
    config: SABQuantizationConfig,
) -> dict[str, list[int]]:
    """Binarize the planned matrices in place, under the second moments of their inputs in the full-precision model.

    A look-up gives one row as it is, so an embedding is fitted to its own entries; a tied one half to them and half to the
    output head's inputs.

    Args:
        planned: name → full planes, from `plan_rest`.
        batches: calibration batches; `sensitivity_samples` samples of them are used.
    Returns:
        The sizes of the new packed modules, for `SABQuantizationConfig.modules`.
    """
    tied = is_tied(model) and roles.embedding in planned
    linears = {name: model.get_submodule(name) for name in planned if name != roles.embedding}
    if tied:
        linears[roles.head] = model.get_output_embeddings()
    batches = batches[: count_first([batch.modality.shape[0] for batch in batches], config.sensitivity_samples)]
    for part in _parts(linears):
        moments = _collect(model, part, batches)
        for name, linear in part.items():
            H = damp(mix(moments.get(name), linear.in_features, linear.weight.device), config.damping)
            if tied and name == roles.head:
                _binarize_embedding(model, roles, planned[roles.embedding], H, config)
                tie_head(model)
                continue
            fit = fit_tall_planes(
                linear.weight, H, planned[name], alternations=config.alternations, block_size=config.block_size
            )
            logger.info("%s: %d planes, relative output error %.2e", name, planned[name], fit.error)
            replace_module(model, name, SABLinear.from_planes(fit.planes, linear.bias))
    if roles.embedding in planned and not tied:
        _binarize_embedding(model, roles, planned[roles.embedding], None, config)
    return {name: [num_planes, 0] for name, num_planes in planned.items()}


def _binarize_embedding(
    model: nn.Module, roles: Roles, num_planes: int, H_head: Tensor | None, config: SABQuantizationConfig
) -> None:
    weight = model.get_submodule(roles.embedding).weight
    H = torch.eye(weight.shape[1], device=weight.device)
    if H_head is not None:
        H = 0.5 * H + 0.5 * H_head / H_head.diagonal().mean()
    fit = fit_tall_planes(weight, H, num_planes, alternations=config.alternations, block_size=config.block_size)
    logger.info("%s: %d planes, relative error %.2e", roles.embedding, num_planes, fit.error)
    replace_module(model, roles.embedding, SABEmbedding.from_planes(fit.planes, weight.dtype))


def _parts(linears: dict[str, nn.Linear]) -> Iterator[dict[str, nn.Linear]]:
    """Split the Linears so that the second moments of each part fit into memory."""
    part: dict[str, nn.Linear] = {}
    size = 0
    for name, linear in linears.items():
        own = 4 * linear.in_features**2
        if part and size + own > _MOMENT_BYTES:
            yield part
            part, size = {}, 0
        part[name] = linear
        size += own
    if part:
        yield part


def _collect(
    model: nn.Module, linears: dict[str, nn.Linear], batches: list[CalibrationBatch]
) -> dict[str, SecondMoments]:
    """Collect second moments of the Linears' inputs: by modality where there is one row a token, else as images."""
    moments: dict[str, SecondMoments] = {}
    modality = torch.empty(0)

    def observe(name: str, x: Tensor, _: Tensor) -> None:
        kinds = torch.full(x.shape[:-1], IMAGE) if x.shape[:-1] != modality.shape else modality
        own = moments.setdefault(name, SecondMoments(x.shape[-1], x.device))
        own.add(x.flatten(0, -2), kinds.flatten().to(x.device))

    with observing(linears, observe):
        for batch in batches:
            modality = batch.modality
            model(**model_inputs(model, batch.inputs), use_cache=False)
    return moments
