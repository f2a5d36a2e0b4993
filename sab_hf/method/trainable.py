"""Linears whose weights are made of sign planes that can be trained, and the optimizer that trains them.

No gradient at a latent weight is ever kept: what training needs for each weight is its latent, Adam's two moments, the gradient
of the step at the weight, and the weight itself, which can also be built anew by each pass. Of several processes, each keeps
latents, moments and row scales of its own rows; column scales, biases and other parameters are the same on all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..packed.linear import PackedWeight
from ..planes import SignPlanes
from .fit import PlaneState, from_sign_planes, nearest_signs, to_sign_planes
from .levels import BETAS, EPSILON, Scales, descend, nearest_level, unit_of

LATENT_START = 0.5
"""How far, at most, a latent weight starts from its level, towards the dense weight, in its unit."""


class Share(NamedTuple):
    """The rows of matrices that one of several processes keeps: parts of one size in order, the last ones cut or empty.

    Attributes:
        part: number of the process.
        parts: processes.
    """

    part: int
    parts: int

    def each(self, rows: int) -> int:
        """Return the rows of one part of a matrix with so many."""
        return math.ceil(rows / self.parts)

    def own(self, rows: int) -> slice:
        """Return which rows of a matrix with so many are kept here."""
        each = self.each(rows)
        return slice(min(self.part * each, rows), min((self.part + 1) * each, rows))


ALONE = Share(0, 1)


class Lender(Protocol):
    """Gives passes the weights of Linears that keep some rows only."""

    def weight(self, module: TrainablePlanes) -> Tensor:
        """Return the weight [out_features, in_features] of the pass at hand."""

    def gradient(self, module: TrainablePlanes) -> Tensor:
        """Return what the pass at hand adds its gradient [out_features, in_features] to."""


ROW_AXIS = {"latent": 0, "first": 0, "second": 0, "r change": 1, "r exp_avg": 1, "r exp_avg_sq": 1}
"""The axis of a matrix's rows in each tensor of a training's state that has own rows only, by the end of its name."""


def pass_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of products in training: bfloat16 on a GPU, under autocast."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class TrainablePlanes(nn.Module):
    """A Linear whose weight is made of sign planes that can be trained.

    Behind each weight is a latent one; the weight is the level `Σ_k ±r_k c_k` nearest to it, and gradients go straight
    through to the latent, except where it lies outside all levels. With one plane the level is the latent's sign. Passes add
    up their gradient at the weight; `PlanesAdam` hands it on. Column scales that are all 1 stay so.

    Attributes:
        latent, moments, scales: of the own rows.
        gradient: at the own rows.
        built: the weight for all rows; None where passes build it or are lent it.
        padded, whole_gradient: the same and its gradient, with rows of zeros up to parts of one size.
        lender: gives the weight to passes where it is not kept here; None: each pass builds it.

    Args:
        planes: where to start, of all rows.
        W: [own rows, in_features], the dense weight that they stand for.
        bias: [out_features] or None.
        compact: keep latent weights and Adam's moments in bfloat16, to save memory.
        kept: keep the weight and its gradient for all rows; else each pass builds it or is lent it.
        share: which rows are kept here.
    """

    def __init__(
        self,
        planes: SignPlanes,
        W: Tensor,
        bias: Tensor | None,
        compact: bool = False,
        kept: bool = True,
        share: Share = ALONE,
    ):
        super().__init__()
        self.out_features, self.in_features = planes.shape
        self.share, self.rows = share, share.own(self.out_features)
        state = from_sign_planes(planes.take_rows(self.rows))
        self.free, self.has_residual, self.unit_columns = state.free, state.has_residual, state.unit_columns
        self.scales = Scales(state.r, state.c, state.r.clone(), state.c.clone())
        self.latent = _latent_start(W, state, self.scales, torch.bfloat16 if compact else torch.float32)
        self.moments = torch.zeros_like(self.latent), torch.zeros_like(self.latent)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        dtype = pass_dtype(W.device)
        self.built, self.padded, self.whole_gradient, self.lender = None, None, None, None
        if kept:
            whole = self.padded_shape
            self.padded, self.whole_gradient = (torch.zeros(whole, dtype=dtype, device=W.device) for _ in range(2))
            self.gradient = self.whole_gradient[self.rows]
            self.built = nn.Parameter(self.padded[: self.out_features])
            self.built.grad = self.whole_gradient[: self.out_features]
            self.refresh()
        else:
            self.gradient = torch.zeros_like(self.latent, dtype=dtype)
        self._anchor = torch.zeros((), requires_grad=True)  # gives outputs a gradient where inputs have none

    @property
    def weight(self) -> PackedWeight:
        """What models may ask of a Linear's weight; it is not a tensor that they could use."""
        return PackedWeight((self.out_features, self.in_features), self.latent.dtype, self.latent.device)

    @property
    def padded_shape(self) -> tuple[int, int]:
        """Shape of the weight with rows of zeros up to parts of one size."""
        return self.share.each(self.out_features) * self.share.parts, self.in_features

    def build(self, rows: Tensor) -> Tensor:
        """Write the weight of the own rows, for the latents and scales of now, into `rows`, and return it."""
        return nearest_level(self.latent, self.scales, rows) if len(rows) else rows

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the own rows of the weight anew for the latents and scales of now, where it is kept."""
        if self.built is not None:
            self.build(self.built[self.rows])

    def weight_of_pass(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out_features, in_features] where it is not kept."""
        return self.lender.weight(self) if self.lender else self.build(torch.empty_like(self.latent, dtype=dtype))

    def gradient_of_pass(self) -> Tensor:
        """Return what a pass adds its gradient at the weight to, where that is not kept."""
        return self.lender.gradient(self) if self.lender else self.gradient

    def forward(self, input: Tensor) -> Tensor:
        if self.built is not None:
            return nn.functional.linear(input, self.built, self.bias)
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        output = _product(input, self._anchor, self)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    @torch.no_grad()
    def planes(self, r: Tensor | None = None) -> SignPlanes:
        """Return the trained planes of the own rows; r: [K, out_features] row scales of all rows, where these are some."""
        scales = self.scales
        state = PlaneState(torch.empty(0), scales.r, scales.c, self.free, self.has_residual, self.unit_columns)
        state.B = nearest_signs(self.latent.float() * unit_of(scales.r_start, scales.c_start), state)
        return to_sign_planes(state, r)


