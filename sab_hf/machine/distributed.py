"""Several processes on one calibration: who does what, and how their results come together.

Processes are those of `torchrun` or `accelerate launch`, one for each device. All of them call `quantize` with the same model,
samples and config; each runs its share of the calibration batches through the blocks. Second moments, errors and gradients
are summed, the Linears of a block are fitted by different processes, each keeps its rows of what is distilled
(`sharding.py`), and all end with the same model. Without other processes every function here is a no-op. Sums are in another
order than those of one process: equal to rounding.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..method.hessian import SecondMoments
from ..method.trainable import Share
from .store import map_nested

logger = logging.getLogger(__name__)
Item = TypeVar("Item")


def start(device: torch.device, timeout: float) -> None:
    """Join the other processes, if the environment names some and this process has not joined them yet.

    Args:
        device: the compute device of this process.
        timeout: seconds that one process waits for the others.
    Raises:
        ValueError: there are more processes on this machine than GPUs that they see.
        RuntimeError: the others do not come.
    """
    if not dist.is_available() or dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    if device.type == "cuda":
        local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if 1 < gpus < local:  # a launcher may also show each process its own GPU alone
            raise ValueError(
                f"each process needs a GPU of its own: {local} were started on this machine, which has {gpus} GPUs; start "
                f"{gpus} (`torchrun --nproc-per-node {gpus}`), or compute on the CPU with `compute_device='cpu'`"
            )
        torch.cuda.set_device(device)
    with _together("meeting the others"):
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    atexit.register(_leave)
    logger.info("process %d of %d, computing on %s", rank() + 1, size(), device)


@contextmanager
def shared_work() -> Iterator[None]:
    """Enclose work that processes share: one that it ends with an error for leaves without waiting for the others.

    With NCCL, leaving in order waits until all processes do, while those that know of no error wait for this one. A launcher ends
    them once this one is gone.
    """
    try:
        yield
    except BaseException:
        atexit.unregister(_leave)
        raise


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def sharing(device: torch.device) -> int:
    """Return how many processes have the memory of this one's device between them: on a CPU all of one machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size())) if device.type == "cpu" and size() > 1 else 1


def share(items: list[Item], first: int = 0) -> Iterator[tuple[int, Item]]:
    """Yield the items that are this process's, each with its number; first: number of the first item."""
    for place in range((rank() - first) % size(), len(items), size()):
        yield first + place, items[place]


def assign(costs: dict[str, float]) -> dict[str, int]:
    """Give each task to a process, the costliest first, always to the one with the least to do.

    Args:
        costs: task → cost, in any unit.
    Returns:
        task → number of the process.
    """
    load = [0.0] * size()
    owner = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owner[name] = load.index(min(load))
        load[owner[name]] += costs[name]
    return owner


def divide(costs: dict[str, float], do: Callable[[str], Any], device: torch.device) -> dict[str, Any]:
    """Return the result of `do` for each task; each is done by one process and sent to the others.

    Args:
        costs: task → cost, in any unit.
        do: a task's name → its result: plain data, dataclasses, tensors, nested.
        device: where the tensors of results are wanted.
    """
    if size() == 1:
        return {name: do(name) for name in costs}
    owner = assign(costs)
    own = {name: do(name) for name in costs if owner[name] == rank()}
    sent = {name: broadcast(_moved(own.get(name), torch.device("cpu")), owner[name]) for name in costs}
    return {name: _moved(result, device) for name, result in sent.items()}


def merge(own: dict[Any, Any]) -> dict[Any, Any]:
    """Return the union of all processes' dicts of plain data; of the values of one key, that of the lowest process."""
    merged: dict[Any, Any] = {}
    for other in _gather(own):
        merged = other | merged
    return {key: merged[key] for key in sorted(merged)} if size() > 1 else merged


def sum_numbers(own: dict[Any, float]) -> dict[Any, float]:
    """Add up the processes' values of each key."""
    if size() == 1:
        return own
    total: dict[Any, float] = {}
    for other in _gather(own):
        for key, value in other.items():
            total[key] = total.get(key, 0.0) + value
    return total


def sum_tensors(own: dict[Any, Tensor], device: torch.device) -> dict[Any, Tensor]:
    """Add up the processes' tensors of each key, on `device`; a key that a process lacks counts as zero there."""
    if size() == 1:
        return {key: tensor.to(device) for key, tensor in own.items()}
    shapes = merge({key: (tensor.shape, tensor.dtype) for key, tensor in own.items()})
    total = {}
    for key, (shape, dtype) in shapes.items():
        total[key] = own[key].to(device) if key in own else torch.zeros(shape, dtype=dtype, device=device)
        _sum(total[key])
    return total


def sum_moments(moments: dict[str, SecondMoments], names: list[str], device: torch.device) -> None:
    """Add up second moments in place, so that each process has those of all samples; what one lacks is created.

    Args:
        moments: second moments of this process, by Linear.
        names: names of all Linears that accumulate, on any process.
        device: device of created accumulators.
    """
    if size() == 1:
        return
    plans = _gather({name: (moment.in_features, moment.counts) for name, moment in moments.items()})
    for name in names:
        seen = [plan[name] for plan in plans if name in plan]
        moment = moments.setdefault(name, SecondMoments(seen[0][0], device))
        for modality in sorted({m for _, counts in seen for m in counts}):
            _sum(moment.total(modality))
            moment.counts[modality] = sum(counts.get(modality, 0) for _, counts in seen)


