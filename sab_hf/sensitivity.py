"""How much the model's output depends on each Linear: input variance by column, output gradient by row, by modality.

One pass forward through the full-precision blocks gives the second moments of all inputs, one pass backward the gradient of
the model's own log-likelihood at all outputs, block by block: only one block's activations are ever held.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import distributed
from .calibration import PADDING, CalibrationBatch
from .capture import BatchState, BlockInputs, block_output, observing, output_of_last_block
from .hessian import damp, inverse
from .placement import check_finite

Variance = tuple[dict[int, Tensor], dict[int, int]]
"""modality → variance of each input feature, and modality → tokens."""


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
            m: self.tokens[m] * self.variance[m].to(W.device) * (self.gradient[m].to(W.device) @ squares)
            for m in self.variance.keys() & self.gradient.keys()
        }


@dataclass
class Sensitivity:
    """Sensitivities of a model.

    Attributes:
        linears: by module name; a Linear that no token reached is missing. All tensors are on the CPU.
        outputs: for each block, modality → [hidden_size], mean squared gradient of the loss at the block's output.
    """

    linears: dict[str, LinearSensitivity] = field(default_factory=dict)
    outputs: list[dict[int, Tensor]] = field(default_factory=list)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors by name and plain data, from which `unpack` makes the same again."""
        tensors = {f"output|{i}|{m}": g for i, means in enumerate(self.outputs) for m, g in means.items()}
        for name, at in self.linears.items():
            tensors |= {f"variance|{name}|{m}": v for m, v in at.variance.items()}
            tensors |= {f"gradient|{name}|{m}": g for m, g in at.gradient.items()}
        tokens = {name: {str(m): n for m, n in at.tokens.items()} for name, at in self.linears.items()}
        return tensors, {"blocks": len(self.outputs), "tokens": tokens}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], record: dict[str, Any]) -> Sensitivity:
        """Return what was packed."""
        linears = {
            name: LinearSensitivity({}, {}, {int(m): n for m, n in tokens.items()})
            for name, tokens in record["tokens"].items()
        }
        result = cls(linears, [{} for _ in range(record["blocks"])])
        for key in sorted(tensors):
            kind, name, m = key.split("|")
            if kind == "output":
                result.outputs[int(name)][int(m)] = tensors[key]
            else:
                getattr(linears[name], kind)[int(m)] = tensors[key]
        return result


class UnmeasurableError(Exception):
    """A model whose loss cannot be differentiated block by block; the message says why."""


class _Squares:
    """Sums of squares and token counts, by key and modality."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._counts: dict[tuple[str, int], int] = {}

    def add(self, key: str, x: Tensor, modality: Tensor) -> None:
        """Add x [..., features] for as many tokens as `modality` has, -1 for padding."""
        x, modality = x.detach().flatten(0, -2).float(), modality.flatten().to(x.device)
        for m in modality.unique().tolist():
            if m != PADDING:
                rows = x[modality == m]
                self._sums[key, m] = self._sums.get((key, m), 0) + rows.square().sum(0)
                self._counts[key, m] = self._counts.get((key, m), 0) + rows.shape[0]

    def join(self, other: _Squares) -> None:
        """Add what another one holds."""
        for at, total in other._sums.items():
            self._sums[at] = self._sums.get(at, 0) + total
            self._counts[at] = self._counts.get(at, 0) + other._counts[at]

    def means(self, device: torch.device) -> dict[str, dict[int, Tensor]]:
        """Return key → modality → mean square over the tokens of all processes."""
        counts = distributed.sum_numbers(self._counts)
        result: dict[str, dict[int, Tensor]] = {}
        for (key, m), total in sorted(distributed.sum_tensors(self._sums, device).items()):
            result.setdefault(key, {})[m] = (total / counts[key, m]).cpu()
        return result


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
        inputs: the recorded inputs of the blocks; left as they are. Each process of several has its own; means are over all.
        batches: the calibration set.
        block_names: the blocks, in order.
        linears: by module name, all inside the blocks.
        damping: λ as a share of the mean diagonal of each H_m.
        num_samples: about as many samples are used; the hidden states of all blocks are kept for them.
        seed: of the drawn tokens.
    Raises:
        UnmeasurableError: the model gives no logits, or a block no gradient.

    Source: optimal brain damage and Fisher pruning for the form of the loss; MBQ (arXiv 2412.19509) for gradients by modality.
    """
    own = {block: {n: m for n, m in linears.items() if n.startswith(f"{block}.")} for block in block_names}
    prefix = inputs.first(num_samples)
    entered, variances = _forward(prefix, own, damping)
    try:
        return _backward(model, prefix, batches, own, entered, variances, seed)
    finally:
        for hidden in (hidden for tensors in entered[1:] for hidden in tensors):
            inputs.workspace.store.forget(hidden)


