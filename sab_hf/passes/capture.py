"""The calibration set's hidden states, cached between blocks, so that the model never runs again for a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..calibration import CalibrationBatch, media_modality
from ..machine import distributed
from ..machine.store import tensors_in
from ..machine.workspace import Workspace
from ..method.hessian import SecondMoments
from ..packed.linear import SABLinear, replace_module
from .routing import RowLabels
from .states import BatchState, Left, block_output, join
from .tracing import check_replay, trace


class BlockInputs:
    """Inputs of successive blocks for the whole calibration set.

    Recording runs the model once, with blocks that only note what they are called with and hand their input on: masks and
    positions do not depend on the hidden states, so one cheap pass gives the arguments of all blocks. What a model does
    to hidden states between blocks must be an addition (it is, in the families known), and is replayed as such.

    Where several processes work together, each holds its share of the batches.

    Args:
        model: a transformers model in evaluation mode.
        block_names: blocks that run one after the other, in order; blocks that run before them compute as they are.
        batches: the calibration set.
        workspace: where to compute and where to keep hidden states; None: where the model is.
        later: blocks that run after these and stay where they are: recording stops before them.
        first_number: number of the first batch, where other inputs hold the ones before it.
        all_run: whether every block must run for some batch. Some run for images only, of which a few samples may have none.
    Raises:
        RuntimeError: the model does not run its blocks one after the other, each once, on one row per token.
    """

    def __init__(
        self,
        model: nn.Module,
        block_names: tuple[str, ...],
        batches: list[CalibrationBatch],
        workspace: Workspace | None = None,
        later: tuple[str, ...] = (),
        all_run: bool = True,
        first_number: int = 0,
    ):
        blocks = [model.get_submodule(name) for name in block_names]
        self.workspace = workspace or Workspace.of(model)
        self.keeps = False
        placement, store = self.workspace.placement, self.workspace.store
        self.states: list[BatchState] = []
        own, others = placement.visit_rest((*block_names, *later)), [model.get_submodule(name) for name in later]
        with own, placement.visit(block_names[0]), _not_run(model, others):
            for number, batch in self.workspace.bar.over(list(distributed.share(batches, first_number))):
                state = new_state(number, self.workspace, batch)
                option = trace(model, blocks, batch, state, to_the_end=not later)
                if not self.states:
                    check_replay(model, blocks, batch, state, not later, option)
                seen = {}
                state.hidden, state.calls, state.injections = (
                    store.put_all(value, seen) for value in (state.hidden, state.calls, state.injections)
                )
                state.modality = state.modality.cpu()
                self.states.append(state)
        if all_run:
            self._check_ran(model, len(blocks))

    def _check_ran(self, model: nn.Module, num_blocks: int) -> None:
        ran = distributed.merge({i: True for state in self.states for i in range(num_blocks) if state.runs(i)})
        if len(ran) != num_blocks:
            raise RuntimeError(
                f"{type(model).__name__} ran {len(ran)} of its {num_blocks} language blocks for the calibration samples; if some "
                "run for images only, calibrate with images, else this architecture is not supported yet"
            )

    def running(self, index: int) -> list[BatchState]:
        """Return the batches for which the model runs block number `index`."""
        return [state for state in self.states if state.runs(index)]

    def first(self, num_samples: int) -> BlockInputs:
        """Return the inputs of the first batches, as many as hold `num_samples` samples; they advance by themselves.

        Of several processes, each has its share of these batches. What they advanced from stays as it was, so each `advance`
        takes room in the store until it is given to `StateStore.forget`.
        """
        part = copy.copy(self)
        part.keeps = True
        sizes = sorted(distributed.merge({state.number: state.rows for state in self.states}).items())
        count = count_first([rows for _, rows in sizes], num_samples)
        chosen = {number for number, _ in sizes[:count]}
        part.states = [copy.copy(state) for state in self.states if state.number in chosen]
        return part

    def fork(self, dense: bool = False) -> BlockInputs:
        """Return the same inputs, which stay here while these advance; `take_targets` gives them what became of the targets.

        Args:
            dense: full-precision blocks advance these inputs, which begin with the targets; else binarized blocks do, and the
                targets beside them.
        """
        part = copy.copy(self)
        part.states = [copy.copy(state) for state in self.states]
        for state in self.states:
            if dense and state.target is not None:
                state.hidden, state.left, state.target, state.target_left = state.target, state.target_left, None, {}
            else:
                state.shared = True
        return part

    def take_targets(self, ahead: BlockInputs) -> None:
        """Have the targets of inputs that ran ahead, which are read no more."""
        for state, other in zip(self.states, ahead.states, strict=True):
            if other.target is None:
                state.target = None if other.hidden is state.hidden else other.hidden
                state.target_left = other.left
            else:
                kept = {id(tensor) for tensor in tensors_in((state.hidden, state.left))}
                read = tensors_in((other.hidden, other.left))
                self.workspace.store.forget([tensor for tensor in read if id(tensor) not in kept])
                state.target, state.target_left = other.target, other.target_left

    def close(self) -> None:
        """Give up the room that the batches take; nobody reads them any more."""
        for state in self.states:
            kept = (state.hidden, state.target, state.calls, state.injections, state.left, state.target_left)
            self.workspace.store.forget(*kept)
        self.states = []

    @torch.no_grad()
    def advance_targets(self, block: nn.Module, index: int) -> None:
        """Compute what the full-precision `block`, number `index`, makes of its full-precision input."""
        store = self.workspace.store
        for state in self.running(index):
            output, left = self._output(block, index, state, of_target=True)
            state.target = store.put(output) if state.target is None else store.replace(state.target, output)
            state.target_left = self._merged(state.target_left, left)

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int, with_targets: bool = True) -> None:
        """Replace the cached hidden states by the output of `block`, which is number `index`.

        What the model adds to it is added to the targets too, unless they have it already (not `with_targets`).
        """
        pays = self.workspace.device.type == "cuda" and len(self.states) > 1
        with unpacked(block) if pays else nullcontext():
            self._advance(block, index, with_targets)

    def _advance(self, block: nn.Module, index: int, with_targets: bool) -> None:
        for state in self.states:
            output, left = self._output(block, index, state) if state.runs(index) else (state.hidden, {})
            if with_targets and state.target is not None:
                target = _entering(state, index + 1, state.target)
                if target is not state.target:
                    state.target = self.workspace.store.replace(state.target, target)
            self._replace(state, _entering(state, index + 1, output), left)

    def _advance_to(self, outputs: dict[int, tuple[Tensor, Left]], index: int) -> None:
        """Replace the cached hidden states by what `_own_moments` has put into the store for block number `index`."""
        for state in self.states:
            if state.number in outputs:
                self._replace(state, *outputs[state.number], stored=True)
            else:
                self._replace(state, _entering(state, index + 1, state.hidden), {})

    def _replace(self, state: BatchState, hidden: Tensor, left: Left, stored: bool = False) -> None:
        """Replace a batch's hidden states, and add to what blocks have left; stored: `hidden` is in the store already."""
        store, kept = self.workspace.store, self.keeps or state.shared
        state.left = self._merged(state.left, left)
        if hidden is state.hidden:
            return
        if not stored:
            hidden = store.put(hidden) if kept else store.replace(state.hidden, hidden)
        elif not kept:
            store.forget(state.hidden)
        state.hidden, state.shared = hidden, False

    def _output(self, block: nn.Module, index: int, state: BatchState, of_target: bool = False) -> tuple[Tensor, Left]:
        """Run the block on a whole batch, again in smaller parts where memory runs out; see `_in_parts`."""
        of_target = of_target and state.target is not None  # what enters the first block is both
        return self.workspace.limit.retry(
            f"running block {index}", state.rows, lambda: _in_parts(block, index, state, of_target=of_target)
        )

    def _merged(self, known: Left, new: Left) -> Left:
        """Return what was left before and now, kept in the store."""
        store, merged = self.workspace.store, {name: dict(values) for name, values in known.items()}
        for name, values in new.items():
            own = merged.setdefault(name, {})
            for key, value in values.items():
                if key in own and not self.keeps:
                    store.forget(own[key])
                own[key] = store.put_all(value, {})
        return merged

    @torch.no_grad()
    def second_moments(
        self, block: nn.Module, index: int, linears: dict[str, nn.Linear], advance: bool = False
    ) -> dict[str, SecondMoments]:
        """Collect the second moments of the inputs of all `linears` of a block in one streaming pass.

        Linears that get the very same tensor (query, key and value; gate and up) share one accumulator. A Linear that was
        never called is missing from the result.

        The moments are those of the samples of all processes.

        Args:
            block: of the model, number `index`.
            linears: of the block, by module name.
            advance: the same pass replaces the cached hidden states, as `advance` does.
        Raises:
            ValueError: inputs are not finite, or are not rows whose modality is known.
        """
        largest = max((state.rows for state in self.states), default=1)
        outputs: dict[int, tuple[Tensor, Left]] = {}

        def run() -> tuple[dict[str, str], dict[str, SecondMoments]]:
            return self._own_moments(block, index, linears, outputs if advance else None)

        def undo() -> None:
            self.workspace.store.forget([hidden for hidden, _ in outputs.values()])
            outputs.clear()

        owner, moments = self.workspace.limit.retry(f"collecting second moments of block {index}", largest, run, undo)
        if advance:
            self._advance_to(outputs, index)
        owner = distributed.merge(owner)
        distributed.sum_moments(moments, sorted(set(owner.values())), self.workspace.device)
        for name, moment in moments.items():
            if not moment.is_finite():
                raise ValueError(
                    f"the inputs of `{name}` are not finite on the calibration set; load the model with "
                    "dtype=torch.bfloat16 or torch.float32 (float16 overflows in many models)"
                )
        return {name: moments[first] for name, first in owner.items()}

    def _own_moments(
        self,
        block: nn.Module,
        index: int,
        linears: dict[str, nn.Linear],
        outputs: dict[int, tuple[Tensor, Left]] | None,
    ) -> tuple[dict[str, str], dict[str, SecondMoments]]:
        """Return the Linear that accumulates for each Linear, and the moments of this process's samples by the former.

        Args:
            outputs: gets, by number of the batch, what enters the next block, in the store, and what the block leaves; None:
                that is dropped.
        """
        owner: dict[str, str] = {}
        moments: dict[str, SecondMoments] = {}
        last_input = last_owner = None
        labels = RowLabels(block)

        def observe(name: str, x: Tensor, _: Tensor) -> None:
            nonlocal last_input, last_owner
            if name not in owner:
                owner[name] = last_owner if x is last_input else name
            last_input, last_owner = x, owner[name]
            if owner[name] != name:
                return
            modality = labels.of(linears[name], x)
            if modality is None:
                raise ValueError(
                    f"`{name}` gets inputs of shape {list(x.shape)}, whose rows are not the tokens; add it to "
                    "`modules_to_not_convert`"
                )
            moments.setdefault(name, SecondMoments(x.shape[-1], x.device)).add(x.flatten(0, -2), modality)

        with observing(linears, observe), labels.watching():
            for state in self.workspace.bar.over(self.running(index)):
                output, left = _in_parts(block, index, state, labels.start)
                if outputs is not None:
                    outputs[state.number] = self.workspace.store.put(_entering(state, index + 1, output)), left
        return owner, moments


