"""Work that comes again: run as it is, captured, replayed on other values; what cannot be captured runs as it is."""

from contextlib import contextmanager

import pytest
import torch

from sab_hf.machine.replay import Replay


class Work:
    """Add the sum of a tensor to `total`, and count how often that is done by Python."""

    def __init__(self, device="cpu", waits=False):
        self.total, self.runs, self.waits = torch.zeros((), device=device), 0, waits

    def __call__(self, tensors):
        self.runs += 1
        self.total.add_(tensors[0].sum())
        if self.waits:
            float(self.total)


@pytest.fixture
def graphs(monkeypatch):
    """Stand-ins for CUDA graphs on a CPU: capturing notes the work without doing it, as CUDA does."""
    captured, state = [], {"fails": None}

    class Graph:
        def replay(self):
            self.work()

    @contextmanager
    def capture(graph, pool, stream):
        captured.append(graph)
        if state["fails"]:
            raise state["fails"]
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return captured, state


def replay_on_cpu():
    replay = Replay(torch.device("cpu"))
    replay._problem = None
    return replay


def test_work_is_captured_the_second_time_and_replayed_on_copies(graphs):
    captured, _ = graphs
    replay, seen = replay_on_cpu(), []

    def work(tensors):
        if captured and not hasattr(captured[-1], "work"):
            captured[-1].work = lambda: seen.append(float(tensors[0]))
        else:
            seen.append(float(tensors[0]))

    given = [torch.tensor(value) for value in (1.0, 2.0, 3.0)]
    for value in given:
        replay.run("kind", [value], work)
    replay.run("other kind", [torch.tensor(9.0)], work)
    assert seen == [1.0, 2.0, 3.0, 9.0]
    assert len(captured) == 1
    assert [float(value) for value in given] == [1.0, 2.0, 3.0]  # those that were captured are copies


def test_work_that_cannot_be_captured_runs_as_it_is_and_that_is_said_once(graphs, caplog):
    captured, state = graphs
    state["fails"] = RuntimeError("operation not permitted when stream is capturing\nand more")
    replay, work = replay_on_cpu(), Work()
    with caplog.at_level("INFO", logger="sab_hf"):
        for _ in range(4):
            replay.run("kind", [torch.ones(2)], work)
    assert (float(work.total), work.runs, len(captured)) == (8.0, 4, 1)
    (record,) = caplog.records
    assert record.getMessage().endswith("CUDA graph: operation not permitted when stream is capturing")


def test_memory_that_runs_out_is_for_the_caller(graphs):
    graphs[1]["fails"] = torch.OutOfMemoryError("no memory")
    replay = replay_on_cpu()
    replay.run("kind", [torch.ones(2)], Work())
    with pytest.raises(torch.OutOfMemoryError):
        replay.run("kind", [torch.ones(2)], Work())


def test_nothing_is_captured_on_a_cpu():
    replay, work = Replay(torch.device("cpu")), Work()
    with replay.running():
        for _ in range(3):
            replay.run("kind", [torch.ones(2)], work)
    assert (float(work.total), work.runs) == (6.0, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("waits", [False, True])
def test_replays_do_the_work_on_a_gpu(waits):
    """Work that waits for a value of the GPU cannot be captured, and what comes after still runs."""
    replay, work = Replay(torch.device("cuda")), Work("cuda", waits)
    with replay.running():
        for value in range(1, 6):
            replay.run("kind", [torch.full((3,), float(value), device="cuda")], work)
    assert float(work.total) == 45.0
    assert work.runs == (6 if waits else 2)  # the one that failed to be captured is done again
