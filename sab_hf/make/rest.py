"""Binarizing what is not a language block: towers, projector, input embedding, output head, a few full planes each."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy.roles import EMBEDDING, HEAD, Roles
from ..anatomy.selection import is_skipped
from ..calibration import CalibrationBatch
from ..config import DENSE, REST_ROLES, SABQuantizationConfig
from ..machine.placement import check_finite
from ..machine.workspace import Workspace
from ..method.fit import fit_tall_planes
from ..method.hessian import SecondMoments, damp, mix
from ..packed.embedding import SABEmbedding, SABTiedEmbedding, SABTiedHead, look_up_scale
from ..packed.linear import SABLinear, replace_module
from ..packed.swap import fix_vocabulary, set_tied, swap_in_empty, tie_to_embedding, tied_embeddings
from ..passes.capture import count_first
from ..passes.rest_inputs import moments_after_blocks, moments_before_blocks

logger = logging.getLogger(__name__)

_NO_CODE = (lambda: None).__code__

_MOMENT_BYTES = 2 << 30
"""Most memory that second moments may take at a time; more matrices are done in several passes."""


def plan_rest(model: nn.Module, roles: Roles, config: SABQuantizationConfig) -> dict[str, int]:
    """Return name → full planes of each matrix outside the language blocks that the config asks for.

    Of a skeleton on the meta device only the config says whether embedding and head are one matrix.

    Raises:
        ValueError: a role was named that the model does not have, or tied embeddings were given two numbers.
    """
    skipped = config.modules_to_not_convert or []
    return {
        name: num_planes
        for name, num_planes in _asked_for(model, roles, config).items()
        if not any(is_skipped(other, skipped) for other in _names_of(model, roles, name))
    }


def rest_names(model: nn.Module, roles: Roles, config: SABQuantizationConfig) -> tuple[str, ...]:
    """Return the names by which `modules_to_not_convert` may mean what the other fields of the config ask for."""
    return tuple(name for planned in _asked_for(model, roles, config) for name in _names_of(model, roles, planned))


def _names_of(model: nn.Module, roles: Roles, name: str) -> tuple[str, ...]:
    """Return the names of a planned matrix: a tied embedding is the output head too."""
    return (name, roles.head) if name == roles.embedding and is_tied(model) else (name,)


def _asked_for(model: nn.Module, roles: Roles, config: SABQuantizationConfig) -> dict[str, int]:
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
        for name in (roles.embedding, roles.head):
            planned.pop(name, None)
        if bits != DENSE and _check_look_up(model, roles, bool(named)):
            planned[roles.embedding] = bits
    return planned


def _check_tied(config: SABQuantizationConfig) -> None:
    embedding, head = config.embedding_bits, config.head_bits
    if embedding is not None and head is not None and embedding != head:
        raise ValueError(
            f"`embedding_bits` is {embedding} and `head_bits` is {head}, but this model's input embedding and output head are "
            "one tied matrix; give both the same number, or only one of them"
        )


def _check_look_up(model: nn.Module, roles: Roles, named: bool) -> bool:
    """Return whether a tied embedding can be packed; raise a ValueError if not and its bits were `named`."""
    embedding = model.get_submodule(roles.embedding)
    reason = None
    if not isinstance(embedding, nn.Embedding) or look_up_scale(embedding) is None:
        reason = f"is a {type(embedding).__name__}, which does more than look rows up and multiply them by a number"
    elif (reader := _reader_of_tying(model)) is not None:
        reason = (
            f"is tied by `tie_word_embeddings`, after which {reader} computes: packed, nothing is tied in the config"
        )
    if reason is None:
        return True
    message = (
        f"`{roles.embedding}` {reason}, so neither it nor the output head, which is the same matrix, can be packed"
    )
    if named:
        raise ValueError(f"{message}; leave out `embedding_bits` and `head_bits`")
    logger.warning("%s: it stays dense", message)
    return False


def _reader_of_tying(model: nn.Module) -> str | None:
    """Return the class of a module whose forward reads `tie_word_embeddings` (T5 of transformers 4), if there is one."""
    for kind in {type(module) for module in model.modules()}:
        if "tie_word_embeddings" in getattr(inspect.unwrap(kind.forward), "__code__", _NO_CODE).co_names:
            return kind.__name__
    return None


def is_tied(model: nn.Module) -> bool:
    """Return whether output head and input embedding are one matrix; of one without values, what the config says.

    A config may say so of a checkpoint that holds two different matrices, and transformers 5 then loads both.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embedding.weight:
        return head is not None
    if head.weight.is_meta or embedding.weight.is_meta:
        return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return False


def _matrices(model: nn.Module, roles: Roles, role: str) -> dict[str, nn.Module]:
    """Return the matrices of a role by name. Linears with a forward of their own, and embeddings that do more than look up
    and multiply by a number, are left alone.
    """
    if role == EMBEDDING:  # further tables of that role (of positions, or one for each layer) stay dense
        embedding = model.get_submodule(roles.embedding)
        possible = isinstance(embedding, nn.Embedding) and look_up_scale(embedding) is not None
        return {roles.embedding: embedding} if possible else {}
    return {name: m for name, m in model.named_modules() if type(m) is nn.Linear and roles.of(name) == role}


def check_rest(model: nn.Module, planned: dict[str, int]) -> None:
    """Raise a ValueError if one of the planned matrices is not finite, or offloaded: it can only be binarized in memory."""
    for name in planned:
        weight = model.get_submodule(name).weight
        if weight.is_meta:
            raise ValueError(
                f"`{name}` is offloaded, and what is outside the language blocks can only be binarized in memory (the blocks "
                "may be offloaded); leave `rest_bits` and the bits of single roles at 16, or give it a place in `device_map`"
            )
        check_finite(name, weight)