class _Product(torch.autograd.Function):
    """`x Wᵀ` for a weight of `TrainablePlanes` that is there for the pass only; its gradient is added to the module's."""

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor, module: TrainablePlanes) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        return x @ module.weight_of_pass(x.dtype).T

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,), module = ctx.saved_tensors, ctx.module
        module.gradient_of_pass().addmm_(gradient.flatten(0, -2).T, x.flatten(0, -2))
        return gradient @ module.weight_of_pass(gradient.dtype) if ctx.needs_input_grad[0] else None, None, None


@torch.compiler.disable
def _product(x: Tensor, anchor: Tensor, module: TrainablePlanes) -> Tensor:
    return _Product.apply(x, anchor, module)


def _latent_start(W: Tensor, state: PlaneState, scales: Scales, dtype: torch.dtype) -> Tensor:
    """Return where the latent weights start, in their unit: between their level and the dense weight.

    Where levels lie so near to each other that another one would be the nearest there, that is at their level.
    """
    unit = unit_of(state.r, state.c)
    largest = (state.r[:, :, None] * state.c[:, None]).abs().sum(0)
    level = torch.where(unit > 0, state.dense() / unit, 0)
    start = level + (torch.where(unit > 0, W / unit, 0) - level).clamp_(-LATENT_START, LATENT_START)
    bound = torch.where(unit > 0, largest / unit, 1)
    level, start = level.to(dtype), start.clamp(-bound, bound).to(dtype)
    if not len(start):
        return start
    del unit, largest, bound
    own, nearest = (nearest_level(latent, scales, torch.empty_like(W)) for latent in (level, start))
    return torch.where(nearest == own, start, level)


