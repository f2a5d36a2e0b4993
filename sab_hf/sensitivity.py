"""How much the model's output depends on each Linear: input variance by column, output gradient by row, by modality.

One pass forward through the full-precision blocks gives the second moments of all inputs, one pass backward the gradient of
the model's own log-likelihood at all outputs, block by block: only one block's activations are ever held.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .calibration import PADDING, CalibrationBatch
from .capture import BatchState, BlockInputs, block_output, output_of_last_block
from .hessian import damp, inverse


class LinearSensitivity(NamedTuple):
    """What the loss near a Linear `y = W x` looks like: an error E of W costs about `Σ_m N_m Σ_ij g_m[i] v_m[j] E[i,j]²`.

    Attributes:
        variance: modality → [in_features], v_m[j] = 1 / [(H_m + λI)⁻¹]_jj, the variance of an input feature that the others do
            not explain.
        gradient: modality → [out_features], g_m[i], mean squared gradient of the loss at an output feature.
        tokens: modality → N_m, how many tokens of the modality the Linear sees.
    """

    variance: dict[int, Tensor]
    gradient: dict[int, Tensor]
    tokens: dict[int, int]

    def column_scores(self, W: Tensor) -> dict[int, Tensor]:
        """Return, by modality, the loss at stake in each column [in_features] of W: `N_m v_m[j] Σ_i g_m[i] W[i,j]²`."""
        squares = W.detach().float().square()
        return {
            m: self.tokens[m] * self.variance[m] * (self.gradient[m] @ squares)
            for m in self.variance.keys() & self.gradient.keys()
        }


@dataclass
class Sensitivity:
    """Sensitivities of a model.

    Attributes:
        linears: by module name; a Linear that no token reached is missing.
        outputs: for each block, modality → [hidden_size], mean squared gradient of the loss at the block's output.
    """

    linears: dict[str, LinearSensitivity] = field(default_factory=dict)
    outputs: list[dict[int, Tensor]] = field(default_factory=list)


class _MeanSquares:
    """Mean of squares over the tokens of each modality."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}

    def add(self, x: Tensor, modality: Tensor) -> None:
        """Add x [..., features] for as many tokens as `modality` has, -1 for padding."""
        x, modality = x.detach().flatten(0, -2).float(), modality.flatten().to(x.device)
        for m in modality.unique().tolist():
            if m != PADDING:
                rows = x[modality == m]
                self._sums[m] = self._sums.get(m, 0) + rows.square().sum(0)
                self._counts[m] = self._counts.get(m, 0) + rows.shape[0]

    def means(self) -> dict[int, Tensor]:
        return {m: total / self._counts[m] for m, total in sorted(self._sums.items())}


def measure_sensitivity(
    model: nn.Module,
    inputs: BlockInputs,
    batches: list[CalibrationBatch],
    block_names: tuple[str, ...],
    linears: dict[str, nn.Linear],
    *,
    damping: float,
    num_samples: int,
    seed: int,
) -> Sensitivity:
    """Measure the sensitivities of `linears` on the first samples of the calibration set.

    The loss is the cross-entropy of tokens drawn from the model's own predictions, so its squared gradient is the diagonal
    of the Fisher information: it needs no labels, and does not vanish where the model is right.

    Args:
        model: in full precision; its weights are only read.
        inputs: the recorded inputs of the blocks; left as they are.
        batches: the calibration set, in the order of `inputs.states`.
        block_names: the blocks, in order.
        linears: by module name, all inside the blocks.
        damping: λ as a share of the mean diagonal of each H_m.
        num_samples: about as many samples are used; the hidden states of all blocks are kept for them.
        seed: of the drawn tokens.

    Source: optimal brain damage and Fisher pruning for the form of the loss; MBQ (arXiv 2412.19509) for gradients by modality.
    """
    result = Sensitivity()
    blocks = [model.get_submodule(name) for name in block_names]
    own = [{name: m for name, m in linears.items() if name.startswith(f"{block}.")} for block in block_names]
    prefix = inputs.first(num_samples)
    entered = []  # [block][batch] the block's input
    variances: dict[str, tuple[dict[int, Tensor], dict[int, int]]] = {}
    for index, block in enumerate(blocks):
        for name, moment in prefix.second_moments(block, index, own[index]).items():
            variance = {m: 1 / inverse(damp(H, damping)).diagonal() for m, H in moment.matrices().items()}
            variances[name] = variance, moment.counts
        entered.append([state.hidden for state in prefix.states])
        prefix.advance(block, index)
    with _frozen(model):
        gradients = [
            _gradient_at_output(model, blocks, batch, state, seed + i)
            for i, (state, batch) in enumerate(zip(prefix.states, batches, strict=False))
        ]
        for index in reversed(range(len(blocks))):
            at_output, at_linears = _MeanSquares(), {name: _MeanSquares() for name in own[index]}
            for i, state in enumerate(prefix.states):
                at_output.add(gradients[i], state.modality)
                with _observing_gradients(own[index], at_linears, state.modality), torch.enable_grad():
                    entering = entered[index][i].detach().requires_grad_(True)
                    output = block_output(blocks[index], index, state, entering)
                    (gradients[i],) = torch.autograd.grad(output, entering, gradients[i].to(output.dtype))
            result.outputs.insert(0, at_output.means())
            for name, squares in at_linears.items():
                if name in variances and squares.means():
                    result.linears[name] = LinearSensitivity(variances[name][0], squares.means(), variances[name][1])
    return result


def _gradient_at_output(
    model: nn.Module, blocks: list[nn.Module], batch: CalibrationBatch, state: BatchState, seed: int
) -> Tensor:
    """Return the gradient of the loss at the output of the last block, [batch, length, hidden_size]."""
    leaf = state.hidden.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = output_of_last_block(model, blocks, batch, state, leaf).logits.float()
        counted = (batch.modality.to(logits.device) != PADDING).flatten()
        logits = logits.flatten(0, 1)[counted]
        generator = torch.Generator(logits.device).manual_seed(seed)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter ask for a gradient: only activations need one here."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


@contextmanager
def _observing_gradients(
    linears: dict[str, nn.Linear], squares: dict[str, _MeanSquares], modality: Tensor
) -> Iterator[None]:
    def observe(name: str, output: Tensor) -> None:
        if output.requires_grad and output.shape[:-1].numel() == modality.numel():
            output.register_hook(lambda gradient: squares[name].add(gradient, modality))

    hooks = [
        module.register_forward_hook(lambda _, args, output, name=name: observe(name, output))
        for name, module in linears.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
