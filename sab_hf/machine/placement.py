"""Where weights are while a model is quantized: one block at a time on the compute device, the others where they came from.

A model may lie on the compute device, in RAM (memory-mapped files included) or, through accelerate's hooks, on disk. A visit
brings one block to the compute device. After a lasting visit the block stays in memory, packed; after a passing one it is
again exactly where and what it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import psutil
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn


class Placement:
    """The compute device of a run, and the moves of blocks to it and back.

    Args:
        model: a transformers model, in memory or offloaded.
        device: where to compute; None: where the model is if that is an accelerator, else the accelerator if there is one,
            else the CPU.
    Raises:
        ValueError: the device does not exist.
    """

    def __init__(self, model: nn.Module, device: str | torch.device | None = None):
        self.model = model
        self.device = compute_device(model, device)

    @contextmanager
    def visit(self, name: str, lasting: bool = False) -> Iterator[nn.Module]:
        """Bring the module called `name` to the compute device for the time of a `with` statement.

        Args:
            name: name of a block, or of any other module.
            lasting: the visit changes the module. Its former weights are then given up at once, and what the module has become
                goes to where it was before, or to the device that offloaded weights would run on.
        Raises:
            ValueError: a weight is on the meta device and no hook says from where to load it.
        """
        module = self.model.get_submodule(name)
        kept = [] if lasting else _data(module)
        hooks = _take_hooks(module)
        home, here = _home(module, hooks), False
        try:
            for owner, hook in hooks.items():
                _materialise(owner, hook, self.device, forget=lasting)
            _check_real(name, module)
            module.to(self.device)
            here = True
            yield module
        finally:
            if not lasting:
                _put_back(kept, hooks)
            elif here:
                module.to(home)
                _settle(module, hooks, home)
        if lasting:
            _note_device(self.model, name, home)

    @contextmanager
    def visit_rest(self, without: tuple[str, ...]) -> Iterator[None]:
        """Bring all modules beside those called `without` (the blocks) to the compute device; they are not changed.

        With none called, that is the whole model.

        Modules with accelerate's hooks are left alone: their hooks bring them where they run.
        """
        with ExitStack() as stack:
            for name in _beside(self.model, without):
                if not any(_align_hooks(m) for m in self.model.get_submodule(name).modules()):
                    stack.enter_context(self.visit(name))
            with _own_tensors(self.model, without, self.device):
                yield

    @contextmanager
    def visit_whole(self) -> Iterator[None]:
        """Bring the whole model to the compute device, if it fits there; else it stays where it is."""
        with self.visit_rest(()) if fits_whole(self.model, self.device) else nullcontext():
            yield

    @property
    def input_device(self) -> torch.device:
        """The device that the model takes its inputs on."""
        hook = next(
            (hook for m in self.model.modules() for hook in _align_hooks(m) if hook.execution_device is not None), None
        )
        return torch.device(hook.execution_device) if hook else next(self.model.parameters()).device


def read_parameter(model: nn.Module, name: str) -> Tensor:
    """Return the values of a parameter wherever it is; offloaded ones are read from where their hook finds them.

    Raises:
        ValueError: the parameter is on the meta device and no hook says from where to load it.
    """
    parameter = model.get_parameter(name)
    if not parameter.is_meta:
        return parameter.detach()
    return check_readable(model, name)[name.rpartition(".")[2]]


def check_readable(model: nn.Module, name: str) -> Mapping[str, Tensor]:
    """Return what the hook of an offloaded parameter's module loads from.

    Raises:
        ValueError: there is none.
    """
    for hook in _align_hooks(model.get_submodule(name.rpartition(".")[0])):
        if hook.offload and hook.weights_map is not None:
            return hook.weights_map
    raise ValueError(_missing(name))


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def fits_whole(model: nn.Module, device: torch.device) -> bool:
    """Tell whether a device has the whole model, or room for what it has not and as much again; hooks must not load weights."""
    if any(hook.offload for module in model.modules() for hook in _align_hooks(module)):
        return False
    return 2 * sum(p.nbytes for p in model.parameters() if p.device.type != device.type) <= free_memory(device)


def check_finite(name: str, weight: Tensor) -> None:
    """Raise a ValueError if a weight holds NaN or infinite values."""
    # both ends are NaN where a value is; one pass, on a CPU many times as fast as `isfinite`
    ends = weight.aminmax() if weight.numel() else ()
    if not all(end.isfinite() for end in ends):
        raise ValueError(f"the weight of `{name}` holds NaN or infinite values; the checkpoint is damaged")


def compute_device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """Return where to compute: `device`, or what suits the model, see `Placement`.

    Raises:
        ValueError: the device does not exist.
    """
    own = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    if device is None:
        if own.type != "cpu" or not torch.cuda.is_available():
            return own
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', torch.cuda.current_device())) % torch.cuda.device_count()}"
    name = device
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"`compute_device` must be a device of this machine, such as 'cpu' or 'cuda:0', got {name!r}"
        ) from error
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def is_hooked(module: nn.Module) -> bool:
    """Tell whether hooks of accelerate place a module's weights."""
    return bool(_align_hooks(module))


def _align_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    return _aligning(getattr(module, "_hf_hook", None))


