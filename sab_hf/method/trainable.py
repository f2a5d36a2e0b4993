"""Linears whose weights are made of sign planes that can be trained, and the optimizer that trains them.

No gradient at a latent weight is ever kept: what training needs for each weight is its latent, Adam's two moments, the gradient
of the step at the weight, and the weight itself, which can also be built anew by each pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..planes import SignPlanes
from .fit import PlaneState, from_sign_planes, nearest_signs, to_sign_planes
from .levels import BETAS, EPSILON, Scales, descend, nearest_level, unit_of

LATENT_START = 0.5
"""How far, at most, a latent weight starts from its level, towards the dense weight, in halves of a level's distance."""


def pass_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of products in training: bfloat16 on a GPU, under autocast."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class TrainablePlanes(nn.Module):
    """A Linear whose weight is made of sign planes that can be trained.

    Behind each weight is a latent one; the weight is the level `Σ_k ±r_k c_k` nearest to it, and gradients go straight
    through to the latent, except where it lies outside all levels. With one plane the level is the latent's sign. Passes add
    up their gradient at the weight in `gradient`; `PlanesAdam` hands it on. Column scales that are all 1 stay so.

    Args:
        planes: where to start.
        W: [out_features, in_features], the dense weight that they stand for.
        bias: [out_features] or None.
        compact: keep latent weights and Adam's moments in bfloat16, and have each pass build the weight, to save memory.
    """

    def __init__(self, planes: SignPlanes, W: Tensor, bias: Tensor | None, compact: bool = False):
        super().__init__()
        state = from_sign_planes(planes)
        self.free, self.has_residual, self.unit_columns = state.free, state.has_residual, state.unit_columns
        self.scales = Scales(state.r, state.c, state.r.clone(), state.c.clone())
        self.latent = _latent_start(W, state).to(torch.bfloat16 if compact else torch.float32)
        self.moments = torch.zeros_like(self.latent), torch.zeros_like(self.latent)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        dtype = pass_dtype(W.device)
        self.gradient = torch.zeros_like(self.latent, dtype=dtype)
        self.built = None
        if not compact:
            self.built = nn.Parameter(self.weight(dtype))
            self.built.grad = self.gradient
        self._anchor = torch.zeros((), requires_grad=True)  # gives outputs a gradient where inputs have none

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the dense weight [out_features, in_features] for the latents and scales of now."""
        return nearest_level(self.latent, self.scales, torch.empty_like(self.latent, dtype=dtype))

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the weight anew for the latents and scales of now, where it is kept."""
        if self.built is not None:
            nearest_level(self.latent, self.scales, self.built)

    def forward(self, input: Tensor) -> Tensor:
        if self.built is not None:
            return nn.functional.linear(input, self.built, self.bias)
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        output = _product(input, self._anchor, self)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    @torch.no_grad()
    def planes(self) -> SignPlanes:
        """Return the trained planes."""
        scales = self.scales
        state = PlaneState(torch.empty(0), scales.r, scales.c, self.free, self.has_residual, self.unit_columns)
        state.B = nearest_signs(self.latent.float() * unit_of(scales.r_start, scales.c_start), state)
        return to_sign_planes(state)


class _Product(torch.autograd.Function):
    """`x Wᵀ` for the weight of `TrainablePlanes`, which is built and dropped; its gradient is added to the module's."""

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor, module: TrainablePlanes) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        return x @ module.weight(x.dtype).T

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,), module = ctx.saved_tensors, ctx.module
        module.gradient.addmm_(gradient.flatten(0, -2).T, x.flatten(0, -2))
        return gradient @ module.weight(gradient.dtype) if ctx.needs_input_grad[0] else None, None, None


@torch.compiler.disable
def _product(x: Tensor, anchor: Tensor, module: TrainablePlanes) -> Tensor:
    return _Product.apply(x, anchor, module)


def _latent_start(W: Tensor, state: PlaneState) -> Tensor:
    """Return where the latent weights start, in their unit: between their level and the dense weight."""
    unit = unit_of(state.r, state.c)
    largest = (state.r[:, :, None] * state.c[:, None]).abs().sum(0)
    level = torch.where(unit > 0, state.dense() / unit, 0)
    pull = torch.where(unit > 0, W / unit, 0) - level
    start = level + pull.clamp(-LATENT_START, LATENT_START)
    bound = torch.where(unit > 0, largest / unit, 1)
    return start.clamp(-bound, bound)


