"""What a model's pass for one token computes: the PyTorch operations it calls, recorded twice and compared.

Two passes, at t and t + 1 tokens in the cache, tell which of the numbers that an operation is called with are always the same
and which grow with the tokens. A pass that calls other operations the second time, or whose numbers do not grow evenly, cannot be
replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class NotReplayableError(RuntimeError):
    """A pass does something that a list of steps cannot do again."""


class Number(NamedTuple):
    """An integer that grows with the tokens: constant + per_token · tokens."""

    constant: int
    per_token: int = 0

    def at(self, tokens: int) -> int:
        """Return its value at so many tokens in the cache."""
        return self.constant + self.per_token * tokens

    @property
    def fixed(self) -> bool:
        return self.per_token == 0


class View(NamedTuple):
    """A tensor as a view of a numbered storage; sizes and strides in elements, `Number`s once two recordings were compared."""

    storage: int
    offset: Any
    size: tuple
    stride: tuple
    dtype: torch.dtype


class Call(NamedTuple):
    """An operation with its arguments by name (tensors as `View`), and the tensors it returned."""

    op: torch._ops.OpOverload
    arguments: dict[str, Any]
    results: list[View]


@dataclass
class Recording:
    """The operations of a pass.

    Attributes:
        calls: in their order.
        sizes: bytes of each storage, by its number.
        made: storages that a call made, by number, and the index of that call.
        tensors: the tensors of the pass, which keep their storages apart for as long as they are compared.
    """

    calls: list[Call] = field(default_factory=list)
    sizes: list[Any] = field(default_factory=list)
    made: dict[int, int] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)

    def view(self, tensor: Tensor) -> View:
        """Return the view that `tensor` is, and keep it.

        Raises:
            NotReplayableError: it is no plain dense CPU tensor.
        """
        plain = type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer) and tensor.layout is torch.strided
        if not plain or tensor.device.type != "cpu" or tensor.is_neg() or tensor.is_conj():
            raise NotReplayableError(f"a {type(tensor).__name__} on {tensor.device} takes part")
        storage = tensor.untyped_storage()
        number = self._numbers.setdefault(storage._cdata, len(self.sizes))
        if number == len(self.sizes):
            self.sizes.append(storage.nbytes())
        self.tensors.append(tensor)
        return View(number, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def tensor(self, storage: int) -> Tensor:
        """Return the first tensor that was seen in a storage."""
        return next(t for t in self.tensors if self._numbers[t.untyped_storage()._cdata] == storage)

    def views(self, value: Any) -> Any:
        """Return `value` with every tensor in it, also within lists and dicts, as a view."""
        if isinstance(value, Tensor):
            return self.view(value)
        if isinstance(value, (list, tuple)):
            return [self.views(item) for item in value]
        if isinstance(value, dict):
            return {key: self.views(item) for key, item in value.items()}
        return value


class Recorder(TorchDispatchMode):
    """Writes the operations that run under it into a `Recording`; they run as always."""

    def __init__(self):
        super().__init__()
        self.recording = Recording()
        self.failure: NotReplayableError | None = None

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.failure is not None:
            return function(*args, **kwargs)
        try:
            # before it runs: some operations change what a tensor is a view of
            arguments = self.recording.views(_by_name(function, args, kwargs))
        except NotReplayableError as failure:
            self.failure = failure
        result = function(*args, **kwargs)
        try:
            if self.failure is None:
                self._write(function, arguments, result)
        except NotReplayableError as failure:
            self.failure = failure
        return result

    def _write(self, function: Callable, arguments: dict[str, Any], result: Any) -> None:
        """Add a call to the recording. Where it returned a number, that is an argument: the pass went on by it."""
        index, before = len(self.recording.calls), len(self.recording.sizes)
        results = self.recording.views([] if result is None else _flat(result))
        for number in range(before, len(self.recording.sizes)):
            self.recording.made[number] = index
        if not all(isinstance(found, View) for found in results):
            arguments, results = arguments | {"returned": results}, []
        self.recording.calls.append(Call(function, arguments, results))


def record(run: Callable[[], Any]) -> tuple[Recording, Any]:
    """Run `run` without gradients and return what it computed and what it returned.

    Raises:
        NotReplayableError: its operations cannot be recorded.
    """
    recorder = Recorder()
    with torch.inference_mode(), recorder:
        result = run()
    if recorder.failure is not None:
        raise recorder.failure
    return recorder.recording, result


def compare(
    first: Recording, second: Recording, tokens: int, pairs: list[tuple[View, View]]
) -> tuple[Recording, list[View]]:
    """Return a recording whose numbers hold for any count of tokens, from two of them.

    Args:
        first: at `tokens` tokens in the cache.
        second: at one more.
        pairs: tensors of interest of the first and the second.
    Returns:
        The recording, whose storages have the numbers of the first one, and the tensors of interest in it.
    Raises:
        NotReplayableError: they differ by more than tokens.
    """
    if len(first.calls) != len(second.calls):
        raise NotReplayableError(f"one token takes {len(first.calls)} operations, the next {len(second.calls)}")
    comparison = _Comparison(tokens)
    calls = []
    for a, b in zip(first.calls, second.calls, strict=True):
        if a.op is not b.op:
            raise NotReplayableError(f"one token takes {a.op}, the next {b.op}")
        calls.append(Call(a.op, comparison.merge(a.arguments, b.arguments), comparison.merge(a.results, b.results)))
    interest = [comparison.merge(a, b) for a, b in pairs]
    sizes = [
        comparison.merge(size, second.sizes[comparison.storages[number]])
        if number in comparison.storages
        else Number(size)
        for number, size in enumerate(first.sizes)
    ]
    for number, other in comparison.storages.items():
        if first.made.get(number) != second.made.get(other):
            raise NotReplayableError("a tensor of one token comes from elsewhere the next time")
    return Recording(calls, sizes, first.made, first.tensors, first._numbers), interest


class _Comparison:
    """Pairs what two recordings hold."""

    def __init__(self, tokens: int):
        self._tokens = tokens
        self.storages: dict[int, int] = {}

    def merge(self, a: Any, b: Any) -> Any:
        """Return `a` with integers as `Number`s."""
        if type(a) is not type(b):
            raise NotReplayableError(f"{a!r} became {b!r}")
        if isinstance(a, View):
            if self.storages.setdefault(a.storage, b.storage) != b.storage or len(a.size) != len(b.size):
                raise NotReplayableError("a tensor is a view of another one the next time")
            if a.dtype is not b.dtype:
                raise NotReplayableError(f"{a.dtype} became {b.dtype}")
            offset = self._number(a.offset, b.offset)
            return View(a.storage, offset, self._numbers(a.size, b.size), self._numbers(a.stride, b.stride), a.dtype)
        if isinstance(a, (list, tuple)):
            if len(a) != len(b):
                raise NotReplayableError(f"{len(a)} arguments became {len(b)}")
            return [self.merge(x, y) for x, y in zip(a, b, strict=True)]
        if isinstance(a, dict):
            if a.keys() != b.keys():
                raise NotReplayableError(f"the arguments {sorted(a)} became {sorted(b)}")
            return {key: self.merge(value, b[key]) for key, value in a.items()}
        if isinstance(a, int) and not isinstance(a, bool):
            return self._number(a, b)
        if a != b and not (a != a and b != b):
            raise NotReplayableError(f"{a!r} became {b!r}")
        return a

    def _numbers(self, a: tuple, b: tuple) -> tuple:
        return tuple(self._number(x, y) for x, y in zip(a, b, strict=True))

    def _number(self, a: int, b: int) -> Number:
        slope = b - a
        return Number(a - slope * self._tokens, slope)


def _by_name(function: torch._ops.OpOverload, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Return the arguments of a call by the names in its schema, those left out by their defaults."""
    found = dict(kwargs)
    for place, argument in enumerate(function._schema.arguments):
        if place < len(args):
            found[argument.name] = args[place]
        elif argument.name not in found:
            found[argument.name] = argument.default_value
    return found


def _flat(result: Any) -> list:
    """Return what an operation returned as a list."""
    return list(result) if isinstance(result, (list, tuple)) else [result]
