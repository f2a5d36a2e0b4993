"""The same work on tensors of the same shapes, again and again: on a CUDA device as a graph, without a launch for each kernel."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
Work = Callable[[list[Tensor]], None]


class Replay:
    """Runs work of several kinds; each kind runs as it is at first, then is captured, then replayed.

    Work that cannot be captured (it waits for a value of the GPU, as routing to experts does) always runs as it is, which is
    said once. All calls belong into `running`.

    Args:
        device: where the work is done; on a CPU it always runs as it is.
    """

    def __init__(self, device: torch.device):
        self._device, self._problem = device, None if device.type == "cuda" else "not a GPU"
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor]] | None] = {}
        self._pool = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Enter the stream in which the work is captured, and at the end forget what was captured."""
        if self._problem:
            yield
            return
        own, outside = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        own.wait_stream(outside)
        try:
            with torch.cuda.stream(own):
                yield
        finally:
            outside.wait_stream(own)
            self._graphs.clear()

    def run(self, kind: Hashable, tensors: list[Tensor], work: Work) -> None:
        """Do the work on `tensors`.

        Args:
            kind: what decides what is done, beside the values of tensors: shapes, dtypes, other arguments.
            tensors: the arguments that differ from call to call.
            work: leaves its results in tensors that stay the same.
        """
        if self._problem:
            work(tensors)
        elif kind not in self._graphs:
            self._graphs[kind] = None
            work(tensors)
        elif self._graphs[kind] is None:
            self._capture(kind, tensors, work)
        else:
            graph, own = self._graphs[kind]
            for mine, given in zip(own, tensors, strict=True):
                mine.copy_(given, non_blocking=True)
            graph.replay()

    def _capture(self, kind: Hashable, tensors: list[Tensor], work: Work) -> None:
        own = [tensor.to(self._device, copy=True) for tensor in tensors]
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=torch.cuda.current_stream(self._device)):
                work(own)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._problem = str(error).partition("\n")[0]
            self._graphs.clear()
            logger.info("steps run kernel by kernel, since they cannot be captured in a CUDA graph: %s", self._problem)
            torch.cuda.synchronize(self._device)
            work(tensors)
        else:
            self._graphs[kind] = graph, own
            graph.replay()