def _aligning(hook: Any) -> list[AlignDevicesHook]:
    """Return the hooks that place weights among those that an accelerate hook is made of."""
    return [h for h in getattr(hook, "hooks", (hook,)) if isinstance(h, AlignDevicesHook)]


def _take_hooks(module: nn.Module) -> dict[nn.Module, Any]:
    """Take accelerate's hooks off `module` and its parts; weights that they keep in RAM come back to the modules."""
    hooks = {part: part._hf_hook for part in module.modules() if _align_hooks(part)}
    for part in hooks:
        remove_hook_from_module(part)
    return hooks


def _materialise(module: nn.Module, hook: Any, device: torch.device, forget: bool) -> None:
    """Load the offloaded tensors of one module; with `forget`, RAM copies that the hook shares are given up."""
    for align in _aligning(hook):
        if not align.offload or align.weights_map is None:
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                set_module_tensor_to_device(module, name, device, value=align.weights_map[name])
            if forget:
                _forget(align.weights_map, name)


def _forget(weights_map: Any, name: str) -> None:
    """Remove a dense weight from the RAM copies behind accelerate's (possibly prefixed) map."""
    prefix = getattr(weights_map, "prefix", "")
    held = getattr(weights_map, "dataset", weights_map)
    held = getattr(held, "state_dict", held)
    if isinstance(held, dict):
        held.pop(f"{prefix}{name}", None)


def _home(module: nn.Module, hooks: dict[nn.Module, Any]) -> torch.device:
    """Return where a finished module lives: where it is now, or where offloaded weights run (packed, they fit)."""
    real = next((p.device for p in module.parameters() if not p.is_meta), None)
    for align in (align for hook in hooks.values() for align in _aligning(hook)):
        if align.offload and align.execution_device is not None:
            return torch.device(align.execution_device)
    return real or torch.device("cpu")


def _data(module: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """Return (owner, name, tensor, its storage) of each parameter and buffer in memory, to put back without a copy."""
    return [
        (owner, name, tensor, tensor.data)
        for owner in module.modules()
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
        if not tensor.is_meta
    ]


def _put_back(kept: list[tuple[nn.Module, str, Tensor, Tensor]], hooks: dict[nn.Module, Any]) -> None:
    for part, hook in hooks.items():
        add_hook_to_module(part, hook)
    for owner, name, tensor, data in kept:
        tensor.data = data
        (owner._parameters if name in owner._parameters else owner._buffers)[name] = tensor


def _settle(module: nn.Module, hooks: dict[nn.Module, Any], home: torch.device) -> None:
    """Give a finished module hooks that only move its inputs, for the parts that had hooks and still exist."""
    remaining = set(module.modules())
    for part, hook in hooks.items():
        if part not in remaining:
            continue
        align = _aligning(hook)[0]
        plain = AlignDevicesHook(home, io_same_device=align.io_same_device, skip_keys=align.skip_keys)
        add_hook_to_module(part, plain)


def _note_device(model: nn.Module, name: str, device: torch.device) -> None:
    """Correct the model's device map where it says that `name` is offloaded: saving reads it."""
    device_map = getattr(model, "hf_device_map", None)
    if not device_map:
        return
    place = str(device) if device.index is None else device.index
    for key in [key for key in device_map if key == name or key.startswith(f"{name}.")]:
        device_map[key] = place
    for key in _parents(name):
        if device_map.get(key) in ("cpu", "disk"):
            device_map[name] = place
            if not any(parameter.is_meta for parameter in model.get_submodule(key).parameters()):
                device_map[key] = place  # the last block under this entry


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def _holders(names: tuple[str, ...]) -> set[str]:
    """Return the modules that hold some of `names`; the model itself is always one."""
    return {"", *(parent for name in names for parent in _parents(name))}


def _beside(model: nn.Module, without: tuple[str, ...]) -> list[str]:
    """Return the outermost modules that hold none of `without`."""
    holders = _holders(without) | set(without)
    return [
        f"{holder}.{child}".lstrip(".")
        for holder in sorted(holders - set(without))
        for child, _ in model.get_submodule(holder).named_children()
        if f"{holder}.{child}".lstrip(".") not in holders
    ]


@contextmanager
def _own_tensors(model: nn.Module, without: tuple[str, ...], device: torch.device) -> Iterator[None]:
    """Move the tensors that parents of the blocks hold themselves (such as an image separator) for a while."""
    holders = [model.get_submodule(name) for name in _holders(without)]
    holders = [holder for holder in holders if not _align_hooks(holder)]
    own = [t for h in holders for t in [*h.parameters(recurse=False), *h.buffers(recurse=False)] if not t.is_meta]
    kept = {tensor: tensor.data for tensor in own}
    for tensor in own:
        tensor.data = tensor.data.to(device)
    try:
        yield
    finally:
        for tensor, data in kept.items():
            tensor.data = data


def _check_real(name: str, module: nn.Module) -> None:
    lost = next((inner for inner, parameter in module.named_parameters() if parameter.is_meta), None)
    if lost is not None:
        raise ValueError(_missing(f"{name}.{lost}"))


def _missing(name: str) -> str:
    return (
        f"`{name}` has no values (it is on the meta device) and nothing says from where to load it; load the model with "
        "`from_pretrained(..., device_map=...)`, which offloads with hooks that do"
    )
