"""Planes, norms and biases of blocks, made trainable for a while, then packed."""

from __future__ import annotations

from torch import Tensor, nn

from ..method.trainable import PlanesAdam, TrainablePlanes
from ..packed.linear import SABLinear, replace_module
from ..packing import from_tensors, to_tensors
from ..planes import SignPlanes


class Trainees:
    """What is trained in some blocks: the planes of their Linears, and their norms and biases. Other matrices are not.

    Making one puts a `TrainablePlanes` in the place of each Linear, and every other parameter of the blocks into float32.
    `pack` or `give_back` ends that.

    Args:
        model: the model.
        blocks: of the model.
        planes: of their Linears by module name, where training starts.
        weights: the dense weights [out_features, in_features] that the planes stand for, by module name, on any device. Both
            dicts are empty afterwards, so that nothing keeps what they hold in memory.
        compact: see `TrainablePlanes`.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        planes: dict[str, SignPlanes],
        weights: dict[str, Tensor],
        compact: bool = False,
    ):
        self._model = model
        self._linears = {name: model.get_submodule(name) for name in planes}
        self._start, self.modules = {}, {}
        for name, linear in self._linears.items():
            start, W = planes.pop(name), weights.pop(name)
            self._start[name] = _packed(linear, start, linear.bias)
            self.modules[name] = TrainablePlanes(start, W.detach().to(start.signs.device).float(), linear.bias, compact)
        for name, module in self.modules.items():
            replace_module(model, name, module)
        own = {p for module in self.modules.values() for p in module.parameters()}
        beside = [p for block in blocks for p in block.parameters() if p not in own and p.is_floating_point()]
        self.others = [p for p in beside if p.ndim < 2]
        """Norms and biases."""
        self._before = {p: (p.data if p.ndim > 1 else p.detach().clone(), p.requires_grad) for p in beside}
        for p in beside:
            p.data = p.data.float()
            p.requires_grad_(p.ndim < 2)

    def adam(self, latent_rate: float, scale_rate: float) -> PlanesAdam:
        """Return an optimizer of all of them; see there."""
        return PlanesAdam(list(self.modules.values()), self.others, latent_rate, scale_rate)

    def result(self) -> dict[str, Tensor]:
        """Return a copy of what `pack` would put into the model now, by name, planes as they are stored."""
        result = {f"other|{i}": p.detach().clone() for i, p in enumerate(self.others)}
        for name, module in self.modules.items():
            result |= {f"{name}|{part}": tensor for part, tensor in to_tensors(module.planes()).items()}
            if module.bias is not None:
                result[f"{name}|bias"] = module.bias.detach().clone()
        return result

    def pack(self, result: dict[str, Tensor] | None = None) -> None:
        """Put packed Linears and norms into the model: as they are now, or as they were at a `result`."""
        result = self.result() if result is None else result
        for i, p in enumerate(self.others):
            p.data = result[f"other|{i}"].to(p.device)
        self._settle(trained=True)
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in self._linears}
        for key, tensor in result.items():
            name, _, part = key.rpartition("|")
            if name in parts:
                parts[name][part] = tensor.to(self.modules[name].latent.device)
        for name, linear in self._linears.items():
            bias = parts[name].pop("bias", None)
            planes = from_tensors(parts[name], linear.in_features)
            replace_module(
                self._model, name, _packed(linear, planes, None if bias is None else bias.to(linear.bias.dtype))
            )

    def pack_start(self) -> None:
        """Put packed Linears into the model as the training found them, and leave all else as it was before."""
        self._settle(trained=False)
        for name, packed in self._start.items():
            replace_module(self._model, name, packed)

    def give_back(self) -> None:
        """Make the blocks what they were before."""
        self._settle(trained=False)
        for name, linear in self._linears.items():
            replace_module(self._model, name, linear)

    def _settle(self, trained: bool) -> None:
        for p, (value, requires_grad) in self._before.items():
            p.data = p.data.to(value.dtype) if trained and p.ndim < 2 else value
            p.grad = None
            p.requires_grad_(requires_grad)


def _packed(linear: nn.Module, planes: SignPlanes, bias: Tensor | None) -> SABLinear:
    """Return a packed Linear in the place of one, which may be packed already."""
    return SABLinear.from_planes(planes, bias, linear.weight.dtype)
