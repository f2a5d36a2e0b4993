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
        weights: the dense weights [out_features, in_features] that the planes stand for, by module name, on any device. The dict
            is empty afterwards, so that nothing keeps them in memory.
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
        self._model, self._start = model, planes
        self._linears = {name: model.get_submodule(name) for name in planes}
        self.modules = {}
        for name, linear in self._linears.items():
            W = weights.pop(name).detach().to(planes[name].signs.device).float()
            self.modules[name] = TrainablePlanes(planes[name], W, linear.bias, compact)
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

    def result(self) -> dict[str, Tensor | SignPlanes]:
        """Return a copy of what `pack` would put into the model now, in little memory."""
        planes = {name: module.planes() for name, module in self.modules.items()}
        biases = {f"{name}|bias": m.bias.detach().clone() for name, m in self.modules.items() if m.bias is not None}
        return planes | biases | {f"other|{i}": p.detach().clone() for i, p in enumerate(self.others)}

    def pack_result(self, result: dict[str, Tensor | SignPlanes]) -> dict[str, Tensor]:
        """Return a `result` as tensors by name, for `unpack_result`."""
        tensors = {}
        for name, value in result.items():
            parts = to_tensors(value) if isinstance(value, SignPlanes) else {"": value}
            tensors |= {f"best|{name}|{part}": tensor for part, tensor in parts.items()}
        return tensors

    def unpack_result(self, tensors: dict[str, Tensor]) -> dict[str, Tensor | SignPlanes]:
        """Return the `result` that `pack_result` made tensors of; other tensors among them are left alone."""
        result: dict[str, Tensor | SignPlanes] = {}
        for name, value in self.result().items():
            if isinstance(value, SignPlanes):
                start = f"best|{name}|"
                parts = {
                    key[len(start) :]: t.to(value.signs.device) for key, t in tensors.items() if key.startswith(start)
                }
                result[name] = from_tensors(parts, value.shape[1])
            else:
                result[name] = tensors[f"best|{name}|"].to(value.device)
        return result

    def pack(self, result: dict[str, Tensor | SignPlanes] | None = None) -> None:
        """Put packed Linears and norms into the model: as they are now, as they were at a `result`."""
        result = self.result() if result is None else result
        for i, p in enumerate(self.others):
            p.data = result[f"other|{i}"]
        self._settle(trained=True)
        for name, linear in self._linears.items():
            bias = linear.bias
            if bias is not None:
                bias = result[f"{name}|bias"].to(bias.dtype)
            dtype = self._linears[name].weight.dtype
            replace_module(self._model, name, SABLinear.from_planes(result[name], bias, dtype))

    def pack_start(self) -> None:
        """Put packed Linears into the model as the training found them, and leave all else as it was before."""
        self._settle(trained=False)
        for name, linear in self._linears.items():
            packed = SABLinear.from_planes(self._start[name], linear.bias, linear.weight.dtype)
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
