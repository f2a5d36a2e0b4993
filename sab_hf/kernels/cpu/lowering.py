"""PyTorch's operations as steps: which step does what an operation does, on which views."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import Operands
from . import linear
from .operands import DIMS, DTYPES, Amount, Elsewhere, Placed, State, Step, offset_of, state_of, strides_of
from .recording import Call, NotReplayableError, Number, Recording, View

ONE = Number(1)
_ZERO = Amount(0)

_UNARY = (
    *("neg", "abs", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "silu", "relu", "reciprocal"),
    *("square", "gelu", "logical_not", "bitwise_not"),
)
_BINARY = {
    **{name: name for name in ("add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge")},
    **{"maximum": "max", "minimum": "min", "logical_and": "and", "logical_or": "or"},
    **{"bitwise_and": "and", "bitwise_or": "or", "__and__": "and", "__or__": "or"},
}
_COPIES = (
    *("to", "_to_copy", "clone", "contiguous", "reshape", "_unsafe_view", "copy_", "flatten", "lift_fresh", "type_as"),
    *("float", "lift_fresh_copy", "dropout"),
)
_FILLS = ("ones", "ones_like", "new_ones", "zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full", "fill")
_REDUCTIONS = {name: name for name in ("sum", "mean", "max", "min", "all", "any")} | {"amax": "max", "amin": "min"}
MOST_PRODUCTS = 8  # that share a call: MOST_MATRICES of csrc/linear.c

Item = tuple[Step | Elsewhere, list[int], list[int]]  # what is to be done, and the storages that it writes and reads


class Lowering:
    """Turns the calls of a recording into steps.

    Args:
        recording, fixed, states: as `Steps` has them.
    """

    def __init__(self, recording: Recording, fixed: dict[int, Tensor], states: list[State]):
        self._recording, self._fixed, self._states = recording, fixed, states

    def items(self) -> list[Item]:
        """Return what is to be done, in order.

        Raises:
            NotReplayableError: the pass writes into memory that is not its own, or changes a state in another way.
        """
        items: list[Item] = []
        products: dict[tuple, Item] = {}  # packed products by their input
        for call in self._recording.calls:
            if self._is_view(call):
                continue
            self._check_writes(call)
            written, read = [view.storage for view in call.results], [view.storage for view in _given(call)]
            steps = self._steps(call)
            if steps is None:
                items.append((Elsewhere(call), written, read))
                products.clear()
                continue
            for step in steps:
                item = step, list(written), read
                if step.products:
                    key = _key(call.arguments["x"]), step.exact
                    first = products.get(key)
                    if first is not None and len(first[0].products) < MOST_PRODUCTS:
                        first[0].products += step.products  # one call for products of one input
                        first[1].extend(written)
                        continue
                    products[key] = item
                items.append(item)
            if call.op._schema.is_mutable:
                products.clear()
        return items

    def _is_view(self, call: Call) -> bool:
        """Tell whether a call computes nothing: its results are views of what it was given."""
        if call.op._schema.name == "aten::detach_":
            return True
        given = {view.storage for view in _given(call)}
        made = {view.storage for view in call.results}
        return bool(made) and made <= given and not call.op._schema.is_mutable

    def _check_writes(self, call: Call) -> None:
        """Refuse calls that write elsewhere than into their own results."""
        if not call.op._schema.is_mutable:
            return
        for argument in call.op._schema.arguments:
            value, alias = call.arguments.get(argument.name), argument.alias_info
            if alias is None or not alias.is_write or not isinstance(value, View):
                continue
            if value.storage not in self._recording.made or state_of(value.storage, self._states) is not None:
                raise NotReplayableError(f"{call.op} writes into a tensor of the model or the cache")

    def _steps(self, call: Call) -> list[Step] | None:
        """Return the steps of a call, None if PyTorch has to run it."""
        namespace, name = call.op.namespace, _name(call)
        if "returned" in call.arguments:
            return self._guard(call)
        if namespace == "sab":
            return self._packed(call) if name == "linear" else None
        in_place = name.endswith("_") and not name.startswith("__")
        handler = _HANDLERS.get(name[:-1] if in_place and name != "copy_" else name)
        dtypes = {view.dtype for view in [*_given(call), *call.results]}
        if handler is None or not dtypes <= DTYPES.keys():
            return None
        return handler(self, call)

    # ---- operands

    def _placed(self, value: Any, size: list[Number]) -> Placed | None:
        """Return a tensor as an operand of a step of this size, broadcast to it; None for a number."""
        if not isinstance(value, View):
            return None
        strides = strides_of(value, self._states)
        pad = len(size) - len(strides)
        if pad < 0:
            raise NotReplayableError("an operand has more dimensions than the result")
        found = [_ZERO] * pad
        for own, wanted, stride in zip(value.size, size[pad:], strides, strict=True):
            if own != wanted and own != ONE:
                raise NotReplayableError(f"sizes {own} and {wanted} do not fit")
            found.append(stride if own == wanted else _ZERO)
        return self._laid(value, found)

    def _laid(self, view: View, strides: list[Amount]) -> Placed:
        """Return a view as an operand with these strides."""
        return Placed(view.storage, offset_of(view, self._states), strides, view.dtype)

    def _step(
        self,
        kind: str,
        function: str,
        size: list[Number],
        operands: list[Any],
        keep: int = 0,
        integers: bool = False,
        numbers: dict[int, float] | None = None,
    ) -> list[Step] | None:
        """Return the step over `size`, with dimensions joined where all operands allow it; None if too many are left.

        Args:
            operands: the result, then inputs: views that broadcast to `size`, placed ones, or numbers.
            keep: dimensions at the end that stay as they are.
            integers, numbers: as in `Step`; numbers among the inputs are added.
        """
        placed = [value if isinstance(value, Placed) else self._placed(value, size) for value in operands]
        numbers = dict(numbers or {})
        for place, value in enumerate(operands):
            if placed[place] is None and value is not None:
                value = value.constant if isinstance(value, Number) and value.fixed else value
                if not isinstance(value, (int, float)):
                    return None  # a number that grows, or one that is no real number
                numbers[place - 1] = float(value)
        dims = list(zip(size, *[operand.strides if operand else [None] * len(size) for operand in placed], strict=True))
        dims = _joined(dims[: len(dims) - keep]) + dims[len(dims) - keep :]
        if len(dims) > DIMS:
            return None
        placed = [
            operand and operand._replace(strides=[dim[1 + place] for dim in dims])
            for place, operand in enumerate(placed)
        ]
        return [Step(kind, function, integers, [dim[0] for dim in dims], placed, numbers)]

    def _map(self, function: str, result: View, *inputs: Any) -> list[Step] | None:
        """Return the step of an elementwise function."""
        integers = _whole(result, inputs)
        return self._step("map", function, list(result.size), [result, *inputs], integers=integers)

    def _copy_to(self, target: Placed, source: View) -> list[Step] | None:
        """Return the step that copies a tensor to a place with strides for its dimensions."""
        return self._step("map", "copy", list(source.size), [target, source], integers=_whole(target, [source]))

    # ---- operations

    def _unary(self, call: Call) -> list[Step] | None:
        name = _name(call).rstrip("_")
        source = _input(call)
        if name in ("logical_not", "bitwise_not"):
            of_bits = name == "bitwise_not" and source.dtype is not torch.bool
            return None if of_bits else self._map("not", call.results[0], source)
        if name == "gelu" and call.arguments["approximate"] == "tanh":
            name = "gelu_tanh"
        return self._map(name, call.results[0], source)

    def _binary(self, call: Call) -> list[Step] | None:
        arguments = call.arguments
        name = _name(call)
        function = _BINARY[name if name.startswith("__") else name.rstrip("_")]
        if arguments.get("alpha", ONE) not in (ONE, 1) or arguments.get("rounding_mode") is not None:
            return None
        result, other = call.results[0], arguments["other"]
        if function in ("and", "or") and result.dtype is not torch.bool:
            return None
        if isinstance(other, Number) and not other.fixed:
            return None
        return self._map(function, result, arguments["self"], other)

    def _subtract_from(self, call: Call) -> list[Step] | None:
        if call.arguments["alpha"] != ONE:
            return None
        return self._map("sub", call.results[0], call.arguments["other"], call.arguments["self"])

    def _power(self, call: Call) -> list[Step] | None:
        exponent = call.arguments["exponent"]
        base = call.arguments["self"]
        if exponent in (Number(2), 2.0):
            return self._map("square", call.results[0], base)
        return self._map("pow", call.results[0], base, exponent) if isinstance(base, View) else None

    def _where(self, call: Call) -> list[Step] | None:
        a = call.arguments
        if "condition" in a:
            if "other" not in a:  # the places where it is true
                return None
            return self._map("where", call.results[0], a["condition"], a["self"], a["other"])
        return self._map("where", call.results[0], a["mask"], a["value"], a["self"])  # masked_fill

    def _clamp(self, call: Call) -> list[Step] | None:
        steps, source = [], call.arguments["self"]
        for name, function in (("min", "max"), ("max", "min")):
            if call.arguments.get(name) is not None:
                steps.append(self._map(function, call.results[0], source, call.arguments[name]))
                source = call.results[0]
        return _all(steps)

    def _copy(self, call: Call) -> list[Step] | None:
        if call.arguments.get("train") is True:  # dropout
            return None
        result = call.results[0]
        source = call.arguments["src"] if "src" in call.arguments else _input(call)
        if not isinstance(source, View):
            return None
        if result.size == source.size or _name(call) == "copy_":
            return self._map("copy", result, source)
        alone = state_of(result.storage, self._states) is None
        if not alone or not _is_contiguous(result) or sum(not number.fixed for number in source.size) > 1:
            return None
        strides, step = [], Amount(1)
        for number in reversed(source.size):  # the same numbers in the same order, one after the other
            strides.insert(0, step)
            step = _times(step, number)
        return self._copy_to(self._laid(result, strides), source)

    def _fill(self, call: Call) -> list[Step] | None:
        name = _name(call)
        value = call.arguments.get("fill_value", call.arguments.get("value"))
        if "ones" in name or "zeros" in name:
            value = Number(int("ones" in name))
        return None if isinstance(value, View) else self._map("copy", call.results[0], value)

    def _range(self, call: Call) -> list[Step] | None:
        result, a = call.results[0], call.arguments
        start, step = a.get("start", Number(0)), a.get("step", ONE)
        if result.dtype is not torch.int64 or not all(isinstance(n, Number) and n.fixed for n in (start, step)):
            return None
        made = Step("map", "iota", integers=True, sizes=[result.size[0]])
        made.operands = [self._placed(result, list(result.size)), None, None]
        made.numbers = {0: start.constant, 1: step.constant}
        return [made] if result.size[0].fixed and result.size[0].constant <= 512 else None  # one chunk of a row

    def _concatenate(self, call: Call) -> list[Step] | None:
        result, parts = call.results[0], call.arguments["tensors"]
        dim = call.arguments["dim"].constant % len(result.size)
        state, strides = state_of(result.storage, self._states), strides_of(result, self._states)
        steps, start = [], Number(0)
        for part in parts:
            if len(part.size) != len(result.size):
                return None  # an empty tensor of one dimension is allowed there
            if state is None or part.storage != state.storage:
                offset = _plus(Amount(*result.offset), _times(strides[dim], start))
                steps.append(self._copy_to(Placed(result.storage, offset, strides, result.dtype), part))
            length = part.size[dim]
            start = Number(start.constant + length.constant, start.per_token + length.per_token)
        return _all(steps)

    def _stack(self, call: Call) -> list[Step] | None:
        result = call.results[0]
        dim = call.arguments["dim"].constant % len(result.size)
        strides, steps = strides_of(result, self._states), []
        others = [*strides[:dim], *strides[dim + 1 :]]
        for place, part in enumerate(call.arguments["tensors"]):
            offset = _plus(Amount(*result.offset), _times(strides[dim], Number(place)))
            steps.append(self._copy_to(Placed(result.storage, offset, others, result.dtype), part))
        return _all(steps)

    def _reduce(self, call: Call) -> list[Step] | None:
        source, result = call.arguments["self"], call.results[0]
        dims = call.arguments.get("dim")
        if len(call.results) != 1 or call.arguments.get("other") is not None or call.arguments.get("dtype") is not None:
            return None
        rank = len(source.size)
        reduced = {
            d.constant % rank
            for d in ([dims] if isinstance(dims, Number) else dims or [Number(d) for d in range(rank)])
        }
        kept = [d for d in range(rank) if d not in reduced]
        strides = strides_of(source, self._states)
        inner = [(source.size[d], strides[d]) for d in sorted(reduced) if source.size[d] != ONE]
        while len(inner) > 1:
            (a, outer), (b, within) = inner[-2], inner[-1]
            if not (b.fixed and a.fixed and outer == _times(within, b)):
                return None
            inner[-2:] = [(Number(a.constant * b.constant), within)]
        length, along = inner[0] if inner else (ONE, _ZERO)
        places = kept if len(result.size) == rank else list(range(len(result.size)))
        into = strides_of(result, self._states)
        size = [source.size[d] for d in kept] + [length]
        target = self._laid(result, [into[p] for p in places] + [_ZERO])
        origin = self._laid(source, [strides[d] for d in kept] + [along])
        function = _REDUCTIONS[_name(call)]
        whole = _whole(result, [source])
        if function in ("all", "any") and not whole:
            return None
        return self._step("reduce", function, size, [target, origin], keep=1, integers=whole)

    def _softmax(self, call: Call) -> list[Step] | None:
        source, result = call.arguments["self"], call.results[0]
        rank = len(source.size)
        if call.arguments["dim"].constant % rank != rank - 1 or not _last_adjacent(source, result):
            return None
        return self._step("normalize", "softmax", list(result.size), [result, source, None, None], keep=1)

    def _norm(self, call: Call) -> list[Step] | None:
        a, result = call.arguments, call.results[0]
        layer = call.op._schema.name == "aten::layer_norm"
        parts = [a["input"], a["weight"], a["bias"] if layer else None]
        shape = a["normalized_shape"]
        adjacent = _last_adjacent(result, *[part for part in parts if part is not None])
        if len(shape) != 1 or a["eps"] is None or not adjacent:
            return None
        function = "layer_norm" if layer else "rms_norm"
        return self._step("normalize", function, list(result.size), [result, *parts], keep=1, numbers={0: a["eps"]})

    def _gather(self, call: Call) -> list[Step] | None:
        a, result = call.arguments, call.results[0]
        table, ids = (a["weight"], a["indices"]) if "weight" in a else (a["self"], a["index"])
        if "weight" not in a and a["dim"] != Number(0):
            return None
        adjacent = _last_adjacent(table, result) and len(table.size) == 2
        if not adjacent or ids.dtype not in (torch.int64, torch.int32) or state_of(table.storage, self._states):
            return None
        broadcast = self._laid(ids, [*strides_of(ids, self._states), _ZERO])
        steps = self._step("gather", "copy", list(result.size), [result, broadcast, broadcast], keep=1)
        if steps is None or len(steps[0].sizes) > 2 or not table.size[0].fixed:
            return None
        (step,) = steps
        if len(step.sizes) == 1:
            step.sizes = [ONE, *step.sizes]
            step.operands = [o._replace(strides=[_ZERO, *o.strides]) for o in step.operands]
        step.operands[1] = self._laid(table, [Amount(*n) for n in table.stride])
        step.count = table.size[0]
        return steps

    def _dense(self, call: Call) -> list[Step] | None:
        a, result = call.arguments, call.results[0]
        name = call.op._schema.name
        if name == "aten::linear":
            left, right, bias = a["input"], a["weight"], a["bias"]
            if len(right.size) != 2:
                return None
            right_strides = [_ZERO] * (len(left.size) - 2) + strides_of(right, self._states)
            right_size = [ONE] * (len(left.size) - 2) + list(right.size)
        else:
            left, right, bias = a["self"], a.get("mat2", a.get("other")), None
            if len(left.size) < 2 or len(left.size) != len(right.size):
                return None
            right_strides, right_size = strides_of(right, self._states), list(right.size)
            right_strides[-2:], right_size[-2:] = right_strides[:-3:-1], right_size[:-3:-1]
        if len(left.size) < 2:
            return None
        left_strides, into = strides_of(left, self._states), strides_of(result, self._states)
        batch = []
        for d, size in enumerate(result.size[:-2]):
            x = left_strides[d] if left.size[d] == size else _ZERO
            w = right_strides[d] if right_size[d] == size else _ZERO
            batch.append((size, into[d], x, w))
        joined = _joined(batch)
        if len(joined) > 1:
            return None
        size, out, x, w = joined[0] if joined else (ONE, _ZERO, _ZERO, _ZERO)
        operands = [
            self._laid(result, [out, into[-2], into[-1], _ZERO]),
            self._laid(left, [x, left_strides[-2], _ZERO, left_strides[-1]]),
            self._laid(right, [w, _ZERO, right_strides[-2], right_strides[-1]]),
            None if bias is None else self._laid(bias, [_ZERO, _ZERO, Amount(*bias.stride[0]), _ZERO]),
        ]
        return [Step("multiply", sizes=[size, result.size[-2], result.size[-1], left.size[-1]], operands=operands)]

    def _attend(self, call: Call) -> list[Step] | None:
        a, result = call.arguments, call.results[0]
        query, key, value, mask = a["query"], a["key"], a["value"], a["attn_mask"]
        ranks = {len(view.size) for view in (query, key, value, result)}
        if ranks != {4} or a["dropout_p"] or (a["is_causal"] and not query.size[2] == key.size[2] == ONE):
            return None
        if query.size[3] != value.size[3] or not _last_adjacent(query, key, value):
            return None
        heads, key_heads = query.size[1], key.size[1]
        if not a["enable_gqa"] and heads != key_heads:
            return None
        positions = key.size[2]
        placed = [self._laid(view, strides_of(view, self._states)) for view in (result, query, key, value)]
        scale = a["scale"] if a["scale"] is not None else 1 / math.sqrt(query.size[3].constant)
        over = self._placed(mask, [query.size[0], heads, query.size[2], positions]) if mask is not None else None
        return [
            Step(
                "attend",
                sizes=list(query.size),
                operands=placed,
                numbers={0: float(scale)},
                mask=over,
                count=positions,
                key_heads=key_heads.constant,
            )
        ]

    def _packed(self, call: Call) -> list[Step] | None:
        a, result = call.arguments, call.results[0]
        x = a["x"]
        packed = [a[name] for name in Operands._fields]
        if x.dtype not in linear.DTYPES or not (_is_contiguous(x) and _is_contiguous(result)):
            return None
        if any(view is not None and view.storage not in self._fixed for view in packed):
            return None
        tensors = Operands(*[view and self._tensor(view) for view in packed])
        if not all(number.fixed for number in x.size):
            return None
        tokens = math.prod(number.constant for number in x.size[:-1])
        sizes = [ONE, ONE, Number(tokens), x.size[-1]]
        source = self._laid(x, [_ZERO] * DIMS)
        target = self._laid(result, [_ZERO] * DIMS)
        step = Step("packed", sizes=sizes, operands=[target, source], exact=a["exact"])
        step.products.append((tensors, target))
        return [step]

    def _tensor(self, view: View) -> Tensor:
        """Return the tensor of a view of fixed memory, which counts as written when that is."""
        size, stride = ([number.constant for number in numbers] for numbers in (view.size, view.stride))
        return self._fixed[view.storage].detach().view(view.dtype).as_strided(size, stride, view.offset.constant)

    def _guard(self, call: Call) -> list[Step] | None:
        source, (value,) = call.arguments["self"], call.arguments["returned"]
        if not isinstance(source, View) or source.dtype not in DTYPES or len(_given(call)) != 1:
            raise NotReplayableError(f"the pass depends on what {call.op} returns")
        if isinstance(value, Number):
            if not value.fixed:
                raise NotReplayableError(f"the pass depends on a number that {call.op} returns")
            value = value.constant
        whole = not source.dtype.is_floating_point
        step = Step(
            "guard", integers=whole, operands=[None, self._placed(source, list(source.size))], numbers={0: float(value)}
        )
        step.operands[1] = step.operands[1]._replace(strides=[])
        return [step]


_HANDLERS: dict[str, Callable[[Lowering, Call], list[Step] | None]] = {
    **dict.fromkeys(_UNARY, Lowering._unary),
    **dict.fromkeys(_BINARY, Lowering._binary),
    **dict.fromkeys(_COPIES, Lowering._copy),
    **dict.fromkeys(_FILLS, Lowering._fill),
    **dict.fromkeys(_REDUCTIONS, Lowering._reduce),
    **dict.fromkeys(("embedding", "index_select"), Lowering._gather),
    **dict.fromkeys(("linear", "matmul", "bmm", "mm"), Lowering._dense),
    **dict.fromkeys(("softmax", "_softmax"), Lowering._softmax),
    **dict.fromkeys(("layer_norm", "rms_norm"), Lowering._norm),
    "rsub": Lowering._subtract_from,
    "pow": Lowering._power,
    "where": Lowering._where,
    "masked_fill": Lowering._where,
    "clamp": Lowering._clamp,
    "arange": Lowering._range,
    "cat": Lowering._concatenate,
    "stack": Lowering._stack,
    "scaled_dot_product_attention": Lowering._attend,
}


def _name(call: Call) -> str:
    """Return an operation's name without its namespace."""
    return call.op._schema.name.split("::")[1]


