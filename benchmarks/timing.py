"""What the speed benchmarks share: medians, where and when a number was measured, the machine's own limit."""

import contextlib
import fcntl
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch


def median_ms(
    run: Callable[[], Any], repeats: int = 11, warmup: int = 2, clear: Callable[[], Any] | None = None
) -> float:
    """Return the median wall-clock time of `run()` on the CPU, milliseconds.

    Args:
        run: what is timed.
        repeats, warmup: calls that count, and calls before them.
        clear: called before each timed call, e.g. to evict caches.
    """
    times = []
    for call in range(warmup + repeats):
        if clear is not None:
            clear()
        start = time.perf_counter()
        run()
        if call >= warmup:
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def median_graph_us(calls: list[Callable[[], Any]], repeats: int = 21, passes: int = 1) -> float:
    """Return the median time of one call in a CUDA graph that makes all `calls` in turn, microseconds.

    Args:
        calls: the same work on other weights, enough of them to leave no weight in the cache when its turn comes again.
        repeats: timed replays.
        passes: times that the graph makes all calls.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, and makes derived layouts
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(passes):
            for call in calls:
                call()
    times = []
    for replay in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 3:
            times.append(start.elapsed_time(end) * 1e3 / (passes * len(calls)))
    del graph
    return statistics.median(times)


class Turns:
    """Let several processes compile at the same time for one GPU, and time one after the other, while none compiles.

    Args:
        folder: shared by the processes, empty at the start; None for a process that is alone.
        count: processes.
        patience: seconds to wait for the others, to be ready and to have had their turns.
    """

    def __init__(self, folder: str | None, count: int, patience: float = 100):
        self.folder, self.count, self.patience = None if folder is None else Path(folder), count, patience
        self._round, self._lock = 0, None

    def take(self) -> None:
        """Wait until all processes have come to this point, then for this one's turn."""
        if self.folder is not None:
            self._meet("ready")
            self._lock = (self.folder / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    @contextlib.contextmanager
    def given_back(self) -> Iterator[None]:
        """Give the turn back at the end, also after an error before `take`, and wait until all have had theirs."""
        try:
            yield
        finally:
            if self.folder is not None:
                if self._lock is not None:
                    self._lock.close()
                self._come("ready")  # it has not if an error came before `take`
                self._meet("done")
                self._round, self._lock = self._round + 1, None

    def _come(self, point: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{point}.{self._round}.{os.getpid()}").touch()

    def _meet(self, point: str) -> None:
        self._come(point)
        end = time.monotonic() + self.patience
        while len(list(self.folder.glob(f"{point}.{self._round}.*"))) < self.count and time.monotonic() < end:
            time.sleep(0.1)


def copy_bandwidth(device: str, nbytes: int) -> float:
    """Return the bandwidth of a copy of `nbytes`, bytes read and written counted, GB/s."""
    source = torch.randint(-(2**31), 2**31 - 1, (nbytes // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    if device == "cpu":
        milliseconds = median_ms(lambda: target.copy_(source))
    else:
        milliseconds = median_graph_us([lambda: target.copy_(source)]) / 1e3
    return 2 * nbytes / milliseconds / 1e6


def provenance(device: str) -> dict[str, Any]:
    """Return date, machine and versions, to be written beside every result."""
    return {
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def kernels_in_use() -> str:
    """Return the instruction set of the CPU kernels; end the program where they are not built, unless that was asked for.

    What was measured without them would be PyTorch's fallback, and look like ours.
    """
    from sab_hf.kernels.cpu import library

    kernels = library.load()
    if kernels is not None:
        return kernels.sab_cpu_isa().decode()
    if os.environ.get(library.SWITCH) == library.PYTORCH:
        return library.PYTORCH
    sys.exit(
        f"the CPU kernels of {Path(library.__file__).parent} cannot be used: build them with `python -m "
        f"sab_hf.kernels.cpu.build`, or set {library.SWITCH}={library.PYTORCH} to measure without them"
    )


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or None


def write_json(path: str | Path, results: dict[str, Any]) -> None:
    """Write results; called after every row, so that what was measured survives what comes after."""
    Path(path).write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def merge_rows(path: str | Path, results: dict[str, Any], key: tuple[str, ...]) -> None:
    """Write results as `write_json` does, with the rows of an earlier file that are not measured again.

    Args:
        path, results: see `write_json`; `results["rows"]` are dictionaries.
        key: the entries that tell what a row measures.
    """
    rows = {tuple(row[name] for name in key): row for row in results["rows"]}
    if Path(path).exists():
        earlier = json.loads(Path(path).read_text())["rows"]
        rows = {tuple(row[name] for name in key): row for row in earlier} | rows
    write_json(path, results | {"rows": list(rows.values())})