def _in_parts(
    block: nn.Module,
    index: int,
    state: BatchState,
    begin: Callable[[BatchState], None] = lambda part: None,
    of_target: bool = False,
) -> tuple[Tensor, Left]:
    """Run a block on a batch in parts that fit into memory; returns what it gives and what it leaves.

    Args:
        begin: is called before each part runs.
        of_target: the block runs on `target`.
    """
    outputs, left = [], []
    for part in state.pieces(index, of_target):
        begin(part)
        outputs.append(block_output(block, index, part, part.target if of_target else part.hidden))
        left.append(part.left)
    return join(outputs, left)


def _entering(state: BatchState, index: int, output: Tensor) -> Tensor:
    """Return what enters block number `index`: what the one before it gave, and what the model adds to it."""
    injection = state.injections[index] if index < len(state.injections) else None
    return output if injection is None else output + injection.to(output.device)


@contextmanager
def _not_run(model: nn.Module, blocks: list[nn.Module]) -> Iterator[None]:
    """Raise a RuntimeError if the model runs one of `blocks`, which are expected to run later than all others."""

    def refuse(*_) -> None:
        raise RuntimeError(
            f"{type(model).__name__} runs its lists of language blocks alternately for some calibration samples and one after "
            "the other for the first; this architecture is not supported yet"
        )

    hooks = [block.register_forward_pre_hook(refuse) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def unpacked(block: nn.Module) -> Iterator[None]:
    """Have the packed Linears of a block hold dense weights for a while, in their dtype; experts stay packed.

    A GPU unpacks a weight for each product of many tokens. For a whole calibration set it is unpacked once.
    """
    packed = {name: module for name, module in block.named_modules() if type(module) is SABLinear}
    try:
        for name, module in packed.items():
            replace_module(block, name, module.dense(module.dtype))
        yield
    finally:
        for name, module in packed.items():
            replace_module(block, name, module)


def new_state(number: int, workspace: Workspace, batch: CalibrationBatch, modality: Tensor | None = None) -> BatchState:
    """Return the state of a batch before it is recorded; `modality`: of the hidden states, if not that of the batch."""
    media = media_modality(batch.inputs)
    return BatchState(number, workspace, batch.modality if modality is None else modality, batch.modality, media)


def count_first(rows: Iterable[int], num_samples: int) -> int:
    """Return how many of the first batches hold `num_samples` samples together (all, if too few); rows: of each batch."""
    total = count = 0
    for size in rows:
        if total >= num_samples:
            break
        total += size
        count += 1
    return count


@contextmanager
def observing(modules: dict[str, nn.Module], observe: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `observe(name, input, output)` after each run of one of the modules."""
    hooks = [
        module.register_forward_hook(
            lambda _, args, kwargs, output, name=name: observe(name, args[0] if args else kwargs["input"], output),
            with_kwargs=True,
        )
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