def _input(call: Call) -> View:
    """Return the first argument of a call."""
    return next(iter(call.arguments.values())) if "self" not in call.arguments else call.arguments["self"]


def _given(call: Call) -> list[View]:
    """Return all tensors that a call was given."""
    return _views_in(list(call.arguments.values()))


def _views_in(value: Any) -> list[View]:
    """Return all views in an argument."""
    if isinstance(value, View):
        return [value]
    if isinstance(value, list):
        return [view for item in value for view in _views_in(item)]
    return []


def _key(view: View) -> tuple:
    return (view.storage, view.offset, view.size, view.stride)


def _whole(result: View | Placed, inputs: Any) -> bool:
    """Tell whether an elementwise function takes and gives integers only."""
    views = [value for value in inputs if isinstance(value, View)]
    real = any(view.dtype.is_floating_point for view in [result, *views])
    return not real and not any(isinstance(value, float) and not value.is_integer() for value in inputs)


def _times(amount: Amount, number: Number) -> Amount:
    """Return the product of two amounts of which one is fixed."""
    if number.fixed:
        return Amount(*(part * number.constant for part in amount))
    if amount.fixed:
        return Amount(amount.constant * number.constant, amount.constant * number.per_token)
    raise NotReplayableError("an address grows with the square of the tokens")


