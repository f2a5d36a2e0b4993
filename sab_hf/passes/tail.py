"""What a model makes of the output of its last block: logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..calibration import CalibrationBatch
from .states import BatchState
from .tracing import makes_some_logits, output_of_last_block

_TEXT = ("input_ids", "attention_mask")


class NoLogitsError(Exception):
    """A model that gives no logits for the positions of its blocks; the message says why."""


class Tail:
    """Run a model from the output of its last block on.

    What comes before the blocks is not wanted but runs too, as it is the model's own forward that is called. Where it gives the
    same logits for the token ids alone, towers stay out.

    Args:
        model: everything beside its blocks is on the compute device.
        blocks: the language blocks.
        batch, state: one batch of the calibration set, and its state with `hidden`, to try it on.
    Raises:
        NoLogitsError: the model gives no logits for these positions.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module], batch: CalibrationBatch, state: BatchState):
        self.model, self.blocks = model, blocks
        self.by_ids = False
        hidden = state.hidden.to(state.workspace.device)
        self.chunks = makes_some_logits(model, batch.inputs)
        part = slice(0, min(8, hidden.shape[-2]))
        with torch.no_grad():
            whole = self.logits(batch, state, hidden, part)
            self.by_ids = not batch.inputs.keys() - set(_TEXT) or self._same_by_ids(batch, state, hidden, part, whole)

    def logits(self, batch: CalibrationBatch, state: BatchState, hidden: Tensor, part: slice) -> Tensor:
        """Return the logits [batch, positions, vocabulary] for what the last block gives, [..., batch, length, hidden_size].

        Args:
            batch, state: the whole batch.
            part: positions; all of them where the model cannot be asked for some.
        """
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
