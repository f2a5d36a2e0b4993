"""Distillation: train the planes of many blocks together until the model predicts what the full-precision one predicts.

A window of successive blocks, whose Linears are trainable planes, runs on the cached states that enter it. Its loss is the
divergence of the next-token distributions, or, where blocks follow that are not in the window, the squared error of its output.
The full-precision side is the cached output of the full-precision blocks, so no second model is held or run.

Of several processes, each has its batches and keeps its rows of what is trained (`machine/sharding.py`).
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..calibration import PADDING, TEXT, CalibrationBatch
from ..machine import distributed
from ..machine.placement import free_memory
from ..machine.replay import Replay
from ..machine.resume import Left, Progress, Steps
from ..machine.sharding import Kept, Lent
from ..machine.store import tensors_in
from ..method.divergence import divergence
from ..method.trainable import PlanesAdam, pass_dtype
from ..passes.capture import BlockInputs
from ..passes.states import BatchState, block_output, window_output
from ..passes.tail import NoLogitsError, Tail
from .plan import Plan
from .refine import draw_batches
from .settings import DistilSettings
from .trainees import Trainees

logger = logging.getLogger(__name__)

WARM_UP = 20
"""Steps over which the rates rise."""

MEASUREMENTS = 10
"""How often the loss on held-out samples is measured during a run of all steps."""

PATIENCE = 3
"""Measurements without a new best after which training stops."""

GIVEN_SHARE = 0.375
"""Part of the steps, at least, that see given samples where the model has written others: those are of the domain that counts."""

HELD_OUT = 16
"""One of so many batches is held out of training."""

STATE_BYTES = {False: 12, True: 6}
"""Latent and two moments of a weight, in float32, and compactly in bfloat16: shared among processes."""

WEIGHT_BYTES = 8
"""A weight and its gradient of the step in float32, where each process has them whole; on a GPU they are bfloat16."""

MEMORY_SHARE = 0.7
"""Part of the free memory that the weights of a window may take; activations and logits need some too."""

COMPILE_FROM = 300
"""Steps from which on compiling the blocks pays: it takes some 20 s, and then a step of a small model about half the time."""

COMPILED_FORMS = 64
"""Forms of batches and kinds of blocks for which the code of a block is compiled, at most; others run as they are."""

ACTIVATION_SHARE = 0.25
"""Part of the free memory that activations may take; where they take more, blocks run again on the way back."""


class DistilResult(NamedTuple):
    """How a distillation went.

    Attributes:
        before, after: on held-out calibration samples, nats per token between the next-token distributions of the full-precision
            and the binarized model; of a window that other blocks follow, the relative squared error of its output.
        steps: that were made, and the one whose result was kept.
    """

    before: float
    after: float
    steps: int
    best_step: int


class Window(NamedTuple):
    """Successive blocks that are trained together, or that are not trained.

    Attributes:
        names: of the blocks.
        first: number of the first one in its list.
        trained: whether they are.
        last: whether no block follows: the loss is that of the model's predictions.
        tail: gives the predictions, on a process that has samples.
        compact: whether training keeps less than float32 for each weight.
        lent: whether a process has the weights of a block only while it runs.
    """

    names: tuple[str, ...]
    first: int
    trained: bool
    last: bool = True
    tail: Tail | None = None
    compact: bool = False
    lent: bool = False


class Way(NamedTuple):
    """How many blocks are trained at a time, and how: see `Window`."""

    blocks: int
    compact: bool
    lent: bool


def plan_windows(
    model: nn.Module, plan: Plan, blocks: tuple[str, ...], inputs: BlockInputs, steps: Steps
) -> list[Window]:
    """Share a list of blocks out to windows, as large as the memory of the compute device allows.

    Args:
        model: with its dense blocks.
        plan: of the run.
        blocks: names of one of its lists.
        inputs: of the first block.
        steps: of the run; one that was interrupted goes on with the windows it had.
    """
    whole = [Window(blocks, 0, trained=False)]
    if not plan.distil.steps or blocks != plan.roles.stacks[-1]:
        return whole
    tail, problem = _find_tail(model, plan, blocks, inputs)
    if problem:
        logger.warning("the model is not distilled: %s", problem)
        return whole

    weights = [sum(math.prod(plan.shapes[name]) for name in plan.linears_of(block)) for block in blocks]
    device, processes = inputs.workspace.device, distributed.size()
    free = min(distributed.merge({distributed.rank(): free_memory(device)}).values()) / distributed.sharing(device)

    def decide() -> Left:
        way = blocks_at_once(weights, device, free, processes)
        return {}, {"blocks": way.blocks, "compact": way.compact}

    decided = distributed.broadcast(steps.once("windows", decide)[1], source=0)
    size, compact = decided["blocks"], decided["compact"]
    largest = [max(weights)] * size  # a run that goes on may have another number of processes
    lent = processes > 1 and (compact or bytes_of_training(largest, device, processes) > MEMORY_SHARE * free)
    needed = bytes_of_training(largest, device, processes, compact, lent)
    if needed > free and size > blocks_at_once(weights, device, free, processes).blocks:
        raise RuntimeError(
            f"the run in `checkpoint_dir` trains {size} blocks together, which takes {needed / 2**30:.1f} GiB on each of "
            f"{processes} processes, and {free / 2**30:.1f} GiB are free; start again with more processes, or name another folder"
        )
    starts = range(0, len(blocks), size)
    return [Window(blocks[i : i + size], i, True, i + size >= len(blocks), tail, compact, lent) for i in starts]


def blocks_at_once(weights: list[int], device: torch.device, free: float, processes: int = 1) -> Way:
    """Return how many blocks a window has, and how it is trained: the first way in which all blocks fit into one.

    Those are: each process has all weights; it is lent them block by block; the same compactly, which is for GPUs, and in which
    one process builds them anew. Where none is enough, the last way in windows of about one size.

    Args:
        weights: that each block has.
        device: the compute device.
        free: bytes on it.
        processes: that share what is trained, each with a device like this.
    """
    several, count = processes > 1, len(weights)
    ways = [(False, False)] + [(False, True)] * several + [(True, several)] * (device.type != "cpu")
    largest, most = max(weights), 1
    for compact, lent in ways:
        beside = bytes_of_training([largest], device, processes, compact, lent)
        each = bytes_of_training([largest] * 2, device, processes, compact, lent) - beside  # buffers are there once
        most = max(1, min(count, 1 + int((MEMORY_SHARE * free - beside) / each)))
        if most == count:
            break
    return Way(math.ceil(count / math.ceil(count / most)), compact, lent)


def bytes_of_training(
    weights: list[int], device: torch.device, processes: int = 1, compact: bool = False, lent: bool = False
) -> float:
    """Return the bytes on each process of what training a window keeps for its weights.

    Args:
        weights: of each block of the window.
        device, processes: as in `blocks_at_once`.
        compact, lent: the way, see `Window`.
    """
    total, size = sum(weights), pass_dtype(device).itemsize
    if lent or compact:
        buffers = 4 * size * max(weights) if lent else 0  # weights and gradients of two blocks
        return (STATE_BYTES[compact] + size) * total / processes + buffers
    return (STATE_BYTES[False] / processes + WEIGHT_BYTES) * total


def activation_bytes(shapes: list[tuple[int, int]], tokens: int) -> float:
    """Return the bytes of what a pass of so many tokens keeps for its way back, of Linears [out_features, in_features]."""
    return 4.0 * tokens * sum(n + 2 * m for n, m in shapes)


def _find_tail(
    model: nn.Module, plan: Plan, blocks: tuple[str, ...], inputs: BlockInputs
) -> tuple[Tail | None, str | None]:
    """Return the model's tail, None on a process without samples, or why it gives no predictions on one of the processes."""
    batches, problems, tail = plan.calibration.batches, {}, None
    states = [state for state in inputs.states if state.hidden is not None]
    if states:
        richest = max(states, key=lambda state: len(batches[state.number].inputs))
        modules = [model.get_submodule(name) for name in blocks]
        with inputs.workspace.placement.visit_rest(plan.roles.blocks):
            try:
                tail = Tail(model, modules, batches[richest.number], richest)
            except NoLogitsError as reason:
                problems["tail"] = str(reason)
    return tail, distributed.merge(problems).get("tail")


