"""The passes that measure a model's sensitivity, `Sensitivity`.

One pass forward through the full-precision blocks gives the second moments of all inputs, one pass backward the gradient of
the model's own log-likelihood at all outputs, block by block: only one block's activations are ever held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..calibration import PADDING, CalibrationBatch
from ..machine import distributed
from ..machine.placement import check_finite
from ..machine.weights import apart
from ..method.hessian import SecondMoments, own_variance
from ..method.sensitivity import LinearSensitivity, Sensitivity, UnmeasurableError
from .capture import BlockInputs, observing
from .routing import RowLabels
from .states import BatchState, block_output
from .tail import NoLogitsError, Tail, positions_within
from .tracing import makes_some_logits

BYTES_PER_LOGIT = 20
"""Peak of the gradient of the loss, in bytes for each logit: five float32 copies, as measured."""

Variance = tuple[dict[int, Tensor], dict[int, int]]
"""modality → variance of each input feature, and modality → tokens."""


class _Squares:
    """Sums of squares and token counts, by key and modality."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._counts: dict[tuple[str, int], int] = {}

    def add(self, key: str, x: Tensor, modality: Tensor) -> None:
        """Add x [..., features] for as many tokens as `modality` has, -1 for padding, or several times as many in order."""
        x, modality = x.detach().flatten(0, -2).float(), modality.flatten().to(x.device)
        modality = modality.repeat(len(x) // max(1, len(modality)))
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
    names: Iterable[str],
    *,
    damping: float,
    num_samples: int,
    seed: int,
) -> Sensitivity:
    """Measure the sensitivities of Linears on the first samples of the calibration set.

    The loss is the cross-entropy of tokens drawn from the model's own predictions, so its squared gradient is the diagonal
    of the Fisher information: it needs no labels, and does not vanish where the model is right.

    Args:
        model: the model in full precision; its weights are only read.
        inputs: the recorded inputs of the blocks; left as they are. Each process of several has its own; means are over all.
        batches: the calibration set.
        block_names: the blocks, in order.
        names: names of the Linears, all inside the blocks; experts of fused parameters are taken apart for the passes.
        damping: λ as a share of the mean diagonal of each H_m.
        num_samples: about as many samples are used; the hidden states of all blocks are kept for them.
        seed: seed of the drawn tokens.
    Raises:
        UnmeasurableError: the model gives no logits, or a block no gradient.

    Source: optimal brain damage and Fisher pruning for the form of the loss; MBQ (arXiv 2412.19509) for gradients by modality.
    Deviation: keys and values that later blocks read too (Gemma 3n, Gemma 4) have the gradient of their own block only.
    """
    own = {block: [name for name in names if name.startswith(f"{block}.")] for block in block_names}
    prefix = inputs.first(num_samples)
    first = [state.hidden for state in prefix.states]
    entered, variances = _forward(model, prefix, own, damping)
    try:
        return _backward(model, prefix, batches, own, entered, variances, seed)
    finally:
        store = inputs.workspace.store
        store.forget([h for hidden in entered for h in hidden if not any(h is known for known in first)])
        store.forget([state.left for state in prefix.states])


def _forward(
    model: nn.Module, prefix: BlockInputs, own: dict[str, list[str]], damping: float
) -> tuple[list[list[Tensor]], dict[str, Variance]]:
    """Return the hidden states [block][batch] that enter each block and, at last, leave the last; and input variances."""
    entered = [[state.hidden for state in prefix.states]]
    variances: dict[str, Variance] = {}
    for index, (name, names) in enumerate(prefix.workspace.bar.over(list(own.items()), part=0.4)):
        with prefix.workspace.placement.visit(name) as block, apart(model, names):
            linears = {linear: model.get_submodule(linear) for linear in names}
            for linear, module in linears.items():
                check_finite(linear, module.weight)  # offloaded weights are seen here for the first time
            moments = prefix.second_moments(block, index, linears, advance=True)
            known: dict[int, Variance] = {}  # Linears that share an accumulator share what follows from it
            for linear, moment in moments.items():
                if id(moment) not in known:
                    known[id(moment)] = _variance(moment, damping)
                by_modality, counts = known[id(moment)]
                variances[linear] = {m: v.clone() for m, v in by_modality.items()}, counts
        entered.append([state.hidden for state in prefix.states])
    return entered, variances


def _variance(moment: SecondMoments, damping: float) -> Variance:
    by_modality = {m: own_variance(H, damping).cpu() for m, H in moment.matrices().items()}
    return by_modality, dict(moment.counts)


