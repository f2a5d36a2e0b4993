"""Planes, norms and biases of blocks, made trainable for a while, then packed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby

from torch import Tensor, nn

from .. import packing
from ..machine import distributed
from ..machine.sharding import Kept, Lent
from ..method import trainable
from ..method.trainable import ALONE, PlanesAdam, Share, TrainablePlanes
from ..packed.linear import SABLinear, replace_module
from ..packing import from_tensors, to_tensors
from ..planes import SignPlanes

_ROW_AXIS = trainable.ROW_AXIS | packing.ROW_AXIS


class Trainees:
    """What is trained in some blocks: the planes of their Linears, and their norms and biases. Other matrices are not.

    Making one puts a `TrainablePlanes` in the place of each Linear, and every other parameter of the blocks into float32.
    `pack` or `give_back` ends that.

    Args:
        model: the model.
        blocks: of the model.
        planes: of their Linears by module name, where training starts; None: that is what the Linears hold, which are packed.
        weights: the dense weights [own rows, in_features] that the planes stand for, by module name, on any device. Both
            dicts are empty afterwards, so that nothing keeps what they hold in memory.
        compact: see `TrainablePlanes`.
        lent: each process has the weights of a block only while it runs.
        share: the rows that this process keeps.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        planes: dict[str, SignPlanes] | None,
        weights: dict[str, Tensor],
        compact: bool = False,
        lent: bool = False,
        share: Share = ALONE,
    ):
        self._model, self._lent = model, lent
        self._linears = {name: model.get_submodule(name) for name in weights}
        self._start, self.modules = {}, {}
        for name, linear in self._linears.items():
            start, W = linear.planes() if planes is None else planes.pop(name), weights.pop(name)
            self._start[name] = linear if planes is None else _packed(linear, start, linear.bias)
            W = W.detach().to(start.signs.device).float()
            kept = not (compact or lent)
            self.modules[name] = TrainablePlanes(start, W, linear.bias, compact, kept, share)
        for name, module in self.modules.items():
            replace_module(model, name, module)
        self._numbered = list(self.modules.values())
        self._by_block = [[m for m in block.modules() if isinstance(m, TrainablePlanes)] for block in blocks]
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

    def exchange(self, adam: PlanesAdam) -> Kept:
        """Return what the processes exchange in a step."""
        return Lent(adam, self._by_block) if self._lent else Kept(adam)

    def result(self) -> dict[str, Tensor]:
        """Return a copy of what `pack` would put into the model now, by name, planes as they are stored; their own rows."""
        result = {f"other|{i}": p.detach().clone() for i, p in enumerate(self.others)}
        for name, module in self.modules.items():
            own = module.scales.r
            r = own if module.share.parts == 1 else distributed.gather_rows(own, module.out_features, axis=1)
            result |= {f"{name}|{part}": tensor for part, tensor in to_tensors(module.planes(r)).items()}
            if module.bias is not None:
                result[f"{name}|bias"] = module.bias.detach().clone()
        return result

    def state(self, adam: PlanesAdam, best: dict[str, Tensor] | None) -> Iterator[dict[str, Tensor]]:
        """Yield all tensors that training needs to go on, with all rows, by name: block by block, so that few are held at once.

        Args:
            adam: of these trainees.
            best: a result.
        """
        kept: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in (best or {}).items():
            kept[key.rpartition("|")[0]][f"best|{key}"] = tensor
        number_of = {module: number for number, block in enumerate(self._by_block) for module in block}
        entries = zip(("other", *self.modules), (None, *self.modules.values()), adam.state(), strict=True)
        for _, block in groupby(entries, key=lambda entry: number_of.get(entry[1])):
            part: dict[str, Tensor] = {}
            for name, _, now in block:
                part |= {f"now|{key}": tensor for key, tensor in now.items()} | kept[name]
            yield {key: self._all_rows(key, tensor).cpu() for key, tensor in part.items()}

    def load_state(self, adam: PlanesAdam, parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor] | None:
        """Continue from what `state` yielded, on any number of processes; returns the best result, None if there was none."""
        best: dict[str, Tensor] = {}

        def own() -> Iterator[dict[str, Tensor]]:
            for part in parts:
                part = {key: self._own_rows(key, tensor) for key, tensor in part.items()}
                best.update({key[len("best|") :]: t for key, t in part.items() if key.startswith("best|")})
                yield {key[len("now|") :]: t for key, t in part.items() if key.startswith("now|")}

        adam.load_state(own())
        return best or None

    def _all_rows(self, key: str, own: Tensor) -> Tensor:
        axis, module = _ROW_AXIS.get(key.rpartition("|")[2]), self._owner(key)
        if axis is None or module is None or module.share.parts == 1:
            return own
        return distributed.gather_rows(own, module.out_features, axis)

    def _own_rows(self, key: str, whole: Tensor) -> Tensor:
        axis, module = _ROW_AXIS.get(key.rpartition("|")[2]), self._owner(key)
        if axis is None or module is None or module.share.parts == 1:
            return whole
        return whole.narrow(axis, module.rows.start, module.rows.stop - module.rows.start).clone()

    def _owner(self, key: str) -> TrainablePlanes | None:
        """Return the module that a tensor of the state or of a result belongs to."""
        name = key.removeprefix("now|").removeprefix("best|").rpartition("|")[0]
        return self._numbered[int(name)] if name.isdigit() else self.modules.get(name)

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
                device = self.modules[name].latent.device
                parts[name][part] = self._all_rows(key, tensor.to(device))
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