def _forward(
    prefix: BlockInputs, own: dict[str, dict[str, nn.Linear]], damping: float
) -> tuple[list[list[Tensor]], dict[str, Variance]]:
    """Return the hidden states [block][batch] that enter each block and, at last, leave the last; and input variances."""
    entered = [[state.hidden for state in prefix.states]]
    variances: dict[str, Variance] = {}
    for index, (name, linears) in enumerate(own.items()):
        with prefix.workspace.placement.visit(name) as block:
            for linear, module in linears.items():
                check_finite(linear, module.weight)  # offloaded weights are seen here for the first time
            for linear, moment in prefix.second_moments(block, index, linears).items():
                variance = {m: (1 / inverse(damp(H, damping)).diagonal()).cpu() for m, H in moment.matrices().items()}
                variances[linear] = variance, dict(moment.counts)
            prefix.advance(block, index)
        entered.append([state.hidden for state in prefix.states])
    return entered, variances


def _backward(
    model: nn.Module,
    prefix: BlockInputs,
    batches: list[CalibrationBatch],
    own: dict[str, dict[str, nn.Linear]],
    entered: list[list[Tensor]],
    variances: dict[str, Variance],
    seed: int,
) -> Sensitivity:
    result, workspace = Sensitivity(), prefix.workspace
    names = list(own)
    blocks = [model.get_submodule(name) for name in names]
    with workspace.placement.visit_rest(tuple(names)), _frozen(model), _agreeing():
        gradients = [
            _gradient_at_output(model, blocks, batches[state.number], state, seed + state.number)
            for state in prefix.states
        ]
    for index in reversed(range(len(names))):
        squares = _Squares()
        with workspace.placement.visit(names[index]) as block, _frozen(block), _agreeing():
            for i, state in enumerate(prefix.states):
                state.hidden = entered[index][i]
                found, gradients[i] = workspace.limit.retry(
                    f"measuring the sensitivity of block {index}",
                    state.rows,
                    partial(_through_block, block, index, own[names[index]], state, gradients[i]),
                )
                squares.join(found)
        means = squares.means(workspace.device)
        result.outputs.insert(0, means.pop("", {}))
        for name, gradient in means.items():
            if name in variances:
                result.linears[name] = LinearSensitivity(variances[name][0], gradient, variances[name][1])
    return result


def _through_block(
    block: nn.Module, index: int, linears: dict[str, nn.Linear], state: BatchState, gradient: Tensor
) -> tuple[_Squares, Tensor]:
    """Carry a gradient [batch, length, hidden_size] at a block's output back to its input, on the CPU.

    Returns:
        The squares at the output, under "", and at the Linears; and the gradient at the input.
    """
    squares, parts, start = _Squares(), [], 0
    modality = torch.empty(0)

    def observe(name: str, _: Tensor, output: Tensor) -> None:
        kinds = modality
        if output.requires_grad and output.shape[:-1].numel() == kinds.numel():
            output.register_hook(lambda gradient: squares.add(name, gradient, kinds))

    for piece in state.pieces(index):
        at_output = gradient[start : start + piece.rows].to(piece.hidden.device)
        start += piece.rows
        modality = piece.modality
        squares.add("", at_output, modality)
        with observing(linears, observe), torch.enable_grad():
            entering = piece.hidden.detach().requires_grad_(True)
            output = block_output(block, index, piece, entering)
            try:
                (at_input,) = torch.autograd.grad(output, entering, at_output.to(output.dtype))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                raise UnmeasurableError(f"block {index} ({type(block).__name__}) has no gradient: {error}") from error
        parts.append(at_input.cpu())
    return squares, torch.cat(parts)


def _gradient_at_output(
    model: nn.Module, blocks: list[nn.Module], batch: CalibrationBatch, state: BatchState, seed: int
) -> Tensor:
    """Return the gradient of the loss at the output of the last block, [batch, length, hidden_size], on the CPU."""
    leaf = state.hidden.detach().to(state.workspace.device).requires_grad_(True)
    with torch.enable_grad():
        output = output_of_last_block(model, blocks, batch, state, leaf)
        if getattr(output, "logits", None) is None:
            raise UnmeasurableError(f"{type(model).__name__} gives no `logits`")
        logits = output.logits.float()
        counted = (batch.modality.to(logits.device) != PADDING).flatten()
        logits = logits.flatten(0, 1)[counted]
        generator = torch.Generator(logits.device).manual_seed(seed)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient.cpu()


@contextmanager
def _agreeing() -> Iterator[None]:
    """Raise on all processes what one of them raises, so that none waits for it."""
    reasons: dict[str, str] = {}
    try:
        yield
    except UnmeasurableError as error:
        reasons["first"] = str(error)
    reasons = distributed.merge(reasons)
    if reasons:
        raise UnmeasurableError(reasons["first"])


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
