"""Training that is shared by rows: what processes send each other in a step, so that none keeps the whole.

Each process keeps latents, Adam's moments and row scales of its rows of every Linear. Where weights fit, each also has all of
them (`Kept`): it runs its batches alone, then gradients are summed into the rows, and the trained rows gathered. Where they do
not fit (`Lent`), a block's weights are gathered when a pass comes to it and given up when the pass leaves it, there and back.

Deviation: this is what FSDP2 (`torch.distributed.fsdp.fully_shard`) does, with torch's own collectives. FSDP2 wants every process
to run every Linear in each pass and its gradient as a parameter's; here processes have different numbers of batches, blocks and
experts are left out for some, a pass that runs out of memory is repeated, and the gradient goes to the fused step at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..method.trainable import PlanesAdam, TrainablePlanes
from . import distributed


class Kept:
    """Training in which each process has all weights; alone, a process has all rows too.

    Args:
        adam: of the modules.
    """

    def __init__(self, adam: PlanesAdam):
        self.adam = adam
        self.alone = distributed.size() == 1

    def enter(self) -> None:
        """Begin a pass, forward."""

    def turn(self) -> None:
        """Begin the way back of this pass."""

    def sum_gradients(self) -> None:
        """Add up the gradients of all processes, each at its rows."""
        for module in () if self.alone else self.adam.modules:
            distributed.reduce_scatter(_own_part(module.whole_gradient, module), module.whole_gradient).wait()

    def sum_shared(self) -> None:
        """Add up the gradients at what is the same on all processes."""
        distributed.sum_gradients([self.adam.shared_gradient])

    def spread(self) -> None:
        """Send the trained rows of the weights to all processes."""
        for module in () if self.alone else self.adam.modules:
            whole = module.padded
            distributed.all_gather(whole, _own_part(whole, module)).wait()


class Lent(Kept):
    """Training in which the weights of a block are on a process while it runs only.

    What is sent in a pass, and in which order, is the same whatever a process runs: the weights of each block in turn, and on
    the way back, in the opposite order, its gradients. A process that leaves blocks out, or has no batch, takes part all the
    same, and so does one that has no memory to build its rows: the pass raises that once all have sent theirs.

    Args:
        adam: of the modules.
        blocks: the modules of each block, in the order in which they run; none keeps its weight.
    """

    def __init__(self, adam: PlanesAdam, blocks: Sequence[Sequence[TrainablePlanes]]):
        super().__init__(adam)
        self._blocks = blocks
        self._block_of = {module: i for i, block in enumerate(blocks) for module in block}
        sizes = [sum(math.prod(module.padded_shape) for module in block) for block in blocks]
        like = adam.modules[0].gradient
        self._weights, self._gradients = ([like.new_empty(max(sizes)) for _ in range(2)] for _ in range(2))
        self._views = [[_views(block, slot) for slot in self._weights] for block in blocks]
        self._gradient_views = [[_views(block, slot) for slot in self._gradients] for block in blocks]
        self._order: list[tuple[int, bool, int]] = []
        self._at, self._pass, self._back, self._each = -1, -1, False, 0
        self._coming: list[distributed.Waits] = []
        self._problem = ""
        self._sent: list[tuple[TrainablePlanes, Tensor, distributed.Waits]] = []
        for module in adam.modules:
            module.lender = self

    def sum_gradients(self) -> None:
        """Do nothing: passes have done it."""

    def spread(self) -> None:
        """Do nothing: passes gather weights."""

    def begin(self, passes: int, backward: bool) -> None:
        """Prepare for the passes to come.

        Args:
            passes: the most that a process makes.
            backward: whether they go back; those without a gradient then take part in that too.
        """
        there = [(i, False) for i in range(len(self._blocks))]
        one = there + [(i, True) for i, _ in reversed(there)] * backward
        self._order, slot = [], 1
        for i, back in one * passes:
            changed = not self._order or self._order[-1][0] != i  # at the turn the weights are there
            slot = 1 - slot if changed else slot
            self._order.append((i, back, slot))
        self._at, self._pass, self._back, self._each = -1, -1, False, len(one)
        self._problem = ""

    def enter(self) -> None:
        self._pass, self._back = self._pass + 1, False

    def turn(self) -> None:
        self._back = True

    def end(self) -> str:
        """Take part in what is left of all passes, also after one that ended with an error.

        Returns:
            What this process had no memory for when it built its rows, or nothing.
        """
        self._advance(len(self._order))
        self._collect()
        return self._problem

    def weight(self, module: TrainablePlanes) -> Tensor:
        slot = self._come_to(module)
        return self._views[self._block_of[module]][slot][module][: module.out_features]

    def gradient(self, module: TrainablePlanes) -> Tensor:
        self._come_to(module)
        return self._gradient_views[self._block_of[module]][self._at % 2][module][: module.out_features]

    def _come_to(self, module: TrainablePlanes) -> int:
        """Go on to the block of a module in this pass; returns the slot that its weights are in."""
        i = self._block_of[module]
        place = self._pass * self._each + (2 * len(self._blocks) - 1 - i if self._back else i)
        if place < self._at:
            raise RuntimeError("a block ran again after the blocks behind it, so its weights are gone")
        self._advance(place)
        if self._problem:
            raise torch.OutOfMemoryError(self._problem)
        return self._order[place][2]

    @torch.no_grad()
    def _advance(self, place: int) -> None:
        while self._at < place:
            if self._at >= 0 and self._order[self._at][1]:
                self._send_gradients()
            self._at += 1
            if self._at < len(self._order):
                self._open()

    def _open(self) -> None:
        """Have the weights of the block at hand, and begin to gather those of the next one."""
        i, back, _ = self._order[self._at]
        if self._at == 0:
            self._gather(0)
        for coming in self._coming:
            coming.wait()
        self._coming = []
        if self._at + 1 < len(self._order) and self._order[self._at + 1][0] != i:
            self._gather(self._at + 1)
        if back:
            self._gradients[self._at % 2].zero_()

    def _gather(self, place: int) -> None:
        i, _, slot = self._order[place]
        for module, whole in self._views[i][slot].items():
            try:
                module.build(whole[module.rows])
            except torch.OutOfMemoryError as error:  # the others wait for these rows and all that come after them
                self._problem = str(error) or "out of memory"
            self._coming.append(distributed.all_gather(whole, _own_part(whole, module)))

    def _send_gradients(self) -> None:
        i = self._order[self._at][0]
        self._collect()
        for module, whole in self._gradient_views[i][self._at % 2].items():
            own = _own_part(whole, module)
            self._sent.append((module, own, distributed.reduce_scatter(own, whole)))

    def _collect(self) -> None:
        for module, own, sent in self._sent:
            sent.wait()
            module.gradient += own[: len(module.gradient)]
        self._sent = []


def _own_part(whole: Tensor, module: TrainablePlanes) -> Tensor:
    """Return the own part of a tensor with the rows of all parts."""
    each = module.share.each(module.out_features)
    return whole[module.share.part * each : (module.share.part + 1) * each]


def _views(block: Sequence[TrainablePlanes], slot: Tensor) -> dict[TrainablePlanes, Tensor]:
    """Return a matrix with the rows of all parts for each module of a block, one after the other in a slot."""
    views, start = {}, 0
    for module in block:
        n, m = module.padded_shape
        views[module] = slot[start : start + n * m].view(n, m)
        start += n * m
    return views