def _plus(a: Amount, b: Amount) -> Amount:
    return Amount(*(x + y for x, y in zip(a, b, strict=True)))


def _continues(outer: tuple, inner: tuple) -> bool:
    """Tell whether two neighbouring dimensions, as (size, stride of each operand), are one for all operands."""
    if not (outer[0].fixed and inner[0].fixed):
        return False
    pairs = zip(outer[1:], inner[1:], strict=True)
    return all(a is None or a == _times(b, inner[0]) for a, b in pairs)


def _is_contiguous(view: View) -> bool:
    """Tell whether the numbers of a view lie one after the other."""
    step = Amount(1)
    for size, stride in zip(reversed(view.size), reversed(view.stride), strict=True):
        if size != ONE and Amount(*stride) != step:
            return False
        step = _times(step, size)
    return True


def _joined(dims: list[tuple]) -> list[tuple]:
    """Return dimensions, as (size, stride of each operand), without those of one element; neighbours that can be are one."""
    joined: list[tuple] = []
    for dim in dims:
        if dim[0] == ONE:
            continue
        if joined and _continues(joined[-1], dim):
            joined[-1] = (Number(joined[-1][0].constant * dim[0].constant), *dim[1:])
        else:
            joined.append(dim)
    return joined


def _all(parts: list[list[Step] | None]) -> list[Step] | None:
    """Return all steps of some parts, None if one of them has none."""
    return None if None in parts else [step for part in parts for step in part]


def _last_adjacent(*views: View) -> bool:
    """Tell whether the numbers of the last dimension are adjacent in all views."""
    return all(view.stride and (view.stride[-1] == ONE or view.size[-1] == ONE) for view in views)
