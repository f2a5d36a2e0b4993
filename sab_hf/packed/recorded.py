"""Tokens of `generate` on a CPU as recorded steps: what a model's `forward` does for one token, without Python in between.

The first two tokens of a kind are recorded while the model computes them as always; from the third on the compiled steps of
`kernels.cpu.steps` run in their place, on the memory of the cache, which has room to grow. What cannot be recorded goes the
model's own way, for good.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import os
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.utils import ModelOutput

from ..kernels.cpu import library
from ..kernels.cpu.operands import State
from ..kernels.cpu.recording import NotReplayableError, Number, Recording, View, compare, record
from ..kernels.cpu.steps import Steps
from ..kernels.layouts import version_of
from .linear import SABModule

logger = logging.getLogger(__name__)

SWITCH = "SAB_STEPS"
_FEWEST_TOKENS = 2  # in the cache: sizes of 0 and 1 are also those of other things
_MOST_BATCH = 8
_MOST_TRIES = 3
_ROOM = 256  # tokens by which the cache's memory grows at least
_CLOSE = {torch.float32: 0.02, torch.bfloat16: 0.1, torch.float16: 0.05}  # from the model's own pass
_PLAIN = (bool, int, float, str, type(None))


def record_decoding(model: nn.Module, enabled: bool = True) -> bool:
    """Have a model's passes for one token with a dynamic cache run as recorded steps, on CPUs.

    `from_pretrained` does it for packed models, unless the environment variable `SAB_STEPS` is 0.

    Args:
        model: with packed modules.
        enabled: False undoes it.
    Returns:
        Whether it is so now. It is not for models whose `forward` was replaced.
    """
    own = vars(model).get("forward")
    if isinstance(own, RecordedDecoding):
        if not enabled:
            del model.forward
        return enabled
    if not enabled or own is not None or not any(isinstance(module, SABModule) for module in model.modules()):
        return False
    model.forward = RecordedDecoding(model)
    return True


def record_by_default(model: nn.Module) -> None:
    """Record the decoding of a loaded model if all of it is on a CPU and the environment variable `SAB_STEPS` is not 0."""
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices == {"cpu"} and model.can_generate() and os.environ.get(SWITCH, "1") != "0":
        record_decoding(model)


@dataclass
class _Pass:
    """A recorded pass: the recording, and the views of what goes in and comes out.

    Attributes:
        tokens: in the cache before it.
        views: by part ("input", "before", "after", "output") and name; those of the cache, before and after, have (layer,
            attribute) as their name.
        counts: numbers of the cache and its layers that it raised by one, by (layer or None, attribute).
        values: what it returned, by name.
        kind: the class of what it returned.
        given: its inputs.
    """

    tokens: int
    recording: Recording
    views: dict[tuple[str, Any], View]
    counts: list[tuple[int | None, str]]
    values: dict[str, Any]
    kind: type
    given: dict[str, Tensor]


@dataclass
class _Room:
    """Memory of a cache's tensors with room for more tokens.

    Attributes:
        tokens: that there is room for.
        tensors: the memory, by (layer, attribute).
        begins: where in it the tensor begins that the cache holds now; it moves where a window does.
        views: those tensors.
    """

    tokens: int = 0
    tensors: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    begins: dict[tuple[int, str], int] = field(default_factory=dict)
    views: dict[tuple[int, str], Tensor] = field(default_factory=dict)


class _Replay:
    """The steps of one kind of pass.

    Args:
        first, second: recorded at t and t + 1 tokens.
        model: whose tensors the steps read where they are.

    Raises:
        NotReplayableError: the passes differ by more than tokens.
    """

    def __init__(self, first: _Pass, second: _Pass, model: nn.Module):
        same = first.counts == second.counts and first.kind is second.kind and first.views.keys() == second.views.keys()
        if second.tokens != first.tokens + 1 or not same:
            raise NotReplayableError("the second pass was none of one token more")
        pairs = [(view, second.views[key]) for key, view in first.views.items()]
        recording, views = compare(first.recording, second.recording, first.tokens, pairs)
        found: dict[str, dict[Any, View]] = {"input": {}, "before": {}, "after": {}, "output": {}}
        for (part, name), view in zip(first.views, views, strict=True):
            found[part][name] = view
        self._inputs, self._outputs = found["input"], found["output"]
        self._constant: dict[tuple[int, str], View] = {}
        self._states: dict[tuple[int, str], State] = {}
        for key, before in found["before"].items():
            after = found["after"][key]
            if before == after:
                self._constant[key] = before
            else:
                self._states[key] = _state(recording, before, after)
        self._counts, self._kind, self._values = first.counts, first.kind, first.values
        named = {view.storage for view in (*self._inputs.values(), *self._constant.values())}
        carried = named | {s for state in self._states.values() for s in (state.storage, state.grown)}
        self._model = model
        fixed, self._attributes = _tensors_of(model, recording, second.recording, carried)
        self._known = _what_counts(model)
        made = {view.storage for view in self._outputs.values() if view.storage in recording.made}
        named |= {storage for storage, *_ in self._attributes}
        passed_on = {view.storage for view in self._outputs.values()} - made
        if not passed_on <= named or made & carried:
            raise NotReplayableError("the pass returns a tensor of the model or the cache")
        self._steps = Steps(recording, fixed, sorted(named), list(self._states.values()), sorted(made))
        recording.tensors.clear()  # a copy of the cache, and all that was computed

    def is_for(self, model: nn.Module) -> bool:
        """Tell whether the model is still what it was: modules, hooks, settings, and where its tensors are."""
        return self._known == _what_counts(model)

    def run(self, cache: DynamicCache, room: _Room, inputs: dict[str, Tensor], tokens: int) -> ModelOutput | None:
        """Compute a pass, and write what it adds to the cache; None if it has to go another way."""
        given = {view.storage: inputs[name] for name, view in self._inputs.items()}
        for storage, module, attribute, form in self._attributes:
            given[storage] = getattr(module, attribute)
            if not isinstance(given[storage], Tensor) or _form(given[storage]) != form:
                return None
        for (layer, name), view in self._constant.items():
            given[view.storage] = getattr(cache.layers[layer], name).contiguous()
        for view in (*self._inputs.values(), *self._constant.values()):
            tensor = given[view.storage]
            if list(tensor.shape) != [number.at(tokens) for number in view.size] or tensor.dtype != view.dtype:
                return None
        if not self._take_over(cache, room, tokens):
            return None
        given |= {
            state.storage: room.tensors[key].narrow(state.dim, room.begins[key], 1)
            for key, state in self._states.items()
        }
        memory = self._steps.run(tokens, room.tokens, given, torch.get_num_threads())
        if memory is None:
            return None
        for key, state in self._states.items():
            layer, name = key
            room.begins[key] += state.dropped
            length = state.length(state.grown).at(tokens) - state.dropped
            view = room.views[key] = room.tensors[key].narrow(state.dim, room.begins[key], length)
            setattr(cache.layers[layer], name, view)
        for layer, name in self._counts:
            owner = cache if layer is None else cache.layers[layer]
            setattr(owner, name, getattr(owner, name) + 1)
        memory |= given
        outputs = {name: self._steps.tensor(view, tokens, room.tokens, memory) for name, view in self._outputs.items()}
        values = {name: cache if value is _CACHE else outputs.get(name, value) for name, value in self._values.items()}
        return self._kind(**values)

    def _take_over(self, cache: DynamicCache, room: _Room, tokens: int) -> bool:
        """Have the cache's growing tensors in memory with room for another token."""
        needed = max((state.length(state.grown).at(tokens) for state in self._states.values()), default=0)
        if needed > room.tokens:
            room.tokens = (needed * 5 // 4 // _ROOM + 1) * _ROOM
            room.tensors.clear()
            room.views.clear()
        for key, state in self._states.items():
            layer, name = key
            present = getattr(cache.layers[layer], name)
            size = [number.at(tokens) for number in state.size]
            added = room.begins.get(key, 0) + state.length(state.grown).at(tokens)
            if room.views.get(key) is present and added <= room.tokens:
                continue
            if list(present.shape) != size or present.dtype != state.dtype or present.device.type != "cpu":
                return False
            shape = [room.tokens if d == state.dim else length for d, length in enumerate(size)]
            # new memory where the present one is at its end: what others may hold of it stays
            room.tensors[key] = torch.empty(shape, dtype=state.dtype)
            room.tensors[key].narrow(state.dim, 0, size[state.dim]).copy_(present)
            room.begins[key] = 0
        return True


_CACHE = object()  # stands for the cache among what a pass returned


class RecordedDecoding:
    """A model's `forward`, see `record_decoding`."""

    def __init__(self, model: nn.Module):
        functools.update_wrapper(self, type(model).forward.__get__(model))
        self.__signature__ = inspect.signature(self.__wrapped__)
        self._model = model
        self._lock = threading.Lock()
        self._first: dict[tuple, _Pass] = {}
        self._replays: dict[tuple, _Replay] = {}
        self._tries: dict[tuple, int] = {}
        self._rooms: weakref.WeakKeyDictionary[DynamicCache, _Room] = weakref.WeakKeyDictionary()
        self.replayed = 0
        self.refused: dict[tuple, str] = {}

    def __deepcopy__(self, memo: dict) -> RecordedDecoding:
        return type(self)(copy.deepcopy(self._model, memo))

    def __reduce__(self):
        return type(self), (self._model,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            found = self._one_token(kwargs)
            if found is not None and self._lock.acquire(blocking=False):
                try:
                    output = self._step(kwargs, *found)
                finally:
                    self._lock.release()
                if output is not None:
                    return output
        return self.__wrapped__(*args, **kwargs)

    def _one_token(self, kwargs: dict[str, Any]) -> tuple[DynamicCache, tuple] | None:
        """Return the cache of a pass for one token, and what kind of pass it is; None for any other pass."""
        cache, key = None, []
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                key.append((name, value.dtype, value.ndim))
                if type(value) is not Tensor or value.device.type != "cpu":
                    return None
            elif isinstance(value, DynamicCache):
                if cache is not None:
                    return None
                cache = value
            elif isinstance(value, _PLAIN):
                key.append((name, value))
            else:
                return None
        ids = kwargs.get("input_ids")
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if cache is None or ids is None or ids.ndim < 2 or ids.shape[1] != 1 or ids.shape[0] > _MOST_BATCH:
            return None
        if self._model.training or not getattr(cache, "layers", None) or torch._C._len_torch_dispatch_stack():
            return None
        layers = []
        for layer in cache.layers:
            window = getattr(layer, "sliding_window", None)
            beyond = window is not None and layer.get_seq_length() + 1 >= window
            layers.append((type(layer).__name__, beyond))
        return cache, (ids.shape[0], *key, *dict.fromkeys(layers), len(layers))

    def _step(self, kwargs: dict[str, Any], cache: DynamicCache, key: tuple) -> Any:
        """Compute a pass by its steps, or record it; None if the model has to compute it."""
        tokens = cache.get_seq_length()
        if key in self.refused or not isinstance(tokens, int) or tokens < _FEWEST_TOKENS or library.load() is None:
            return None
        replay = self._replays.get(key)
        room = self._rooms.get(cache)
        if room is None:
            room = self._rooms[cache] = _Room()
            if replay is not None and not replay.is_for(self._model):
                self._first.pop(key, None)
                del self._replays[key]
                replay = None
        if replay is not None:
            inputs = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
            inputs = {n: v if v.is_contiguous() and not v.storage_offset() else v.clone() for n, v in inputs.items()}
            output = replay.run(cache, room, inputs, tokens)
            self.replayed += output is not None
            return output
        try:
            self._record(kwargs, cache, key, tokens)
        except Exception as failure:  # whatever a model does, it can be computed without steps
            self._refuse(key, f"{type(failure).__name__}: {failure}")
        return None

    def _record(self, kwargs: dict[str, Any], cache: DynamicCache, key: tuple, tokens: int) -> None:
        """Record a pass on a copy of the cache; with the one before make steps of it, and hold them against it."""
        recorded = _record_pass(self.__wrapped__, kwargs, cache, tokens)
        first = self._first.get(key)
        if first is None or first.tokens + 1 != tokens:
            self._first[key] = recorded
            return
        del self._first[key]
        replay = _Replay(first, recorded, self._model)
        shadow, room = _shadow(cache), _Room()
        output = replay.run(shadow, room, recorded.given, tokens)
        if output is None or not _is_close(output, recorded.values):
            tries = self._tries[key] = self._tries.get(key, 0) + 1
            if tries == _MOST_TRIES:
                self._refuse(key, "its steps gave another result than the model")
            return
        self._replays[key] = replay

    def _refuse(self, key: tuple, why: str) -> None:
        self.refused[key] = why
        self._first.pop(key, None)
        logger.info("tokens of %s are computed without recorded steps: %s", type(self._model).__name__, why)


def _record_pass(forward: Any, kwargs: dict[str, Any], cache: DynamicCache, tokens: int) -> _Pass:
    """Record a pass on copies of its inputs and of the cache.

    Raises:
        NotReplayableError: it cannot be recorded.
    """
    shadow = _shadow(cache)
    given = {name: value.clone() for name, value in kwargs.items() if isinstance(value, Tensor)}
    states = _tensors_in(shadow)
    before = _plain_values(shadow)
    passed = {name: shadow if value is cache else given.get(name, value) for name, value in kwargs.items()}
    recording, output = record(lambda: forward(**passed))
    if not isinstance(output, ModelOutput):
        raise NotReplayableError(f"it returns a {type(output).__name__}")
    after = _tensors_in(shadow)
    if after.keys() != states.keys():
        raise NotReplayableError("the cache has other tensors after it")
    values = {}
    for name, value in output.items():
        if not (value is None or value is shadow or isinstance(value, (Tensor, bool, int, float))):
            raise NotReplayableError(f"it returns `{name}`, a {type(value).__name__}")
        values[name] = _CACHE if value is shadow else value
    outputs = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    parts = {"input": given, "before": states, "after": after, "output": outputs}
    views = {(part, name): recording.view(tensor) for part, own in parts.items() for name, tensor in own.items()}
    return _Pass(tokens, recording, views, _raised(before, _plain_values(shadow)), values, type(output), given)


def _shadow(cache: DynamicCache) -> DynamicCache:
    """Return a copy of a cache with tensors of its own, contiguous ones: some passes write into them."""
    shadow = copy.deepcopy(cache)
    for (index, name), value in _tensors_in(shadow).items():
        setattr(shadow.layers[index], name, value.contiguous())
    return shadow


def _tensors_in(cache: DynamicCache) -> dict[tuple[int, str], Tensor]:
    """Return the tensors of a cache by (layer, attribute)."""
    return {
        (index, name): value
        for index, layer in enumerate(cache.layers)
        for name, value in vars(layer).items()
        if isinstance(value, Tensor)
    }


def _plain_values(cache: DynamicCache) -> dict[tuple[int | None, str], Any]:
    """Return the numbers, strings and flags of a cache and its layers."""
    owners = [(None, cache), *enumerate(cache.layers)]
    return {
        (index, name): value
        for index, owner in owners
        for name, value in vars(owner).items()
        if isinstance(value, _PLAIN)
    }


def _raised(before: dict, after: dict) -> list[tuple[int | None, str]]:
    """Return the numbers that a pass raised by one.

    Raises:
        NotReplayableError: it changed something else.
    """
    raised = []
    for key in before.keys() | after.keys():
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        if type(old) is not int or type(new) is not int or new != old + 1:
            raise NotReplayableError(f"it changes `{key[1]}` of the cache from {old!r} to {new!r}")
        raised.append(key)
    return sorted(raised, key=str)


def _state(recording: Recording, before: View, after: View) -> State:
    """Return the state that becomes `after` by adding something to the end of `before`.

    Raises:
        NotReplayableError: it is changed in another way.
    """
    made = recording.made.get(after.storage)
    call = recording.calls[made] if made is not None else None
    if call is None or call.op._schema.name != "aten::cat":
        raise NotReplayableError("the cache is not only added to")
    parts, dim = call.arguments["tensors"], call.arguments["dim"].constant % len(after.size)
    grown = call.results[0]
    added = grown.size[dim].constant - before.size[dim].constant
    state = State(before.storage, after.storage, dim, before.size, before.dtype, added, 0)
    length = before.size[dim]
    if parts[0] != before or grown.size[dim] != state.length(after.storage):
        raise NotReplayableError("the cache is not only added to")
    if after == grown and length.per_token == added:
        return state
    moved = after.size == before.size and length.fixed and after.offset == Number(added * state.entry)
    if moved and after.stride == grown.stride:
        return state._replace(dropped=added)
    raise NotReplayableError("the cache is not only added to")


def _tensors_of(
    model: nn.Module, recording: Recording, second: Recording, carried: set[int]
) -> tuple[dict[int, Tensor], list[tuple[int, nn.Module, str, tuple]]]:
    """Return the tensors that a pass reads and nobody hands over.

    They are the parameters and buffers of the model, by storage, with constants that the pass makes of the same numbers each
    time; and other attributes of its modules.

    Raises:
        NotReplayableError: it reads a tensor that is none of these.
    """
    owned: dict[int, Tensor] = {}
    others: dict[int, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for tensor in _own_tensors(module):
            owned[tensor.untyped_storage()._cdata] = tensor
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                others[value.untyped_storage()._cdata] = (module, name)
    fixed = {number: tensor.clone() for number, tensor in _constants(recording, second).items()}
    attributes = []
    for tensor in list(recording.tensors):
        number = recording.view(tensor).storage
        if number in recording.made or number in carried or number in fixed:
            continue
        place = tensor.untyped_storage()._cdata
        if place in owned:
            fixed[number] = owned[place]
        elif place in others:
            module, name = others[place]
            attributes.append((number, module, name, _form(getattr(module, name))))
            carried = carried | {number}
        else:
            raise NotReplayableError("it reads a tensor that belongs neither to the model nor to its inputs")
    return fixed, attributes


def _constants(first: Recording, second: Recording) -> dict[int, Tensor]:
    """Return what two passes made of the same numbers by `torch.tensor`, by storage of the first."""
    found = {}
    for a, b in zip(first.calls, second.calls, strict=True):
        if a.op._schema.name == "aten::lift_fresh":
            view, other = a.arguments["self"], b.arguments["self"]
            tensor, again = first.tensor(view.storage), second.tensor(other.storage)
            if view.storage not in first.made and torch.equal(tensor, again):
                found[view.storage] = tensor
    return found


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """Return parameters and buffers of a module without those of modules in it."""
    return [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]


def _form(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _what_counts(model: nn.Module) -> list[tuple]:
    """Return what a model's passes depend on beside what its tensors hold; packed ones count how often they were written."""
    found = []
    for module in model.modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module)
        own = _own_tensors(module)
        tensors = [(t.data_ptr(), version_of(t) if t.dtype is torch.uint8 else 0) for t in own]
        found.append((module, type(module), hooks, tensors, [x for x in vars(module).items() if _is_plain(x[1])]))
    return found


def _is_plain(value: Any) -> bool:
    """Tell whether a module's attribute is a setting: a number, a word, a flag, or a list of them."""
    return all(isinstance(item, _PLAIN) for item in (value if isinstance(value, (list, tuple)) else [value]))


def _is_close(output: ModelOutput, values: dict[str, Any]) -> bool:
    """Tell whether the tensors of a pass are those of the model, to rounding."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            continue
        wanted, found = value.float(), output[name].float()
        size = wanted.norm()
        if not torch.isfinite(size) or (found - wanted).norm() > _CLOSE.get(value.dtype, 0) * size:
            return False
    return True