class PlanesAdam:
    """Adam for trainable planes, and for other parameters beside them.

    Scales, biases and the others lie in one vector and are trained relative to their size where training starts, so that one
    rate suits all.

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
        self.modules, self._rates, self._done = modules, (latent_rate, scale_rate), 0
        parameters = [module.bias for module in modules if module.bias is not None] + list(others)
        scales = [scale for module in modules for scale in module.scales[:2]]
        starts = [scale.flatten() for scale in scales] + [p.detach().flatten() for p in parameters]
        sizes = starts[: len(scales)] + [torch.full_like(p, _size(p)) for p in starts[len(scales) :]]
        for i, module in enumerate(modules):
            if module.unit_columns:
                sizes[2 * i + 1] = torch.zeros_like(sizes[2 * i + 1])  # a change of no size
        self._start, self._size = torch.cat(starts), torch.cat(sizes)
        self._values, self._gradient = self._start.clone(), torch.zeros_like(self._start)
        self.change = nn.Parameter(torch.zeros_like(self._start))
        self.change.grad = torch.zeros_like(self._start)
        lengths = [len(start) for start in starts]
        values, gradients = (
            [part.view(like.shape) for part, like in zip(whole.split(lengths), (*scales, *parameters), strict=True)]
            for whole in (self._values, self._gradient)
        )
        self._at_scales = []
        for i, module in enumerate(modules):
            own = slice(2 * i, 2 * i + 2)
            module.scales = Scales(*module.scales[:2], *values[own])
            self._at_scales.append(tuple(gradients[own]))
        for p, value, gradient in zip(parameters, values[len(scales) :], gradients[len(scales) :], strict=True):
            p.data, p.grad = value, gradient
        on_gpu = self._start.is_cuda
        rate = torch.zeros((), device=self._start.device) if on_gpu else 0.0  # a graph reads it when it is replayed
        self._adam = torch.optim.Adam([self.change], rate, BETAS, EPSILON, fused=on_gpu, capturable=on_gpu)
        self._numbers = self._start.new_zeros(4)

    def gradients(self) -> list[Tensor]:
        """Return the gradients that the passes of a step add up, each in its own tensor."""
        return [*(module.gradient for module in self.modules), self._gradient]

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

    @torch.no_grad()
    def step(self) -> None:
        """Train with the gradients that were added up, which are 0 then. It can be captured in a CUDA graph."""
        for module, at_scales in zip(self.modules, self._at_scales, strict=True):
            descend(module.gradient, module.latent, module.moments, module.scales, at_scales, self._numbers)
        torch.mul(self._gradient, self._size, out=self.change.grad)
        self._adam.step()
        self._refresh()
        self._gradient.zero_()

    def _refresh(self) -> None:
        torch.addcmul(self._start, self._size, self.change, out=self._values)
        for module in self.modules:
            module.refresh()

    def state(self) -> dict[str, Tensor]:
        """Return what goes on from step to step, by name, for `load_state`; the tensors themselves."""
        named = {"change": self.change.data, "done": torch.tensor(self._done)}
        for key, value in self._adam.state.get(self.change, {}).items():
            named[f"adam|{key}"] = value
        for i, module in enumerate(self.modules):
            named |= {f"{i}|latent": module.latent, f"{i}|first": module.moments[0], f"{i}|second": module.moments[1]}
        return named

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        self._done = int(state["done"])
        self.change.data.copy_(state["change"])
        moments = {key[len("adam|") :]: value for key, value in state.items() if key.startswith("adam|")}
        groups = self._adam.state_dict()["param_groups"]
        self._adam.load_state_dict({"state": {0: moments} if moments else {}, "param_groups": groups})
        for i, module in enumerate(self.modules):
            for name, tensor in zip(("latent", "first", "second"), (module.latent, *module.moments), strict=True):
                tensor.copy_(state[f"{i}|{name}"])
        with torch.no_grad():
            self._refresh()


def _size(values: Tensor) -> float:
    """Return the root mean square of a parameter, 1 for zeros."""
    return float(values.square().mean().sqrt()) or 1.0
