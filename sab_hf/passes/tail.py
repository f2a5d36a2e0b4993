"""What a model makes of the output of its last block: logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..calibration import TEXT, CalibrationBatch
from .states import BatchState
from .tracing import makes_some_logits, output_of_last_block

_TEXT = ("input_ids", "attention_mask")

LOGIT_BYTES = 2 * 2**30
"""Most memory that logits, their probabilities and their gradients take at once, where a model can be asked for some of them."""

BYTES_PER_LOGIT = 24
"""Peak of the divergence of two distributions and its gradient, in bytes for each logit: six float32 copies (on a GPU, where a
kernel computes it, four of bfloat16)."""


class NoLogitsError(Exception):
    """A model that gives no logits for the positions of its blocks; the message says why."""


class Tail:
    """Run a model from the output of its last block on.

    Where the modules that run after the last block (norm, head) give the same logits one after the other, they alone run. Else it
    is the model's own forward that is called, with what comes before the blocks; where that gives the same logits for the token
    ids alone, towers stay out.

    Args:
        model: everything beside its blocks is on the compute device.
        blocks: the language blocks.
        batch, state: one batch of the calibration set, and its state with `hidden`, to try it on.
    Raises:
        NoLogitsError: the model gives no logits for these positions.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module], batch: CalibrationBatch, state: BatchState):
        self.model, self.blocks = model, blocks
        self.by_ids, self.chain = False, []
        hidden = state.hidden.to(state.workspace.device)
        self.dtype = hidden.dtype
        self.chunks = makes_some_logits(model, batch.inputs)
        start = int((state.modality > TEXT).any(0).int().argmax())  # of an image, whose features a model may add
        part = slice(start, min(start + 8, hidden.shape[-2]))
        with torch.no_grad():
            with _called_after(model, blocks[-1]) as called:
                whole = self.logits(batch, state, hidden, part)
            self.width = whole.shape[-1]
            given = whole if self.chunks else whole[:, part]
            self.chain = self._same_by_modules(called, hidden[..., part, :], given)
            if not self.chain:
                ids_alone = not batch.inputs.keys() - set(_TEXT)
                self.by_ids = ids_alone or self._same_by_ids(batch, state, hidden, part, whole)

    def positions(self, batch: CalibrationBatch, bytes_per_logit: float = BYTES_PER_LOGIT) -> int:
        """Return for how many positions of each sample of a batch logits are made at once, so that their loss fits in memory."""
        if not (self.chain or self.chunks):
            return batch.modality.shape[1]
        return positions_within(batch, self.width, bytes_per_logit)

    def logits(self, batch: CalibrationBatch, state: BatchState, hidden: Tensor, part: slice) -> Tensor:
        """Return the logits [batch, positions, vocabulary] for what the last block gives, [..., batch, length, hidden_size].

        Args:
            batch, state: the whole batch.
            part: positions; all of them where the model cannot be asked for some.
        """
        if not torch.is_autocast_enabled(hidden.device.type):  # trained blocks compute in float32, a head need not
            hidden = hidden.to(self.dtype)
        if self.chain:
            return _through(self.chain, hidden[..., part, :])
        options = {}
        length = hidden.shape[-2]
        if self.chunks and part != slice(0, length):
            options["logits_to_keep"] = torch.arange(part.start, part.stop, device=hidden.device)
        if self.by_ids:
            batch = CalibrationBatch({key: batch.inputs[key] for key in _TEXT if key in batch.inputs}, batch.modality)
        output = output_of_last_block(self.model, self.blocks, batch, state, hidden, **options)
        logits = getattr(output, "logits", None)
        if logits is None:
            raise NoLogitsError(f"{type(self.model).__name__} gives no `logits`")
        wanted = part.stop - part.start if options else length
        if logits.shape[1] != wanted:
            raise NoLogitsError(f"{type(self.model).__name__} gives logits for {logits.shape[1]} of {wanted} positions")
        return logits

    def _same_by_modules(self, called: list[nn.Module], hidden: Tensor, expected: Tensor) -> list[nn.Module]:
        """Return the modules if they give the expected logits one after the other, else none."""
        try:
            return called if torch.equal(_through(called, hidden), expected) else []
        except Exception:  # whatever a module raises that was called with something else
            return []

    def _same_by_ids(
        self, batch: CalibrationBatch, state: BatchState, hidden: Tensor, part: slice, expected: Tensor
    ) -> bool:
        self.by_ids = True
        try:
            return torch.equal(self.logits(batch, state, hidden, part), expected)
        except Exception:  # whatever a model raises that misses its pictures
            return False
        finally:
            self.by_ids = False


def positions_within(batch: CalibrationBatch, width: int, bytes_per_logit: float) -> int:
    """Return for how many positions of each sample `width` logits, and what is made of them, fit into `LOGIT_BYTES`."""
    samples, length = batch.modality.shape
    return min(length, max(1, int(LOGIT_BYTES / (bytes_per_logit * samples * width))))


def _through(modules: list[nn.Module], hidden: Tensor) -> Tensor:
    for module in modules:
        hidden = module(hidden)
    return hidden


@contextmanager
def _called_after(model: nn.Module, block: nn.Module) -> Iterator[list[nn.Module]]:
    """Yield a list that gets the modules without parts of their own that run after a block, in order."""
    called: list[nn.Module] = []
    hooks = [block.register_forward_hook(lambda *_: called.clear())]
    for module in model.modules():
        if module is not block and not any(True for _ in module.children()):
            hooks.append(module.register_forward_hook(lambda module, *_: called.append(module)))
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()