def _backward(
    model: nn.Module,
    prefix: BlockInputs,
    batches: list[CalibrationBatch],
    own: dict[str, list[str]],
    entered: list[list[Tensor]],
    variances: dict[str, Variance],
    seed: int,
) -> Sensitivity:
    result, workspace = Sensitivity(), prefix.workspace
    blocks = [model.get_submodule(name) for name in own]
    with workspace.placement.visit_rest(tuple(own)), _frozen(model), _agreeing():
        tail = _find_tail(model, blocks, batches, prefix)
        gradients = [
            _gradient_at_output(tail, batches[state.number], state, seed + state.number) for state in prefix.states
        ]
    for index, (name, names) in workspace.bar.over(list(enumerate(own.items()))[::-1], part=0.5):
        squares = _Squares()
        with workspace.placement.visit(name) as block, apart(model, names), _frozen(block), _agreeing():
            linears = {linear: model.get_submodule(linear) for linear in names}
            for i, state in enumerate(prefix.states):
                if not state.runs(index):
                    continue
                state.hidden = entered[index][i]
                found, gradients[i] = workspace.limit.retry(
                    f"measuring the sensitivity of block {index}",
                    state.rows,
                    partial(_through_block, block, index, linears, state, gradients[i]),
                )
                squares.join(found)
        means = squares.means(workspace.device)
        if "" in means:
            result.outputs[name] = means.pop("")
        for linear, gradient in means.items():
            if linear in variances:
                result.linears[linear] = LinearSensitivity(variances[linear][0], gradient, variances[linear][1])
    return result


def _through_block(
    block: nn.Module, index: int, linears: dict[str, nn.Linear], state: BatchState, gradient: Tensor
) -> tuple[_Squares, Tensor]:
    """Carry a gradient [..., batch, length, hidden_size] at a block's output back to its input, on the CPU.

    Returns:
        The squares at the output, under "", and at the Linears; and the gradient at the input.
    """
    squares, parts, start = _Squares(), [], 0
    labels = RowLabels(block)
    apart_outputs: list[tuple[str, Tensor, Tensor]] = []  # of Linears that read something else (features of an image)

    def observe(name: str, x: Tensor, output: Tensor) -> None:
        kinds = labels.of(linears[name], x)
        if kinds is None:
            return
        if output.requires_grad:
            output.register_hook(lambda gradient: squares.add(name, gradient, kinds))
        else:
            apart_outputs.append((name, output.requires_grad_(True), kinds))

    for piece in state.pieces(index):
        at_output = gradient.narrow(-3, start, piece.rows).to(piece.hidden.device)
        start += piece.rows
        labels.start(piece)
        apart_outputs.clear()
        squares.add("", at_output, piece.modality)
        with observing(linears, observe), labels.watching(), torch.enable_grad():
            entering = piece.hidden.detach().requires_grad_(True)
            output = block_output(block, index, piece, entering)
            wanted = [entering, *(leaf for _, leaf, _ in apart_outputs)]
            try:
                at_input, *at_others = torch.autograd.grad(
                    output, wanted, at_output.to(output.dtype), allow_unused=True
                )
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                raise UnmeasurableError(f"block {index} ({type(block).__name__}) has no gradient: {error}") from error
        for (name, _, kinds), at_other in zip(apart_outputs, at_others, strict=True):
            if at_other is not None:
                squares.add(name, at_other, kinds)
        parts.append((torch.zeros_like(entering) if at_input is None else at_input).cpu())
    return squares, torch.cat(parts, dim=-3)


def _find_tail(
    model: nn.Module, blocks: list[nn.Module], batches: list[CalibrationBatch], prefix: BlockInputs
) -> Tail | None:
    """Return what makes logits of the last block's output, without the towers where it can; None without samples."""
    if not prefix.states:
        return None
    richest = max(prefix.states, key=lambda state: len(batches[state.number].inputs))
    try:
        return Tail(model, blocks, batches[richest.number], richest)
    except NoLogitsError as error:
        raise UnmeasurableError(str(error)) from error


def _gradient_at_output(tail: Tail, batch: CalibrationBatch, state: BatchState, seed: int) -> Tensor:
    """Return the gradient of the loss at the output of the last block, [..., batch, length, hidden_size], on the CPU.

    Logits that would take more than `LOGIT_BYTES` are made for some positions at a time, where the model can do that.
    """
    leaf = state.hidden.detach().to(state.workspace.device).requires_grad_(True)
    generator: torch.Generator | None = None
    length = batch.modality.shape[1]
    step = tail.positions(batch, BYTES_PER_LOGIT)
    total = torch.zeros_like(leaf)
    for start in range(0, length, step):
        part = slice(start, min(start + step, length))
        with torch.enable_grad():
            try:
                logits = tail.logits(batch, state, leaf, part)
            except NoLogitsError as error:
                raise UnmeasurableError(str(error)) from error
            counted = (batch.modality[:, part] != PADDING).flatten().to(logits.device)
            if generator is None:
                generator = torch.Generator(logits.device).manual_seed(seed)  # a head with hooks may run elsewhere
            if counted.any():
                logits = logits.flatten(0, 1)[counted].float()
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
                total += torch.autograd.grad(loss, leaf)[0]
    return total.cpu()


def positions_at_once(model: nn.Module, batch: CalibrationBatch) -> int:
    """Return for how many positions of each sample of a batch the gradient of the loss is taken at once."""
    if not makes_some_logits(model, batch.inputs):
        return batch.modality.shape[1]
    return positions_within(batch, model.get_input_embeddings().weight.shape[0], BYTES_PER_LOGIT)


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
