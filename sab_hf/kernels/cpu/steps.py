"""A recorded pass as the steps of csrc/steps.h, and their memory."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from . import library
from .linear import layouts_of, matrix_of
from .lowering import Lowering
from .operands import DIMS, DTYPES, Amount, Elsewhere, Placed, State, Step, offset_of, strides_of
from .recording import Call, Number, Recording, View

OPERANDS = 4
KINDS = ("map", "reduce", "normalize", "gather", "multiply", "attend", "guard", "packed")  # enum sab_step_kind
FUNCTIONS = (  # enum sab_step_function
    *("copy", "neg", "not", "abs", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid"),
    *("silu", "gelu", "gelu_tanh", "relu", "reciprocal", "square", "add", "sub", "mul", "div", "pow"),
    *("max", "min", "and", "or", "eq", "ne", "lt", "le", "gt", "ge", "where", "iota", "sum", "mean"),
    *("all", "any", "softmax", "layer_norm", "rms_norm"),
)
_ALIGNMENT = 64
_FIXED = -1  # the base of an address that never changes


class _Operand(ctypes.Structure):
    """`sab_operand` of csrc/steps.h."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * DIMS), ("dtype", ctypes.c_int64)]


class _Step(ctypes.Structure):
    """`sab_step` of csrc/steps.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "function", "integers", "inputs")),
        ("size", ctypes.c_int64 * DIMS),
        ("operand", _Operand * OPERANDS),
        ("number", ctypes.c_double * (OPERANDS - 1)),
        ("mask", _Operand),
        *((name, ctypes.c_int64) for name in ("count", "key_heads", "exact")),
        *((name, ctypes.c_void_p) for name in ("matrices", "outputs")),
    ]


class _Patch(ctypes.Structure):
    """`sab_patch` of csrc/steps.h."""

    _fields_ = [
        ("where", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("base", "constant", "per_token", "per_room")),
    ]


class Steps:
    """The steps of a pass, ready to run.

    Args:
        recording: compared, see `recording.compare`.
        fixed: tensors whose memory the steps use as it is, by storage.
        named: storages that are handed over for each run.
        states: see `State`.
        outputs: storages of results, of which every run gives new memory.

    Raises:
        NotReplayableError: a call can be neither a step nor run elsewhere.
    """

    def __init__(
        self,
        recording: Recording,
        fixed: dict[int, Tensor],
        named: list[int],
        states: list[State],
        outputs: list[int],
    ):
        self.states, self.outputs = states, outputs
        self._recording = recording
        self._fixed = fixed
        items = Lowering(recording, fixed, states).items()
        self._slots = {storage: place for place, storage in enumerate([*named, *outputs])}  # places among the bases
        for place, state in enumerate(states, len(self._slots)):
            self._slots[state.storage] = self._slots[state.grown] = place
        self._bases = len(named) + len(outputs) + len(states)
        self._growing: list[int] = []
        self._addresses: dict[int, int] = {}
        self._arena = self._allocate(items)
        self._room = 0
        self._grown: list[Tensor] = []
        self._patches: list[_Patch] = []
        self._kept: list[Any] = []
        self._emit(items)

    # ---- memory

    def _allocate(self, items: list[tuple[Step | Elsewhere, list[int], list[int]]]) -> Tensor:
        """Give every storage that calls make its place: those of fixed size share an arena, by when they are in use."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for index, (_, writes, reads) in enumerate(items):
            for storage in [*writes, *reads]:
                if storage not in self._slots and storage not in self._fixed:
                    first.setdefault(storage, index)
                    last[storage] = index
        ends: dict[int, list[int]] = {}
        for storage, index in last.items():
            ends.setdefault(index, []).append(storage)
        begins: dict[int, list[int]] = {}
        for storage, index in first.items():
            begins.setdefault(index, []).append(storage)
        free: list[tuple[int, int]] = []
        total, places = 0, {}
        for index in range(len(items)):
            for storage in begins.get(index, ()):
                size = self._recording.sizes[storage]
                if not size.fixed:
                    self._slots[storage] = self._bases
                    self._bases += 1
                    self._growing.append(storage)
                    continue
                length = max(_ALIGNMENT, -(-size.constant // _ALIGNMENT) * _ALIGNMENT)
                fitting = min((f for f in free if f[1] >= length), key=lambda f: f[1], default=None)
                if fitting is None:
                    places[storage] = total, length
                    total += length
                else:
                    free.remove(fitting)
                    places[storage] = fitting[0], length
                    if fitting[1] > length:
                        free.append((fitting[0] + length, fitting[1] - length))
            for storage in ends.get(index, ()):
                if storage in places:
                    free.append(places[storage])
        arena = torch.zeros(total + _ALIGNMENT, dtype=torch.uint8)
        shift = -arena.data_ptr() % _ALIGNMENT
        self._offsets = {storage: shift + place for storage, (place, _) in places.items()}
        self._addresses = {storage: arena.data_ptr() + offset for storage, offset in self._offsets.items()}
        self._addresses |= {s: t.untyped_storage().data_ptr() for s, t in self._fixed.items() if s not in self._slots}
        return arena

    def _make_room(self, room: int) -> None:
        """Give storages that grow with the tokens memory for `room` of them."""
        if room > self._room:
            self._grown = [
                torch.empty(max(1, self._recording.sizes[storage].at(room)), dtype=torch.uint8)
                for storage in self._growing
            ]
            self._room = room

    # ---- into C

    def _emit(self, items: list[tuple[Step | Elsewhere, list[int], list[int]]]) -> None:
        """Write the steps, in runs between the calls that PyTorch does."""
        steps = [item for item, _, _ in items if isinstance(item, Step)]
        self._steps = (_Step * max(1, len(steps)))()
        self._parts: list[tuple[int, int] | Call] = []
        begin = index = 0
        for item, _, _ in items:
            if isinstance(item, Elsewhere):
                if index > begin:
                    self._parts.append((begin, index))
                self._parts.append(item.call)
                begin = index
            else:
                self._write(self._steps[index], item)
                index += 1
        if index > begin:
            self._parts.append((begin, index))
        self._patch_array = (_Patch * max(1, len(self._patches)))(*self._patches)

    def _write(self, into: _Step, step: Step) -> None:
        into.kind, into.function = KINDS.index(step.kind), FUNCTIONS.index(step.function)
        into.integers, into.inputs = step.integers, len(step.operands) - 1
        pad = DIMS - len(step.sizes)
        sizes = [Amount(1)] * pad + [Amount(*size) for size in step.sizes]
        for place, size in enumerate(sizes):
            self._set(into, "size", place, size)
        for place, operand in enumerate(step.operands):
            if operand is not None:
                self._place(into.operand[place], operand, pad)
        if step.mask is not None:
            self._place(into.mask, step.mask, pad)
        for place, number in step.numbers.items():
            into.number[place] = number
        self._set(into, "count", None, Amount(*step.count) if isinstance(step.count, tuple) else Amount(step.count))
        into.key_heads, into.exact = step.key_heads, step.exact
        if step.products:
            self._write_products(into, step)

    def _write_products(self, into: _Step, step: Step) -> None:
        kernels = library.load()
        layouts = [layouts_of(kernels, operands) for operands, _ in step.products]
        each = [matrix_of(operands, codes) for (operands, _), codes in zip(step.products, layouts, strict=True)]
        matrices = (library.Matrix * len(each))(*each)
        outputs = (ctypes.c_void_p * len(step.products))()
        for place, (_, result) in enumerate(step.products):
            self._point(ctypes.addressof(outputs) + 8 * place, result)
        self._kept += [matrices, outputs, step.products, layouts]
        into.matrices, into.outputs = ctypes.addressof(matrices), ctypes.addressof(outputs)
        into.count = len(step.products)

    def _place(self, into: _Operand, operand: Placed, pad: int) -> None:
        into.dtype = DTYPES[operand.dtype]
        for place, stride in enumerate([Amount(0)] * pad + operand.strides):
            self._set(into, "stride", place, stride)
        self._point(ctypes.addressof(into) + _Operand.data.offset, operand)

    def _point(self, where: int, operand: Placed) -> None:
        """Write the operand's address to `where`, or have it written for each run."""
        width = operand.dtype.itemsize
        offset = Amount(*(width * part for part in operand.offset))
        base = self._slots.get(operand.storage, _FIXED)
        if base == _FIXED:
            address = self._addresses[operand.storage]
            offset = offset._replace(constant=offset.constant + address)
        if base == _FIXED and offset.fixed:
            ctypes.c_int64.from_address(where).value = offset.constant
        else:
            self._patches.append(_Patch(where, base, *offset))

    def _set(self, structure: ctypes.Structure, name: str, place: int | None, amount: Amount) -> None:
        """Write a number of a structure, or have it written for each run."""
        where = ctypes.addressof(structure) + getattr(type(structure), name).offset + 8 * (place or 0)
        ctypes.c_int64.from_address(where).value = amount.constant
        if not amount.fixed:
            self._patches.append(_Patch(where, _FIXED, *amount))

    # ---- running

    def run(self, tokens: int, room: int, given: dict[int, Tensor], threads: int) -> dict[int, Tensor] | None:
        """Run the pass for `tokens` tokens in the cache.

        Args:
            tokens: in the cache, before this one.
            room: tokens that the states' tensors have room for.
            given: by storage, the named tensors, and for each state a tensor that begins with it and has room for more.
            threads: to use.

        Returns:
            By storage, tensors at the beginning of the outputs' memory; None if this pass has to go another way than the
            recorded one: then nothing but room beyond the tokens of the states was written.

        Raises:
            MemoryError: there is no memory for it.
        """
        self._make_room(room)
        made = {s: torch.empty(self._recording.sizes[s].at(tokens), dtype=torch.uint8) for s in self.outputs}
        memory = given | made | dict(zip(self._growing, self._grown, strict=True))
        for state in self.states:
            memory[state.grown] = memory[state.storage]
        bases = (ctypes.c_void_p * self._bases)()
        for storage, base in self._slots.items():
            bases[base] = memory[storage].data_ptr()
        kernels = library.load()
        kernels.sab_cpu_patch(self._patch_array, len(self._patches), bases, tokens, room)
        size = ctypes.sizeof(_Step)
        for part in self._parts:
            if isinstance(part, Call):
                if not self._call(part, tokens, room, memory):
                    return None
                continue
            begin, end = part
            failed = kernels.sab_cpu_steps(ctypes.addressof(self._steps) + size * begin, end - begin, threads)
            if failed == library.NO_MEMORY:
                raise MemoryError("no memory for the steps of a token")
            if failed:
                return None
        return made

    def _call(self, call: Call, tokens: int, room: int, memory: dict[int, Tensor]) -> bool:
        """Have PyTorch do a call, and write its results where steps look for them; False if they are other ones."""
        found = call.op(**{name: self._value(value, tokens, room, memory) for name, value in call.arguments.items()})
        found = list(found) if isinstance(found, (list, tuple)) else [found]
        for view, result in zip(call.results, found, strict=True):
            into = self.tensor(view, tokens, room, memory)
            if result.shape != into.shape or result.dtype != into.dtype:
                return False
            if result.data_ptr() != into.data_ptr():
                into.copy_(result)
        return True

    def _value(self, value: Any, tokens: int, room: int, memory: dict[int, Tensor]) -> Any:
        if isinstance(value, View):
            return self.tensor(value, tokens, room, memory)
        if isinstance(value, Number):
            return value.at(tokens)
        if isinstance(value, list):
            return [self._value(item, tokens, room, memory) for item in value]
        return value

    def tensor(self, view: View, tokens: int, room: int, memory: dict[int, Tensor]) -> Tensor:
        """Return the tensor that a view is at so many tokens."""
        size = [number.at(tokens) for number in view.size]
        stride = [amount.at(tokens, room) for amount in strides_of(view, self.states)]
        offset = offset_of(view, self.states).at(tokens, room)
        if view.storage in memory:
            begin = memory[view.storage]
            storage = begin.untyped_storage()
            offset += begin.storage_offset() * begin.itemsize // view.dtype.itemsize
        elif view.storage in self._fixed:
            storage = self._fixed[view.storage].untyped_storage()
        else:
            storage = self._arena.untyped_storage()
            offset += self._offsets[view.storage] // view.dtype.itemsize
        return torch.empty(0, dtype=view.dtype).set_(storage, offset, size, stride)