def sum_gradients(gradients: Iterable[Tensor]) -> None:
    """Add up each gradient over all processes, in place."""
    if size() > 1:
        for gradient in gradients:
            _sum(gradient)


def broadcast(value: Any, source: int) -> Any:
    """Return the `value` of process `source`: plain data, dataclasses and CPU tensors, nested; tensors go one by one."""
    if size() == 1:
        return value
    tensors: list[Tensor] = []

    def take(tensor: Tensor) -> _Sent:
        tensors.append(tensor)
        return _Sent(tensor.shape, tensor.dtype)

    def put(sent: Any) -> Any:
        return next(mine) if isinstance(sent, _Sent) else sent

    with _together("sending results"):
        box = [_changed(value, take) if rank() == source else None]
        dist.broadcast_object_list(box, src=source, device=_wire())
        if rank() == source:
            _send(tensors, source)
            return value
        _changed(box[0], lambda sent: tensors.append(torch.empty(sent.shape, dtype=sent.dtype)), _Sent)
        _send(tensors, source)
    mine = iter(tensors)
    return _changed(box[0], put, _Sent)


class _Sent:
    """The place of a tensor that is sent by itself."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype):
        self.shape, self.dtype = shape, dtype


def _send(tensors: list[Tensor], source: int) -> None:
    """Fill CPU tensors with what process `source` has, byte by byte, so that all dtypes can be sent."""
    for tensor in tensors:
        if tensor.numel():
            wire = tensor.contiguous().view(-1).view(torch.uint8).to(_wire())
            dist.broadcast(wire, src=source)
            if rank() != source:
                tensor.view(-1).view(torch.uint8).copy_(wire)


def own_share() -> Share:
    """Return the rows that this process keeps of what all keep by rows."""
    return Share(rank(), size())


def own_rows(weight: Tensor) -> Tensor:
    """Return the own rows of a weight [out_features, in_features], alone in memory."""
    return weight if size() == 1 else weight[own_share().own(len(weight))].clone()


def gather_rows(own: Tensor, rows: int, axis: int = 0) -> Tensor:
    """Return a tensor with so many rows, of which each process has its own on an axis; on the device of the own ones."""
    if size() == 1:
        return own
    each = own_share().each(rows)
    moved = own.movedim(axis, 0).contiguous()
    width = math.prod(moved.shape[1:]) * moved.dtype.itemsize
    part = torch.zeros(each, width, dtype=torch.uint8, device=_wire())
    if moved.numel():
        part[: len(moved)] = moved.flatten().view(torch.uint8).view(len(moved), width).to(part.device)
    whole = part.new_empty(each * size(), width)
    all_gather(whole, part).wait()
    shape = (rows, *moved.shape[1:])
    return whole[:rows].to(own.device).flatten().view(own.dtype).view(shape).movedim(0, axis).contiguous()


def all_gather(whole: Tensor, own: Tensor) -> Waits:
    """Fill `whole` with the parts `own` of all processes, in order; `own` may be its place in it. Returns what to wait for."""
    begin = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name of before torch 2.13
    return Waits(lambda: begin(whole, own, async_op=True), "gathering weights")


def reduce_scatter(own: Tensor, whole: Tensor) -> Waits:
    """Add up `whole` over the processes into `own`, the own part of it, which may be its place. Returns what to wait for."""
    begin = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return Waits(lambda: begin(own, whole, async_op=True), "summing gradients")


class Waits:
    """Work that all processes have a part in.

    Args:
        begin: begins it.
        doing: what it is, in words.
    """

    def __init__(self, begin: Callable[[], dist.Work], doing: str):
        self._doing = doing
        with _together(doing):
            self._work = begin()

    def wait(self) -> None:
        """Have what comes next on this process see the result."""
        with _together(self._doing):
            self._work.wait()


def check_same(what: dict[str, Any]) -> None:
    """Raise a ValueError if the processes do not have the same values."""
    for number, other in enumerate(_gather(what)):
        wrong = next((key for key in what if what[key] != other.get(key)), None)
        if wrong is not None:
            raise ValueError(
                f"all processes must quantize the same: process {rank()} has the {wrong} {what[wrong]!r:.120}, process "
                f"{number} has {other.get(wrong)!r:.120}"
            )


def _moved(value: Any, device: torch.device) -> Any:
    return _changed(value, lambda tensor: tensor.to(device))


def _changed(value: Any, change: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """Apply `change` to each item of a kind in plain data and dataclasses, nested."""
    if isinstance(value, kind):
        return change(value)
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return dataclasses.replace(value, **{f.name: _changed(getattr(value, f.name), change, kind) for f in fields})
    return map_nested(value, lambda item: _changed(item, change, kind))


def _sum(tensor: Tensor) -> None:
    with _together("summing"):
        if tensor.device.type == _wire().type:
            dist.all_reduce(tensor)
        else:
            moved = tensor.to(_wire())
            dist.all_reduce(moved)
            tensor.copy_(moved)


def _gather(value: Any) -> list[Any]:
    if size() == 1:
        return [value]
    values = [None] * size()
    with _together("comparing notes"):
        dist.all_gather_object(values, value)
    return values


def _wire() -> torch.device:
    """Return the device that tensors must be on to be sent."""
    cuda = "nccl" in dist.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


@contextmanager
def _together(doing: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"process {os.environ.get('RANK', '0')} lost another process while {doing}: it ended, was killed, never called "
            "`quantize`, or did not answer within `process_timeout`; the first error in the logs of the other processes is "
            f"the cause. With `checkpoint_dir`, the finished blocks are kept: start all processes again. ({error})"
        ) from error


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