def distil_window(
    model: nn.Module,
    plan: Plan,
    window: Window,
    weights: dict[str, Tensor],
    inputs: tuple[BlockInputs, ...],
    batches: list[CalibrationBatch],
    steps: Steps,
) -> DistilResult:
    """Distil one window of a run, or take what it became; then the inputs are those of the block after it, if there is one.

    Args:
        model, window, weights, inputs, batches: as in `distil`; blocks may be anywhere.
        plan: of the run.
        steps: of the run.
    """
    placement, last = inputs[0].workspace.placement, window.first + len(window.names) - 1
    name = f"distilled blocks {window.first} to {last}"

    def train() -> Left:
        result = distil(model, window, weights, inputs, batches, plan.distil, steps.progress(name))
        states = {block: model.get_submodule(block).state_dict() for block in window.names}
        return {f"{b}|{key}": t for b, state in states.items() for key, t in state.items()}, result._asdict()

    def restore(tensors: dict[str, Tensor]) -> None:
        for block in window.names:
            own = {key.partition("|")[2]: t for key, t in tensors.items() if key.partition("|")[0] == block}
            state = {key: tensor.to(placement.device) for key, tensor in own.items()}
            model.get_submodule(block).load_state_dict(state, assign=True)

    with placement.visit_rest(plan.roles.blocks), ExitStack() as stack:
        blocks = [stack.enter_context(placement.visit(block, lasting=True)) for block in window.names]
        _, result = steps.once(name, train, restore, share=True)
        if not window.last:
            for index, block in enumerate(blocks, window.first):
                for each in inputs:
                    each.advance(block, index, with_targets=False)
    return DistilResult(**result)


