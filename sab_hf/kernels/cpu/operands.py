"""What steps are made of: amounts that grow with the tokens, tensors as operands, and the tensors of a cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..ops import Operands
from . import linear
from .recording import Call, NotReplayableError, Number, View

DIMS = 4
DTYPES = {**linear.DTYPES, torch.int64: 3, torch.int32: 4, torch.bool: 5}  # csrc/steps.h
_PROBE = 1009  # tokens, to tell which numbers are multiples of a length


class Amount(NamedTuple):
    """constant + per_token · tokens + per_room · room."""

    constant: int
    per_token: int = 0
    per_room: int = 0

    def at(self, tokens: int, room: int) -> int:
        return self.constant + self.per_token * tokens + self.per_room * room

    @property
    def fixed(self) -> bool:
        return self.per_token == 0 and self.per_room == 0


class Placed(NamedTuple):
    """An operand of a step: the tensor's storage, its offset in elements, and a stride for each dimension of the step."""

    storage: int
    offset: Amount
    strides: list[Amount]
    dtype: torch.dtype


@dataclass
class Step:
    """One step before it has addresses; `operands` are the result and the inputs, numbers where they are no tensors."""

    kind: str
    function: str = "copy"
    integers: bool = False
    sizes: Sequence[Number | Amount] = ()
    operands: Sequence[Placed | None] = ()
    numbers: dict[int, Any] = field(default_factory=dict)
    mask: Placed | None = None
    count: Number | int = 0
    key_heads: int = 0
    products: list[tuple[Operands, Placed]] = field(default_factory=list)
    exact: bool = False


@dataclass
class Elsewhere:
    """A call that has no step: PyTorch runs it on the same memory."""

    call: Call


class State(NamedTuple):
    """A tensor that a pass takes over from the one before, and adds to at the end of one dimension.

    Its memory has room: `room` entries along that dimension, of which it is the first ones.

    Attributes:
        storage: of the tensor before.
        grown: storage of the tensor with what was added.
        dim: along which it grows.
        size: of the tensor before.
        dtype: of both.
        added: entries that come to it.
        dropped: entries at its beginning that the next pass does not get, as in a window that moves.
    """

    storage: int
    grown: int
    dim: int
    size: tuple[Number, ...]
    dtype: torch.dtype
    added: int
    dropped: int

    @property
    def entry(self) -> int:
        """Elements from one entry to the next."""
        return math.prod(number.constant for number in self.size[self.dim + 1 :])

    def length(self, storage: int) -> Number:
        """Return the entries of the tensor in a storage, before or after."""
        length = self.size[self.dim]
        return length if storage == self.storage else Number(length.constant + self.added, length.per_token)


def state_of(storage: int, states: list[State]) -> State | None:
    """Return the state whose tensor, before or after, lies in a storage."""
    return next((state for state in states if storage in (state.storage, state.grown)), None)


def strides_of(view: View, states: list[State]) -> list[Amount]:
    """Return a view's strides in the memory that the steps give its storage: that of a state has room to grow.

    Raises:
        NotReplayableError: a view of a state that cannot be one of the same with more room.
    """
    state = state_of(view.storage, states)
    if state is None:
        return [Amount(*number) for number in view.stride]
    length = state.length(view.storage)
    return [_with_room(number, length, state.entry) for number in view.stride]


def _with_room(stride: Number, length: Number, entry: int) -> Amount:
    """Return a stride in a contiguous tensor of `length` entries as it is where there is room for more of them."""
    whole, rest = divmod(stride.at(_PROBE), length.at(_PROBE) * entry)
    if whole and not rest and stride == Number(*(whole * entry * part for part in length)):
        return Amount(0, 0, whole * entry)
    if not stride.fixed or stride.constant > entry:
        raise NotReplayableError("a view of the cache takes steps that depend on its length in another way")
    return Amount(stride.constant)


def offset_of(view: View, states: list[State]) -> Amount:
    """Return a view's offset, in elements.

    Raises:
        NotReplayableError: a view of a state that does not begin at an entry that stays where it is.
    """
    state = state_of(view.storage, states)
    if state is not None and view.offset != Number(0):
        first_row = state.entry * state.length(view.storage).at(0)
        if not view.offset.fixed or view.offset.constant >= first_row:
            raise NotReplayableError("a view of the cache begins at its end")
    return Amount(*view.offset)