class PlanesAdam:
    """Adam for trainable planes, and for other parameters beside them.

    Scales, biases and the others lie in one vector and are trained relative to their size where training starts, so that one
    rate suits all. Row scales come first; what follows them is the same on all processes.

    Args:
        modules: whose latents and scales are trained, on one device.
        others: float32 parameters, such as norms.
        latent_rate, scale_rate: of the latents, in their unit; of all else.

    Source: Adam (arXiv 1412.6980).
    """

    def __init__(
        self,
        modules: Sequence[TrainablePlanes],
        others: Sequence[nn.Parameter],
        latent_rate: float,
        scale_rate: float,
    ):
        self.modules, self._rates, self._done, count = modules, (latent_rate, scale_rate), 0, len(modules)
        parameters = [module.bias for module in modules if module.bias is not None] + list(others)
        scales = [module.scales.r_start for module in modules] + [module.scales.c_start for module in modules]
        starts = [scale.flatten() for scale in scales] + [p.detach().flatten() for p in parameters]
        sizes = starts[: len(scales)] + [torch.full_like(p, _size(p)) for p in starts[len(scales) :]]
        for i, module in enumerate(modules, count):
            if module.unit_columns:
                sizes[i] = torch.zeros_like(sizes[i])  # a change of no size
        self._start, self._size = torch.cat(starts), torch.cat(sizes)
        self._values, self._gradient = self._start.clone(), torch.zeros_like(self._start)
        self.change = nn.Parameter(torch.zeros_like(self._start))
        self.change.grad = torch.zeros_like(self._start)
        self._lengths = [len(start) for start in starts]
        values, gradients = (
            [
                part.view(like.shape)
                for part, like in zip(whole.split(self._lengths), (*scales, *parameters), strict=True)
            ]
            for whole in (self._values, self._gradient)
        )
        self._at_scales = list(zip(gradients[:count], gradients[count : 2 * count], strict=True))
        for module, r, c in zip(modules, values[:count], values[count : 2 * count], strict=True):
            module.scales = Scales(*module.scales[:2], r, c)
        for p, value, gradient in zip(parameters, values[2 * count :], gradients[2 * count :], strict=True):
            p.data, p.grad = value, gradient
        on_gpu = self._start.is_cuda
        rate = torch.zeros((), device=self._start.device) if on_gpu else 0.0  # a graph reads it when it is replayed
        self._adam = torch.optim.Adam([self.change], rate, BETAS, EPSILON, fused=on_gpu, capturable=on_gpu)
        self._numbers = self._start.new_zeros(4)

    @property
    def shared_gradient(self) -> Tensor:
        """The gradient at what is the same on all processes; at column scales it is there after `descend`."""
        return self._gradient[sum(self._lengths[: len(self.modules)]) :]

    def gradients(self) -> list[Tensor]:
        """Return the gradients that the passes of a step add up, each in its own tensor."""
        at_weights = (m.gradient if m.whole_gradient is None else m.whole_gradient for m in self.modules)
        return [*at_weights, self._gradient]

    def clear(self) -> None:
        """Drop what the passes of this step have added so far."""
        torch._foreach_zero_(self.gradients())

    def prepare(self, factor: float) -> None:
        """Set the numbers of the step to come; factor: of both rates."""
        self._done += 1
        corrections = [1 / (1 - beta**self._done) for beta in BETAS]
        self._numbers.copy_(torch.tensor([self._rates[0] * factor, *corrections, self._done]))
        (group,) = self._adam.param_groups
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(self._rates[1] * factor)
        else:
            group["lr"] = self._rates[1] * factor

    def step(self) -> None:
        """Train with the gradients that were added up, which are 0 then, where no other process has a part."""
        self.descend()
        self.update()

    @torch.no_grad()
    def descend(self) -> None:
        """Train the latents with the gradients at the own rows; returns gradients at scales. A CUDA graph can hold it."""
        for module, at_scales in zip(self.modules, self._at_scales, strict=True):
            if len(module.latent):
                descend(module.gradient, module.latent, module.moments, module.scales, at_scales, self._numbers)
            if module.whole_gradient is not None and module.share.parts > 1:
                module.whole_gradient.zero_()  # rows of others

    @torch.no_grad()
    def update(self) -> None:
        """Train scales and the others, and make the own rows of weights anew. A CUDA graph can hold it."""
        torch.mul(self._gradient, self._size, out=self.change.grad)
        self._adam.step()
        self._refresh()
        self._gradient.zero_()

    def _refresh(self) -> None:
        torch.addcmul(self._start, self._size, self.change, out=self._values)
        for module in self.modules:
            module.refresh()

    def _vectors(self) -> dict[str, Tensor]:
        """Return the vectors that go on from step to step: changes and, after the first step, their moments."""
        moments = self._adam.state.get(self.change, {})
        return {"change": self.change.data} | {key: moments[key] for key in ("exp_avg", "exp_avg_sq") if key in moments}

    def state(self) -> Iterator[dict[str, Tensor]]:
        """Yield what goes on from step to step, by name, for `load_state`: what is the same on all, then each module by number.

        The tensors themselves; those of `ROW_AXIS` have the own rows.
        """
        parts = {key: vector.split(self._lengths) for key, vector in self._vectors().items()}
        rest = {"done": torch.tensor(self._done)}
        if (step := self._adam.state.get(self.change, {}).get("step")) is not None:
            rest["step"] = step
        yield rest | {key: torch.cat(own[len(self.modules) :]) for key, own in parts.items()}
        for i, module in enumerate(self.modules):
            named = dict(zip(("latent", "first", "second"), (module.latent, *module.moments), strict=True))
            named |= {f"r {key}": own[i].view_as(module.scales.r) for key, own in parts.items()}
            yield {f"{i}|{key}": tensor for key, tensor in named.items()}

    @torch.no_grad()
    def load_state(self, states: Iterable[dict[str, Tensor]]) -> None:
        """Continue from what `state` yielded, in its order; parts by rows are those of the own rows."""
        count = len(self.modules)
        for state in states:
            if "done" in state:
                self._done = int(state["done"])
            if "step" in state:
                moments = {key: torch.zeros_like(self.change.data) for key in ("exp_avg", "exp_avg_sq")}
                groups = self._adam.state_dict()["param_groups"]
                self._adam.load_state_dict({"state": {0: moments | {"step": state["step"]}}, "param_groups": groups})
            for key, vector in self._vectors().items():
                parts = vector.split(self._lengths)
                if key in state:
                    vector[sum(self._lengths[:count]) :].copy_(state[key])
                for i, part in enumerate(parts[:count]):
                    if (own := state.get(f"{i}|r {key}")) is not None:
                        part.copy_(own.flatten())
            for i, module in enumerate(self.modules):
                for name, tensor in zip(("latent", "first", "second"), (module.latent, *module.moments), strict=True):
                    if (own := state.get(f"{i}|{name}")) is not None:
                        tensor.copy_(own)
        self._refresh()


def _size(values: Tensor) -> float:
    """Return the root mean square of a parameter, 1 for zeros."""
    return float(values.square().mean().sqrt()) or 1.0