def distil(
    model: nn.Module,
    window: Window,
    weights: dict[str, Tensor],
    inputs: tuple[BlockInputs, ...],
    batches: list[CalibrationBatch],
    settings: DistilSettings,
    progress: Progress,
) -> DistilResult:
    """Train the planes, norms and biases of a window of blocks, and pack the best state that was measured.

    Where nothing lowers the loss on held-out samples, the blocks stay what they were, and a warning says so. Where training ends
    with an error, they do too.

    Args:
        model: with the window's blocks on the compute device, their Linears packed.
        window: the blocks.
        weights: the own rows of the dense weights that all their packed Linears stand for, by module name, on any device; empty
            afterwards.
        inputs: calibration batches with `hidden`, which enters the window, and `target`, what the full-precision blocks up to the
            window's end give. Some of the first ones are held out. Each process of several has its own.
        batches: all of them, in the order of their numbers.
        settings: steps and rates.
        progress: where an interrupted training goes on.
    Raises:
        RuntimeError: out of memory with one sample at a time; the message says what to lower.

    Source: knowledge distillation by forward KL; quantization-aware distillation (arXiv 2601.20088); method §7.
    """
    blocks = [model.get_submodule(name) for name in window.names]
    linears = [model.get_submodule(name) for name in weights]
    shapes = [(linear.out_features, linear.in_features) for linear in linears]
    trainees = Trainees(model, blocks, None, weights, window.compact, window.lent, distributed.own_share())
    try:
        loss = _Loss(blocks, window, inputs, batches, shapes, settings.steps)
        given = distributed.merge({state.number: True for state in inputs[0].states})
        with loss.replay.running(), _compiled(blocks) if loss.compiled else nullcontext():
            result, best = _train(trainees, loss, set(given), settings, progress)
    except BaseException:
        trainees.give_back()
        raise
    if best is None:
        logger.warning(
            "distillation did not lower the loss on held-out samples (%.4f); the blocks stay what they were. More or other "
            "calibration samples, or lower `distil_latent_rate` and `distil_scale_rate`, may help",
            result.before,
        )
        trainees.give_back()
    else:
        trainees.pack(best)
    return result