@torch.no_grad()
def binarize_rest(
    model: nn.Module,
    roles: Roles,
    planned: dict[str, int],
    batches: list[CalibrationBatch],
    config: SABQuantizationConfig,
    workspace: Workspace,
) -> None:
    """Binarize the planned matrices in place, under the second moments of their inputs in the full-precision model.

    A look-up gives one row as it is, so an embedding is fitted to its own entries; a tied one half to them and half to the
    output head's inputs. Language blocks come to the compute device one at a time, so the memory that this takes is that of
    everything beside them.

    Args:
        planned: name → full planes, from `plan_rest`.
        batches: calibration batches; `sensitivity_samples` samples of them are used.
        workspace: where to compute. Packed modules go where the dense ones were.
    """
    tied = is_tied(model) and roles.embedding in planned
    others = tied_embeddings(model)
    linears = {name: model.get_submodule(name) for name in planned if name != roles.embedding}
    head = {name: linear for name, linear in linears.items() if roles.of(name) == HEAD}
    if tied:
        head[roles.head] = model.get_output_embeddings()
    batches = batches[: count_first([batch.modality.shape[0] for batch in batches], config.sensitivity_samples)]
    moments = {}
    if head:  # first: its inputs are those of the full-precision model
        moments = moments_after_blocks(model, roles, head, batches, workspace)
    with workspace.bar.steps(len(planned)) as steps:
        for part in _parts({name: linear for name, linear in linears.items() if name not in head}):
            own = moments_before_blocks(model, roles, part, batches, workspace)
            for name in part:
                _binarize_linear(model, name, own.get(name), planned[name], config, workspace.device)
                steps.update()
        for name in head.keys() & planned.keys():
            _binarize_linear(model, name, moments.get(name), planned[name], config, workspace.device)
            steps.update()
        if roles.embedding in planned:
            at_head = moments.get(roles.head) if tied else None
            _binarize_embedding(model, roles, planned[roles.embedding], at_head, config, workspace.device)
    _settle_head(model, roles, planned, tied, others)


def tied_to_planes(model: nn.Module) -> dict[str, Any]:
    """Return what the config of a packed model says of modules that use the planes of its input embedding."""
    return {
        "tied_head": isinstance(model.get_output_embeddings(), SABTiedHead),
        "tied_embeddings": [name for name, module in model.named_modules() if isinstance(module, SABTiedEmbedding)],
    }


def _settle_head(model: nn.Module, roles: Roles, planned: dict[str, int], tied: bool, others: list[str]) -> None:
    """Tie the head and further embeddings to the packed one, or have the config say that nothing is tied any more."""
    if roles.embedding in planned and (tied or others):
        tie_to_embedding(model, tied, others)
    elif {roles.embedding, roles.head} & planned.keys():
        set_tied(model, False)
    fix_vocabulary(model)


def packed_rest(model: nn.Module, planned: dict[str, int]) -> dict[str, Tensor]:
    """Return the packed tensors of the planned matrices, once they are binarized, by name."""
    return {
        f"{name}.{key}": tensor.detach()
        for name in planned
        for key, tensor in model.get_submodule(name).packed_tensors().items()
    }


def restore_rest(model: nn.Module, roles: Roles, planned: dict[str, int], tensors: dict[str, Tensor]) -> None:
    """Make the planned matrices what they were when `packed_rest` returned `tensors`."""
    tied = is_tied(model) and roles.embedding in planned
    others = tied_embeddings(model)
    devices = {name: model.get_submodule(name).weight.device for name in planned}
    swap_in_empty(model, {name: [num_planes, 0] for name, num_planes in planned.items()})
    for name, device in devices.items():
        module = model.get_submodule(name)
        for key in module.packed_tensors():
            setattr(module, key, nn.Parameter(tensors[f"{name}.{key}"].to(device), requires_grad=False))
    _settle_head(model, roles, planned, tied, others)


def _binarize_linear(
    model: nn.Module,
    name: str,
    moments: SecondMoments | None,
    num_planes: int,
    config: SABQuantizationConfig,
    device: torch.device,
) -> None:
    linear = model.get_submodule(name)
    H = damp(mix(moments, linear.in_features, device), config.damping)
    fit = fit_tall_planes(linear.weight, H, num_planes, alternations=config.alternations, block_size=config.block_size)
    logger.info("%s: %d planes, relative output error %.2e", name, num_planes, fit.error)
    packed = SABLinear.from_planes(fit.planes, linear.bias, linear.weight.dtype)
    replace_module(model, name, packed.to(linear.weight.device))


def _binarize_embedding(
    model: nn.Module,
    roles: Roles,
    num_planes: int,
    at_head: SecondMoments | None,
    config: SABQuantizationConfig,
    device: torch.device,
) -> None:
    embedding = model.get_submodule(roles.embedding)
    weight = embedding.weight
    H = torch.eye(weight.shape[1], device=device)
    if at_head is not None:
        H_head = damp(mix(at_head, weight.shape[1], device), config.damping)
        H = 0.5 * H + 0.5 * H_head / H_head.diagonal().mean()
    fit = fit_tall_planes(weight, H, num_planes, alternations=config.alternations, block_size=config.block_size)
    logger.info("%s: %d planes, relative error %.2e", roles.embedding, num_planes, fit.error)
    replace_module(
        model, roles.embedding, SABEmbedding.from_planes(fit.planes, weight.dtype, embedding).to(weight.device)
    )


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