def _train(
    trainees: Trainees, loss: _Loss, given: set[int], settings: DistilSettings, progress: Progress
) -> tuple[DistilResult, dict[str, Tensor] | None]:
    """Return how training went, and the best result; None if none was better than the start.

    Args:
        given: numbers of the batches of which some are held out.
    """
    sizes = distributed.merge({state.number: state.rows for state in loss.own.values() if loss.counts(state)})
    if not sizes:
        return DistilResult(0.0, 0.0, 0, 0), None
    known = [number for number in sizes if number in given]
    held = set(known[HELD_OUT // 2 :: HELD_OUT] if len(known) > HELD_OUT // 2 else known[1:2])
    held = held or set(known)  # of one batch nothing can be held out
    drawn_from = {number: rows for number, rows in sizes.items() if number not in held} or sizes
    own, written = ({n: rows for n, rows in drawn_from.items() if (n in given) == kind} for kind in (True, False))
    adam = trainees.adam(settings.latent_rate, settings.scale_rate)
    loss.exchange = exchange = trainees.exchange(adam)
    exchange.spread()
    interval = max(1, settings.steps // MEASUREMENTS)
    start, before, best_loss, best_step, best = 0, None, math.inf, 0, None
    found = progress.load()
    if found is not None:
        parts, known = found
        start, before, best_loss, best_step = known["step"], known["before"], known["best_loss"], known["best_step"]
        best = trainees.load_state(adam, parts)
        exchange.spread()
    else:
        before = best_loss = loss.measure(held)
    _warn_of_idle(next(_draw_mixed(own, written, settings)), sizes)
    draws = _draw_mixed(own, written, settings)
    for _ in range(start):
        next(draws)
    step = start
    with loss.workspace.bar.steps(settings.steps, start) as bar:
        bar.note(f"held-out loss {before:.4f}")
        while step < settings.steps:
            loss.accumulate_gradients(adam, next(draws), step)
            exchange.sum_gradients()
            adam.prepare(_schedule(step, settings.steps))
            loss.replay.run("descend", [], lambda _: adam.descend())
            exchange.sum_shared()
            loss.replay.run("update", [], lambda _: adam.update())
            exchange.spread()
            step += 1
            bar.update()
            if step % interval and step < settings.steps:
                continue
            now = loss.measure(held)
            bar.note(f"held-out loss {before:.4f} → {now:.4f}")
            logger.info(
                "distillation: step %d of %d, held-out loss %.4f, at first %.4f", step, settings.steps, now, before
            )
            if now < best_loss:  # False also for NaN
                best_loss, best_step, best = now, step, trainees.result()
            if not math.isfinite(now):
                logger.warning("distillation ends: its loss is not finite%s", loss.first_not_finite())
            if not math.isfinite(now) or step - max(best_step, 0) >= PATIENCE * interval:
                break
            if step < settings.steps:
                record = {"step": step, "before": before, "best_loss": best_loss, "best_step": best_step}
                progress.save(partial(trainees.state, adam, best), record, step)
    return DistilResult(before, best_loss, step, best_step), best


def _warn_of_idle(drawn: list[int], sizes: dict[int, int]) -> None:
    """Say so where a step has fewer batches than there are processes."""
    if len(drawn) < distributed.size():
        samples = sum(sizes[number] for number in drawn)
        logger.warning(
            "a step of distillation has %d batches, so %d of %d processes wait; set `batch_size=%d`, or raise `distil_batch`",
            len(drawn),
            distributed.size() - len(drawn),
            distributed.size(),
            max(1, samples // distributed.size()),
        )


def _draw_mixed(given: dict[int, int], written: dict[int, int], settings: DistilSettings) -> Iterator[list[int]]:
    """Yield the batches of each step: given ones as often as their share of the samples, or `GIVEN_SHARE` if that is more.

    Args:
        given, written: batch number → samples, of which one may be empty.
    """
    first, second = (draw_batches(sizes, settings.samples_per_step, settings.seed) for sizes in (given, written))
    total = sum(given.values()) + sum(written.values())
    share = max(GIVEN_SHARE, sum(given.values()) / total) if given else 0.0
    due = 0.0
    while True:
        due += share
        if due >= 1 or not written:
            due -= 1
            yield next(first)
        else:
            yield next(second)


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def compiling_pays(device: torch.device, steps: int) -> bool:
    """Tell whether blocks are to be compiled for so many steps."""
    return device.type == "cuda" and steps >= COMPILE_FROM


@contextmanager
def _compiled(blocks: list[nn.Module]) -> Iterator[None]:
    """Have the blocks compiled for a while; what cannot be runs as it is."""
    with torch._dynamo.config.patch(suppress_errors=True, cache_size_limit=COMPILED_FORMS):
        for block in blocks:
            block.compile()
        try:
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None


class _Loss:
    """The loss of a window of blocks on batches of the calibration set.

    Args:
        steps: of the training.

    Attributes:
        dtype: of products.
        replay: does the passes of a step.
        compiled: whether the blocks are compiled. All passes are then of one kind, so that it is done once: those that measure
            could go back too, and what enters the first block has a gradient.
        exchange: with other processes.
    """

    exchange: Kept

    def __init__(
        self,
        blocks: list[nn.Module],
        window: Window,
        inputs: tuple[BlockInputs, ...],
        batches: list[CalibrationBatch],
        shapes: list[tuple[int, int]],
        steps: int,
    ):
        self.blocks, self.first, self.last = blocks, window.first, window.last
        self.tail = window.tail if window.last else None
        self.batches, self.workspace = batches, inputs[0].workspace
        self.own = {state.number: state for each in inputs for state in each.states}
        tokens = {n: int(self._counted(state.modality).sum()) for n, state in self.own.items()}
        self.tokens = distributed.merge(tokens)
        self.rows = distributed.merge({n: state.rows for n, state in self.own.items()})
        self.owner = distributed.merge(dict.fromkeys(self.own, distributed.rank()))
        self.limit, device = self.workspace.limit, self.workspace.device
        self.dtype = pass_dtype(device)
        self.replay = Replay(device)
        self.compiled = compiling_pays(device, steps)
        self._ready: dict[int, tuple[BatchState, tuple, list[Tensor]]] = {}
        self._sum, self._factor = torch.zeros((), device=device), torch.ones((), device=device)
        self._step, self._never = torch.zeros((), device=device), torch.full((), math.inf, device=device)
        self._bad = self._never.clone()  # first step with a loss that is not finite
        largest = max((state.modality.numel() for state in self.own.values()), default=0)
        self.saves_memory = activation_bytes(shapes, largest) > ACTIVATION_SHARE * free_memory(device)

    def _counted(self, modality: Tensor) -> Tensor:
        """Return where the loss counts, bool [batch, length]: predictions matter where text is, outputs of blocks everywhere."""
        return modality == TEXT if self.last else modality != PADDING

    def counts(self, state: BatchState) -> bool:
        """Tell whether a batch runs through one of the blocks and has tokens that count."""
        runs = any(state.runs(index) for index in range(self.first, self.first + len(self.blocks)))
        return runs and self.tokens[state.number] > 0

    def accumulate_gradients(self, adam: PlanesAdam, numbers: list[int], step: int) -> None:
        """Add up the gradients of the mean loss over the tokens of some batches; step: number of the training step."""
        self._factor.fill_(1 / sum(self.tokens[number] for number in numbers))
        self._step.fill_(step)
        self._together("distilling", numbers, True, adam.clear)

    def measure(self, numbers: set[int]) -> float:
        """Return the mean loss over the tokens of some batches.

        Raises:
            RuntimeError: it is not finite on some processes and finite on others.
        """
        with torch.set_grad_enabled(self.compiled):
            own = self._together("measuring the loss", sorted(numbers), False)
        by_process = distributed.merge({distributed.rank(): own})
        wrong = [process for process, value in by_process.items() if not math.isfinite(value)]
        others = [p for p, value in by_process.items() if value and math.isfinite(value)]
        if wrong and others:
            raise RuntimeError(
                f"the loss on held-out samples is not finite on process {wrong[0]}, and finite on process {others[0]}: "
                "all have one model, so its samples or device are damaged. With `checkpoint_dir`, the finished blocks are kept"
            )
        return sum(by_process.values()) / sum(self.tokens[number] for number in numbers)

    def first_not_finite(self) -> str:
        """Return at which training step, and on which process, a loss was not finite for the first time, in words."""
        steps = distributed.merge({distributed.rank(): float(self._bad)})
        first = min(steps, key=steps.get)
        if not math.isfinite(steps[first]):
            return ""
        where = f" on process {first}" if len(steps) > 1 else ""
        return f", for the first time at step {steps[first] + 1:.0f}{where}"

    def _together(
        self, what: str, numbers: Iterable[int], train: bool, undo: Callable[[], None] | None = None
    ) -> float:
        """Run the own ones of some batches, to train or to measure; returns the sum of their losses, if measured.

        Where weights are lent, all processes do that in as many passes, and all do it again if one runs out of memory.
        """
        numbers = list(numbers)
        own, lent = [self.own[number] for number in numbers if number in self.own], isinstance(self.exchange, Lent)
        largest = max(self.rows[number] for number in numbers) if lent else max((s.rows for s in own), default=1)

        def run() -> float:
            total = 0.0
            for state in own:
                self._sum.zero_()
                self._run(state, train)
                total += 0.0 if train else float(self._sum)
            return total

        def run_lent() -> float:
            total, failed = 0.0, ""
            self.exchange.begin(self._most_passes(numbers, train), train)
            try:
                total = run()
            except torch.OutOfMemoryError as error:
                failed = str(error) or "out of memory"
            failed = self.exchange.end() or failed
            problems = distributed.merge({distributed.rank(): failed} if failed else {})
            if problems:
                raise torch.OutOfMemoryError(next(iter(problems.values())))
            return total

        if lent:
            limits = distributed.merge({distributed.rank(): self.limit.samples or math.inf})
            least = min(limits.values())
            self.limit.samples = int(least) if math.isfinite(least) else None
        return self.limit.retry(what, largest, run_lent if lent else run, undo)

    def _most_passes(self, numbers: list[int], train: bool) -> int:
        """Return the most passes that a process makes for some batches."""
        passes = dict.fromkeys(self.owner.values(), 0)
        for number in numbers:
            parts = len(self.limit.slices(self.rows[number]))
            passes[self.owner[number]] += parts * (2 if train and parts > 1 else 1)
        return max(passes.values())

    def _run(self, state: BatchState, train: bool) -> None:
        """Add a batch's loss to the sum and, to train, its gradient to those of the trainees."""
        count = len(self.blocks)
        if len(self.limit.slices(state.rows)) == 1:
            piece, form, tensors = self._whole(state)
            work = partial(self._pass, state, piece, tensors, train)
            if (self.tail is None or self.tail.chain) and not isinstance(self.exchange, Lent):
                self.replay.run((train, form), tensors, work)
            else:
                work(tensors)
            return
        with torch.no_grad():  # parts of a batch run a second time for their gradient, so that one is held at once
            pieces = list(state.pieces(self.first, count=count))
            output = torch.cat([self._output(piece) for piece in pieces], -3)
            target = torch.cat([piece.target for piece in pieces], -3)
            modality = torch.cat([piece.modality for piece in pieces])
        gradient = self._loss(state, output, target, modality, train)
        for piece in pieces if train else ():
            rows = piece.hidden.shape[-3]
            self._go_back(self._output(piece), gradient.narrow(-3, 0, rows))
            gradient = gradient.narrow(-3, rows, gradient.shape[-3] - rows)

    def _go_back(self, output: Tensor, gradient: Tensor) -> None:
        self.exchange.turn()
        output.backward(gradient)

    def _whole(self, state: BatchState) -> tuple[BatchState, tuple, list[Tensor]]:
        """Return a batch ready for the blocks, its form and its tensors; made once where it takes no memory beside the state."""
        if state.number not in self._ready:
            (piece,) = state.pieces(self.first, count=len(self.blocks))
            found = piece, piece.form(), piece.tensors()
            kept = tensors_in((state.hidden, state.target, state.calls, state.injections))
            if any(tensor.device != self.workspace.device for tensor in kept):
                return found
            self._ready[state.number] = found
        return self._ready[state.number]

    def _pass(
        self, state: BatchState, piece: BatchState, own: list[Tensor], train: bool, tensors: list[Tensor]
    ) -> None:
        """Do one pass on a whole batch, whose `own` tensors may have others in their place: those of a captured graph."""
        if tensors is not own:
            piece = piece.with_tensors(tensors)
        output = self._output(piece)
        with torch.set_grad_enabled(train):
            gradient = self._loss(state, output.detach(), piece.target, piece.modality, train)
        if train:
            self._go_back(output, gradient)

    def _output(self, piece: BatchState) -> Tensor:
        self.exchange.enter()
        with self._autocast():
            run = _checkpointed if self.saves_memory and torch.is_grad_enabled() else block_output
            hidden = piece.hidden.float().detach().requires_grad_(self.compiled and torch.is_grad_enabled())
            return window_output(self.blocks, self.first, piece, hidden, run)

    def _autocast(self) -> torch.autocast:
        device = self.workspace.device.type
        # no cache: what it holds would outlive a captured graph
        return torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)

    def _loss(self, state: BatchState, output: Tensor, target: Tensor, modality: Tensor, train: bool) -> Tensor | None:
        """Add the loss of a batch to the sum; returns the gradient at the output, times the factor of the step, to train."""
        counted = self._counted(modality).float()
        if self.tail is None:
            value, gradient = _squared_error(output, target, counted)
        else:
            value, gradient = self._divergence(state, output, target, counted, train)
        self._sum.add_(value)
        if train:
            torch.minimum(self._bad, torch.where(value.isfinite(), self._never, self._step), out=self._bad)
        return (gradient * self._factor).to(output.dtype) if train else None

    def _divergence(
        self, state: BatchState, output: Tensor, target: Tensor, counted: Tensor, train: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the summed divergence and its gradient at the output; logits are made for some positions at a time."""
        batch = self.batches[state.number]
        leaf = output.requires_grad_(train)
        gradient, total = torch.zeros_like(output), torch.zeros((), device=output.device)
        for part in self._parts(counted, self.tail.positions(batch)):
            with self._autocast():
                with torch.no_grad():
                    wanted = self.tail.logits(batch, state, target, part)
                given = self.tail.logits(batch, state, leaf, part)
            value, at_given = divergence(given.detach(), wanted, counted[:, part])
            total += value
            if train:
                gradient += torch.autograd.grad(given, leaf, at_given)[0]
        return total, gradient

    def _parts(self, counted: Tensor, step: int) -> Iterator[slice]:
        """Yield the positions for which logits are made at once: up to `step`, where any of `counted` [batch, length] is not 0.

        All positions on a GPU, where a captured graph makes the same ones of each batch, and of a model whose own forward has to
        run for them.
        """
        runs = (
            _runs(counted.any(0).tolist())
            if counted.device.type == "cpu" and self.tail.chain
            else [(0, counted.shape[1])]
        )
        for start, end in runs:
            for first in range(start, end, step):
                yield slice(first, min(first + step, end))


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """Return where runs of True begin and end."""
    runs = [list(run) for flag, run in itertools.groupby(range(len(flags)), flags.__getitem__) if flag]
    return [(run[0], run[-1] + 1) for run in runs]


def _checkpointed(block: nn.Module, index: int, state: BatchState, hidden: Tensor) -> Tensor:
    return checkpoint(block_output, block, index, state, hidden, use_reentrant=False, preserve_rng_state=False)


def _squared_error(output: Tensor, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared error relative to the size of each token's target, summed over tokens, and its gradient at the output.

    Args:
        output, target: [..., batch, length, hidden_size].
        counted: [batch, length] weights of tokens.
    """
    target = target.float()
    weight = (counted / target.square().sum(-1).clamp_min(1e-12))[..., None]
    error = output.float() - target
    return (weight * error.square()).sum(), 2 * weight * error
